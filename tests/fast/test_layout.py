"""Tiles against numpy: whatever the layout, the bytes an iovec names are the ones that indexing finds."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.chunk.layout import KVLayout, Tile, align_up, choose_blocks_per_chunk
from memkv_engines.errors import LayoutError
from memkv_engines.limits import (
    ALIGN_BYTES,
    GIB,
    MAX_BLOCK_BYTES,
    MAX_BLOCKS_PER_CHUNK,
    MAX_CHUNK_TARGET_BYTES,
    MIB,
    MIN_CHUNK_TARGET_BYTES,
)

Bytes = npt.NDArray[np.uint8]


def gather(memory: Bytes, iovecs: npt.NDArray[np.uint64]) -> bytes:
    """Read what the iovecs name; addresses count from the start of ``memory``."""
    return b"".join(memory[a : a + n].tobytes() for a, n in iovecs.astype(np.int64).tolist())


def pool(*shape: int) -> tuple[Bytes, Bytes]:
    """Memory filled with noise, flat and as an array of the given shape."""
    flat = np.random.default_rng(0).integers(0, 256, int(np.prod(shape)), dtype=np.uint8)
    return flat, flat.reshape(shape)


small = st.integers(1, 4)
geometries = st.tuples(small, small, small, small, small)  # layers, blocks, tokens, heads, bytes per head
ids = st.lists(st.integers(0, 3), max_size=6)


def in_range(block_ids: list[int], blocks: int) -> list[int]:
    return [i % blocks for i in block_ids]


# ------------------------------------------------------------------------------------------------- against numpy


@given(geometries, ids)
@settings(deadline=None, max_examples=60)
def test_blocks_outside_layers(shape: tuple[int, ...], block_ids: list[int]) -> None:
    """BLHNC: all layers of a block together, one tile."""
    layers, blocks, tokens, heads, width = shape
    flat, array = pool(blocks, layers, 2, heads, tokens, width)
    piece = 2 * heads * tokens * width
    layout = KVLayout.plan(blocks, [Tile(layer * piece, layers * piece, piece) for layer in range(layers)])
    chosen = in_range(block_ids, blocks)
    assert len(layout.tiles) == 1
    assert gather(flat, layout.iovecs(chosen)) == b"".join(array[i].tobytes() for i in chosen)


@given(geometries, ids)
@settings(deadline=None, max_examples=60)
def test_layers_outside_blocks(shape: tuple[int, ...], block_ids: list[int]) -> None:
    """LBHNC: a tensor per layer, one tile each."""
    layers, blocks, tokens, heads, width = shape
    flat, array = pool(layers, blocks, 2, heads, tokens, width)
    piece = 2 * heads * tokens * width
    layout = KVLayout.plan(blocks, [Tile(layer * blocks * piece, piece, piece) for layer in range(layers)])
    chosen = in_range(block_ids, blocks)
    expected = b"".join(array[layer, i].tobytes() for i in chosen for layer in range(layers))
    assert gather(flat, layout.iovecs(chosen)) == expected
    assert layout.block_bytes == array[:, 0].nbytes


@given(geometries, ids)
@settings(deadline=None, max_examples=60)
def test_keys_and_values_apart(shape: tuple[int, ...], block_ids: list[int]) -> None:
    """A tensor [2, blocks, tokens, heads, width] per layer: keys and values are two tiles."""
    layers, blocks, tokens, heads, width = shape
    flat, array = pool(layers, 2, blocks, tokens, heads, width)
    piece = tokens * heads * width
    tiles = [Tile(half * blocks * piece, piece, piece) for half in range(2 * layers)]
    layout = KVLayout.plan(blocks, tiles)
    chosen = in_range(block_ids, blocks)
    expected = b"".join(
        array[layer, half, i].tobytes() for i, layer, half in itertools.product(chosen, range(layers), range(2))
    )
    assert gather(flat, layout.iovecs(chosen)) == expected


@given(geometries, ids, st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_latents_and_padded_pages(shape: tuple[int, ...], block_ids: list[int], padding: int) -> None:
    """MLA: one latent per token, no heads; pages may be padded, and padding does not move."""
    layers, blocks, tokens, _, width = shape
    page = tokens * width + padding
    flat, array = pool(layers, blocks, page)
    layout = KVLayout.plan(blocks, [Tile(n * blocks * page, page, tokens * width) for n in range(layers)])
    chosen = in_range(block_ids, blocks)
    expected = b"".join(array[layer, i, : tokens * width].tobytes() for i in chosen for layer in range(layers))
    assert gather(flat, layout.iovecs(chosen)) == expected


@given(geometries, st.data())
@settings(deadline=None, max_examples=60)
def test_a_range_of_heads(shape: tuple[int, ...], data: st.DataObject) -> None:
    """A shard's heads inside a pool that holds all of them: a tile per layer and half."""
    layers, blocks, tokens, heads, width = shape
    first = data.draw(st.integers(0, heads - 1))
    count = data.draw(st.integers(1, heads - first))
    chosen = in_range(data.draw(ids), blocks)
    flat, array = pool(blocks, layers, 2, heads, tokens, width)
    head = tokens * width
    tiles = [Tile((n * heads + first) * head, 2 * layers * heads * head, count * head) for n in range(2 * layers)]
    layout = KVLayout.plan(blocks, tiles)
    expected = b"".join(array[i, :, :, first : first + count].tobytes() for i in chosen)
    assert gather(flat, layout.iovecs(chosen)) == expected


