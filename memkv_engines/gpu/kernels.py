"""Launches of our kernels. Every argument is checked on the host first: a kernel cannot refuse a bad address."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from memkv_engines.errors import GpuError, GpuUnavailable
from memkv_engines.gpu.driver import Driver
from memkv_engines.gpu.image import load_kernels
from memkv_engines.gpu.tiles import TILE, Tiles, fit_for_bulk
from memkv_engines.limits import (
    ALIGN_BYTES,
    GPU_COPY_CTAS,
    GPU_DIGEST_CTAS,
    GPU_INLINE_IDS,
    GPU_MAX_CTAS,
    LEAF_BYTES,
    MAX_BLOCKS_PER_CHUNK,
)

# The ABI of kernels/README.md: one by-value argument each.
COPY_ARGS = np.dtype(
    [
        ("tiles", "<u8"),
        ("chunk", "<u8"),
        ("chunk_bytes", "<u8"),
        ("external_ids", "<u8"),
        ("error", "<u8"),
        ("tile_count", "<u4"),
        ("block_count", "<u4"),
        ("num_blocks", "<u4"),
        ("first_index", "<u4"),
        ("ids", "<i4", (GPU_INLINE_IDS,)),
    ]
)
DIGEST_ARGS = np.dtype(
    [
        ("first_block", "<u8"),
        ("leaves", "<u8"),
        ("chunk_bytes", "<u8"),
        ("block_bytes", "<u8"),
        ("block_stride_bytes", "<u8"),
        ("error", "<u8"),
        ("block_count", "<u4"),
        ("first_index", "<u4"),
    ]
)
assert (COPY_ARGS.itemsize, DIGEST_ARGS.itemsize) == (1848, 56)

ERROR_BITS = {1: "a block id out of range", 2: "a chunk that is too small", 4: "a tile not fit for this kernel"}

_THREADS, _BULK_THREADS = 512, 32
_BULK_SHARED_BYTES = 4 * 16384
_BULK_CAPABILITY = (9, 0)

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DeviceTiles:
    """A tile table in device memory.

    Attributes:
        address: of the table, 16-aligned.
        count: tiles per block.
        num_blocks: blocks of the pool.
        block_bytes: payload of a block.
        stride_bytes: distance of blocks in a chunk.
        bulk: whether the bulk variant can move every tile.
    """

    address: int
    count: int
    num_blocks: int
    block_bytes: int
    stride_bytes: int
    bulk: bool

    @classmethod
    def of(cls, table: Tiles, address: int, num_blocks: int, block_bytes: int, stride_bytes: int) -> DeviceTiles:
        """Describe a table that lies at ``address``."""
        if table.dtype != TILE or not table.size:
            raise GpuError("a tile table has rows of dtype TILE")
        return cls(address, int(table.size), num_blocks, block_bytes, stride_bytes, fit_for_bulk(table))


def check_ids(block_ids: npt.ArrayLike, num_blocks: int, *, distinct: bool) -> Ids:
    """Block ids as an array, if all of them may be used.

    Args:
        block_ids: at least one id.
        num_blocks: blocks of the pool.
        distinct: refuse repetitions: two writes to one page have no order.

    Raises:
        GpuError: no ids, an id out of range, or repeated where that is not allowed.
    """
    try:
        ids = np.asarray(block_ids, dtype=np.int64)
    except (OverflowError, ValueError, TypeError) as error:
        raise GpuError(f"block ids that are no numbers of blocks: {error}") from error
    if ids.ndim != 1 or not 1 <= ids.size <= MAX_BLOCKS_PER_CHUNK:
        raise GpuError(f"block ids of shape {ids.shape}; 1 to {MAX_BLOCKS_PER_CHUNK} ids are wanted")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= num_blocks:
        raise GpuError(f"block id outside 0..{num_blocks - 1}: {low}..{high}")
    if distinct and len(set(ids.tolist())) != ids.size:
        raise GpuError("a block id stands twice among those to be written")
    return ids


def error_text(word: int) -> str:
    """What the bits of a kernel's error word mean."""
    known = [text for bit, text in ERROR_BITS.items() if word & bit]
    rest = word & ~sum(ERROR_BITS)
    return ", ".join(known + ([f"unknown bits {rest:#x}"] if rest else []))


