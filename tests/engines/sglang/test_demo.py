"""The SGLang demo still runs; its numbers mean nothing here."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import demo_sglang


def test_the_demo_runs_and_finds_equal_answers(tmp_path: Path) -> None:
    assert demo_sglang.main(["--tiny", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "demo_sglang.json").read_text())
    assert record["tokens_equal"] is True
    assert record["external_hit_tokens"] >= 0.9 * record["prompt_tokens"]
    assert record["objects"]["count"] < record["file_backend_objects"] / 4
    assert record["linker_hit_tokens"] >= 0.9 * record["prompt_tokens"]
    assert record["pairs_measured"] == 2
    for side, parts in {"memkv": 2, "file": 2, "linker": 2}.items():
        assert len(record["restore_cost_parts_s"][side]) == parts
        assert all(seconds > 0 for seconds in record["restore_cost_parts_s"][side].values())
    assert set(record["meaning"]) <= set(record) | {"objects"}
    assert str(tmp_path) not in json.dumps(record), "no paths of this machine"
    assert (tmp_path / "demo_sglang.png").stat().st_size > 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo_sglang.json", "demo_sglang.png"], "it cleans up"
