"""The circuit breaker: closed, open, half-open."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.offload.breaker import Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make() -> tuple[Breaker, Clock]:
    clock = Clock()
    return Breaker(1.0, 8.0, clock), clock


def test_closed_it_admits_everybody() -> None:
    breaker, _ = make()
    assert breaker.closed and all(breaker.admits() for _ in range(10))


def test_after_a_failure_nobody_is_admitted_for_a_pause_and_then_one() -> None:
    breaker, clock = make()
    breaker.failed()
    assert not breaker.closed and not breaker.admits()
    clock.now += 0.99
    assert not breaker.admits()
    clock.now += 0.02
    assert [breaker.admits() for _ in range(5)] == [True, False, False, False, False]


def test_pauses_double_with_each_trial_that_fails_up_to_a_bound() -> None:
    breaker, clock = make()
    breaker.failed()
    pauses = []
    for _ in range(6):
        start = clock.now
        while not breaker.admits():
            clock.now += 0.25
        pauses.append(clock.now - start)
        breaker.failed()
    assert pauses == [1, 2, 4, 8, 8, 8]


def test_late_failures_of_what_was_asked_before_do_not_add_up() -> None:
    breaker, clock = make()
    for _ in range(10):
        breaker.failed()
    clock.now += 1.0
    assert breaker.admits()


def test_a_success_closes_it_and_begins_anew() -> None:
    breaker, clock = make()
    for _ in range(4):
        breaker.failed()
        clock.now += 100
        assert breaker.admits()
    breaker.succeeded()
    assert breaker.closed and all(breaker.admits() for _ in range(3))
    breaker.failed()
    clock.now += 1.0
    assert breaker.admits()


def test_a_trial_of_which_nothing_is_heard_is_followed_by_another() -> None:
    breaker, clock = make()
    breaker.failed()
    for _ in range(3):
        clock.now += 1.0
        assert [breaker.admits(), breaker.admits()] == [True, False]


@given(st.lists(st.tuples(st.sampled_from(["admits", "failed", "succeeded"]), st.floats(0, 3)), max_size=60))
@settings(deadline=None)
def test_in_any_order_it_admits_one_a_pause_at_most_while_not_closed(events: list[tuple[str, float]]) -> None:
    breaker, clock = make()
    last_admitted = -1.0
    for event, seconds in events:
        clock.now += seconds
        if event != "admits":
            getattr(breaker, event)()
            continue
        closed = breaker.closed
        if breaker.admits() and not closed:
            assert clock.now - last_admitted >= 1.0
            last_admitted = clock.now
