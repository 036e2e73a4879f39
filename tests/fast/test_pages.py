"""Both ways of copying pages do the same, whatever the order of the blocks; neighbours are merged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.errors import IoServiceError
from memkv_engines.offload.pages import Iovecs, MappedPages, Pages, ProcessVmPages

POOL_BLOCKS = 40


class Pool:
    """Layers of different block sizes, filled with noise, and the pieces of blocks in them."""

    def __init__(self, tile_bytes: Sequence[int]) -> None:
        noise = np.random.default_rng(7)
        self.layers = [noise.integers(0, 256, (POOL_BLOCKS, size), dtype=np.uint8) for size in tile_bytes]
        self.block_bytes = sum(tile_bytes)

    def iovecs(self, ids: Sequence[int]) -> Iovecs:
        rows = [(int(layer[block].ctypes.data), layer.shape[1]) for block in ids for layer in self.layers]
        return np.array(rows, dtype=np.uint64)

    def block(self, block: int) -> bytes:
        return b"".join(layer[block].tobytes() for layer in self.layers)


id_lists = st.lists(
    st.tuples(st.integers(0, POOL_BLOCKS - 1), st.integers(1, 9)).map(
        lambda run: list(range(run[0], min(POOL_BLOCKS, run[0] + run[1])))
    ),
    min_size=1,
    max_size=8,
).map(lambda runs: [block for run in runs for block in run])


@settings(max_examples=60, deadline=None)
@given(
    ids=id_lists,
    tile_bytes=st.lists(st.sampled_from([8, 24, 4096, 6000]), min_size=1, max_size=12),
    padding=st.sampled_from([0, 40]),
)
def test_gather_and_scatter_move_the_right_bytes(ids: list[int], tile_bytes: list[int], padding: int) -> None:
    pool = Pool(tile_bytes)
    stride = pool.block_bytes + padding
    staging = np.zeros(len(ids) * stride, dtype=np.uint8)
    for pages in (MappedPages(), ProcessVmPages(os.getpid())):
        staging[:] = 0xEE
        pages.gather(pool.iovecs(ids), len(tile_bytes), staging.ctypes.data, pool.block_bytes, stride)
        for index, block in enumerate(ids):
            slot = staging[index * stride : (index + 1) * stride].tobytes()
            assert slot == pool.block(block) + b"\xee" * padding
    unique = list(dict.fromkeys(ids))
    for pages in (MappedPages(), ProcessVmPages(os.getpid())):
        before = [layer.copy() for layer in pool.layers]
        for index in range(len(unique)):
            staging[index * stride : index * stride + pool.block_bytes] ^= 0x5A
        pages.scatter(pool.iovecs(unique), len(tile_bytes), staging.ctypes.data, pool.block_bytes, stride)
        for index, block in enumerate(unique):
            assert pool.block(block) == staging[index * stride : index * stride + pool.block_bytes].tobytes()
        others = [block for block in range(POOL_BLOCKS) if block not in unique]
        assert all((new[others] == old[others]).all() for new, old in zip(pool.layers, before, strict=True))


@pytest.mark.parametrize(
    ("ids", "remote_pieces"),
    [(range(8), 32), ([7, 6, 5, 4, 3, 2, 1, 0], 8 * 32), ([0, 1, 2, 9, 10, 20, 21, 22], 3 * 32)],
)
def test_pieces_that_follow_each_other_are_one(
    ids: Sequence[int], remote_pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool([64] * 32)
    pages = ProcessVmPages(os.getpid())
    calls: list[int] = []

    def count(name: str, local: Any, remote: Any, expect_bytes: int) -> None:
        assert int(local[:, 1].sum()) == int(remote[:, 1].sum()) == expect_bytes
        calls.append(len(remote))

    monkeypatch.setattr(pages, "_call", count)
    pages.gather(pool.iovecs(list(ids)), 32, 1 << 20, pool.block_bytes, pool.block_bytes)
    assert calls == [remote_pieces]


@pytest.mark.parametrize("tiles", [700, 1500])
def test_more_pieces_than_a_call_takes(tiles: int) -> None:
    pool = Pool([8] * tiles)
    staging = np.zeros(3 * pool.block_bytes, dtype=np.uint8)
    pages: Pages = ProcessVmPages(os.getpid())
    pages.gather(pool.iovecs([4, 5, 30]), tiles, staging.ctypes.data, pool.block_bytes, pool.block_bytes)
    assert staging.tobytes() == pool.block(4) + pool.block(5) + pool.block(30)


def test_memory_that_is_not_there_is_an_error() -> None:
    pages = ProcessVmPages(os.getpid())
    with pytest.raises(IoServiceError, match="process_vm_readv"):
        pages.gather(np.array([[4096, 64], [4160, 64]], dtype=np.uint64), 1, 1 << 20, 64, 64)
