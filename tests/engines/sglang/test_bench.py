"""The SGLang benchmark still runs and measures what it claims; its numbers mean nothing here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import bench_sglang
from benchmarks.sglang_conversations import NONE, SIDES, agreement_of
from tests.engines.sglang.engines import PAGE_TOKENS, TOLERANCE

STORING = ("file", "memkv", "linker")
PLAN = bench_sglang.TINY.load
REQUESTS = PLAN.conversations * PLAN.turns

# Four engines start.
pytestmark = [pytest.mark.timeout(800), pytest.mark.slow]


@dataclass(frozen=True)
class Run:
    """What a run of the benchmark wrote."""

    body: dict[str, Any]
    left: list[str]
    picture_bytes: int
    folder: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the benchmark once."""
    output = tmp_path_factory.mktemp("bench")
    assert bench_sglang.main(["--tiny", "--folder", str(output), "--output", str(output)]) == 0
    body = json.loads((output / "bench_sglang.json").read_text())
    left = sorted(path.name for path in output.iterdir())
    return Run(body, left, (output / "bench_sglang.png").stat().st_size, output)


def test_later_turns_come_from_storage_and_nowhere_else(run: Run) -> None:
    opening = PLAN.document_tokens // PAGE_TOKENS * PAGE_TOKENS
    expected = PLAN.conversations * (PLAN.turns - 1) * opening
    for side, source in {"file": "storage", "memkv": "storage", "linker": "host"}.items():
        hits = dict(run.body[side]["hit_tokens"])
        assert hits.pop("all") == hits.pop(source) == expected
        assert not any(hits.values())
    assert not any(run.body["none"]["hit_tokens"].values())


def test_all_sides_saw_the_same_prompts_and_answer_alike(run: Run) -> None:
    assert {run.body[side]["requests"] for side in SIDES} == {REQUESTS}
    assert len({run.body[side]["prompt_tokens"] for side in SIDES}) == 1
    agreement = run.body["agreement"]
    assert agreement["all_sides_share"] == 1
    assert agreement["with_none_share"] == dict.fromkeys(STORING, 1)
    assert agreement["logprobs_compared"] == len(STORING) * REQUESTS
    assert agreement["largest_logprob_difference"] < TOLERANCE


def test_answers_that_differ_are_seen() -> None:
    def side(token: int, logprob: float) -> Any:
        return SimpleNamespace(visits=[SimpleNamespace(answer=SimpleNamespace(tokens=[token], logprobs=[logprob]))])

    same = agreement_of({NONE: side(1, -0.5), "memkv": side(1, -0.25)})
    assert (same["logprobs_compared"], same["largest_logprob_difference"]) == (1, 0.25)
    assert same["all_sides_share"] == same["with_none_share"]["memkv"] == 1
    other = agreement_of({NONE: side(1, -0.5), "memkv": side(2, -0.5)})
    assert other["logprobs_compared"] == other["all_sides_share"] == other["with_none_share"]["memkv"] == 0


def test_pages_are_objects_of_their_own_in_the_file_backend_alone(run: Run) -> None:
    stored = {side: run.body[side]["stored"] for side in SIDES}
    assert stored["none"] == {"objects": 0, "bytes": 0}
    assert 0 < stored["memkv"]["objects"] < stored["file"]["objects"] / 4
    assert 0 < stored["linker"]["objects"] < stored["file"]["objects"] / 4


def test_the_io_processes_are_counted_apart(run: Run) -> None:
    cpu = {side: sum(run.body[side]["io_cpu_s"]) for side in SIDES}
    assert cpu["none"] == cpu["file"] == 0 < min(cpu["memkv"], cpu["linker"])
    assert all(sum(run.body[side]["engine_cpu_s"]) > 0 for side in SIDES)


def test_every_ratio_has_its_interval(run: Run) -> None:
    assert {baseline: set(sides) for baseline, sides in run.body["ratios"].items()} == {
        "none": set(STORING),
        "file": {"memkv", "linker"},
    }
    for sides in run.body["ratios"].values():
        for ratios in sides.values():
            for middle, low, high in ratios.values():
                assert 0 < low <= middle <= high


def test_a_run_that_does_not_show_what_it_claims_fails(run: Run) -> None:
    def told(side: str, **changed: Any) -> list[str]:
        body = {**run.body, side: {**run.body[side], **changed}}
        return bench_sglang.problems_of(body, exact=True)

    assert told("none") == []
    assert len(told("memkv", returning_hit_share=0.1)) == 1
    assert len(told("none", returning_hit_share=0.9)) == 1
    assert len(told("file", hit_tokens={"host": 10, "storage": 5})) == 1
    assert len(told("agreement", all_sides_share=0.5)) == 1


def test_it_leaves_its_result_and_nothing_else(run: Run) -> None:
    assert run.left == ["bench_sglang.json", "bench_sglang.png"]
    assert run.picture_bytes > 1000
    assert str(run.folder) not in json.dumps(run.body), "no paths of this machine"
    assert set(run.body["meaning"]) <= set(run.body) | set(run.body["none"])