@dataclass(frozen=True)
class _Pair:
    """A copy kernel, and its variant with bulk copies where the device has them."""

    plain: int
    bulk: int | None


class Kernels:
    """The loaded kernels of one device. Blocking construction; launches only queue.

    Args:
        driver: with its context current.
        copy_ctas: multiprocessors that one gather or scatter may occupy.
        bulk: use the bulk-copy variant where device and layout allow it.

    Attributes:
        origin: where the machine code came from.
    """

    def __init__(self, driver: Driver, copy_ctas: int = GPU_COPY_CTAS, *, bulk: bool = False) -> None:
        if not 1 <= copy_ctas <= GPU_MAX_CTAS:
            raise GpuError(f"copy_ctas={copy_ctas} must be 1..{GPU_MAX_CTAS}")
        self._driver = driver
        self._ctas = min(copy_ctas, driver.multiprocessors)
        self._digest_ctas = min(GPU_DIGEST_CTAS, driver.multiprocessors)
        self._module, self.origin = load_kernels(driver)
        try:
            bulk = bulk and driver.capability >= _BULK_CAPABILITY
            self._gather = self._pair("memkv_gather", bulk=bulk)
            self._scatter = self._pair("memkv_scatter", bulk=bulk)
            self._digests = self._function("memkv_leaf_digests", DIGEST_ARGS)
        except GpuError:
            self.close()
            raise

    def close(self) -> None:
        """Unload; no kernel may be under way."""
        self._driver.unload_module(self._module)

    def gather(
        self, tiles: DeviceTiles, ids: Ids, chunk: int, chunk_bytes: int, first_index: int, error: int, stream: int
    ) -> None:
        """Queue the copy of blocks into a chunk. Never inside a CUDA graph: the ids would freeze.

        Args:
            tiles: where blocks lie.
            ids: from ``check_ids``.
            chunk: device address of block index 0 in the chunk, a multiple of 16.
            chunk_bytes: what may be written from there on.
            first_index: index in the chunk of the first id.
            error: address of a u32 the kernel may set bits in.
            stream: where to queue; more ids than fit in one launch are several launches.

        Raises:
            GpuError: an argument is wrong (nothing was queued) or the driver failed (some of it may have been).
        """
        self._check_copy(tiles, ids, chunk, chunk_bytes, first_index, error)
        self._copy(self._gather, tiles, ids, chunk, chunk_bytes, first_index, error, stream)

    def scatter(
        self, tiles: DeviceTiles, ids: Ids, chunk: int, chunk_bytes: int, first_index: int, error: int, stream: int
    ) -> None:
        """Queue the copy of blocks of a chunk into pages; arguments as for ``gather``, ids distinct."""
        self._check_copy(tiles, ids, chunk, chunk_bytes, first_index, error, distinct=True)
        self._copy(self._scatter, tiles, ids, chunk, chunk_bytes, first_index, error, stream)

    def leaf_digests(
        self,
        first_block: int,
        block_count: int,
        block_bytes: int,
        stride_bytes: int,
        readable_bytes: int,
        leaves: int,
        error: int,
        stream: int,
    ) -> None:
        """Queue XXH3-64 of all 16 KiB leaves of consecutive blocks.

        Args:
            first_block: device address, a multiple of 16.
            block_count: how many blocks.
            block_bytes: payload of each; its last leaf may be short.
            stride_bytes: distance of blocks, a multiple of 16.
            readable_bytes: what may be read from ``first_block`` on.
            leaves: u64 of every leaf, block-major, native byte order: device or pinned host memory, 8-aligned.
            error: as for ``gather``.
            stream: where to queue.

        Raises:
            GpuError: as for ``gather``.
        """
        _check_address("first_block", first_block, 16)
        _check_address("leaves", leaves, 8)
        _check_address("error", error, 4)
        if block_count < 1 or block_bytes < 1 or stride_bytes < block_bytes or stride_bytes % 16:
            raise GpuError(f"impossible digests: {block_count} blocks of {block_bytes} B, {stride_bytes} B apart")
        if (block_count - 1) * stride_bytes + block_bytes > readable_bytes:
            raise GpuError(f"digests of {block_count} blocks read beyond {readable_bytes} B")
        args = np.zeros((), dtype=DIGEST_ARGS)
        args["first_block"], args["leaves"], args["error"] = first_block, leaves, error
        args["chunk_bytes"], args["block_bytes"], args["block_stride_bytes"] = readable_bytes, block_bytes, stride_bytes
        args["block_count"] = block_count
        self._driver.launch(self._digests, self._digest_ctas, _THREADS, 0, stream, args)

    def _copy(
        self,
        pair: _Pair,
        tiles: DeviceTiles,
        ids: Ids,
        chunk: int,
        chunk_bytes: int,
        first_index: int,
        error: int,
        stream: int,
    ) -> None:
        args = np.zeros((), dtype=COPY_ARGS)
        args["tiles"], args["tile_count"], args["num_blocks"] = tiles.address, tiles.count, tiles.num_blocks
        args["chunk"], args["chunk_bytes"], args["error"] = chunk, chunk_bytes, error
        bulk = pair.bulk if tiles.bulk else None
        function, threads, shared_bytes = (
            (pair.plain, _THREADS, 0) if bulk is None else (bulk, _BULK_THREADS, _BULK_SHARED_BYTES)
        )
        for start in range(0, ids.size, GPU_INLINE_IDS):
            part = ids[start : start + GPU_INLINE_IDS]
            args["block_count"], args["first_index"] = part.size, first_index + start
            args["ids"][: part.size] = part
            self._driver.launch(function, self._ctas, threads, shared_bytes, stream, args)

    def _check_copy(
        self,
        tiles: DeviceTiles,
        ids: Ids,
        chunk: int,
        chunk_bytes: int,
        first_index: int,
        error: int,
        *,
        distinct: bool = False,
    ) -> None:
        check_ids(ids, tiles.num_blocks, distinct=distinct)
        _check_address("tiles", tiles.address, 16)
        _check_address("chunk", chunk, 16)
        _check_address("error", error, 4)
        if tiles.stride_bytes % ALIGN_BYTES or tiles.stride_bytes < tiles.block_bytes:
            raise GpuError(f"chunk stride of {tiles.stride_bytes} B for blocks of {tiles.block_bytes} B")
        end = (first_index + ids.size - 1) * tiles.stride_bytes + tiles.block_bytes
        if first_index < 0 or end > chunk_bytes:
            raise GpuError(f"{ids.size} blocks from index {first_index} on need {end} B; the chunk has {chunk_bytes} B")

    def _pair(self, name: str, *, bulk: bool) -> _Pair:
        plain = self._function(name, COPY_ARGS)
        return _Pair(plain, self._function(f"{name}_bulk", COPY_ARGS, _BULK_SHARED_BYTES) if bulk else None)

    def _function(self, name: str, argument: np.dtype[Any], shared_bytes: int = 0) -> int:
        function = self._driver.function(self._module, name)
        size = self._driver.argument_bytes(function)
        if size not in (None, argument.itemsize):
            raise GpuUnavailable(f"{name} takes {size} B of arguments, this build packs {argument.itemsize} B")
        if shared_bytes:
            self._driver.allow_shared(function, shared_bytes)
        return function


def leaves_of(block_bytes: int) -> int:
    """Leaves of one block."""
    return -(-block_bytes // LEAF_BYTES)


def _check_address(name: str, address: int, align_bytes: int) -> None:
    if address <= 0 or address % align_bytes:
        raise GpuError(f"{name}={address:#x} must be an address that is a multiple of {align_bytes}")
