"""A few visits of `make trust` (`tests/trust/tenants.py`): no tenant and no salt hits what another stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trust.tenants import broken
from tests.trust.tenants_in_engine import in_sglang, named


@pytest.mark.parametrize("door", ["sglang-hicache", "sglang-linker"])
def test_nobody_hits_what_another_stored(door: str, tmp_path: Path) -> None:
    visits = list(in_sglang(tmp_path, door, named(2, "tenant"), named(2, "salt"), 1, 1))
    assert len(visits) == 12
    assert broken(door, visits) == []
