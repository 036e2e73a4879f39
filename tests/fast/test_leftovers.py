"""Shed chunks of requests that have ended: offered again while their pages hold them, and for a bounded time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.limits import LEFTOVER_BATCH_CHUNKS, LEFTOVER_PAUSE_MAX_S, LEFTOVER_PAUSE_S, LEFTOVER_S
from memkv_engines.offload.lookup import GroupView
from memkv_engines.offload.planning import Plan, StorePlanner
from tests.fast.lookup_samples import TOKENS, N, World
from tests.fast.samples import NAMESPACE, SHARD, chain
from tests.fast.test_index import Clock
from tests.fast.test_planning import blocks_of

SPACE = NAMESPACE.digest


class Ended:
    """A planner, requests that end with the step that computes them, and the pages they leave behind."""

    def __init__(self, room_chunks: int = 100, window_tokens: int = 0) -> None:
        self.clock = Clock()
        group = GroupView(0, TOKENS, N, (SHARD,), window_tokens=window_tokens)
        self.world = World([group])
        self.planner = StorePlanner([group], self.world.lookup, room_chunks=room_chunks, clock=self.clock)
        self.pages: dict[int, bytes] = {}

    def holds(self, group: int, hashes: Sequence[bytes], block_ids: Sequence[int]) -> bool:
        assert group == 0 and 0 not in block_ids
        return all(self.pages.get(page) == own for page, own in zip(block_ids, hashes, strict=True))

    def run(self, hashes: Sequence[bytes], request: str = "r", ids: Sequence[int] = ()) -> list[Plan]:
        """What is planned of a request from its first step to its end."""
        pages, tokens = ids or range(1, len(hashes) + 1), len(hashes) * TOKENS
        self.pages |= {page: own for page, own in zip(pages, hashes, strict=True) if page}
        asked = ([hashes], [pages], tokens, SPACE)
        plans = [self.planner.plan_step(request, *asked), self.planner.plan_tail(request, *asked)]
        return [plan for plan in plans if plan is not None]

    def done(self, plan: Plan | None, outcome: str) -> None:
        assert plan is not None
        self.planner.take_rank_results(plan[0], 1, 1, (outcome,) * len(plan[1]))

    def left(self) -> Plan | None:
        return self.planner.plan_leftovers(self.holds)

    def is_stored(self, hashes: Sequence[bytes]) -> bool:
        return self.world.lookup.index.holes_of(hashes[-1], len(hashes), 0) is not None


def test_what_was_shed_is_stored_after_the_request_has_ended() -> None:
    desk, hashes = Ended(), chain(2 * N + 1)
    plans = desk.run(hashes)
    assert desk.left() is None and not desk.planner.awaits_results
    for plan in plans:
        desk.done(plan, "shed")
    assert desk.planner.awaits_results
    plan = desk.left()
    assert blocks_of(plan) == [hashes[:N], hashes[N : 2 * N], hashes[2 * N :]]
    assert plan is not None and [(c.first_position, c.block_ids) for c in plan[1]] == [
        (0, (1, 2, 3, 4)),
        (N, (5, 6, 7, 8)),
        (2 * N, (9,)),
    ]
    assert desk.left() is None, "one batch at a time"
    desk.done(plan, "stored")
    assert all(desk.is_stored(blocks) for blocks in blocks_of(plan))
    assert desk.left() is None and not desk.planner.awaits_results


@pytest.mark.parametrize("outcome", ["failed", "full", "present", "stored"])
def test_only_what_was_shed_waits(outcome: str) -> None:
    desk = Ended()
    for plan in desk.run(chain(N + 1)):
        desk.done(plan, outcome)
    assert desk.left() is None and not desk.planner.awaits_results


def test_pages_that_hold_something_else_are_not_gathered() -> None:
    desk, hashes = Ended(), chain(3 * N)
    for plan in desk.run(hashes):
        desk.done(plan, "shed")
    desk.pages[N + 2] = chain(1, "another prompt")[0]
    assert blocks_of(desk.left()) == [hashes[:N], hashes[2 * N :]]
    assert (desk.planner.take_lost(), desk.planner.take_lost()) == (1, 0)


def test_holes_need_no_pages() -> None:
    desk, hashes = Ended(window_tokens=2 * TOKENS), chain(N)
    for plan in desk.run(hashes, ids=[0, 0, 7, 8]):
        desk.done(plan, "shed")
    plan = desk.left()
    assert plan is not None and [(c.holes, c.block_ids) for c in plan[1]] == [(2, (7, 8))]


def test_what_another_request_stores_meanwhile_is_not_offered() -> None:
    desk, hashes = Ended(), chain(N)
    for plan in desk.run(hashes):
        desk.done(plan, "shed")
    (other,) = desk.run(hashes, "another")
    assert desk.left() is None
    desk.done(other, "stored")
    assert desk.left() is None and not desk.planner.awaits_results


def test_the_wait_is_bounded() -> None:
    desk, hashes = Ended(), chain(N)
    for plan in desk.run(hashes):
        desk.done(plan, "shed")
    offered, began = 0, desk.clock.now
    while desk.planner.awaits_results:
        plan = desk.left()
        if plan is not None:
            offered += 1
            desk.done(plan, "shed")
        desk.clock.now += 0.001
    assert LEFTOVER_S <= desk.clock.now - began <= LEFTOVER_S + 1
    desk.clock.now += LEFTOVER_PAUSE_MAX_S
    assert desk.left() is None, "too late"
    assert desk.planner.take_lost() == 1
    # Pauses double up to the longest.
    assert LEFTOVER_S / LEFTOVER_PAUSE_MAX_S / 2 < offered < LEFTOVER_S / LEFTOVER_PAUSE_MAX_S + 10


def test_room_that_was_found_ends_the_long_pauses() -> None:
    desk, hashes = Ended(), chain(4 * N)
    for plan in desk.run(hashes):
        desk.done(plan, "shed")
    for _ in range(4):
        desk.clock.now += LEFTOVER_PAUSE_MAX_S
        desk.done(desk.left(), "shed")
    assert desk.left() is None
    desk.clock.now += LEFTOVER_PAUSE_MAX_S
    plan = desk.left()
    assert plan is not None
    desk.planner.take_rank_results(plan[0], 1, 1, ("stored", "shed", "shed", "shed"))
    desk.clock.now += 1.01 * LEFTOVER_PAUSE_S
    assert blocks_of(desk.left()) == [hashes[i * N : (i + 1) * N] for i in (1, 2, 3)]


def test_a_batch_is_bounded() -> None:
    desk, hashes = Ended(), chain((LEFTOVER_BATCH_CHUNKS + 3) * N)
    for plan in desk.run(hashes):
        desk.done(plan, "shed")
    first = desk.left()
    assert len(blocks_of(first)) == LEFTOVER_BATCH_CHUNKS
    desk.done(first, "stored")
    assert len(blocks_of(desk.left())) == 3


def test_an_idle_engine_awaits_results_of_more_than_there_is_room_for() -> None:
    desk, hashes = Ended(room_chunks=2), chain(3 * N)
    assert not desk.planner.awaits_results
    (plan,) = desk.run(hashes)
    assert desk.planner.awaits_results
    desk.clock.now += LEFTOVER_S
    assert not desk.planner.awaits_results, "results that never come"
    desk.done(plan, "stored")
    (plan,) = desk.run(chain(2 * N, "fits"), "s")
    assert not desk.planner.awaits_results


def test_a_live_request_that_was_shed_too_often_leaves_its_chunk_behind() -> None:
    desk, hashes = Ended(), chain(N)
    desk.pages = dict(enumerate(hashes, 1))
    for _ in range(65):
        plan = desk.planner.plan_step("r", [hashes], [range(1, N + 1)], N * TOKENS, SPACE)
        desk.done(plan, "shed")
    assert desk.planner.plan_step("r", [hashes], [range(1, N + 1)], N * TOKENS, SPACE) is None
    assert blocks_of(desk.left()) == [hashes]


def test_an_answer_that_never_comes_keeps_nobody_waiting() -> None:
    desk = Ended()
    for plan in desk.run(chain(N)):
        desk.done(plan, "shed")
    unanswered = desk.left()
    desk.clock.now += LEFTOVER_S
    for plan in desk.run(chain(N, "later"), "s"):
        desk.done(plan, "shed")
    assert blocks_of(desk.left()) == [chain(N, "later")]
    desk.done(unanswered, "shed")
    assert desk.planner.awaits_results


def test_a_reset_forgets_them() -> None:
    desk = Ended()
    for plan in desk.run(chain(2 * N)):
        desk.done(plan, "shed")
    under_way = desk.left()
    desk.planner.clear()
    desk.done(under_way, "shed")
    assert desk.left() is None and not desk.planner.awaits_results


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_shed_is_stored_once_or_its_pages_are_gone(data: st.DataObject) -> None:
    desk = Ended(room_chunks=2)
    prompts = [chain(data.draw(st.integers(1, 5 * N)), f"prompt {i}") for i in range(3)]
    out: list[Plan] = []
    published: list[bytes] = []
    first = 1
    for number, hashes in enumerate(prompts):
        # Pages are handed out again once there are no others.
        out += desk.run(hashes, str(number), [1 + (first + i) % 24 for i in range(len(hashes))])
        first += len(hashes)
    for _ in range(200):
        if plan := desk.left():
            out.append(plan)
        if out:
            job, chunks = out.pop(data.draw(st.integers(0, len(out) - 1)))
            fates = [data.draw(st.sampled_from(["shed", "stored"])) for _ in chunks]
            for chunk, fate in zip(chunks, fates, strict=True):
                if fate == "stored":
                    published.append(chunk.hashes)
            desk.planner.take_rank_results(job, 1, 1, tuple(fates))
        desk.clock.now += 0.01
    desk.clock.now += LEFTOVER_PAUSE_MAX_S
    while plan := out.pop() if out else desk.left():
        published += [chunk.hashes for chunk in plan[1]]
        desk.done(plan, "stored")
    assert len(set(published)) == len(published)
    for hashes in prompts:
        blocks = [hashes[i : i + N] for i in range(0, len(hashes), N)]
        for chunk in blocks:
            gone = not set(chunk) <= set(desk.pages.values())
            assert b"".join(chunk) in published or gone
    assert desk.planner._in_flight == set() and not desk.planner.awaits_results
