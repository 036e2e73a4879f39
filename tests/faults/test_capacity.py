"""A moment of `make trust` (`tests/trust/capacity.py`): four writers, one capacity."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trust.capacity import CONTROL, SCENARIOS, Run, Scenario, broken


@pytest.mark.parametrize("name", ["one directory", "two directories, writers killed"])
def test_writers_together_keep_to_the_capacity(name: str, tmp_path: Path) -> None:
    assert broken(name, [Run(SCENARIOS[name], tmp_path, 3).play(1.5)]) == []


def test_writers_that_do_not_ask_the_count_are_seen_to_exceed_it(tmp_path: Path) -> None:
    assert broken(CONTROL, [Run(Scenario(counts=False), tmp_path, 3).play(1.5)]) == []
