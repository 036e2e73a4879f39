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
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], list[Row]]:
    """Rounds in which chunks are known to be in the tier, and those that begin with look-ups."""
    folder = tmp_path_factory.mktemp("faults")
    with ThreadPoolExecutor(2) as pool:
        known = [pool.submit(play_rounds, folder / str(i), [(n, 1024) for n in SOME[i::2]], i) for i in range(2)]
        looked_up = pool.submit(play_rounds, folder / "looked up", [(n, 1024) for n in LOOKED_UP], 2, forgets=True)
        return [row for rows in known for row in rows.result()], looked_up.result()


def test_never_wrong_tokens_never_a_dead_engine(played: tuple[list[Row], list[Row]]) -> None:
    check([*played[0], *played[1]])
    assert len(played[0]) + len(played[1]) == len(SOME) + len(LOOKED_UP) + 3


def test_what_is_lost_is_counted(played: tuple[list[Row], list[Row]]) -> None:
    # What is late is not lost; a store that hangs is let go on.
    assert quiet(played[0]) <= {"slow reads", "slow writes", "hang in a write"}
    # A look-up that finds no folder is told, as of a chunk that was never stored, that there is none.
    assert quiet(played[1]) <= {"ENOENT in an open"}


def quiet(rows: list[Row]) -> set[str]:
    """The faults of which nothing was counted."""
    return {row.fault for row in rows if not row.detected and not row.is_control}
