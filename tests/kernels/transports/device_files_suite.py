"""Blocks between a GPU's pages and files through a device slot: on the fake driver here, on a device in `tests/gpu`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memkv_engines.chunk.checksum import block_digest, block_digest_of_leaves
from memkv_engines.errors import ChunkTruncated, TransportError
from memkv_engines.limits import ALIGN_BYTES
from memkv_engines.transports.base import DeviceView
from memkv_engines.transports.gds import GdsTransport
from tests.fast.samples import aligned, noise
from tests.kernels.driver.bytes_suite import ended
from tests.kernels.driver.rig import HEADER_BYTES, LAYOUTS, Engine

IDS = [7, 0, 3]
HASH = bytes(range(32))


def opened(transport: GdsTransport, path: Path, *, writable: bool = False) -> Any:
    flags = (os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY) | os.O_CLOEXEC | transport.open_flags
    return transport.attach(os.open(path, flags, 0o600), writable=writable)


class DeviceFiles:
    """Needs the fixtures `engine` and `transport`."""

    @pytest.mark.parametrize("name", ["mla-odd", "cross-layer", "hybrid"])
    def test_pages_to_a_file_and_back(self, engine: Engine, transport: GdsTransport, tmp_path: Path, name: str) -> None:
        pool = engine.pool(LAYOUTS[name])
        mover = engine.mover(medium="gpu")
        mover.add_group(0, pool.layout)
        slots = [mover.acquire_slot() for _ in range(2)]
        payload_bytes, header = len(IDS) * pool.stride_bytes, noise(HEADER_BYTES)
        views = []
        for slot in slots:
            assert slot is not None
            transport.register(slot.address, slot.size_bytes, device=0)
            views.append(DeviceView(slot.address, payload_bytes, 0))
        source, target = slots
        assert source is not None and target is not None

        ended(mover.gather_to_device(0, IDS, source, 0, after_stream=engine.stream))
        handle = opened(transport, tmp_path / "chunk", writable=True)
        assert transport.write(handle, [aligned(header), views[0]], 0) == HEADER_BYTES + payload_bytes
        transport.detach(handle)
        assert (tmp_path / "chunk").read_bytes() == header + pool.payload(IDS).tobytes()

        handle = opened(transport, tmp_path / "chunk")
        transport.read(handle, [views[1]], HEADER_BYTES)
        transport.detach(handle)
        digests = mover.leaf_digests(0, target, 0, len(IDS), loading=True)
        ended(digests)
        for row, block in enumerate(IDS):
            made = block_digest_of_leaves(digests.leaf_bytes(row), pool.block_bytes, HASH, row)
            assert made == block_digest(memoryview(pool.block(block)), HASH, row)
        moved = [1, 2, 4]
        ended(mover.scatter_from_device(0, target, 0, moved, after_stream=engine.stream))
        for to, block in zip(moved, IDS, strict=True):
            pool.set_block(to, pool.block(block))
        assert pool.device_matches()
        for slot in (source, target):
            transport.deregister(slot.address)
            mover.release_slot(slot)
        mover.close()

    def test_a_damaged_byte_shows_in_the_devices_digests(
        self, engine: Engine, transport: GdsTransport, tmp_path: Path
    ) -> None:
        pool = engine.pool(LAYOUTS["fused"])
        mover = engine.mover(medium="gpu")
        mover.add_group(0, pool.layout)
        slot = mover.acquire_slot()
        assert slot is not None
        data = bytearray(pool.payload(IDS[:1]).tobytes())
        data[pool.block_bytes // 2] ^= 1
        (tmp_path / "chunk").write_bytes(data)
        handle = opened(transport, tmp_path / "chunk")
        transport.read(handle, [DeviceView(slot.address, len(data), 0)], 0)
        transport.detach(handle)
        digests = mover.leaf_digests(0, slot, 0, 1, loading=True)
        ended(digests)
        made = block_digest_of_leaves(digests.leaf_bytes(0), pool.block_bytes, HASH, 0)
        assert made != block_digest(memoryview(pool.block(IDS[0])), HASH, 0)
        mover.release_slot(slot)
        mover.close()

    def test_short_files_and_misaligned_pieces_are_refused(
        self, engine: Engine, transport: GdsTransport, tmp_path: Path
    ) -> None:
        address = -(-engine.alloc(5 * ALIGN_BYTES) // ALIGN_BYTES) * ALIGN_BYTES
        engine.put(address, np.full(4 * ALIGN_BYTES, 0xEE, dtype=np.uint8))
        (tmp_path / "chunk").write_bytes(noise(2 * ALIGN_BYTES))
        handle = opened(transport, tmp_path / "chunk")
        with pytest.raises(ChunkTruncated):
            transport.read(handle, [DeviceView(address, 3 * ALIGN_BYTES, 0)], 0)
        with pytest.raises(TransportError, match="no multiple of 4096"):
            transport.read(handle, [DeviceView(address + 512, ALIGN_BYTES, 0)], 0)
        transport.detach(handle)
        assert (engine.get(address + 3 * ALIGN_BYTES, ALIGN_BYTES) == 0xEE).all()
