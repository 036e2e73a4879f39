"""What ``bench_gpu`` runs on: a paged pool in device memory, a pinned region, streams, and the ways to compare with."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from memkv_engines.chunk.layout import KVLayout, Tile, align_up
from memkv_engines.errors import GpuError
from memkv_engines.gpu.direct import copy_list
from memkv_engines.gpu.driver import Driver
from memkv_engines.gpu.kernels import check_ids
from memkv_engines.limits import MIB

HOST_PLACES = 16
DECODE_BYTES = 256 * MIB


@dataclass(frozen=True)
class Layout:
    """A block of equal tiles, each from a tensor of its own (layers outermost)."""

    name: str
    tiles: int
    tile_bytes: int

    @property
    def block_bytes(self) -> int:
        """Payload of a block."""
        return self.tiles * self.tile_bytes

    @property
    def stride_bytes(self) -> int:
        """Distance of blocks in a chunk."""
        return align_up(self.block_bytes)


def torch_or_none() -> Any:
    """torch with a CUDA device, or None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


class GpuPool:
    """A pool; use as a context manager.

    Args:
        shape: of a block.
        num_blocks: in the pool.
        chunk_bytes: payload of a chunk at most.
        decode_bytes: what a decode-like step touches.

    Raises:
        GpuUnavailable: no device.
    """

    def __init__(
        self, shape: Layout, num_blocks: int, chunk_bytes: int = 8 * MIB, decode_bytes: int = DECODE_BYTES
    ) -> None:
        self._shape, self._num_blocks = shape, num_blocks
        self._driver = Driver(0)
        from cuda.bindings import driver as api

        self._api = api
        self._held = self._driver.current()
        self._held.__enter__()
        self._tensor_bytes = num_blocks * shape.tile_bytes
        self._memory = self._driver.alloc(shape.tiles * self._tensor_bytes)
        self._decode_bytes = decode_bytes
        self._decode = self._driver.alloc(decode_bytes)
        self.stream, self.idle_stream, self._copies = (self._driver.create_stream() for _ in range(3))
        self._events = [self._ok("cuEventCreate", 0) for _ in range(2)]
        tiles = [
            Tile(self._memory + number * self._tensor_bytes, shape.tile_bytes, shape.tile_bytes)
            for number in range(shape.tiles)
        ]
        self.layout = KVLayout(num_blocks, tuple(tiles))
        self._place_bytes = align_up(chunk_bytes + shape.stride_bytes)
        self._map = mmap.mmap(-1, HOST_PLACES * self._place_bytes, flags=mmap.MAP_SHARED)
        self._host = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._random = np.random.default_rng(3)

    def __enter__(self) -> GpuPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._wait(self.stream)
        self._wait(self._copies)
        for event in self._events:
            self._ok("cuEventDestroy", event)
        for stream in (self.stream, self.idle_stream, self._copies):
            self._driver.destroy_stream(stream)
        self._driver.free(self._memory)
        self._driver.free(self._decode)
        self._held.__exit__(None, None, None)
        self._driver.close()

    @property
    def host_region(self) -> tuple[int, int]:
        """Address and length for ``DeviceMover.register_host``."""
        return self._host, len(self._map)

    def host_place(self, number: int) -> int:
        """Address of one of the host slots."""
        return self._host + number % HOST_PLACES * self._place_bytes

    def blocks_of(self, chunk_bytes: int) -> list[int]:
        """Scattered ids of as many blocks as a chunk holds."""
        count = max(1, chunk_bytes // self._shape.stride_bytes)
        return [int(i) for i in self._random.permutation(self._num_blocks)[:count]]

    def timed(self, work: Callable[[], None]) -> float:
        """Seconds on the device between an event before and one behind what ``work`` queues on ``stream``."""
        first, last = self._events
        self._ok("cuEventRecord", first, self.stream)
        work()
        self._ok("cuEventRecord", last, self.stream)
        self._wait(self.stream)
        return float(self._ok("cuEventElapsedTime", first, last)) / 1e3

    def copy_on_device(self, to: int, size_bytes: int) -> None:
        """Queue a plain copy of as many bytes from the pool."""
        self._ok("cuMemcpyDtoDAsync", to, self._memory, size_bytes, self.stream)

    def decode_step(self) -> None:
        """Queue what loads the device as a decode does: kernels that stream through HBM on all multiprocessors."""
        for value in range(4):
            self._ok("cuMemsetD8Async", self._decode, value, self._decode_bytes, self.stream)

    def torch_index(self, torch: Any, ids: list[int]) -> Callable[[], None]:
        """The way of a connector without kernels: one ``index_select`` per tensor into a contiguous buffer."""
        index = torch.tensor(ids, device="cuda")
        pages = torch.empty(
            (self._shape.tiles, self._num_blocks, self._shape.tile_bytes), dtype=torch.uint8, device="cuda"
        )
        out = torch.empty((self._shape.tiles, len(ids), self._shape.tile_bytes), dtype=torch.uint8, device="cuda")
        stream = torch.cuda.ExternalStream(self.stream)

        def work() -> None:
            with torch.cuda.stream(stream):
                for tensor, target in zip(pages, out, strict=True):
                    torch.index_select(tensor, 0, index, out=target)

        return work

    def link_gb_per_s(self, chunks: int, size_bytes: int) -> float:
        """One contiguous copy per chunk into the registered region: what the link carries."""
        started = time.perf_counter()
        for number in range(chunks):
            self._driver.copy_to_host(self.host_place(number), self._memory, size_bytes, self._copies)
        self._wait(self._copies)
        return chunks * size_bytes / (time.perf_counter() - started) / 1e9

    def batch_gb_per_s(self, chunks: int, ids: list[int]) -> float:
        """Every tile a copy of its own, one call per chunk.

        Raises:
            GpuError: the driver has no batch copies.
        """
        if not self._driver.batch_copies:
            raise GpuError(self._driver.reason_no_batch)
        checked = check_ids(ids, self._num_blocks, distinct=True)
        started = time.perf_counter()
        for number in range(chunks):
            pages, slots, sizes = copy_list(self.layout, checked, self._shape.stride_bytes, self.host_place(number), 0)
            self._driver.copy_many(slots, pages, sizes, self._copies)
        self._wait(self._copies)
        return chunks * len(ids) * self._shape.block_bytes / (time.perf_counter() - started) / 1e9

    def _wait(self, stream: int) -> None:
        self._ok("cuStreamSynchronize", stream)

    def _ok(self, name: str, *arguments: Any) -> Any:
        code, *results = getattr(self._api, name)(*arguments)
        if int(code):
            raise GpuError(f"{name} failed: {code}")
        return results[0] if results else None
