"""Copies between staging memory and the engine's pages, from whichever process the I/O loop runs in.

* ``ProcessVmPages``: the engine's pages are in another process; ``process_vm_readv``/``writev`` copy a whole chunk,
  all layers, in one system call and without the engine's interpreter taking part (no GIL crossing).
* ``MappedPages``: the pages are mapped here (the loop is a thread of the engine, or the pool is a shared memfd);
  copies are ``memmove``.

Measured once, by hand (4 MiB, virtual machine): one call of one piece 1.3 ms, of 256 pieces of 16 KiB 2.5 ms, a plain
copy 0.9 ms; the device needs 3.5 ms for the same bytes, so the copy hides behind the I/O of other chunks. Pieces that
follow each other are merged.
"""

from __future__ import annotations

import ctypes
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from memkv_engines.errors import IoServiceError
from memkv_engines.limits import MAX_IOVECS_PER_CALL

Iovecs = npt.NDArray[np.uint64]


class Pages(ABC):
    """Moves whole blocks. ``iovecs`` lists the pieces of the blocks, ``tiles`` pieces per block, block-major."""

    @abstractmethod
    def gather(self, iovecs: Iovecs, tiles: int, staging_address: int, block_bytes: int, stride_bytes: int) -> None:
        """Copy blocks into staging: block i to ``staging_address + i * stride_bytes``.

        Raises:
            IoServiceError: the engine's memory cannot be read.
        """

    @abstractmethod
    def scatter(self, iovecs: Iovecs, tiles: int, staging_address: int, block_bytes: int, stride_bytes: int) -> None:
        """Copy blocks from staging into the pages; errors as in ``gather``."""


