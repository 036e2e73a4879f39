"""Loads and stores under every fault: one answer each in time, right bytes or counted misses, every slot comes back."""

from __future__ import annotations

from unittest import mock

import pytest

from memkv_engines.offload import client
from tests.fast.io_samples import quick_folder
from tests.faults.control import FAULTS, Injector
from tests.faults.pipelines import LOAD_TIMEOUT_S, Pipelines, play
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


@pytest.mark.parametrize("fault", ["hang in a read", "hang in everything"])
def test_an_outage_costs_some_loads_a_deadline_and_all_others_nothing(fault: str) -> None:
    trial_s = 0.4
    hurry = mock.patch.multiple(client, SERVICE_RESTART_BACKOFF_S=0.2, TRIAL_LOAD_S=trial_s)
    with hurry, quick_folder() as folder, Injector(folder / "kv") as injector:
        bench = Pipelines(folder / "kv", injector)
        try:
            waits = bench.outage(FAULTS[fault], seconds=5.0)
        finally:
            bench.close()
    slow = [wait for wait in waits if wait > trial_s / 2]
    # The first had the deadline of all loads, a trial a short one; pauses between trials double.
    assert waits[0] >= LOAD_TIMEOUT_S and max(slow[1:], default=0.0) < LOAD_TIMEOUT_S
    assert len(slow) <= 5 < 30 < len(waits), waits
