"""What is stored: every block once, nothing that is known or on its way, and again what was shed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.limits import HASH_BYTES
from memkv_engines.offload.lookup import GroupView
from memkv_engines.offload.messages import StoreChunk
from memkv_engines.offload.planning import OUTCOMES_WORST_FIRST, StorePlanner
from tests.fast.lookup_samples import GROUP, TOKENS, N, World
from tests.fast.samples import NAMESPACE, SHARD, chain

Plan = tuple[int, tuple[StoreChunk, ...]] | None
SPACE = NAMESPACE.digest


class Desk:
    """A planner, and requests whose page numbers are their block numbers + 1."""

    def __init__(self, groups: Sequence[GroupView] = (GROUP,)) -> None:
        self.world = World(groups)
        self.lookup = self.world.lookup
        self.planner = StorePlanner(groups, self.lookup)

    def step(self, hashes: Sequence[bytes], computed: int, request: str = "r", ids: Sequence[int] = ()) -> Plan:
        """A step after which this many tokens of a request of one group are computed."""
        pages = ids or range(1, len(hashes) + 1)
        if not self.planner.may_plan(request, computed):
            assert self.planner.plan_step(request, [hashes], [pages], computed, SPACE) is None
            return None
        return self.planner.plan_step(request, [hashes], [pages], computed, SPACE)

    def tail(self, hashes: Sequence[bytes], computed: int, request: str = "r", ids: Sequence[int] = ()) -> Plan:
        pages = ids or range(1, len(hashes) + 1)
        return self.planner.plan_tail(request, [hashes], [pages], computed, SPACE)

    def done(self, plan: Plan, outcome: str = "stored") -> None:
        assert plan is not None
        self.planner.take_rank_results(plan[0], 1, 1, (outcome,) * len(plan[1]))


def blocks_of(plan: Plan) -> list[list[bytes]]:
    """Hashes of each chunk of a plan."""
    chunks = plan[1] if plan else ()
    return [[c.hashes[i : i + HASH_BYTES] for i in range(0, len(c.hashes), HASH_BYTES)] for c in chunks]


# --------------------------------------------------------------------------------------------------- each block once


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=20),
    st.lists(st.sampled_from(["stored", "present", "late"]), min_size=20, max_size=20),
)
def test_on_a_single_visit_each_full_block_is_stored_once(steps: list[int], fates: list[str]) -> None:
    desk, tokens = Desk(), sum(steps)
    # The engine hashes only full blocks.
    hashes = chain(tokens // TOKENS)
    pages = list(range(1, len(hashes) + 2))
    stored: list[list[bytes]] = []
    late: list[Plan] = []
    computed = 0
    for step, fate in zip(steps, fates, strict=False):
        computed += step
        plan = desk.step(hashes[: computed // TOKENS], computed, ids=pages[: -(-computed // TOKENS)] or [1])
        if plan is None:
            continue
        stored += blocks_of(plan)
        for chunk, blocks in zip(plan[1], blocks_of(plan), strict=True):
            position = hashes.index(blocks[0])
            assert (chunk.first_position, len(blocks), chunk.holes) == (position, N, 0)
            assert position % N == 0 and (position + N) * TOKENS <= computed
            assert list(chunk.block_ids) == pages[position : position + N]
            assert not chunk.replace and chunk.namespace == SPACE
        if fate == "late":
            late.append(plan)
        else:
            desk.done(plan, fate)
    tail = desk.tail(hashes, computed, ids=pages)
    stored += blocks_of(tail)
    assert [len(blocks) for blocks in stored] == [N] * (len(hashes) // N) + [len(hashes) % N] * (len(hashes) % N > 0)
    assert [block for blocks in stored for block in blocks] == hashes
    for plan in [*late, *([tail] if tail else [])]:
        desk.done(plan)
    # A second visit finds all of it known.
    assert desk.step(hashes, computed, request="again") is None
    assert desk.tail(hashes, computed, request="again") is None
    assert desk.planner._in_flight == set()
    assert desk.planner._progress.keys() <= {"again"} and not desk.planner._sent


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 150)), max_size=30), st.integers(0, 12))
def test_requests_that_share_a_prefix_store_it_once(steps: list[tuple[int, int]], shared: int) -> None:
    """However their steps interleave, and before any result has come back."""
    desk = Desk()
    prompts = [[*chain(shared), *chain(16 - shared, f"own{i}")] for i in range(3)]
    computed = [0, 0, 0]
    stored: list[bytes] = []
    for number, step in steps:
        computed[number] = min(computed[number] + step, 16 * TOKENS)
        for blocks in blocks_of(desk.step(prompts[number], computed[number], request=str(number))):
            stored.append(blocks[-1])
    assert len(set(stored)) == len(stored)
    expected = {prompts[i][k * N + N - 1] for i in range(3) for k in range(computed[i] // TOKENS // N)}
    assert set(stored) == expected


def test_most_steps_cost_one_comparison() -> None:
    desk, hashes = Desk(), chain(3 * N)
    assert desk.planner.may_plan("r", 1)
    assert desk.step(hashes, 1) is None
    asked = [computed for computed in range(1, 3 * N * TOKENS + 1) if desk.planner.may_plan("r", computed)]
    assert asked[0] == N * TOKENS
    plan = desk.step(hashes, N * TOKENS)
    assert blocks_of(plan) == [hashes[:N]]
    assert not desk.planner.may_plan("r", 2 * N * TOKENS - 1)
    assert desk.planner.may_plan("r", 2 * N * TOKENS)


# ----------------------------------------------------------------------------------------------- what is known already


def test_what_the_tier_was_seen_to_hold_is_not_stored_again() -> None:
    desk, hashes = Desk(), chain(2 * N + 2)
    for start, stop in ((0, N), (N, 2 * N), (2 * N, 2 * N + 2)):
        desk.world.put(hashes[start:stop])
    assert desk.world.ask(hashes).tokens == (2 * N + 2) * TOKENS
    assert desk.step(hashes, (2 * N + 2) * TOKENS) is None
    assert desk.tail(hashes, (2 * N + 2) * TOKENS) is None


def test_a_conversation_that_grows_supersedes_its_tail() -> None:
    desk, hashes = Desk(), chain(2 * N)
    first = desk.tail(hashes[: N + 1], (N + 1) * TOKENS)
    assert blocks_of(first) == [hashes[:N], hashes[N : N + 1]]
    desk.done(first)
    assert desk.world.ask_once(hashes[: N + 1]) is not None
    second = desk.tail(hashes[: N + 3], (N + 3) * TOKENS, request="turn 2")
    assert blocks_of(second) == [hashes[N : N + 3]]
    desk.done(second)
    third = desk.step(hashes, 2 * N * TOKENS, request="turn 3")
    assert blocks_of(third) == [hashes[N:]]


def test_what_is_stored_becomes_a_hit() -> None:
    desk, hashes = Desk(), chain(N + 2)
    plan = desk.tail(hashes, (N + 2) * TOKENS)
    desk.done(plan)
    hit = desk.world.ask_once(hashes)
    assert hit is not None and hit.tokens == (N + 2) * TOKENS
    assert desk.world.sent == []


def test_a_bad_chunk_is_written_over() -> None:
    desk, hashes = Desk(), chain(N)
    desk.done(desk.step(hashes, N * TOKENS))
    desk.lookup.forget_chunk(0, hashes[0], hashes[-1], N)
    plan = desk.step(hashes, N * TOKENS, request="b")
    assert plan is not None and [c.replace for c in plan[1]] == [True]
    desk.done(plan)
    assert (0, hashes[-1]) not in desk.lookup.bad
    assert desk.step(hashes, N * TOKENS, request="c") is None


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("outcome", ["failed", "full"])
def test_what_failed_is_not_tried_again_by_the_same_request(outcome: str) -> None:
    desk, hashes = Desk(), chain(2 * N)
    desk.done(desk.step(hashes, N * TOKENS), outcome)
    assert blocks_of(desk.step(hashes, 2 * N * TOKENS)) == [hashes[N:]]
    # But by the next.
    assert blocks_of(desk.step(hashes, N * TOKENS, request="b")) == [hashes[:N]]


def test_what_was_shed_is_offered_again_while_the_request_lives() -> None:
    desk, hashes = Desk(), chain(2 * N + 1)
    for _ in range(3):
        plan = desk.step(hashes, N * TOKENS)
        assert blocks_of(plan) == [hashes[:N]]
        desk.done(plan, "shed")
        assert desk.planner.may_plan("r", N * TOKENS)
    plan = desk.tail(hashes, (2 * N + 1) * TOKENS)
    assert blocks_of(plan) == [hashes[:N], hashes[N : 2 * N], hashes[2 * N :]]
    desk.done(plan, "shed")
    assert desk.planner._progress == {}


def test_retries_are_bounded() -> None:
    desk, hashes = Desk(), chain(N)
    offered = 0
    while (plan := desk.step(hashes, N * TOKENS)) is not None:
        desk.done(plan, "shed")
        offered += 1
        assert offered < 1000
    assert offered == 65


def test_a_preempted_request_goes_on_where_it_was() -> None:
    desk, hashes = Desk(), chain(3 * N)
    desk.done(desk.step(hashes, 2 * N * TOKENS))
    assert desk.step(hashes, TOKENS) is None
    assert blocks_of(desk.step(hashes, 3 * N * TOKENS)) == [hashes[2 * N :]]


def test_stores_on_their_way_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memkv_engines.offload.planning.MAX_PENDING_STORE_CHUNKS", 3)
    desk, hashes = Desk(), chain(5 * N)
    plan = desk.step(hashes, 5 * N * TOKENS)
    assert len(blocks_of(plan)) == 3
    assert desk.tail(hashes, 5 * N * TOKENS, request="b") is None
    assert [desk.step(hashes, 5 * N * TOKENS, request=r) for r in "rc"] == [None, None]
    desk.done(plan)
    # What found no room is offered again.
    assert blocks_of(desk.step(hashes, 5 * N * TOKENS)) == [hashes[3 * N : 4 * N], hashes[4 * N :]]


# ---------------------------------------------------------------------------------------------------------------- pages


def test_a_chunk_without_all_its_pages_is_not_stored() -> None:
    desk, hashes = Desk(), chain(2 * N)
    assert desk.step(hashes, 2 * N * TOKENS, ids=[0] * N + [0, 7, 7, 7]) is None  # holes in full attention
    assert desk.step(hashes, 2 * N * TOKENS, request="b", ids=[1, 2, 0, 4, 0, 0, 0, 0]) is None
    assert blocks_of(desk.step(hashes, 2 * N * TOKENS, request="c", ids=[1, 2, 3, 4, 5])) == [hashes[:N]]
    # Fewer hashes than pages: draft tokens have none.
    assert desk.step(hashes[: N - 1], 2 * N * TOKENS, request="d") is None


def test_a_window_leaves_holes_at_the_front_only() -> None:
    window = GroupView(0, TOKENS, N, (SHARD,), window_tokens=2 * TOKENS)
    desk, hashes = Desk([window]), chain(3 * N)
    plan = desk.step(hashes, 3 * N * TOKENS, ids=[0, 0, 0, 0, 0, 0, 7, 8, 9, 0, 11, 12])
    assert plan is not None
    (chunk,) = plan[1]
    assert (chunk.first_position, chunk.holes, chunk.block_ids) == (N, 2, (7, 8))
    assert blocks_of(plan) == [hashes[N : 2 * N]]
    desk.done(plan)
    # With fewer holes it is worth storing once more, with more it is not.
    assert desk.step(hashes, 2 * N * TOKENS, request="b", ids=[0, 0, 0, 0, 0, 0, 0, 8]) is None
    again = desk.step(hashes, 2 * N * TOKENS, request="c", ids=[0, 0, 0, 0, 0, 6, 7, 8])
    assert again is not None and again[1][0].holes == 1


def test_groups_are_planned_together() -> None:
    wide = GroupView(1, 2 * TOKENS, 2, (SHARD,))
    desk, hashes, wides = Desk([GROUP, wide]), chain(N), chain(2, "wide")
    plan = desk.planner.plan_step("r", [hashes, wides], [range(1, N + 1), [8, 9]], N * TOKENS, SPACE)
    assert plan is not None
    assert [(c.group, c.block_ids) for c in plan[1]] == [(0, (1, 2, 3, 4)), (1, (8, 9))]
    assert blocks_of(plan) == [hashes, wides]


# ---------------------------------------------------------------------------------------------------------------- ranks


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(OUTCOMES_WORST_FIRST), min_size=1, max_size=4))
def test_a_chunk_is_stored_when_every_rank_has_stored_its_part(outcomes: list[str]) -> None:
    desk, hashes = Desk(), chain(N)
    plan = desk.step(hashes, N * TOKENS)
    assert plan is not None
    for number, outcome in enumerate(outcomes):
        known = desk.lookup.index.holes_of(hashes[-1], N, 0)
        assert known is None, f"known after {number} of {len(outcomes)} ranks"
        desk.planner.take_rank_results(plan[0], 1, len(outcomes), (outcome,))
    good = set(outcomes) <= {"stored", "present"}
    assert (desk.lookup.index.holes_of(hashes[-1], N, 0) is not None) == good
    assert desk.planner._in_flight == set() and desk.planner._partial == {}
    retried = desk.step(hashes, N * TOKENS) is not None
    assert retried == (min(outcomes, key=OUTCOMES_WORST_FIRST.index) == "shed")


def test_several_ranks_may_answer_at_once() -> None:
    desk, hashes = Desk(), chain(N)
    plan = desk.step(hashes, N * TOKENS)
    assert plan is not None
    desk.planner.take_rank_results(plan[0], 3, 4, ("stored",))
    desk.planner.take_rank_results(plan[0], 1, 4, ("present",))
    assert desk.lookup.index.holes_of(hashes[-1], N, 0) == 0
    desk.planner.take_rank_results(4711, 1, 1, ("stored",))  # a job nobody knows


def test_after_a_reset_older_jobs_teach_nothing() -> None:
    desk, hashes = Desk(), chain(N)
    plan = desk.step(hashes, N * TOKENS)
    desk.planner.clear()
    desk.lookup.clear()
    desk.done(plan)
    assert len(desk.lookup.index) == 0
    desk.planner.forget_request("r")
    again = desk.step(hashes, N * TOKENS)
    assert blocks_of(again) == [hashes]
    assert again is not None and plan is not None and again[0] != plan[0]
