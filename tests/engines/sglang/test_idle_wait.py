"""An idle scheduler waits for prefetches."""

from __future__ import annotations

import threading
import time

import pytest

from memkv_engines.sglang import idle_wait
from memkv_engines.sglang.idle_wait import IdleWait

# Longer than anything here takes: who waits as long has not been woken.
LONG_S = 60.0


class Scheduler:
    """The part that is held up."""

    def on_idle(self) -> str:
        """What SGLang calls when there is nothing to run."""
        return "housekeeping"


def test_a_prefetch_holds_it_up_and_its_end_lets_it_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_wait, "IDLE_LOAD_WAIT_S", LONG_S)
    scheduler = Scheduler()
    idle = IdleWait(scheduler)
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(scheduler.on_idle()))
    with idle.prefetching():
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
    thread.join(LONG_S / 2)
    assert answers == ["housekeeping"]


def test_without_a_prefetch_it_goes_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_wait, "IDLE_LOAD_WAIT_S", LONG_S)
    scheduler = Scheduler()
    idle = IdleWait(scheduler)
    with pytest.raises(KeyError), idle.prefetching():
        raise KeyError
    begun = time.monotonic()
    assert scheduler.on_idle() == "housekeeping"
    assert time.monotonic() - begun < LONG_S / 2


def test_a_prefetch_that_hangs_holds_it_up_for_moments_only() -> None:
    scheduler = Scheduler()
    idle = IdleWait(scheduler)
    begun = time.monotonic()
    with idle.prefetching():
        scheduler.on_idle()
    assert idle_wait.IDLE_LOAD_WAIT_S <= time.monotonic() - begun < LONG_S / 2


def test_it_leaves_the_scheduler_as_it_was() -> None:
    scheduler = Scheduler()
    idle = IdleWait(scheduler)
    assert "on_idle" in vars(scheduler)
    idle.stop()
    idle.stop()
    assert not vars(scheduler)


def test_what_somebody_else_put_there_since_stays() -> None:
    scheduler = Scheduler()
    idle = IdleWait(scheduler)
    theirs = vars(scheduler)["on_idle"] = lambda: "theirs"
    idle.stop()
    assert vars(scheduler)["on_idle"] is theirs


def test_where_there_is_no_such_scheduler_nothing_is_held_up() -> None:
    for scheduler in (None, object()):
        idle = IdleWait(scheduler)
        with idle.prefetching():
            pass
        idle.stop()


def test_sglang_has_what_is_held_up() -> None:
    from sglang.srt.managers.scheduler import Scheduler as Real

    assert callable(Real.on_idle)
