"""What transports that hide the system's error number need to know of a file, asked of the file itself."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from memkv_engines.errors import ChunkMissing, ChunkTruncated, MemKVError, TierFull, TransportError
from memkv_engines.limits import ALIGN_BYTES
from memkv_engines.transports.base import DeviceView, FileTransport, Handle, View

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_PROOF_BYTES = 2 * ALIGN_BYTES


def check_reach(fd: int, end: int) -> None:
    """Make sure that a file reaches to ``end``.

    Raises:
        ChunkTruncated: it does not.
        ChunkMissing: it vanished (ESTALE).
        TransportError: it cannot be asked.
    """
    try:
        size = os.fstat(fd).st_size
    except OSError as error:
        raise read_error(error) from error
    if size < end:
        raise ChunkTruncated(f"object ends {end - size} B early")


def read_error(error: OSError) -> MemKVError:
    """What an error of the system means for a read."""
    if error.errno == errno.ESTALE:
        return ChunkMissing("object vanished under the reader")
    return TransportError(f"read failed: {error.strerror}")


def why_read_failed(fd: int, views: Sequence[View], offset: int, align_bytes: int, words: str) -> MemKVError:
    """The error to raise for a failed read: the file may have become shorter or have vanished since."""
    try:
        check_reach(fd, offset + total_bytes(views))
    except MemKVError as error:
        return error
    return TransportError(f"read failed: {words}{_misaligned(views, offset, align_bytes)}")


def why_write_failed(fd: int, views: Sequence[View], offset: int, align_bytes: int, words: str) -> MemKVError:
    """The error to raise for a failed write: where the device has no room, asking for it says so."""
    try:
        os.posix_fallocate(fd, offset, max(total_bytes(views), 1))
    except OSError as error:
        if error.errno in NO_ROOM:
            return TierFull(f"no room on the device: {error.strerror}")
    return TransportError(f"write failed: {words}{_misaligned(views, offset, align_bytes)}")


def _misaligned(views: Sequence[View], offset: int, align_bytes: int) -> str:
    if align_bytes > 1:
        position = offset
        for view in views:
            address = address_of(view) if view.nbytes else 0
            if address % align_bytes or position % align_bytes or view.nbytes % align_bytes:
                return (
                    f" ({view.nbytes} B at address {address:#x} for offset {position} are not multiples of "
                    f"{align_bytes} B, which direct I/O may want: align the buffer, or set direct_io=off)"
                )
            position += view.nbytes
    return ""


def total_bytes(views: Sequence[View]) -> int:
    """Bytes of all views."""
    return sum(view.nbytes for view in views)


def address_of(view: View) -> int:
    """Where a view begins."""
    if isinstance(view, DeviceView):
        return view.address
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0]) if view.nbytes else 0


def attach(transport: FileTransport[Handle], fd: int, *, writable: bool = False) -> Handle:
    """Hand a descriptor over to a transport; it is closed if the transport does not take it."""
    try:
        return transport.attach(fd, writable=writable)
    except BaseException:
        os.close(fd)
        raise


def prove(transport: FileTransport[Any], dir_fd: int, views: Sequence[View]) -> None:
    """Write a scratch file and read it back, so that a transport which does not work here is known before it is used.

    Args:
        transport: what to try.
        dir_fd: descriptor of a writable directory.
        views: two equal pieces of aligned memory, of the kind that will be used; the second is overwritten.

    Raises:
        TransportError: it does not work.
        TierFull: there is no room.
        OSError: no scratch file can be made.
    """
    source, target = views
    name = f".tmp-probe-{secrets.token_hex(8)}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | transport.open_flags
    fd = os.open(name, flags, 0o600, dir_fd=dir_fd)
    try:
        handle = attach(transport, fd, writable=True)
        try:
            transport.write(handle, [source], 0)  # type: ignore[list-item]
            transport.read(handle, [target], 0)  # type: ignore[list-item]
        finally:
            transport.detach(handle)
    finally:
        os.unlink(name, dir_fd=dir_fd)
    if isinstance(source, memoryview) and source != target:
        raise TransportError(f"{transport.name} reads other bytes than it wrote")
