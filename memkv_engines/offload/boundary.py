"""The engine boundary: the only broad ``except`` of the package.

An exception that escapes a connector hook kills the engine. A hook wrapped here logs it once in a while, counts it
and answers with a safe default instead: no hit, nothing stored, nothing finished.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from memkv_engines.errors import ConfigError, IdentityError, LayoutError
from memkv_engines.log import Throttle, get_logger
from memkv_engines.metrics import Counters

log = get_logger(__name__)
_throttle = Throttle()
REFUSALS = (ConfigError, IdentityError, LayoutError)

Hook = TypeVar("Hook", bound=Callable[..., Any])


def guarded(
    default: Callable[[], Any] = lambda: None, *, recover: str = "", refusals: bool = True
) -> Callable[[Hook], Hook]:
    """Wrap an engine hook of an object that has ``counters: Counters``.

    Args:
        default: makes what the hook answers when it fails.
        recover: name of a method to call with the hook's arguments when it fails, for hooks that the engine or the
            correctness of stored bytes depends on; what it returns is the answer.
        refusals: let refusals (bad configuration, identity or layout) through, as start-up hooks do.
    """

    stops: tuple[type[Exception], ...] = REFUSALS if refusals else ()

    def wrap(hook: Hook) -> Hook:
        @functools.wraps(hook)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(self, *args, **kwargs)
            except stops:
                # Start-up refusals are meant to stop the engine before it serves anything.
                raise
            except Exception:
                _report(hook.__name__, getattr(self, "counters", None))
                return getattr(self, recover)(*args, **kwargs) if recover else default()

        return call  # type: ignore[return-value]

    return wrap


def _report(hook: str, counters: Counters | None) -> None:
    if counters is not None:
        counters.add("boundary_errors")
    held = _throttle.admit(hook)
    if held is not None:
        log.exception("unexpected error in %s; the engine goes on without us (%d more held back)", hook, held)