def test_iovecs_are_block_major_and_repeatable() -> None:
    layout = KVLayout.plan(4, [Tile(0, 10, 3), Tile(100, 20, 5)])
    rows = layout.iovecs([2, 0, 2])
    assert rows.dtype == np.uint64
    assert rows.tolist() == [[20, 3], [140, 5], [0, 3], [100, 5], [20, 3], [140, 5]]
    assert layout.iovecs([]).shape == (0, 2)


def test_addresses_are_as_wide_as_the_machine() -> None:
    base = (1 << 47) - GIB
    assert KVLayout.plan(2, [Tile(base, 16, 16)]).iovecs([1]).tolist() == [[base + 16, 16]]


@pytest.mark.parametrize("block_ids", [[-1], [4], [0, 4, 1], [2**40]])
def test_ids_outside_the_pool_are_refused(block_ids: list[int]) -> None:
    with pytest.raises(LayoutError, match=r"outside 0\.\.3"):
        KVLayout.plan(4, [Tile(0, 8, 8)]).iovecs(block_ids)


# ---------------------------------------------------------------------------------------------- merging, overlaps


def test_neighbours_merge_only_where_the_order_allows() -> None:
    assert KVLayout.plan(4, [Tile(0, 8, 4), Tile(4, 8, 4)]).tiles == (Tile(0, 8, 8),)
    assert len(KVLayout.plan(4, [Tile(4, 8, 4), Tile(0, 8, 4)]).tiles) == 2
    assert len(KVLayout.plan(4, [Tile(0, 8, 3), Tile(4, 8, 4)]).tiles) == 2
    assert len(KVLayout.plan(1, [Tile(0, 4, 4), Tile(4, 8, 4)]).tiles) == 2


tiles_anywhere = st.builds(
    lambda base, length, gap: Tile(base, length + gap, length), st.integers(0, 60), st.integers(1, 9), st.integers(0, 9)
)


@given(st.integers(1, 5), st.lists(tiles_anywhere, min_size=1, max_size=4))
@settings(deadline=None, max_examples=400)
def test_overlap_is_refused_exactly_when_a_byte_belongs_to_two_places(blocks: int, tiles: list[Tile]) -> None:
    uses = np.zeros(400, dtype=np.int64)
    for tile, block in itertools.product(tiles, range(blocks)):
        start = tile.base + block * tile.block_stride_bytes
        uses[start : start + tile.length_bytes] += 1
    if uses.max() > 1:
        with pytest.raises(LayoutError, match="overlap"):
            KVLayout.plan(blocks, tiles)
    else:
        layout = KVLayout.plan(blocks, tiles)
        assert layout.block_bytes == sum(t.length_bytes for t in tiles)
        assert len(layout.tiles) <= len(tiles)


@pytest.mark.parametrize(
    "values", [(-1, 8, 8), (0, 8, 0), (0, 8, -1), (0, 7, 8), (0, 0, 1)], ids=lambda v: "-".join(map(str, v))
)
def test_impossible_tiles_are_refused(values: tuple[int, int, int]) -> None:
    with pytest.raises(LayoutError):
        Tile(*values)


def test_impossible_layouts_are_refused() -> None:
    for blocks, tiles in ((0, [Tile(0, 8, 8)]), (-1, [Tile(0, 8, 8)]), (1, [])):
        with pytest.raises(LayoutError, match="needs blocks and tiles"):
            KVLayout.plan(blocks, tiles)
    with pytest.raises(LayoutError, match="larger than the bound"):
        KVLayout.plan(1, [Tile(0, MAX_BLOCK_BYTES + 1, MAX_BLOCK_BYTES + 1)])


# ------------------------------------------------------------------------------------------------ blocks per chunk


@given(st.integers(1, 64 * MIB), st.integers(MIN_CHUNK_TARGET_BYTES, MAX_CHUNK_TARGET_BYTES))
@settings(deadline=None, max_examples=300)
def test_the_chunk_is_the_nearest_inside_its_bounds(block_bytes: int, target: int) -> None:
    count = choose_blocks_per_chunk(block_bytes, target)
    stride = align_up(block_bytes)
    allowed = [
        n
        for n in range(1, MAX_CHUNK_TARGET_BYTES // stride + 1)
        if MIN_CHUNK_TARGET_BYTES <= n * stride <= MAX_CHUNK_TARGET_BYTES
    ]
    assert 1 <= count <= MAX_BLOCKS_PER_CHUNK
    if allowed:
        assert count in allowed
        assert abs(count * stride - target) == min(abs(n * stride - target) for n in allowed)
    else:
        assert count == 1


@pytest.mark.parametrize(
    ("block_bytes", "target", "count"),
    [
        (1_474_560, 4 * MIB, 3),
        (1_124_352, 4 * MIB, 4),
        (39_531_264, 4 * MIB, 1),
        (1, 16 * MIB, 4096),
        (2 * MIB, 2 * MIB, 1),
        (9 * MIB, 16 * MIB, 1),
    ],
)
def test_known_models(block_bytes: int, target: int, count: int) -> None:
    assert choose_blocks_per_chunk(block_bytes, target) == count


def test_a_block_without_bytes_is_refused() -> None:
    with pytest.raises(LayoutError):
        choose_blocks_per_chunk(0, 4 * MIB)


@given(st.integers(0, 1 << 40))
@settings(deadline=None, max_examples=50)
def test_alignment(value: int) -> None:
    assert align_up(value) % ALIGN_BYTES == 0
    assert 0 <= align_up(value) - value < ALIGN_BYTES
