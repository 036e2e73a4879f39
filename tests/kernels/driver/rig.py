"""A small engine on the fake driver: pools of pages, a compute stream, a shared staging region, and an oracle.

The oracle indexes the arrays that the pools were filled from and knows nothing of tiles.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from memkv_engines.chunk.layout import KVLayout, Tile, align_up
from memkv_engines.gpu.mover import DeviceMover
from memkv_engines.limits import ALIGN_BYTES
from tests.fake_cuda.control import FakeCuda

Bytes = npt.NDArray[np.uint8]
HEADER_BYTES = ALIGN_BYTES


def view(address: int, size: int) -> Bytes:
    """Memory as it is now; the fake's device memory is host memory."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class EngineFailed(Exception):
    """A call of the engine's own failed: someone broke the context that it shares."""


@dataclass(frozen=True)
class Shape:
    """One tensor of a pool: ``[planes, num_blocks, stride_bytes]`` with ``used_bytes`` of each row in the block.

    With ``block_outermost`` it is ``[num_blocks, planes, stride_bytes]``.
    """

    planes: int
    used_bytes: int
    stride_bytes: int
    offset_bytes: int = 0
    block_outermost: bool = False


SPLIT = (Shape(1, 2048, 2048),) * 6
FUSED = (Shape(2, 4096, 4096),) * 3
CROSS_LAYER = (Shape(6, 4096, 4096, block_outermost=True),)
MLA = (Shape(1, 576 * 16, 576 * 16),) * 3
MLA_ODD = (Shape(1, 656 * 3, 656 * 3), Shape(1, 132 * 3, 132 * 3))
HEAD_SLICE = (Shape(2, 512, 2048, 512),) * 2
ODD = (Shape(1, 1001, 1003, 1), Shape(1, 77, 100, 3))
HYBRID = (Shape(1, 4096, 4096), Shape(1, 33024, 33024))
LARGE = (Shape(2, 32768, 32768),) * 2
LARGE_CONTIGUOUS = (Shape(3, 16384, 16384, block_outermost=True),)
LARGE_PADDED = (Shape(1, 40000, 40000),)
LONG_POOL = (Shape(2, 24, 24),)
LAYOUTS = {
    "split": SPLIT,
    "fused": FUSED,
    "cross-layer": CROSS_LAYER,
    "mla": MLA,
    "mla-odd": MLA_ODD,
    "head-slice": HEAD_SLICE,
    "odd": ODD,
    "hybrid": HYBRID,
    "large": LARGE,
    "large-contiguous": LARGE_CONTIGUOUS,
    "large-padded": LARGE_PADDED,
}


class Engine:
    """What an engine has on its device.

    Args:
        fake: the loaded driver.
        seed: of the scheduler and of the pages' bytes.
        lateness: of the fake.
    """

    def __init__(self, fake: FakeCuda, seed: int = 0, **reset: Any) -> None:
        from cuda.bindings import driver

        self.fake, self.api = fake, driver
        fake.reset(seed, allow_pageable=False, **reset)
        self.random = np.random.default_rng(seed)
        self.ok("cuInit", 0)
        self.context = self.ok("cuDevicePrimaryCtxRetain", 0)
        self.ok("cuCtxPushCurrent", self.context)
        self.stream = int(self.ok("cuStreamCreate", 0))
        self.abandoned = False
        self._allocations: list[int] = []
        self._pinned: list[int] = []
        self._map_region(64 * ALIGN_BYTES * 16)

    def _map_region(self, size: int) -> None:
        self.region = mmap.mmap(-1, size, flags=mmap.MAP_SHARED)
        self.region_bytes = size
        self.region_address = ctypes.addressof(ctypes.c_char.from_buffer(self.region))
        self.host = view(self.region_address, size)

    def ok(self, name: str, *arguments: Any) -> Any:
        """A driver call of the engine's own."""
        code, *results = getattr(self.api, name)(*arguments)
        if int(code):
            raise EngineFailed(f"{name}: {code}")
        return results[0] if results else None

    def put(self, address: int, data: Bytes) -> None:
        """Write device memory at once."""
        view(address, data.size)[:] = data

    def get(self, address: int, size: int) -> Bytes:
        """Device memory as it is now."""
        return view(address, size).copy()

    def alloc(self, size: int) -> int:
        """Device memory."""
        self._allocations.append(int(self.ok("cuMemAlloc", size)))
        return self._allocations[-1]

    def pool(self, shapes: Sequence[Shape], num_blocks: int = 9) -> Pool:
        """A pool with random content."""
        return Pool(self, tuple(shapes), num_blocks)

    def write_late(self, address: int, data: Bytes) -> None:
        """Let the compute stream write device memory, as late as the fake likes."""
        source = int(self.ok("cuMemHostAlloc", data.size, 0))
        self._pinned.append(source)
        view(source, data.size)[:] = data
        self.ok("cuMemcpyHtoDAsync", address, source, data.size, self.stream)

    def read_late(self, address: int, size: int) -> int:
        """Let the compute stream read device memory; returns where to (valid after ``settle``)."""
        to = int(self.ok("cuMemHostAlloc", size, 0))
        self._pinned.append(to)
        self.ok("cuMemcpyDtoHAsync", to, address, size, self.stream)
        return to

    def settle(self) -> None:
        """Run everything that is queued."""
        self.fake.run()

    def close(self) -> None:
        """Free what the engine had."""
        self.settle()
        for address in self._allocations:
            self.ok("cuMemFree", address)
        for address in self._pinned:
            self.ok("cuMemFreeHost", address)
        self.ok("cuStreamDestroy", self.stream)
        self.ok("cuCtxPopCurrent")
        self.ok("cuDevicePrimaryCtxRelease", 0)

    def unpin(self) -> None:
        """Unpin the region, if a mover could not."""
        self.api.cuMemHostUnregister(self.region_address)
        self.fake.clear_violations()

    def keep(self) -> None:
        """Never give memory back that a broken context still knows as pinned: others would get its addresses."""
        _kept.append(self)

    def abandon(self) -> None:
        """For a mover that leaves things on purpose: the test has looked, the fixture shall not."""
        self.keep()
        self.fake.reset(0, allow_pageable=False)
        self.abandoned = True

    def mover(self, **arguments: Any) -> DeviceMover:
        """A mover with the region registered."""
        settings: dict[str, Any] = {"slot_bytes": 512 * 1024, "slots": 2, **arguments}
        mover = DeviceMover(0, **settings)
        mover.register_host(self.region_address, self.region_bytes)
        return mover


