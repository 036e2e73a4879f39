"""Faults below a real SGLang, through both doors: right tokens, no dead engine, no wait past its deadline.

Some of them; `make faults` plays all.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.rows import check
from tests.faults.sglang_rounds import DOORS, play_rounds

SOME = (
    "EIO in a read",
    "EIO in everything",
    "ENOSPC in a write",
    "bit flip in a read",
    "misdirected write",
    "stale read",
    "torn write",
    "hang in a read",
    "hang in everything",
    "kill in a write",
)
pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]


@pytest.mark.parametrize("door", DOORS)
def test_never_wrong_tokens_never_a_dead_engine(door: str, tmp_path: Path) -> None:
    rows = play_rounds(tmp_path, door, [(name, 1024) for name in SOME], seed=3)
    check(rows)
    assert len(rows) == len(SOME) + 1
    assert all(row.detected for row in rows if not row.is_control)
