"""The benchmarks of the offload layer run tiny, so that none rots."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import bench_gil, bench_lookup


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
