"""A few visits of `make trust` (`tests/trust/tenants.py`): no tenant and no salt hits what another stored."""

from __future__ import annotations

from pathlib import Path

from tests.trust.tenants import broken
from tests.trust.tenants_in_engine import in_vllm, named


def test_nobody_hits_what_another_stored(tmp_path: Path) -> None:
    visits = list(in_vllm(tmp_path, named(2, "tenant"), named(2, "salt"), 1, 1))
    assert len(visits) == 12
    assert broken("vllm", visits) == []


def test_a_cross_hit_would_be_told(tmp_path: Path) -> None:
    visit = {"tenant": "a", "salt": "", "prompt": 0, "whole_tokens": 640, "right": True}
    visits = [{**visit, "when": "first", "hit_tokens": 32}, {**visit, "when": "again", "hit_tokens": 640}]
    assert broken("vllm", visits) == ["vllm, tenant 'a', salt '', prompt 0, first: a cross hit of 32 tokens"]
