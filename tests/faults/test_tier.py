"""The directory tier under every fault that ends: right bytes, a counted miss, or one of the package's own errors."""

from __future__ import annotations

import pytest

from tests.faults.rows import CONTROL, Row, check, merged
from tests.faults.tier_machine import TRIED, run

SEEDS = (1, 2, 3)


def test_whatever_goes_wrong_below_the_tier() -> None:
    rows = merged(row for seed in SEEDS for row in run(seed, examples=40))
    check(rows)
    hit = {row.fault for row in rows}
    assert len(hit) > 0.8 * len(TRIED), f"never injected: {sorted({f.name for f in TRIED} - hit)}"
    assert sum(row.detected for row in rows) > 100


def test_without_verification_the_same_faults_give_wrong_bytes() -> None:
    check(merged(row for seed in SEEDS for row in run(seed, examples=20, verified=False)))


@pytest.mark.parametrize("name", ["a_row_that_was_not_run", "nothing_injected"])
def test_a_suite_that_proves_nothing_fails(name: str) -> None:
    bad = {
        "a_row_that_was_not_run": Row("EIO in a read", "tier", injected=1),
        "nothing_injected": Row("EIO in a read", "tier", rounds=3),
    }[name]
    with pytest.raises(AssertionError):
        check([bad])
    with pytest.raises(AssertionError):
        check([Row(CONTROL, "tier", rounds=3, injected=3)])
    with pytest.raises(AssertionError):
        check([])