_kept: list[Engine] = []


@dataclass
class Pool:
    """Pages of one group: tensors in device memory, and what they hold by our own account."""

    engine: Engine
    shapes: tuple[Shape, ...]
    num_blocks: int
    tensors: list[Bytes] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for shape in self.shapes:
            size = shape.planes * self.num_blocks * shape.stride_bytes
            address = self.engine.alloc(size)
            data = self.engine.random.integers(0, 256, size, dtype=np.uint8)
            self.engine.put(address, data)
            order = (
                (self.num_blocks, shape.planes, shape.stride_bytes)
                if shape.block_outermost
                else (shape.planes, self.num_blocks, shape.stride_bytes)
            )
            self.addresses.append(address)
            self.tensors.append(data.reshape(order))
        self.layout = KVLayout.plan(self.num_blocks, list(self._tiles()))
        self.block_bytes = self.layout.block_bytes
        self.stride_bytes = align_up(self.block_bytes)

    def _tiles(self) -> Any:
        for shape, address in zip(self.shapes, self.addresses, strict=True):
            for plane in range(shape.planes):
                if shape.block_outermost:
                    base, stride = address + plane * shape.stride_bytes, shape.planes * shape.stride_bytes
                else:
                    base, stride = address + plane * self.num_blocks * shape.stride_bytes, shape.stride_bytes
                yield Tile(base + shape.offset_bytes, stride, shape.used_bytes)

    def _rows(self, block: int) -> Any:
        for shape, tensor in zip(self.shapes, self.tensors, strict=True):
            part = tensor[block] if shape.block_outermost else tensor[:, block]
            yield part[:, shape.offset_bytes : shape.offset_bytes + shape.used_bytes]

    def block(self, block: int) -> Bytes:
        """The payload of a block by our account."""
        return np.concatenate([row.reshape(-1) for row in self._rows(block)])

    def set_block(self, block: int, payload: Bytes) -> None:
        """Change our account of a block."""
        offset = 0
        for rows in self._rows(block):
            rows[:] = payload[offset : offset + rows.size].reshape(rows.shape)
            offset += rows.size

    def payload(self, ids: Sequence[int], holes: int = 0) -> Bytes:
        """What a gather must deliver: holes and padding are zero."""
        out = np.zeros(((holes + len(ids)), self.stride_bytes), dtype=np.uint8)
        for row, block in enumerate(ids, start=holes):
            out[row, : self.block_bytes] = self.block(block)
        return out.reshape(-1)

    def device_matches(self) -> bool:
        """Whether every byte of the device's pages is what our account says, those around blocks included."""
        return all(
            np.array_equal(self.engine.get(address, tensor.size), tensor.reshape(-1))
            for address, tensor in zip(self.addresses, self.tensors, strict=True)
        )

    def overwrite_late(self, block: int) -> None:
        """Let the engine's forward pass write new bytes into a block, late; our account has them at once."""
        self.set_block(block, self.engine.random.integers(0, 256, self.block_bytes, dtype=np.uint8))
        payload, offset = self.block(block), 0
        for tile in self.layout.tiles:
            at = tile.base + block * tile.block_stride_bytes
            self.engine.write_late(at, payload[offset : offset + tile.length_bytes])
            offset += tile.length_bytes
