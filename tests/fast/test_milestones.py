"""Prefixes known as a whole: found by bisection, never longer than what was learned, forgotten in time."""

from __future__ import annotations

from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.offload import milestones
from memkv_engines.offload.index import ChunkIndex
from memkv_engines.offload.lookup import Hit, Run
from memkv_engines.offload.milestones import Milestones
from tests.fast.lookup_samples import TOKENS, N, World, check
from tests.fast.samples import chain
from tests.fast.test_index import Clock

M = 2


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 12)), max_size=5), st.integers(0, 48))
def test_never_more_than_was_learned(learned: list[tuple[str, int]], asked: int) -> None:
    known = Milestones(100, 60)
    most = {"a": 0, "b": 0}
    with mock.patch.object(milestones, "MILESTONE_CHUNKS", M):
        for prompt, chunks in learned:
            known.extend(chain(48, prompt), 4, 0, chunks)
            most[prompt] = max(most[prompt], chunks)
        for prompt, chunks in most.items():
            assert known.known_chunks(chain(48, prompt)[:asked], 4, 0) == min(chunks, asked // 4) // M * M
            assert known.known_chunks(chain(48, prompt), 4, 1) == known.known_chunks(chain(48, prompt), 5, 0) == 0


def test_what_follows_is_believed_no_longer_than_what_it_follows() -> None:
    clock = Clock()
    known, hashes = Milestones(100, 60, clock), chain(64)
    known.extend(hashes, 1, 0, 16)
    clock.now += 40
    known.extend(hashes, 1, 0, 64)
    assert known.known_chunks(hashes, 1, 0) == 64
    clock.now += 21
    assert known.known_chunks(hashes, 1, 0) == 0
    known.extend(hashes, 1, 0, 32)
    assert known.known_chunks(hashes, 1, 0) == 32
    known.clear()
    assert known.known_chunks(hashes, 1, 0) == 0


def test_they_are_bounded_and_a_forgotten_one_only_shortens() -> None:
    known = Milestones(3, 60)
    hashes = chain(16 * 6)
    known.extend(hashes, 1, 0, 16 * 6)
    assert known.known_chunks(hashes, 1, 0) == 16 * 6
    assert known.known_chunks(hashes[: 16 * 4], 1, 0) == 16 * 4
    assert known.known_chunks(hashes[: 16 * 3], 1, 0) == 0


def stored(chunks: int) -> tuple[World, list[bytes]]:
    world, hashes = World(), chain(chunks * N + 3)
    for start in range(0, chunks * N, N):
        world.put(hashes[start : start + N])
    world.put(hashes[chunks * N :])
    return world, hashes


def test_a_long_prompt_is_not_looked_up_chunk_by_chunk() -> None:
    world, hashes = stored(50)
    expected = Hit(
        (50 * N + 3) * TOKENS, {0: (Run(0, N, 50, 0, b"", 50 * N), Run(50 * N, 3, 1, 0, hashes[-1][:16], 3))}
    )
    assert world.ask(hashes) == expected
    with mock.patch.object(ChunkIndex, "leading_chunks", side_effect=AssertionError):
        assert world.ask_once(hashes, request="b") == expected
        part = world.ask_once(hashes[: 37 * N], request="c")
        assert part == Hit(37 * N * TOKENS, {0: (Run(0, N, 37, 0, b"", 37 * N),)})
        late = world.ask_once(hashes, computed=35 * N * TOKENS, request="d")
        assert late is not None and late.runs[0][0] == Run(35 * N, N, 15, 0, b"", 15 * N)


def test_what_was_learned_by_storing_is_a_milestone_once_it_was_asked_for() -> None:
    world, hashes = stored(40)
    for start in range(0, 40 * N, N):
        world.lookup.learn(0, hashes[start : start + N], 0)
    first = world.ask(hashes[: 40 * N])
    with mock.patch.object(ChunkIndex, "leading_chunks", side_effect=AssertionError):
        assert world.ask_once(hashes[: 40 * N], request="b") == first
    assert check(world, first, hashes, 0) == 40 * N


def test_a_bad_chunk_ends_the_hit_where_it_lies() -> None:
    world, hashes = stored(50)
    world.ask(hashes)
    bad = hashes[20 * N : 21 * N]
    world.lookup.forget_chunk(0, bad[0], bad[-1], N)
    for request in ("b", "c"):
        world.clock.now += 3
        assert world.ask(hashes, request=request).tokens == 20 * N * TOKENS
    world.lookup.learn(0, bad, 0)
    assert world.ask(hashes).tokens == (50 * N + 3) * TOKENS


def test_milestones_expire_with_what_they_stand_for() -> None:
    world, hashes = stored(50)
    world.ask(hashes)
    world.tier._objects.clear()
    world.clock.now += 102
    world.lookup.index.sweep()
    assert world.ask(hashes).tokens == 0
