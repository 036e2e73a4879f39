"""What came before a page: what was seen, joined to what SGLang passes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memkv_engines.sglang.chain import ChainMemory

PAGES = [bytes([index]) * 32 for index in range(12)]


def test_a_short_chain_that_was_seen_is_continued_by_what_is_passed() -> None:
    memory = ChainMemory()
    memory.learn(PAGES[5:9])

    assert memory.context(PAGES[8], PAGES[:7], 8) == PAGES[:8]
    assert memory.context(PAGES[8], PAGES[:7], 5) == PAGES[3:8]


def test_what_is_passed_with_a_gap_does_not_cut_off_what_was_seen() -> None:
    memory = ChainMemory()
    memory.learn(PAGES[3:9])

    assert memory.context(PAGES[8], PAGES[:2], 8) == PAGES[3:8]


def test_nothing_seen_leaves_what_is_passed() -> None:
    memory = ChainMemory()

    assert memory.context(PAGES[8], PAGES[:8], 3) == PAGES[5:8]
    assert memory.context(PAGES[8], PAGES[:8], 0) == []


@given(st.integers(0, 10), st.integers(0, 10), st.integers(0, 10), st.integers(0, 12))
def test_the_context_is_always_a_piece_of_the_chain_that_ends_before_the_page(
    first_seen: int, page: int, passed: int, count: int
) -> None:
    memory = ChainMemory()
    memory.learn(PAGES[min(first_seen, page) : page + 1])

    found = memory.context(PAGES[page], PAGES[: min(passed, page)], count)

    assert len(found) <= count
    whole = [*PAGES[:page]]
    # With a gap between the two, which nobody can see, only what is passed is there where nothing was seen.
    end = page if first_seen < page else min(passed, page)
    assert found == whole[end - len(found) : end]
    if min(first_seen, page) <= min(passed, page) - 1 or first_seen >= page:
        assert len(found) == min(count, end)
