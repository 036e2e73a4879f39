"""The demo and the vLLM benchmarks in their tiny modes: they run, they measure what they claim, they write it down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine_run import FORKS_FROM
from tests.engines.vllm.scenario import engines
from tests.environments.engine_env import ROOT, engine_env
from tests.environments.models import ensure_model

# Several engine processes each: minutes on a slow machine.
pytestmark = [pytest.mark.timeout(800), pytest.mark.slow]

DEMO_KEYS = {
    "model", "dtype", "prompt_tokens", "recompute_ttft_s", "first_visit_ttft_s", "restore_ttft_s", "local_hit_ttft_s",
    "speedup", "external_hit_tokens", "chunks", "chunk_bytes", "stored_bytes", "blocks_per_chunk",
    "partial_chunk_hits", "tail_chunks", "raw_read_s", "tokens_equal", "environment", "settings",
}  # fmt: skip


def run_script(module: str, folder: Path, output: Path) -> None:
    """Runs a script in its tiny mode and makes sure that it leaves nothing but its output behind."""
    command = [sys.executable, "-m", module, "--tiny", "--model", str(ensure_model("smollm2"))]
    done = subprocess.run(
        [*command, "--folder", str(folder), "--output", str(output)],
        cwd=ROOT,
        env=engine_env(**{FORKS_FROM: engines().forks()}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert not list(folder.glob("*tier*")), "the tier's directory was left behind"


def result_of(path: Path) -> dict[str, Any]:
    """Returns a result that has a picture beside it."""
    assert path.with_suffix(".png").stat().st_size > 0
    body: dict[str, Any] = json.loads(path.read_text())
    return body


def test_the_demo_restores_what_it_stored(tmp_path: Path) -> None:
    run_script("benchmarks.demo", tmp_path, tmp_path / "demo.json")
    body = result_of(tmp_path / "demo.json")
    assert body.keys() >= DEMO_KEYS
    assert body["tokens_equal"] is True
    assert body["external_hit_tokens"] == (body["prompt_tokens"] - 1) // 32 * 32
    assert body["blocks_per_chunk"] >= 3
    assert body["partial_chunk_hits"] > 0
    assert body["tail_chunks"] > 0
    assert (body["chunks"] - body["tail_chunks"]) * body["chunk_bytes"] < body["stored_bytes"]


def test_the_benchmark_measures_what_it_claims(tmp_path: Path) -> None:
    run_script("benchmarks.bench_vllm", tmp_path, tmp_path)
    conversations = result_of(tmp_path / "vllm-conversations.json")
    assert conversations["memkv"]["external_hit_tokens"] > 0
    assert conversations["recompute"]["external_hit_tokens"] == 0
    assert conversations["write_amplification"] == pytest.approx(1.0, abs=0.02)
    visit = result_of(tmp_path / "vllm-first-visit.json")
    assert len(visit["io_cpu_s"]) == len(visit["engine_cpu_s"]["recompute"]) == visit["pairs"]
    for key in ("ttft_ratio", "throughput_ratio", "storing_cpu_share"):
        middle, low, high = visit[key]
        assert low <= middle <= high
