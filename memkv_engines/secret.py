"""The key that protects chunks: read from a file that only its owner can read, or from the environment; never shown."""

from __future__ import annotations

import os
import re
import stat
from typing import Any

from memkv_engines.errors import ConfigError
from memkv_engines.limits import MAX_KEY_FILE_BYTES, PROTECTION_KEY_BYTES

_HEX = re.compile(rf"[0-9a-fA-F]{{{2 * PROTECTION_KEY_BYTES}}}", re.ASCII)
_MAKE_ONE = f"make one with: (umask 077; openssl rand -hex {PROTECTION_KEY_BYTES} > FILE)"
_MIN_DIFFERENT_BYTES = 8


class SecretKey:
    """A key of 32 bytes whose ``repr``, ``str`` and pickles do not show it."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        """The bytes."""
        return self._value

    def __repr__(self) -> str:
        return "set"

    def __reduce__(self) -> Any:
        raise TypeError("a key is not pickled")


def parse_key(text: str, source: str) -> SecretKey:
    """A key from its 64 hexadecimal digits; white space around them is allowed.

    Args:
        text: the digits.
        source: what to call them in an error, which never quotes them.

    Raises:
        ConfigError: they are no key, or one that is not random.
    """
    if not _HEX.fullmatch(text.strip()):
        raise ConfigError(f"{source} does not hold a key of {2 * PROTECTION_KEY_BYTES} hexadecimal digits: {_MAKE_ONE}")
    value = bytes.fromhex(text.strip())
    # 32 random bytes have fewer different ones once in 10**40.
    if len(set(value)) < _MIN_DIFFERENT_BYTES:
        raise ConfigError(f"{source} holds a key that is not random: {_MAKE_ONE}")
    return SecretKey(value)


def read_key_file(path: str, source: str) -> SecretKey:
    """A key from a file that only this user, or only the administrator, can read and write. Links are followed.

    Args:
        path: the file.
        source: what to call it in an error.

    Raises:
        ConfigError: it cannot be read, others can read or change it, or it holds no key.
    """
    what = f"{source}={path!r}"
    try:
        # O_NONBLOCK so that a FIFO cannot hang the start.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb", buffering=0) as file:
            info = os.fstat(file.fileno())
            _check_private(info, path, what)
            data = file.read(MAX_KEY_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{what} cannot be read: {why}") from error
    if len(data) > MAX_KEY_FILE_BYTES:
        raise ConfigError(f"{what} is larger than {MAX_KEY_FILE_BYTES} B: {_MAKE_ONE}")
    return parse_key(data.decode("latin-1"), what)


def _check_private(info: os.stat_result, path: str, what: str) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise ConfigError(f"{what} is not a regular file")
    if info.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{what} belongs to user {info.st_uid}, who can change it: chown it to the engine's user")
    if info.st_mode & 0o077:
        raise ConfigError(
            f"{what} has mode {stat.S_IMODE(info.st_mode):04o}, so that others can use the key: chmod 600 {path} "
            "(Kubernetes: defaultMode 0400), and make another key if they may have read it"
        )
