"""Loads and stores under every fault: one answer each in time, right bytes or counted misses, every slot comes back."""

from __future__ import annotations

import pytest

from tests.faults.control import FAULTS
from tests.faults.pipelines import play
from tests.faults.rows import Row, check

ROUNDS = 2


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(play(list(FAULTS), ROUNDS, seed=11))


def test_whatever_goes_wrong_below_the_pipelines(rows: list[Row]) -> None:
    check(rows)
    assert len(rows) == len(FAULTS) + 1


def test_faults_that_lose_data_are_counted(rows: list[Row]) -> None:
    harmless = {"slow reads", "slow writes"}
    assert {row.fault for row in rows if not row.detected and not row.is_control} <= harmless
