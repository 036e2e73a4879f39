"""The parts of the GPU path that need no driver: tile plans, routes, the NumPy path, and what happens without CUDA."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.chunk.checksum import block_digest, block_digest_of_leaves
from memkv_engines.chunk.layout import KVLayout, Tile, align_up
from memkv_engines.errors import GpuUnavailable, LayoutError
from memkv_engines.gpu import reference
from memkv_engines.gpu.routes import choose_route
from memkv_engines.gpu.tiles import TILE, fit_for_bulk, plan_tiles
from memkv_engines.limits import GPU_COPY_ENGINE_MIN_BYTES, GPU_SINGLE_COPY_MIN_BYTES, LEAF_BYTES

PIECES = st.lists(st.tuples(st.integers(1, 9000), st.integers(0, 40), st.integers(0, 33)), min_size=1, max_size=4)


def layout_of(pieces: list[tuple[int, int, int]], num_blocks: int, start: int = 0) -> KVLayout:
    """Pools one behind the other: (length, padding, misalignment) each."""
    tiles, at = [], start
    for length, padding, shift in pieces:
        tiles.append(Tile(at + shift, length + padding, length))
        at += shift + num_blocks * (length + padding) + 64
    return KVLayout.plan(num_blocks, tiles)


@given(PIECES, st.integers(1, 5))
def test_a_plan_covers_every_byte_of_a_block_once(pieces: list[tuple[int, int, int]], num_blocks: int) -> None:
    layout = layout_of(pieces, num_blocks, start=1 << 20)
    stride = align_up(layout.block_bytes)
    table = plan_tiles(layout, stride)
    assert table.dtype == TILE
    assert (table["length_bytes"] <= 4096).all()
    assert (table["length_bytes"] > 0).all()
    assert (table["chunk_stride_bytes"] == stride).all()
    assert (table["reserved"] == 0).all()
    ends = table["chunk_offset_bytes"] + table["length_bytes"]
    assert table["chunk_offset_bytes"].tolist() == [0, *ends.tolist()[:-1]]
    assert int(ends[-1]) == layout.block_bytes
    wanted = np.concatenate([np.arange(t.base, t.base + t.length_bytes) for t in layout.tiles])
    made = np.concatenate([np.arange(int(r["base"]), int(r["base"]) + int(r["length_bytes"])) for r in table])
    assert np.array_equal(made, wanted)
    for row in table:
        width = 1 << int(row["log2_access"])
        addresses = [int(row["base"]), int(row["block_stride_bytes"]), int(row["chunk_offset_bytes"]), stride]
        assert all(address % width == 0 for address in addresses)
        assert width == 16 or any(address % (2 * width) for address in addresses), "a wider access would do"


def test_only_whole_vectors_are_fit_for_the_bulk_kernels() -> None:
    assert fit_for_bulk(plan_tiles(KVLayout.plan(2, [Tile(4096, 4096, 4096)]), 4096))
    assert not fit_for_bulk(plan_tiles(KVLayout.plan(2, [Tile(4104, 4096, 4096)]), 4096))
    assert not fit_for_bulk(plan_tiles(KVLayout.plan(2, [Tile(4096, 4096, 4088)]), 4096))


@pytest.mark.parametrize("stride", [4096, 8200, 0])
def test_a_stride_that_does_not_fit_is_refused(stride: int) -> None:
    with pytest.raises(LayoutError, match=f"chunk_stride_bytes={stride}"):
        plan_tiles(KVLayout.plan(1, [Tile(4096, 8192, 8192)]), stride)


@given(PIECES, st.data())
@settings(max_examples=60, deadline=None)
def test_the_numpy_path_moves_what_the_layout_says(pieces: list[tuple[int, int, int]], data: st.DataObject) -> None:
    num_blocks = 4
    memory = np.random.default_rng(7).integers(0, 256, 1 << 18, dtype=np.uint8)
    layout = layout_of(pieces, num_blocks, start=memory.ctypes.data)
    ids = data.draw(st.lists(st.integers(0, num_blocks - 1), min_size=1, max_size=4, unique=True))
    first = data.draw(st.integers(0, 2))
    stride = align_up(layout.block_bytes)
    payload = np.full((first + len(ids)) * stride, 0xEE, dtype=np.uint8)
    reference.gather(layout, ids, payload, stride, first)
    wanted = np.full_like(payload, 0xEE)
    for row, block in enumerate(ids, start=first):
        at = row * stride
        for tile in layout.tiles:
            start = tile.base - memory.ctypes.data + block * tile.block_stride_bytes
            wanted[at : at + tile.length_bytes] = memory[start : start + tile.length_bytes]
            at += tile.length_bytes
    assert np.array_equal(payload, wanted)
    before = memory.copy()
    payload = np.random.default_rng(8).integers(0, 256, payload.size, dtype=np.uint8)
    reference.scatter(layout, ids, payload, stride, first)
    for row, block in enumerate(ids, start=first):
        at = row * stride
        for tile in layout.tiles:
            start = tile.base - memory.ctypes.data + block * tile.block_stride_bytes
            before[start : start + tile.length_bytes] = payload[at : at + tile.length_bytes]
            at += tile.length_bytes
    assert np.array_equal(memory, before), "a scatter touches its blocks and nothing else"


@pytest.mark.parametrize(
    ("lengths", "medium", "batch", "kind"),
    [
        ([GPU_COPY_ENGINE_MIN_BYTES - 1], "host", True, "kernel"),
        ([GPU_COPY_ENGINE_MIN_BYTES], "host", True, "contiguous"),
        ([GPU_COPY_ENGINE_MIN_BYTES] * 2, "host", True, "copy_engine"),
        ([1 << 20, GPU_COPY_ENGINE_MIN_BYTES - 1], "host", True, "kernel"),
        ([GPU_SINGLE_COPY_MIN_BYTES - 1], "host", False, "kernel"),
        ([GPU_SINGLE_COPY_MIN_BYTES], "host", False, "contiguous"),
        ([1 << 20], "gpu", True, "kernel"),
    ],
)
def test_routes(lengths: list[int], medium: str, batch: bool, kind: str) -> None:
    layout = layout_of([(length, 0, 0) for length in lengths], 3, start=4096)
    route = choose_route(layout, medium, batch_copies=batch)  # type: ignore[arg-type]
    assert route.kind == kind
    assert route.direct == (kind != "kernel")
    assert f"{len(lengths)} tile(s)" in route.reason


@given(st.integers(1, 3 * LEAF_BYTES), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_a_digest_from_ready_leaves_is_the_digest(length: int, index: int) -> None:
    from xxhash import xxh3_64_digest

    block = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8).tobytes()
    leaves = b"".join(xxh3_64_digest(block[at : at + LEAF_BYTES]) for at in range(0, length, LEAF_BYTES))
    chain = bytes(range(32))
    assert block_digest_of_leaves(leaves, length, chain, index) == block_digest(memoryview(block), chain, index)
    for wrong in (leaves[:-1], leaves + bytes(8)):
        with pytest.raises(ValueError, match=f"{len(leaves)} for a block of {length} B"):
            block_digest_of_leaves(wrong, length, chain, index)


def test_without_cuda_bindings_the_gpu_path_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from memkv_engines.gpu.mover import DeviceMover

    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(GpuUnavailable, match="cuda-bindings is not installed"):
        DeviceMover(0, slot_bytes=1 << 20)
