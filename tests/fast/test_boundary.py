"""Nothing but a refusal gets through the boundary; log lines do not flood; counters are declared."""

from __future__ import annotations

import logging

import pytest

from memkv_engines import log
from memkv_engines.errors import ChunkDamaged, ConfigError, IdentityError, LayoutError
from memkv_engines.log import Throttle, adopt_handlers, get_logger
from memkv_engines.metrics import COUNTERS, Counters
from memkv_engines.offload import boundary
from memkv_engines.offload.boundary import guarded


class Hooks:
    """An object with hooks that fail as told."""

    def __init__(self) -> None:
        self.counters = Counters()

    @guarded(default=lambda: (0, False))
    def matched(self, error: BaseException | None) -> tuple[int, bool]:
        """Its docstring survives."""
        if error is not None:
            raise error
        return 7, True

    @guarded(recover="mend")
    def fence(self, error: Exception) -> str:
        raise error

    def mend(self, error: Exception) -> str:
        return f"mended {error}"


class Bare:
    """An object that failed before it had counters."""

    @guarded()
    def hook(self) -> int:
        raise ValueError("early")


@pytest.fixture(autouse=True)
def _fresh_throttle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary, "_throttle", Throttle())


def test_what_works_goes_through() -> None:
    hooks = Hooks()
    assert hooks.matched(None) == (7, True)
    assert hooks.counters.as_dict() == {}
    assert (Hooks.matched.__name__, Hooks.matched.__doc__) == ("matched", "Its docstring survives.")


@pytest.mark.parametrize("error", [ValueError("x"), ChunkDamaged("x"), AssertionError("x"), MemoryError(), OSError(5)])
def test_an_error_becomes_the_default(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    hooks = Hooks()
    assert [hooks.matched(error) for _ in range(3)] == [(0, False)] * 3
    assert hooks.counters["boundary_errors"] == 3
    assert len(caplog.records) == 1
    assert "matched" in caplog.text
    assert Bare().hook() is None


def test_a_default_is_made_anew_each_time() -> None:
    class Lists:
        @guarded(default=list)
        def hook(self) -> list[int]:
            raise ValueError

    lists = Lists()
    assert lists.hook() is not lists.hook()


@pytest.mark.parametrize("refusal", [ConfigError("x"), IdentityError("x"), LayoutError("x")])
def test_refusals_stop_the_engine(refusal: Exception) -> None:
    hooks = Hooks()
    with pytest.raises(type(refusal)):
        hooks.matched(refusal)
    assert hooks.counters["boundary_errors"] == 0


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_the_user_can_always_stop_it(stop: type[BaseException]) -> None:
    with pytest.raises(stop):
        Hooks().matched(stop())


def test_a_hook_may_have_a_way_to_recover() -> None:
    hooks = Hooks()
    assert hooks.fence(ValueError("it")) == "mended it"
    assert hooks.counters["boundary_errors"] == 1


def test_a_throttle_counts_what_it_holds_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    throttle = Throttle(interval_s=10, max_keys=2)
    assert [throttle.admit("a") for _ in range(4)] == [0, None, None, None]
    assert throttle.admit("b") == 0
    now[0] += 10
    assert throttle.admit("a") == 3
    assert throttle.admit("a") is None
    throttle.admit("c")
    assert len(throttle._last) <= 2


def test_loggers_are_below_the_root_and_handlers_are_adopted_once() -> None:
    assert get_logger("memkv_engines.offload.client").name == "memkv_engines.offload.client"
    assert get_logger("__main__").name == "memkv_engines.__main__"
    ours, theirs, root = logging.getLogger(log.ROOT), logging.getLogger("an engine"), logging.getLogger()
    kept = (list(ours.handlers), ours.level, ours.propagate, list(root.handlers))
    try:
        ours.handlers, root.handlers = [], []
        adopt_handlers("an engine")
        assert ours.handlers == []
        theirs.handlers = [logging.NullHandler()]
        theirs.setLevel(logging.INFO)
        adopt_handlers("an engine")
        assert (ours.handlers, ours.level, ours.propagate) == (theirs.handlers, logging.INFO, False)
        theirs.handlers = []
        adopt_handlers("an engine")
        assert len(ours.handlers) == 1
    finally:
        ours.handlers, ours.level, ours.propagate, root.handlers = kept
        logging.Logger.manager.loggerDict.pop("an engine", None)


def test_counters_are_declared_and_merge() -> None:
    one, other = Counters(), Counters()
    one.add("load_jobs")
    one.add("load_jobs", 4)
    other.add("load_bytes", 10)
    with pytest.raises(KeyError):
        one.add("load_job")
    one.merge({**other.as_dict(), "load_jobs": 1, "of a newer peer": 5})
    assert one.as_dict() == {"load_jobs": 6, "load_bytes": 10}
    assert sorted(one) == ["load_bytes", "load_jobs"]
    assert one.drain() == {"load_jobs": 6, "load_bytes": 10}
    assert (one["load_jobs"], one["store_chunks"], one.as_dict()) == (0, 0, {})
    assert all(COUNTERS.values())
