"""Look-ups against a tier that really holds chunks: never more than is stored, and all of it where that is promised."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.keys import Shard
from memkv_engines.offload import lookup, milestones
from memkv_engines.offload.lookup import GroupView, Hit, Run
from memkv_engines.offload.messages import ProbeDone
from memkv_engines.offload.probing import ChainWalk
from tests.fast.lookup_samples import GROUP, TOKENS, N, World, check, covered, greedy_ends, prompt, reachable
from tests.fast.samples import NAMESPACE, SHARD, chain


@pytest.fixture(autouse=True, scope="module")
def _short_milestones() -> Iterator[None]:
    """So that prompts of a few chunks reach some."""
    with mock.patch.object(lookup, "MILESTONE_CHUNKS", 2), mock.patch.object(milestones, "MILESTONE_CHUNKS", 2):
        yield


paths = st.text("ab", min_size=1, max_size=18)
grid_chunks = st.tuples(paths, st.integers(0, 4), st.just(N))
tails = st.tuples(paths, st.integers(0, 4), st.integers(1, N - 1))


# ------------------------------------------------------------------------------------------------------ the whole truth


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(grid_chunks, tails), max_size=12), st.lists(st.tuples(paths, st.integers(0, 18)), max_size=4))
def test_a_hit_is_all_that_chunks_on_the_grid_cover(
    stored: list[tuple[str, int, int]], asked: list[tuple[str, int]]
) -> None:
    world, names = World(), set()
    for path, chunk, count in stored:
        own = prompt(path)[chunk * N : chunk * N + count]
        if own:
            world.put(own)
            names.add((chunk * N, tuple(own)))
    for number, (path, blocks) in enumerate(asked):
        hashes = prompt(path)
        computed = 0 if not number else min(blocks, len(hashes))
        end = check(world, world.ask(hashes, computed=computed * TOKENS), hashes, computed * TOKENS)
        # The walk begins where the chunk begins that the engine's own blocks end in, or at the front.
        assert end <= max(computed, reachable(names, hashes), reachable(names, hashes, computed - computed % N))
        if not number:
            # Later prompts may be answered by what the look-up knows already, which can be less.
            assert end in greedy_ends(names, hashes)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(paths, st.integers(0, 17), st.integers(1, 9)), max_size=12),
    st.lists(st.tuples(paths, st.integers(0, 18)), min_size=1, max_size=6),
    st.integers(1, 6),
)
def test_never_more_than_is_stored_whatever_the_chunks(
    stored: list[tuple[str, int, int]], asked: list[tuple[str, int]], align: int
) -> None:
    """Chunks of any length anywhere, as other settings write them."""
    world = World(align_tokens=align * TOKENS)
    for path, start, count in stored:
        own = prompt(path)[start : start + count]
        if own:
            world.put(own)
    for path, blocks in asked:
        hashes = prompt(path)
        computed = min(blocks, len(hashes)) * TOKENS
        hit = world.ask(hashes, computed=computed)
        check(world, hit, hashes, computed)
        assert hit.tokens % (align * TOKENS) == 0 or hit.tokens <= computed


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(paths, st.integers(0, 4), st.integers(1, N)), max_size=10), paths)
def test_what_was_stored_here_is_known_without_a_probe(stored: list[tuple[str, int, int]], path: str) -> None:
    world, names = World(), set()
    for own_path, chunk, count in stored:
        own = prompt(own_path)[chunk * N : chunk * N + count]
        if own:
            world.put(own)
            world.lookup.learn(0, own, 0)
            names.add((chunk * N, tuple(own)))
    hashes = prompt(path)
    world.ask_once(hashes)
    world.sent.clear()
    world.clock.now += 1  # the deadline passes without an answer
    hit = world.ask_once(hashes)
    assert hit is not None
    end = check(world, hit, hashes, 0)
    assert end in greedy_ends(names, hashes)


def test_a_missing_chunk_in_the_middle_ends_the_hit() -> None:
    world, hashes = World(), chain(4 * N)
    for chunk in (0, 1, 3):
        world.put(hashes[chunk * N : (chunk + 1) * N])
    assert world.ask(hashes).tokens == 2 * N * TOKENS
    assert world.ask(hashes, computed=3 * N * TOKENS).tokens == 4 * N * TOKENS


def test_an_engine_that_has_part_of_a_chunk_gets_the_rest() -> None:
    world, hashes = World(), chain(2 * N)
    world.put(hashes[:N])
    world.put(hashes[N:])
    hit = world.ask(hashes, computed=(N + 1) * TOKENS)
    assert hit == Hit(2 * N * TOKENS, {0: (Run(N, N, 1, 0, b"", N),)})


def test_chunks_longer_than_ours_are_used() -> None:
    world, hashes = World(), chain(12)
    world.put(hashes[:10])
    assert world.ask(hashes).tokens == 10 * TOKENS
    assert world.ask(hashes[:7]).tokens == 7 * TOKENS
    # From a position that is none of its starts it is found from the beginning.
    assert world.ask(hashes, computed=5 * TOKENS).tokens == 10 * TOKENS


def test_a_prompt_that_ends_inside_a_chunk_does_not_hide_the_rest_of_it() -> None:
    world, hashes = World(), chain(2 * N)
    for start in (0, N):
        world.put(hashes[start : start + N])
    assert world.ask(hashes[: N + 1]).tokens == (N + 1) * TOKENS
    assert world.ask(hashes).tokens == 2 * N * TOKENS


def test_a_known_variant_does_not_hide_a_better_one() -> None:
    world, hashes = World(), chain(N)
    other = [hashes[0], *chain(N - 1, "b")]
    world.put(other)
    world.lookup.learn(0, other, 0)
    world.put(hashes)  # by another engine
    assert world.ask(hashes).tokens == N * TOKENS
    # Where there is none, this costs one probe, and its answer is remembered.
    third = [hashes[0], *chain(N - 1, "c")]
    before = world.counters["probe_requests"]
    assert [world.ask(third).tokens for _ in range(3)] == [TOKENS] * 3
    assert world.counters["probe_requests"] == before + 1


# -------------------------------------------------------------------------------------------------------------- probing


def test_a_prompt_that_shared_little_of_a_chunk_leaves_the_rest_known() -> None:
    world, hashes = World(), chain(2 * N)
    world.put(hashes[:N])
    world.put(hashes[N:])
    short = hashes[: N - 2]
    assert world.ask(short).tokens == (N - 2) * TOKENS
    assert world.ask(hashes).tokens == 2 * N * TOKENS


def test_one_probe_a_prompt_and_none_once_it_is_known() -> None:
    world, hashes = World(), chain(3 * N)
    for chunk in range(3):
        world.put(hashes[chunk * N : (chunk + 1) * N])
    assert world.ask_once(hashes) is None
    assert [world.ask_once(hashes) for _ in range(5)] == [None] * 5
    assert len(world.sent) == 1
    world.answer()
    for request in ("r", "another"):
        assert world.ask_once(hashes, request=request) == Hit(3 * N * TOKENS, {0: (Run(0, N, 3, 0, b"", 3 * N),)})
    assert (world.sent, world.counters["probe_requests"]) == ([], 1)


def test_a_miss_is_remembered_for_a_while() -> None:
    world, hashes = World(), chain(N)
    assert world.ask(hashes).tokens == 0
    assert world.ask_once(hashes, request="b") == Hit(0, {0: ()})
    world.clock.now += 2.1
    world.put(hashes)
    assert world.ask_once(hashes, request="c") is None
    world.answer()
    hit = world.ask_once(hashes, request="c")
    assert hit is not None and hit.tokens == N * TOKENS
    assert world.counters["probe_requests"] == 2


def test_no_answer_in_time_is_a_counted_miss_and_a_late_answer_is_learned() -> None:
    world, hashes = World(), chain(N)
    world.put(hashes)
    assert world.ask_once(hashes) is None
    world.clock.now += 0.24
    assert world.ask_once(hashes) is None
    world.clock.now += 0.02
    assert world.ask_once(hashes) == Hit(0, {0: ()})
    assert world.counters["probe_timeouts"] == 1
    assert [world.ask_once(hashes) for _ in range(3)] == [Hit(0, {0: ()})] * 3
    # Nobody else waits for a tier that is silent.
    assert world.ask_once(hashes, request="b") == Hit(0, {0: ()})
    assert len(world.sent) == 1
    world.answer()
    for request in ("r", "b", "c"):
        hit = world.ask_once(hashes, request=request)
        assert hit is not None and hit.tokens == N * TOKENS
    assert world.sent == []


def test_silence_ends() -> None:
    world = World()
    assert world.ask_once(chain(N)) is None
    world.clock.now += 0.3
    assert world.ask_once(chain(N)) == Hit(0, {0: ()})
    world.clock.now += 60
    assert world.ask_once(chain(N, "b"), request="b") is None


def test_after_a_silence_one_request_waits_and_the_others_do_not() -> None:
    world = World()
    assert world.ask_once(chain(N)) is None
    world.clock.now += 0.3
    assert world.ask_once(chain(N)) == Hit(0, {0: ()})
    world.clock.now += 2.0
    asked = [world.ask_once(chain(N, name), request=name) for name in "bcd"]
    assert asked == [None, Hit(0, {0: ()}), Hit(0, {0: ()})]


def test_nobody_waits_for_a_prober_that_has_gone() -> None:
    world = World()
    assert world.ask_once(chain(N)) is None
    world.lookup.lose_service()
    assert world.ask_once(chain(N)) == Hit(0, {0: ()})
    assert world.counters["probe_timeouts"] == 1


def test_a_request_that_goes_leaves_nothing_behind() -> None:
    world, hashes = World(), chain(N)
    world.put(hashes)
    assert world.ask_once(hashes) is None
    world.lookup.forget_request("r")
    world.lookup.forget_request("unknown")
    assert (world.lookup._asked, world.lookup._probes) == ({}, {})
    world.answer()
    hit = world.ask_once(hashes, request="b")
    assert hit is not None and hit.tokens == N * TOKENS


def test_known_hits_expire_and_are_asked_for_again() -> None:
    world, hashes = World(), chain(N + 1)
    name = world.put(hashes[:N])
    tail = world.put(hashes[N:])
    assert world.ask(hashes).tokens == (N + 1) * TOKENS
    world.tier.remove(NAMESPACE.folder, name)
    world.tier.remove(NAMESPACE.folder, tail)
    assert world.ask(hashes).tokens == (N + 1) * TOKENS  # believed
    world.clock.now += 102
    for _ in range(10):
        world.lookup.index.sweep()
    assert world.ask(hashes).tokens == 0
    assert world.counters["probe_requests"] == 2


def test_a_bad_chunk_is_not_advertised_until_it_is_written_again() -> None:
    world, hashes = World(), chain(3 * N)
    for chunk in range(3):
        world.put(hashes[chunk * N : (chunk + 1) * N])
    assert world.ask(hashes).tokens == 3 * N * TOKENS
    bad = hashes[N : 2 * N]
    world.lookup.forget_chunk(0, bad[0], bad[-1], N)
    for _ in range(3):
        assert world.ask(hashes).tokens == N * TOKENS
        world.clock.now += 5  # the prober sees the file, and is not believed
    assert world.counters["probe_requests"] > 1
    world.lookup.learn(0, bad, 0)
    assert world.ask(hashes).tokens == 3 * N * TOKENS


def test_a_bad_tail_is_not_advertised_either() -> None:
    world, hashes = World(), chain(N + 2)
    world.put(hashes[:N])
    world.put(hashes[N:])
    assert world.ask(hashes).tokens == (N + 2) * TOKENS
    world.lookup.forget_chunk(0, hashes[N], hashes[-1], 2)
    assert world.ask(hashes).tokens == N * TOKENS


def test_nothing_is_asked_where_nothing_can_be_gained() -> None:
    world, hashes = World(), chain(N + 1)
    assert world.ask_once(hashes, computed=(N + 1) * TOKENS) == Hit((N + 1) * TOKENS, {0: ()})
    assert world.ask_once([]) == Hit(0, {0: ()})
    assert world.sent == []


def test_answers_that_contradict_themselves_teach_nothing() -> None:
    world, hashes = World(), chain(2 * N)
    world.put(hashes[:N])
    assert world.ask_once(hashes) is None
    (probe,) = world.sent
    good = ChainWalk(probe, world.tier).run()[0]
    for changes in (
        {"position": 1},
        {"take": 0},
        {"take": 9},
        {"last": b"short"},
        {"block_count": 2},
        {"position": 99},
    ):
        values = {field: getattr(good, field) for field in type(good).__struct_fields__}
        world.lookup._probes[probe.probe_id] = ("r", 0, hashes, 0)
        world.lookup.take_probe(ProbeDone(probe.probe_id, (type(good)(**{**values, **changes}),), 1))
        assert len(world.lookup.index) == 0
    world.lookup.take_probe(ProbeDone(4711, (good,), 1))
    assert len(world.lookup.index) == 0


def test_probes_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memkv_engines.offload.lookup.MAX_PROBES_IN_FLIGHT", 3)
    world = World()
    answers = [world.ask_once(chain(N, str(i)), request=str(i)) for i in range(5)]
    assert answers == [None] * 3 + [Hit(0, {0: ()})] * 2
    for i in range(3):
        world.lookup.forget_request(str(i))
    assert [world.ask_once(chain(N, f"x{i}"), request=f"x{i}") for i in range(3)] == [None] * 3
    assert len(world.lookup._late) <= 3


def test_clearing_forgets_what_is_under_way_too() -> None:
    world, hashes = World(), chain(N)
    world.put(hashes)
    world.ask(hashes)
    world.ask_once(chain(N, "b"), request="b")
    world.lookup.clear()
    world.answer()
    assert len(world.lookup.index) == 0
    assert world.ask_once(hashes, request="c") is None


# -------------------------------------------------------------------------------------- windows, groups, shards, bounds


@settings(max_examples=120, deadline=None)
@given(
    st.sets(st.integers(0, 5)),
    st.sets(st.tuples(st.integers(0, 5), st.integers(0, N - 1))),
    st.integers(1, 6 * N),
    st.integers(1, 7),
)
def test_a_window_group_needs_only_its_window(
    full: set[int], windowed: set[tuple[int, int]], blocks: int, window_blocks: int
) -> None:
    window = GroupView(1, TOKENS, N, (SHARD,), window_tokens=window_blocks * TOKENS)
    world, hashes = World([GROUP, window]), chain(6 * N)
    for chunk in full:
        world.put(hashes[chunk * N : (chunk + 1) * N])
    for chunk, holes in windowed:
        world.put(hashes[chunk * N : (chunk + 1) * N], holes=holes, group=1)
    own = hashes[:blocks]
    hit = world.ask(own, own)
    end = hit.tokens // TOKENS
    assert set(range(end)) <= covered(hit, GROUP, own, world.tier)
    if end:
        need = max(0, hit.tokens - window.window_tokens + 1) // TOKENS
        assert set(range(need, end)) <= covered(hit, window, own, world.tier)
    # Where every chunk is there without holes, nothing is lost.
    if full == set(range(6)) and {c for c, holes in windowed if not holes} == full:
        assert end == blocks


def test_a_window_hit_does_not_need_what_lies_before() -> None:
    window = GroupView(1, TOKENS, N, (SHARD,), window_tokens=2 * TOKENS)
    world, hashes = World([GROUP, window]), chain(3 * N)
    for chunk in range(3):
        world.put(hashes[chunk * N : (chunk + 1) * N])
    world.put(hashes[2 * N :], holes=2, group=1)
    hit = world.ask(hashes, hashes)
    assert hit.tokens == 3 * N * TOKENS
    assert hit.runs[1] == (Run(2 * N, N, 1, 2, b"", N),)


def test_a_window_that_fails_one_prompt_is_no_miss_for_another() -> None:
    window = GroupView(1, TOKENS, N, (SHARD,), window_tokens=2 * TOKENS)
    world, hashes = World([GROUP, window]), chain(N)
    world.put(hashes)
    world.put(hashes, holes=2, group=1)
    short = hashes[: N - 1]
    assert world.ask(short, short).tokens == 0, "a block of the shorter prompt's window is a hole"
    assert world.ask(hashes, hashes).tokens == N * TOKENS


def test_groups_with_other_block_sizes_agree_on_what_all_have() -> None:
    wide = GroupView(1, 2 * TOKENS, 2, (SHARD,))
    world, hashes, wides = World([GROUP, wide]), chain(2 * N), chain(N, "wide")
    for start in (0, N):
        world.put(hashes[start : start + N])
    world.put(wides[:2], group=1)
    assert world.ask(hashes, wides).tokens == N * TOKENS
    world.put(wides[2:3], group=1)
    world.clock.now += 3
    assert world.ask(hashes, wides).tokens == (N + 2) * TOKENS
    assert world.ask(hashes[: N + 1], wides[:2]).tokens == N * TOKENS


def test_every_shard_must_be_there() -> None:
    other = Shard(0, 1, 3, 0, 30, 30)
    world, hashes = World([GroupView(0, TOKENS, N, (SHARD, other))]), chain(N)
    world.put(hashes)
    assert world.ask(hashes).tokens == 0
    world.put(hashes, shard=other)
    world.clock.now += 3
    assert world.ask(hashes).tokens == N * TOKENS


def test_hits_end_on_the_alignment() -> None:
    world, hashes = World(align_tokens=3 * TOKENS), chain(2 * N)
    world.put(hashes[:N])
    world.put(hashes[N:])
    assert world.ask(hashes).tokens == 6 * TOKENS
    assert world.ask(hashes[:2]).tokens == 0


def test_asking_never_blocks_nor_touches_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    world, hashes = World(), chain(8 * N + 3)
    for start in range(0, 6 * N, N):
        world.put(hashes[start : start + N])
    world.put(hashes[6 * N : 6 * N + 2])

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the scheduler's thread must not do this")

    with monkeypatch.context() as patch:
        for name in ("open", "stat", "lstat", "listdir", "scandir", "read", "write", "mkdir", "access", "fsync"):
            patch.setattr(os, name, forbidden)
        patch.setattr("builtins.open", forbidden)
        patch.setattr(time, "sleep", forbidden)
        patch.setattr("threading.Condition.wait", forbidden)
        patch.setattr("threading.Event.wait", forbidden)
        assert world.ask_once(hashes) is None
        world.clock.now += 0.1
        assert world.ask_once(hashes) is None
    world.answer()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", forbidden)
        patch.setattr("builtins.open", forbidden)
        patch.setattr(time, "sleep", forbidden)
        hit = world.ask_once(hashes)
    assert hit is not None and hit.tokens == (6 * N + 2) * TOKENS
