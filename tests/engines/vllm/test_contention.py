"""Some rounds of `make trust` (`tests/trust/contention.py`): preempted, aborted, finished; every chunk recomputed."""

from __future__ import annotations

import pytest

from tests.trust.contention import CONTROL, SCARCE, VARIANTS, broken, control, one_engine

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


@pytest.mark.parametrize("name", ["child process", "threads", SCARCE])
def test_what_is_stored_under_pressure_is_what_a_recomputation_gives(name: str) -> None:
    assert broken(name, one_engine(VARIANTS[name], 120, 1)) == []


def test_without_the_fence_the_comparison_sees_it() -> None:
    assert broken(CONTROL, one_engine(control(), 60, 1)) == []
