"""The GPU benchmark from end to end on the fake driver (its figures mean nothing), and what it says with no device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import bench_gpu, gpu_pool
from benchmarks.gpu_pool import Layout
from tests.kernels.driver.rig import Engine

ROOT = Path(__file__).resolve().parents[3]


def test_tiny(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layouts = (Layout("small tiles", 2, 1024), Layout("long tiles", 2, 32768), Layout("one tile", 1, 32768))
    monkeypatch.setattr(bench_gpu, "LAYOUTS", layouts)
    monkeypatch.setattr(bench_gpu, "TINY", bench_gpu.Size(chunk_bytes=131072, num_blocks=64, rounds=1))
    monkeypatch.setattr(bench_gpu, "BUDGETS", (1, 8))
    monkeypatch.setattr(gpu_pool.GpuPool.__init__, "__defaults__", (262144, 65536))
    assert bench_gpu.main(["--tiny", "--json", str(tmp_path / "gpu.json")]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    ways = {(row["layout"], row["way"]) for row in result["device"] + result["host"]}
    for layout in layouts:
        assert {"gather", "scatter", "plain device copy"} <= {way for name, way in ways if name == layout.name}
    assert [row["ctas"] for row in result["budget"]] == [1, 8]


def test_bars() -> None:
    def rows(gather: float) -> list[dict[str, object]]:
        ways = {"gather": gather, "scatter": 100.0, "plain device copy": 1000.0, "one contiguous copy": 50.0}
        return [{"layout": "a", "way": way, "gb_per_s": rate} for way, rate in ways.items()]

    sweep = [{"ctas": 8, "slowdown": 0.01}, {"ctas": 32, "slowdown": 0.5}]
    assert bench_gpu.failed_bars(rows(100.0), [], sweep) == []
    assert bench_gpu.failed_bars(rows(99.0), [], sweep) == ["a: gather 99 GB/s, the bar is 100"]
    assert "8 CTAs" in bench_gpu.failed_bars(rows(100.0), [], [{"ctas": 8, "slowdown": 0.04}])[0]


def test_without_a_device_it_says_so_and_fails() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_gpu", "--tiny"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        pytest.skip("this machine has a device")
    assert done.returncode == bench_gpu.NO_DEVICE
    assert "nothing was measured: no CUDA driver" in done.stderr
