"""Some inputs of `make trust` (`tests/trust/hostile.py`), mutated without atheris; and what makes it fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trust import hostile, targets

INPUTS = 600


@pytest.mark.parametrize("name", list(targets.TARGETS))
def test_hostile_inputs_are_misses_and_refusals(name: str) -> None:
    inputs = int(INPUTS * targets.TARGETS[name].share)
    assert hostile.broken(name, hostile.play_plain(name, inputs, 7), inputs) == []


def test_a_careless_parser_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It believes the length that it reads."""
    target = targets.Target("careless", lambda data: "x" * data[1 + data[0]], (), (b"\x01ab",))
    monkeypatch.setitem(targets.TARGETS, "careless", target)
    monkeypatch.setattr(hostile, "CRASHES", tmp_path)
    told = hostile.broken("careless", hostile.play_plain("careless", 200, 1), 200)
    assert any(line.startswith("careless: IndexError at test_hostile.py") for line in told)
    assert list(tmp_path.iterdir())
