"""When the scheduler side waits for a look-up, and how long at most."""

from __future__ import annotations

import pytest

from memkv_engines.limits import IDLE_LOOKUP_WAIT_S
from memkv_engines.vllm.idle_wait import IdleWait
from tests.fast.clocks import Clock


class Waiter:
    """Something comes in after a while."""

    def __init__(self, news_after_s: float) -> None:
        self.clock, self.news_after_s = Clock(), news_after_s
        self.idle = IdleWait(self.wait, self.clock)
        self.waited_s: list[float] = []

    def wait(self, timeout_s: float) -> None:
        self.waited_s.append(min(timeout_s, self.news_after_s))
        self.clock.now += self.waited_s[-1]


def test_an_idle_engine_waits_for_what_comes_in() -> None:
    waiter = Waiter(0.001)
    assert waiter.idle.wait() and waiter.waited_s == [0.001]


def test_a_busy_engine_does_not_wait() -> None:
    waiter = Waiter(0.001)
    for request_id in "ab":
        waiter.idle.got_pages(request_id)
    waiter.idle.ended("a")
    assert not waiter.idle.wait()
    waiter.idle.ended("b")
    waiter.idle.ended("never run")
    assert waiter.idle.wait()


def test_a_tier_that_hangs_costs_a_step_no_more_than_its_share() -> None:
    waiter = Waiter(10.0)
    for step in range(1, 4):
        requests = sum(waiter.idle.wait() for _ in range(100))
        assert requests == 1 and sum(waiter.waited_s) == pytest.approx(step * IDLE_LOOKUP_WAIT_S)
        waiter.idle.step_planned()


def test_news_that_bring_no_answer_use_the_time_up() -> None:
    waiter = Waiter(IDLE_LOOKUP_WAIT_S / 4)
    while waiter.idle.wait():
        pass
    assert len(waiter.waited_s) in (4, 5) and sum(waiter.waited_s) == pytest.approx(IDLE_LOOKUP_WAIT_S)
