"""Small files of ours beside the chunks (manifest, policy, quotas): read with bounds, written atomically."""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import time

from memkv_engines.errors import ChunkForeign
from memkv_engines.keys import ChunkName, namespace_folder_of
from memkv_engines.limits import BUCKET_HEX_DIGITS, MAX_MANIFEST_BYTES, TEMPORARY_MAX_AGE_S
from memkv_engines.tier.folders import as_tier_error, unlink_quietly

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
# O_NONBLOCK so that a FIFO planted under a name of ours cannot hang the open; regular files ignore it.
READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_NAMESPACE = re.compile(r"[0-9a-f]{32}", re.ASCII)
_BUCKET = re.compile(rf"[0-9a-f]{{{BUCKET_HEX_DIGITS}}}", re.ASCII)


def is_namespace(name: str) -> bool:
    """Whether a folder below the root has the name of a namespace."""
    return _NAMESPACE.fullmatch(name) is not None


def is_bucket(name: str) -> bool:
    """Whether a folder of a namespace has the name of a bucket."""
    return _BUCKET.fullmatch(name) is not None


def parse_name(text: str, bucket: str) -> ChunkName | None:
    """The chunk name of a file found in a bucket, None if it is not one that belongs there."""
    try:
        name = ChunkName.parse(text)
    except ChunkForeign:
        return None
    return name if name.bucket == bucket else None


def temporary_name() -> str:
    """A name for a file that is not complete yet; process ids repeat over containers, so it does not rest on them."""
    return f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"


def is_leftover(info: os.stat_result) -> bool:
    """Whether a temporary file is one that nobody can still be writing.

    One from the future was written before a clock was set back.
    """
    return stat.S_ISREG(info.st_mode) and abs(time.time() - info.st_mtime) > TEMPORARY_MAX_AGE_S


def owned_by_us(info: os.stat_result) -> bool:
    """Whether a file is this user's, or the administrator's."""
    return info.st_uid in (os.geteuid(), 0)


def read_record(dir_fd: int, name: str, max_bytes: int) -> bytes | None:
    """A small file, whole; None if there is none.

    Raises:
        ChunkForeign: it is not a regular file of ours, or too large.
        OSError: it cannot be read.
    """
    try:
        fd = os.open(name, READ_FLAGS, dir_fd=dir_fd)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb", buffering=0) as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode) or not owned_by_us(info):
            raise ChunkForeign(f"{name} is not a regular file of ours")
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ChunkForeign(f"{name} is larger than {max_bytes} B")
    return data


def write_record(dir_fd: int, name: str, data: bytes) -> None:
    """Write a small file; readers see the old one or the new one, whole.

    Raises:
        TierFull: no room.
        TierUnavailable: any other failure.
    """
    temporary = temporary_name()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(temporary, flags, 0o600, dir_fd=dir_fd)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except OSError as error:
        unlink_quietly(temporary, dir_fd)
        raise as_tier_error(error, f"cannot write {name}") from error


def read_manifest(namespace_fd: int, folder: str) -> dict[str, object] | None:
    """What a namespace stands for; None without a manifest.

    The folder's name is the manifest's digest, so a manifest that was tampered with is found.

    Raises:
        ChunkForeign: what is there is not the manifest of this folder.
        OSError: it cannot be read.
    """
    data = read_record(namespace_fd, MANIFEST, MAX_MANIFEST_BYTES)
    if data is None:
        return None
    if namespace_folder_of(data) != folder:
        raise ChunkForeign(f"the manifest in {folder} is another namespace's, or was changed")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ChunkForeign(f"the manifest in {folder} is not JSON") from error
    if not isinstance(body, dict):
        raise ChunkForeign(f"the manifest in {folder} is not a JSON object")
    return body
