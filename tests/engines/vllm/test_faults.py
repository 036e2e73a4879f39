"""Faults below a real vLLM: the tokens of an engine without storage, no dead engine, no wait past its deadline.

Those left out are other errors on the same paths; `make faults` plays all.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.rows import Row, check
from tests.faults.vllm_rounds import play_rounds

SOME = (
    "EIO in a read",
    "EIO in a write",
    "EIO in everything",
    "ENOSPC in a write",
    "ENOENT in an open",
    "ESTALE in a read",
    "short read",
    "bit flip in a read",
    "bit flip in a write",
    "misdirected read",
    "misdirected write",
    "stale read",
    "zeros read",
    "torn write",
    "lost rename",
    "hang in a read",
    "hang in a write",
    "hang in everything",
    "kill in a read",
    "kill in a write",
)
# Those that look-ups meet as well, for an engine that has to look up everything.
LOOKED_UP = (
    "EIO in everything",
    "ESTALE in everything",
    "ENOENT in an open",
    "bit flip in a read",
    "stale read",
    "hang in everything",
    "kill in a read",
)
pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("faults")
    with ThreadPoolExecutor(2) as pool:
        known = [pool.submit(play_rounds, folder / str(i), [(n, 1024) for n in SOME[i::2]], i) for i in range(2)]
        looked_up = pool.submit(play_rounds, folder / "looked up", [(n, 1024) for n in LOOKED_UP], 2, forgets=True)
        return [row for played in (*known, looked_up) for row in played.result()]


def test_never_wrong_tokens_never_a_dead_engine(rows: list[Row]) -> None:
    check(rows)
    assert len(rows) == len(SOME) + len(LOOKED_UP) + 3


def test_what_is_lost_is_counted(rows: list[Row]) -> None:
    quiet = [row for row in rows if not row.detected and not row.is_control]
    # What is late is not lost; a store that hangs is let go on.
    harmless = {"slow reads", "slow writes", "hang in a write"}
    unexpected = [row for row in quiet if row.fault not in harmless]
    assert not unexpected
