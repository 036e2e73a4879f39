"""What people decide about namespaces and tenants: two small files, read by the keeper and by stores, not by look-ups.

``<root>/<namespace>/policy.json``: ``{"pinned": bool, "priority": int, "ttl_s": int, "version": 1}``, and
``<root>/quotas.json``: ``{"tenants": {name: bytes}, "version": 1}``; canonical JSON, replaced atomically. One that is
damaged, too large or not ours counts as absent, with a warning: without a policy a chunk is an ordinary chunk.
"""

from __future__ import annotations

import os
from typing import Annotated, TypeVar

import msgspec

from memkv_engines.errors import ChunkForeign, ConfigError
from memkv_engines.limits import (
    MAX_POLICY_BYTES,
    MAX_PRIORITY,
    MAX_QUOTAS_BYTES,
    MAX_TENANTS_WITH_QUOTA,
    MAX_TTL_S,
)
from memkv_engines.log import Throttle, get_logger
from memkv_engines.tier.folders import Folder
from memkv_engines.tier.records import read_record, write_record

log = get_logger(__name__)

POLICY, QUOTAS = "policy.json", "quotas.json"
_VERSION = 1
_lines = Throttle(interval_s=600.0)

Ttl = Annotated[int, msgspec.Meta(ge=0, le=MAX_TTL_S)]
Priority = Annotated[int, msgspec.Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
Quota = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
Tenant = Annotated[str, msgspec.Meta(max_length=1024)]


class NamespacePolicy(msgspec.Struct, frozen=True):
    """How the chunks of one namespace are kept.

    Attributes:
        pinned: never evicted; they still expire.
        priority: chunks of a lower one are evicted before any of a higher one.
        ttl_s: chunks written longer ago are removed, 0 for never.
        version: of the file.
    """

    pinned: bool = False
    priority: Priority = 0
    ttl_s: Ttl = 0
    version: int = _VERSION


class Quotas(msgspec.Struct, frozen=True):
    """Bytes that tenants may hold below one root; tenants without an entry are not bounded."""

    tenants: dict[Tenant, Quota] = msgspec.field(default_factory=dict)
    version: int = _VERSION

    def __post_init__(self) -> None:
        if len(self.tenants) > MAX_TENANTS_WITH_QUOTA:
            raise ValueError(f"{len(self.tenants)} tenants with a quota; the bound is {MAX_TENANTS_WITH_QUOTA}")


_Record = TypeVar("_Record", NamespacePolicy, Quotas)


def load_policy(root_fd: int, folder: str) -> NamespacePolicy:
    """A namespace's policy, the default if it has none.

    Raises:
        ConfigError: what is there cannot be used.
    """
    try:
        namespace = Folder(folder, root_fd)
        data = read_record(namespace.fd, POLICY, MAX_POLICY_BYTES)
        return _decode(data, NamespacePolicy) if data is not None else NamespacePolicy()
    except FileNotFoundError:
        return NamespacePolicy()
    except (OSError, ChunkForeign, ValueError) as error:
        raise ConfigError(f"{folder}/{POLICY} cannot be used: {error}. Write it anew with `tier policy`") from error


def load_quotas(root_fd: int) -> Quotas:
    """The quotas of a directory, none if there is no file.

    Raises:
        ConfigError: what is there cannot be used.
    """
    try:
        data = read_record(root_fd, QUOTAS, MAX_QUOTAS_BYTES)
        return _decode(data, Quotas) if data is not None else Quotas()
    except (OSError, ChunkForeign, ValueError) as error:
        raise ConfigError(f"{QUOTAS} cannot be used: {error}. Write it anew with `tier policy`") from error


def policy_of(root_fd: int, folder: str) -> NamespacePolicy:
    """As ``load_policy``; one that cannot be used is ignored, with a warning now and then."""
    try:
        return load_policy(root_fd, folder)
    except ConfigError as error:
        _warn(str(error))
        return NamespacePolicy()


def quotas_of(root_fd: int) -> Quotas:
    """As ``load_quotas``; a file that cannot be used is ignored, with a warning now and then."""
    try:
        return load_quotas(root_fd)
    except ConfigError as error:
        _warn(str(error))
        return Quotas()


def save_policy(root_fd: int, folder: str, policy: NamespacePolicy) -> None:
    """Write a namespace's policy.

    Raises:
        ConfigError: a value is out of its bounds, or there is no such namespace.
        TierFull, TierUnavailable: it cannot be written.
    """
    data = _encode(policy)
    try:
        namespace = Folder(folder, root_fd)
    except OSError as error:
        raise ConfigError(f"no namespace {folder} here: {error.strerror}") from error
    write_record(namespace.fd, POLICY, data)


def save_quotas(root_fd: int, quotas: Quotas) -> None:
    """Write the quotas of a directory.

    Raises:
        ConfigError: a value is out of its bounds.
        TierFull, TierUnavailable: they cannot be written.
    """
    write_record(root_fd, QUOTAS, _encode(quotas))


def signature(root_fd: int) -> tuple[int, int, int] | None:
    """Changes whenever the quotas were written anew; None if there are none."""
    try:
        info = os.stat(QUOTAS, dir_fd=root_fd, follow_symlinks=False)
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size


def _encode(record: _Record) -> bytes:
    data = msgspec.json.encode(record, order="sorted")
    try:
        _decode(data, type(record))
    except ValueError as error:
        raise ConfigError(f"this policy cannot be kept: {error}") from error
    if len(data) > (MAX_POLICY_BYTES if isinstance(record, NamespacePolicy) else MAX_QUOTAS_BYTES):
        raise ConfigError("the quotas of this many tenants do not fit in one file")
    return data


def _decode(data: bytes, kind: type[_Record]) -> _Record:
    try:
        record = msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if record.version != _VERSION:
        raise ValueError(f"version {record.version}; this build reads {_VERSION}")
    return record


def _warn(text: str) -> None:
    held = _lines.admit(text)
    if held is not None:
        log.warning("ignored: %s", text)