class ProcessVmPages(Pages):
    """Pages of another process of the same user.

    Args:
        pid: the engine's process.
    """

    def __init__(self, pid: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._pid = pid
        self._calls: dict[str, Any] = {}
        for name in ("process_vm_readv", "process_vm_writev"):
            call = getattr(libc, name)
            call.argtypes = [
                ctypes.c_int,
                ctypes.c_void_p,
                ctypes.c_ulong,
                ctypes.c_void_p,
                ctypes.c_ulong,
                ctypes.c_ulong,
            ]
            call.restype = ctypes.c_ssize_t
            self._calls[name] = call

    def gather(self, iovecs: Iovecs, tiles: int, staging_address: int, block_bytes: int, stride_bytes: int) -> None:
        self._move("process_vm_readv", iovecs, tiles, staging_address, block_bytes, stride_bytes)

    def scatter(self, iovecs: Iovecs, tiles: int, staging_address: int, block_bytes: int, stride_bytes: int) -> None:
        self._move("process_vm_writev", iovecs, tiles, staging_address, block_bytes, stride_bytes)

    def read(self, address: int, length: int) -> bytes:
        """Read a few bytes of the engine's memory (the start-up canary)."""
        buffer = ctypes.create_string_buffer(length)
        remote = np.array([[address, length]], dtype=np.uint64)
        local = np.array([[ctypes.addressof(buffer), length]], dtype=np.uint64)
        self._call("process_vm_readv", local, remote, length)
        return buffer.raw

    def _move(
        self, name: str, iovecs: Iovecs, tiles: int, staging_address: int, block_bytes: int, stride_bytes: int
    ) -> None:
        blocks = len(iovecs) // tiles
        if tiles > MAX_IOVECS_PER_CALL:
            for block in range(blocks):
                address = staging_address + block * stride_bytes
                self._move_block(name, iovecs[block * tiles : (block + 1) * tiles], address)
            return
        per_call = MAX_IOVECS_PER_CALL // tiles
        for start in range(0, blocks, per_call):
            count = min(per_call, blocks - start)
            pieces = iovecs[start * tiles : (start + count) * tiles].reshape(count, tiles, 2)
            address = staging_address + start * stride_bytes
            merged = _merge_neighbours(pieces, address, stride_bytes)
            if merged is None:
                local = np.empty((count, 2), dtype=np.uint64)
                local[:, 0] = address + np.arange(count) * stride_bytes
                local[:, 1] = block_bytes
                merged = local, pieces.reshape(-1, 2)
            self._call(name, *merged, count * block_bytes)

    def _move_block(self, name: str, remote: Iovecs, staging_address: int) -> None:
        done = 0
        for start in range(0, len(remote), MAX_IOVECS_PER_CALL):
            part = remote[start : start + MAX_IOVECS_PER_CALL]
            length = int(part[:, 1].sum())
            local = np.array([[staging_address + done, length]], dtype=np.uint64)
            self._call(name, local, part, length)
            done += length

    def _call(self, name: str, local: Iovecs, remote: Iovecs, expect_bytes: int) -> None:
        local, remote = np.ascontiguousarray(local), np.ascontiguousarray(remote)
        done = self._calls[name](self._pid, local.ctypes.data, len(local), remote.ctypes.data, len(remote), 0)
        if done != expect_bytes:
            reason = os.strerror(ctypes.get_errno()) if done < 0 else f"{done} of {expect_bytes} B"
            raise IoServiceError(f"{name} on process {self._pid}: {reason}")


def _merge_neighbours(pieces: Iovecs, staging_address: int, stride_bytes: int) -> tuple[Iovecs, Iovecs] | None:
    """Merge pieces of blocks that follow each other in the engine's memory, as those of a fresh prompt mostly do.

    The kernel pins and walks the pages of each remote piece on its own, about 4 us a piece; local ones are cheap.

    Args:
        pieces: address and length of every piece, (blocks, tiles, 2).
        staging_address: where the first block goes.
        stride_bytes: distance of blocks in staging.

    Returns:
        Local and remote lists, tile after tile; None where no block follows its predecessor.
    """
    ends = pieces[..., 0] + pieces[..., 1]
    follows = pieces[1:, :, 0] == ends[:-1]
    if not follows.any():
        return None
    blocks, tiles = pieces.shape[:2]
    lengths = pieces[..., 1]
    local = np.empty((tiles, blocks, 2), dtype=np.uint64)
    local[..., 0] = (staging_address + np.arange(blocks, dtype=np.uint64) * np.uint64(stride_bytes)) + (
        np.cumsum(lengths, axis=1) - lengths
    ).T
    local[..., 1] = lengths.T
    starts = np.vstack([np.ones((1, tiles), dtype=bool), ~follows]).T.reshape(-1)
    remote = pieces.transpose(1, 0, 2).reshape(-1, 2)
    first = np.flatnonzero(starts)
    merged = np.empty((len(first), 2), dtype=np.uint64)
    merged[:, 0] = remote[first, 0]
    merged[:, 1] = np.add.reduceat(remote[:, 1], first)
    return local.reshape(-1, 2), merged


class MappedPages(Pages):
    """Pages that are mapped in this process.

    Args:
        delta: what to add to the engine's addresses to get ours (0 inside the engine's own process).
    """

    def __init__(self, delta: int = 0) -> None:
        self._delta = delta

    def gather(self, iovecs: Iovecs, tiles: int, staging_address: int, block_bytes: int, stride_bytes: int) -> None:
        self._move(iovecs, tiles, staging_address, stride_bytes, to_staging=True)

    def scatter(self, iovecs: Iovecs, tiles: int, staging_address: int, block_bytes: int, stride_bytes: int) -> None:
        self._move(iovecs, tiles, staging_address, stride_bytes, to_staging=False)

    def _move(self, iovecs: Iovecs, tiles: int, staging_address: int, stride_bytes: int, *, to_staging: bool) -> None:
        for block in range(len(iovecs) // tiles):
            cursor = staging_address + block * stride_bytes
            for address, length in iovecs[block * tiles : (block + 1) * tiles].tolist():
                page = address + self._delta
                if to_staging:
                    ctypes.memmove(cursor, page, length)
                else:
                    ctypes.memmove(page, cursor, length)
                cursor += length


class GatedPages(Pages):
    """Copies that can be stopped for good, for a loop that runs on threads of the engine and cannot be killed.

    A thread that hangs in I/O may come back long after its job was given up: by then its pages belong to another
    request, so its copy must fail.
    """

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._condition = threading.Condition()
        self._copies = 0
        self._closed = False

    def close(self) -> None:
        """Refuse new copies and return once none is under way (copies are memory to memory: milliseconds)."""
        with self._condition:
            self._closed = True
            self._condition.wait_for(lambda: not self._copies)

    def gather(self, iovecs: Iovecs, tiles: int, staging_address: int, block_bytes: int, stride_bytes: int) -> None:
        with self._copying():
            self._pages.gather(iovecs, tiles, staging_address, block_bytes, stride_bytes)

    def scatter(self, iovecs: Iovecs, tiles: int, staging_address: int, block_bytes: int, stride_bytes: int) -> None:
        with self._copying():
            self._pages.scatter(iovecs, tiles, staging_address, block_bytes, stride_bytes)

    @contextmanager
    def _copying(self) -> Iterator[None]:
        with self._condition:
            if self._closed:
                raise IoServiceError("the job was given up")
            self._copies += 1
        try:
            yield
        finally:
            with self._condition:
                self._copies -= 1
                self._condition.notify_all()
