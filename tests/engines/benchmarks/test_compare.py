"""The comparison with vLLM's own caches and the recompute tax, tiny: they run, and what they write is consistent.

Nothing is judged by time here. Other peers and SGLang are left to `make compare`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare.intervals import MET, MISSED, UNDECIDED
from benchmarks.compare.names import (
    AGAIN,
    CONVERSATIONS,
    DOCUMENTS,
    FIRST,
    LOCAL,
    MEMKV,
    NATIVE,
    PREFIX_CACHE,
    RAG,
    REPETITION,
    RESUMED,
)
from benchmarks.compare.plan import TINY
from benchmarks.engine_run import FORKS_FROM
from tests.engines.vllm.scenario import engines
from tests.environments.engine_env import ROOT, engine_env
from tests.environments.models import ensure_model

pytestmark = [pytest.mark.timeout(800), pytest.mark.slow]

SIDES = (PREFIX_CACHE, NATIVE, MEMKV)


def run(module: str, *arguments: str) -> None:
    """Runs a benchmark."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=engine_env(PYTHONPATH=str(ROOT), **{FORKS_FROM: engines().forks()}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Returns the folder and the record of a tiny comparison."""
    ensure_model("smollm2")
    folder = tmp_path_factory.mktemp("compare")
    run(
        "benchmarks.compare", "--profile", "tiny", "--stages", "vllm", "--sides", ";".join(SIDES),
        "--folder", str(folder / "tiers"), "--output", str(folder),
    )  # fmt: skip
    return folder, json.loads((folder / "compare.json").read_text())


def batches(body: dict[str, Any], **labels: Any) -> list[dict[str, Any]]:
    """Returns the visits with these labels."""
    found = body["stages"]["vllm"]["batches"]
    return [batch for batch in found if all(batch[name] == value for name, value in labels.items())]


def prompt_tokens(visits: Sequence[dict[str, Any]]) -> int:
    """Returns the length of all prompts."""
    return sum(request["prompt_tokens"] for visit in visits for request in visit["requests"])


def test_every_side_was_asked_for_everything(compared: tuple[Path, dict[str, Any]]) -> None:
    folder, body = compared
    stage = body["stages"]["vllm"]
    assert stage["complete"]
    assert min(stage["environment"]["page_costs_us"]) > 0
    assert {name: side["status"] for name, side in stage["sides"].items()} == dict.fromkeys(SIDES, "ok")
    for side in SIDES:
        asked = batches(body, side=side)
        stores = {RESUMED} if side in (NATIVE, MEMKV) else set()
        assert {visit["workload"] for visit in asked} == {DOCUMENTS, CONVERSATIONS, RAG, REPETITION} | stores
        assert len(batches(body, side=side, step=FIRST)) == len(TINY.documents.lengths)
        assert len(batches(body, side=side, workload=CONVERSATIONS)) == 2 * TINY.conversations.turns
    assert not list((folder / "tiers").iterdir()), "what the sides stored was left behind"


def test_the_figures_fit_together(compared: tuple[Path, dict[str, Any]]) -> None:
    _, body = compared
    for visit in batches(body):
        assert 0 <= sum(visit["hits"].values()) <= prompt_tokens([visit])
        assert all(0 < request["ttft_s"] <= visit["wall_s"] + 0.1 for request in visit["requests"])
        assert visit["usage"]["cpu_s"] > 0
        assert visit["side"] == MEMKV or not visit["usage"]["io_process_cpu_s"]
    assert any(visit["usage"]["io_process_cpu_s"] for visit in batches(body, side=MEMKV))
    assert all(not sum(visit["hits"].values()) for visit in batches(body, step=FIRST))
    assert all(not visit["hits"]["connector"] for visit in batches(body, side=PREFIX_CACHE))
    for side in (NATIVE, MEMKV):
        again = batches(body, side=side, step=AGAIN)
        assert sum(visit["hits"]["connector"] for visit in again) > 0.9 * prompt_tokens(again)
        for visit in again:
            assert (visit["load_s"] is not None) == (side == MEMKV)
            assert side != MEMKV or 0 < visit["load_s"] < visit["wall_s"]
        assert all(visit["usage"]["read_bytes"] > 0 for visit in again), "they did not come from the device"
        resumed = batches(body, side=side, workload=RESUMED)
        assert sum(visit["hits"]["connector"] for visit in resumed) > 0.5 * prompt_tokens(resumed)
        assert all(visit["usage"]["read_bytes"] > 0 for visit in resumed), "they were in memory"
        local = batches(body, side=side, step=LOCAL)
        assert sum(visit["hits"]["prefix cache"] for visit in local) > 0.9 * prompt_tokens(local)
        told = body["stages"]["vllm"]["sides"][side]
        assert told["stored_bytes"] > 0 and told["stored_files"] > 0
        assert told["peak_rss_bytes"] > told["peak_pss_bytes"] > 0
    raw = body["stages"]["vllm"]["raw_reads"]
    assert {one["length"] for one in raw} == set(TINY.documents.lengths)
    assert all(one["seconds"] > 0 for one in raw)


def test_the_judgements_and_the_page_are_there(compared: tuple[Path, dict[str, Any]]) -> None:
    folder, body = compared
    assert {one["status"] for one in body["judgements"]} <= {MET, MISSED, UNDECIDED}
    assert sum(one["required"] for one in body["judgements"]) == 8
    assert all(one["promise"].startswith(f"{MEMKV}:") for one in body["judgements"]), "the others were not asked"
    assert {cell["side"] for cell in body["cells"]} == {MEMKV}
    text = (folder / "RESULTS.md").read_text()
    assert all(side in text for side in SIDES)
    assert str(ROOT) not in text and str(folder) not in text
    assert (folder / "RESULTS.png").stat().st_size > 0


def test_the_recompute_tax_is_paid_without_us(tmp_path: Path) -> None:
    model = str(ensure_model("smollm2"))
    run(
        "benchmarks.bench_recompute_tax", "--tiny", "--model", model,
        "--folder", str(tmp_path), "--output", str(tmp_path),
    )  # fmt: skip
    body = json.loads((tmp_path / "recompute-tax.json").read_text())
    assert (tmp_path / "recompute-tax.png").stat().st_size > 0
    without, with_us = body["recompute"], body["memkv"]
    for side in (without, with_us):
        assert side["computed_tokens"] == (
            side["prompt_tokens"] - side["local_hit_tokens"] - side["external_hit_tokens"]
        )
        assert 0 <= side["computed_again_tokens"] <= side["computed_tokens"]
        assert 0 <= side["tax_seconds_share"] <= 1
    assert without["prompt_tokens"] == with_us["prompt_tokens"]
    assert without["external_hit_tokens"] == 0 < with_us["external_hit_tokens"]
    # Counted by the engines, not timed: this holds on any machine.
    assert with_us["computed_again_tokens"] < without["computed_again_tokens"]
    assert len(body["trace"]["lines"]) == without["requests"]
