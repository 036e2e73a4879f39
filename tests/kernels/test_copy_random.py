"""Gather and scatter over random layouts."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.copy_suite import Variant, check_both
from tests.kernels.layouts import Builder, Paged, Placement
from tests.kernels.routes import Route

Case = tuple[Paged, Placement, list[int], dict[str, Any]]
SIZES = st.sampled_from((1, 2, 3, 7, 16, 24, 48, 64, 100, 132, 512, 576, 584, 656, 1000, 1024, 2048, 4096, 8448))
MISALIGNMENTS = st.sampled_from((0, 0, 0, 1, 2, 4, 8, 12, 16))
SETTINGS = settings(max_examples=60, deadline=None)


@st.composite
def pools(draw: st.DrawFn, step: int = 1) -> Paged:
    """Some caches of any stride and alignment with pieces that do not overlap; all multiples of `step`."""
    builder = Builder(draw(st.integers(0, 2**16)), draw(st.integers(1, 9)))
    for _ in range(draw(st.integers(1, 4))):
        length = -(-draw(SIZES) // step) * step
        pieces = draw(st.integers(1, 4))
        padding = draw(MISALIGNMENTS) // step * step
        cache = builder.cache(pieces * length + padding, draw(MISALIGNMENTS) // step * step)
        shift = draw(st.integers(0, padding // step)) * step
        order = draw(st.permutations(range(pieces)))
        for number in order[: draw(st.integers(1, pieces))]:
            builder.piece(cache, shift + number * length, length)
    return builder.build()


@st.composite
def cases(draw: st.DrawFn, step: int = 1) -> Case:
    """A pool, a placement, ids with holes, and a launch."""
    paged = draw(pools(step))
    gap = draw(st.sampled_from((0, 0, 1, 16, 48, 4096))) // step * step
    header = draw(st.sampled_from((0, 64, 4096, 5))) // step * step
    placement = Placement(header, draw(st.sampled_from((0, paged.block_bytes + gap))))
    order = draw(st.permutations(range(paged.num_blocks)))
    ids = list(order[: draw(st.integers(0, paged.num_blocks))])
    for index in range(len(ids)):
        if draw(st.integers(0, 9)) == 0:
            ids[index] = -draw(st.integers(1, 2**31))
    launch = {
        "first_index": draw(st.integers(0, 3)),
        "external": draw(st.booleans()),
        "grid": draw(st.integers(1, 6)),
        "block": 32 * draw(st.integers(1, 5)),
        "seed": draw(st.integers(0, 2**16)),
        "misalign": draw(MISALIGNMENTS) // step * step,
        "tile_bytes": draw(st.sampled_from((16, 64, 512, 2048, 4096))),
    }
    return paged, placement, ids, launch


@SETTINGS
@given(case=cases())
def test_random_layouts(searched: Route, case: Case) -> None:
    paged, placement, ids, launch = case
    check_both(Variant(searched), paged, placement, ids, **launch)


@SETTINGS
@given(case=cases(step=16))
def test_random_layouts_in_bulk(searched_bulk: Variant, case: Case) -> None:
    paged, placement, ids, launch = case
    check_both(searched_bulk, paged, placement, ids, **launch)
