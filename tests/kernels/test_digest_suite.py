"""The digest kernel on every route, against the `xxhash` package."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.chunk.checksum import HASH_ID_XXH3_TREE
from memkv_engines.limits import ALIGN_BYTES
from memkv_engines.limits import LEAF_BYTES as PACKAGE_LEAF_BYTES
from tests.kernels.abi import LEAF_BYTES
from tests.kernels.digest_suite import (
    CHECKS,
    Check,
    check_blocks,
    check_every_short_length,
    check_lengths,
    digests,
    memory_of,
)
from tests.kernels.routes import Route


def test_the_leaves_are_those_of_the_format() -> None:
    assert (LEAF_BYTES, HASH_ID_XXH3_TREE) == (PACKAGE_LEAF_BYTES, 1)
    # Payload and block stride are multiples of this, so a leaf that the kernel refuses cannot occur in a chunk.
    assert ALIGN_BYTES % 16 == 0


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_digests(route: Route, check: Check) -> None:
    check(route)


def test_every_short_length(route: Route) -> None:
    check_every_short_length(route)


def test_lengths_over_a_whole_leaf(searched: Route) -> None:
    """Every fifth length up to a leaf's, every 97th where lanes are fibers; all remainders modulo 64 occur."""
    check_lengths(searched, range(330, LEAF_BYTES + 1, 5 if searched.name == "sm_90" else 97))


@settings(max_examples=40, deadline=None)
@given(
    block_bytes=st.integers(1, 3 * LEAF_BYTES),
    count=st.integers(1, 3),
    padding=st.integers(0, 300).map(lambda n: 16 * n),
    grid=st.integers(1, 5),
    warps=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_random_blocks(
    searched: Route, block_bytes: int, count: int, padding: int, grid: int, warps: int, seed: int
) -> None:
    check_blocks(searched, block_bytes, count, padding, grid, 32 * warps, seed)


def test_one_changed_bit_changes_the_leaf(searched: Route) -> None:
    """In each piece of 16 bytes of a leaf some bit is flipped: no byte is left out of the digest."""
    memory = memory_of(LEAF_BYTES, 21)
    shape = {"block_bytes": LEAF_BYTES, "stride": LEAF_BYTES, "count": 1}
    before, _ = digests(searched, memory, **shape)
    random = np.random.default_rng(22)
    for at in range(0, LEAF_BYTES, 16 if searched.name == "sm_90" else 512):
        where, bit = at + int(random.integers(16)), np.uint8(1 << int(random.integers(8)))
        memory[where] ^= bit
        assert digests(searched, memory, **shape)[0] != before, f"byte {where}"
        memory[where] ^= bit
