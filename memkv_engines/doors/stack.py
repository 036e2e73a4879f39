"""What engines hand no plugin, and what is among the local variables of those who call it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any


def locals_up_the_stack(depth: int) -> Iterator[dict[str, Any]]:
    """Local variables of the callers of who iterates, the nearest first; depth as for ``sys._getframe`` there."""
    frame: FrameType | None = sys._getframe(depth + 1)
    while frame is not None:
        yield frame.f_locals
        frame = frame.f_back
