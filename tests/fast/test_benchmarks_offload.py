"""The benchmarks of the offload layer run tiny, so that none rots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_gil, bench_lookup, bench_protection


def test_bench_lookup(tmp_path: Path) -> None:
    out = tmp_path / "lookup.json"
    assert bench_lookup.main(["--tiny", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [r["blocks_per_chunk"] for r in record["results"]] == [2, 16]
    assert all(0 < r["thread_cpu_us"]["median"] <= r["thread_cpu_us"]["p90"] for r in record["results"])


def test_bench_gil(tmp_path: Path) -> None:
    out = tmp_path / "gil.json"
    assert bench_gil.main(["--tiny", "--dir", str(tmp_path), "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    by_mode = {r["mode"]: r for r in record["results"] if r["caches"] == "page cache"}
    assert by_mode.keys() == {"process", "thread"}
    calls = by_mode["process"]["system_calls_per_job"]
    # However many chunks a job has: one message there, one look for the answer.
    assert calls == {"submit": {"send": 1}, "empty_poll": {"recv": 1}, "answering_poll": {"recv": 2}, "answered": 1}


def test_bench_protection(tmp_path: Path, direct: Path) -> None:
    out, demo = tmp_path / "protection.json", tmp_path / "demo.json"
    restore = {"dtype": "float32", "stored_bytes": 10**9, "prompts": [{}, {}], "restore_ttft_s": 0.5}
    meaning = {"restore_ttft_s": "the demo explains its fields"}
    demo.write_text(json.dumps({**restore, "bf16": {**restore, "dtype": "bfloat16"}, "meaning": meaning}))
    code = bench_protection.main(["--tiny", "--directory", str(direct), "--json", str(out), "--demo", str(demo)])
    assert code == 0
    record = json.loads(out.read_text())
    assert [(r["way"], r["direction"]) for r in record["results"]] == [
        (way, direction) for way in ("off", "auth", "encrypt") for direction in ("store", "load")
    ]
    assert all(len(r["seconds"]) == 2 and min(r["seconds"]) > 0 for r in record["results"])
    assert [r["times_off"][0] for r in record["results"][:2]] == [1.0, 1.0]
    assert out.with_suffix(".png").exists()
    assert record["share_of_restore_percent"].keys() == {"float32", "bfloat16"}


def test_the_share_of_a_restore() -> None:
    rows = [
        {"way": way, "direction": "load", "seconds": [seconds] * 3} for way, seconds in (("off", 1.0), ("auth", 1.1))
    ]
    demo = {"stored_bytes": 4000, "prompts": [1, 2], "restore_ttft_s": 10.0}
    assert bench_protection.shares_of_restore(rows, 1000, demo) == {"off": 0.0, "auth": pytest.approx(2.0)}
