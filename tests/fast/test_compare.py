"""The comparison's pure parts: prompts, what processes used, judgements that can fail, and the page of results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness
from benchmarks.compare import __main__ as compare
from benchmarks.compare import intervals, judge, plan, plots, prompts, report, side
from benchmarks.compare.names import (
    AGAIN,
    CONVERSATIONS,
    DOCUMENTS,
    FILE,
    FIRST,
    HICACHE,
    LMCACHE_FS,
    LOCAL,
    MEMKV,
    MEMKV_MEMORY,
    NATIVE,
    NO_CACHE,
    NO_STORAGE,
    PREFIX_CACHE,
    RAG,
    SGLANG_SIDES,
    THROTTLED,
    VLLM_SIDES,
)
from benchmarks.compare.record import Batch, Record, batches_of, without_paths

LENGTH = 8000


@pytest.fixture(autouse=True)
def few_bootstrap_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is judged here is far from its limit, or made to lie across it."""
    monkeypatch.setattr(intervals, "SAMPLES", 200)


def visit(
    name: str,
    workload: str,
    step: str,
    unit: str,
    ttft_s: float,
    *,
    round_: int = 1,
    hits: int = 0,
    length: int = LENGTH,
) -> Batch:
    """One visit as the driver notes it."""
    usage = {
        "cpu_s": ttft_s, "read_bytes": 0, "write_bytes": 0, "read_calls": 0, "write_calls": 0,
        "io_process_cpu_s": 0.01 * ttft_s,
    }  # fmt: skip
    return {
        "side": name, "workload": workload, "step": step, "unit": unit, "round": round_, "length": length,
        "wall_s": ttft_s, "hits": {"connector": hits}, "load_s": None, "usage": usage,
        "requests": [{"prompt_tokens": length, "ttft_s": ttft_s, "tokens": [1]}],
    }  # fmt: skip


def restores(costs: dict[str, float], rounds: int = 6, *, hits: int = LENGTH, scatter: float = 0.01) -> list[Batch]:
    """Second visits with a local hit of 0.2 s after each."""
    found = []
    for number in range(1, rounds + 1):
        for name, cost in costs.items():
            ttft = 0.2 + cost * (1 + scatter * (number % 3 - 1))
            found.append(visit(name, DOCUMENTS, AGAIN, "a", ttft, round_=number, hits=hits))
            found.append(visit(name, DOCUMENTS, LOCAL, "a", 0.2, round_=number))
    return found


def raw(seconds: float, rounds: int = 6) -> list[dict[str, Any]]:
    return [{"unit": "a", "length": LENGTH, "round": number, "seconds": seconds} for number in range(1, rounds + 1)]


# ---------------------------------------------------------------------------------------------------------- judgements


@pytest.mark.parametrize(
    ("low", "high", "limit", "at_most", "status"),
    [
        (0.8, 0.9, 1.0, True, intervals.MET),
        (0.9, 1.1, 1.0, True, intervals.UNDECIDED),
        (1.1, 1.2, 1.0, True, intervals.MISSED),
        (1.6, 1.9, 1.5, False, intervals.MET),
        (1.4, 1.6, 1.5, False, intervals.UNDECIDED),
        (1.1, 1.4, 1.5, False, intervals.MISSED),
    ],
)
def test_an_interval_says_met_missed_or_nothing(
    low: float, high: float, limit: float, at_most: bool, status: str
) -> None:
    assert intervals.status_of(low, high, limit, at_most=at_most) == status


def test_too_few_comparisons_decide_nothing_however_clear() -> None:
    one = intervals.judged("x", intervals.MIN_UNITS - 1, lambda indices: 0.1, 1.0, at_most=True)
    assert (one.status, one.value, one.low) == (intervals.UNDECIDED, 0.1, None)
    assert intervals.judged("x", 0, lambda indices: 0.1, 1.0, at_most=True).value is None
    assert intervals.judged("x", intervals.MIN_UNITS, lambda indices: 0.1, 1.0, at_most=True).status == intervals.MET


@pytest.mark.parametrize(
    ("ours", "native", "lmcache", "raw_s", "status"),
    [
        (0.20, 0.50, 0.60, 0.10, intervals.MET),  # less than half of both
        (0.30, 0.50, 0.90, 0.10, intervals.MISSED),  # less than half of one of them only
        (0.30, 0.50, 0.90, 0.25, intervals.MET),  # and within 1.3 raw reads
        (0.30, 0.20, 0.20, 0.20, intervals.MISSED),
        (0.25, 0.50, 0.60, 0.10, intervals.UNDECIDED),  # the scatter goes across the limit
    ],
)
def test_a_restore_is_held_against_peers_and_the_raw_read(
    ours: float, native: float, lmcache: float, raw_s: float, status: str
) -> None:
    batches = restores({MEMKV: ours, NATIVE: native, LMCACHE_FS: lmcache})
    if status == intervals.UNDECIDED:
        for batch in batches:
            if batch["side"] == MEMKV and batch["step"] == AGAIN:
                batch["requests"][0]["ttft_s"] += 0.05 * (batch["round"] % 2 * 2 - 1)
    assert judge.judge_restore(batches, raw(raw_s), LENGTH).status == status


def test_what_restored_nothing_is_no_restore() -> None:
    batches = restores({MEMKV: 0.2}) + restores({NATIVE: 9.0}, hits=LENGTH // 2) + restores({LMCACHE_FS: 0.5})
    assert judge.restore_costs(batches, NATIVE, LENGTH) == {}
    one = judge.judge_restore(batches, raw(0.1), LENGTH)
    assert NATIVE in one.note
    # Recomputing would have made the limit 4.5 s.
    assert one.value == pytest.approx(0.2 / 0.25, rel=0.05)


def test_a_restore_without_peers_is_held_against_the_raw_read_alone() -> None:
    assert judge.judge_restore(restores({MEMKV: 0.2}), raw(0.1), LENGTH).status == intervals.MISSED
    assert judge.judge_restore(restores({MEMKV: 0.12}), raw(0.1), LENGTH).status == intervals.MET
    assert judge.judge_restore([], [], LENGTH).status == intervals.UNDECIDED


@pytest.mark.parametrize(("load_s", "status"), [(0.12, intervals.MET), (0.14, intervals.MISSED)])
def test_a_load_is_judged_by_its_own_timer_whatever_attention_takes(load_s: float, status: str) -> None:
    batches = restores({MEMKV: 0.5, NATIVE: 0.15}, scatter=0.4)
    assert judge.judge_load(batches, raw(0.1), LENGTH).status == intervals.UNDECIDED, "nobody has a timer"
    for batch in batches_of(batches, side=MEMKV, step=AGAIN):
        batch["load_s"] = load_s
    one = judge.judge_load(batches, raw(0.1), LENGTH)
    assert (one.status, one.units) == (status, 6)
    # What was not restored was not loaded, however long its timer says.
    assert judge.judge_load([*batches, *restores({MEMKV: 9.0}, hits=LENGTH // 2)], raw(0.1), LENGTH).value == one.value


def test_units_of_one_set_of_processes_do_not_count_as_if_they_were_independent() -> None:
    """Three processes are 5% quicker and three 5% slower than the peer's: of 48 units that is 24 to 24."""
    batches = []
    for number in range(6):
        for unit in range(8):
            for name, seconds in ((MEMKV, 1.05 if number % 2 else 0.95), (NATIVE, 1.0)):
                one = visit(name, CONVERSATIONS, "turn 2", f"{number}.{unit}", seconds, hits=100)
                batches.append({**one, "processes": number + 1})
    alike = [{**batch, "processes": 1} for batch in batches]
    told, blind = (judge.judge_throughput(some, CONVERSATIONS, MEMKV, [NATIVE], 0.98, "x") for some in (batches, alike))
    assert told.value == blind.value and blind.status == intervals.MET and told.status == intervals.UNDECIDED
    assert "6 sets of fresh processes" in told.note and not blind.note


def test_who_was_not_asked_is_not_judged() -> None:
    body = stage_body("vllm", talks({MEMKV_MEMORY: 1.0, NATIVE: 1.1, NO_CACHE: 2.0}, units=8), [])
    whole, some = judge.judge_vllm(body), judge.judge_vllm({**body, "asked": [NO_CACHE, NATIVE, MEMKV_MEMORY]})
    assert {one.promise.split(":")[0] for one in whole.judgements} == {MEMKV, MEMKV_MEMORY, THROTTLED}
    assert [(one.promise.split(":")[0], one.status) for one in some.judgements] == [(MEMKV_MEMORY, intervals.MET)] * 3


def test_what_was_left_out_is_not_judged_and_has_no_table(tmp_path: Path) -> None:
    body = stage_body("vllm", talks({MEMKV: 1.0, MEMKV_MEMORY: 0.98, NATIVE: 1.1}, units=8), [])
    body.update(asked=list(plan.TALKS.vllm_sides), profile=asdict(plan.TALKS))
    judgements = judge.judge_vllm(body).judgements
    assert [one.promise.split(":")[0] for one in judgements] == [MEMKV_MEMORY, MEMKV, MEMKV]
    assert [one.status for one in judgements] == [intervals.MET, intervals.MET, intervals.UNDECIDED], "none resumed"
    report.write(compare.combined(plan.TALKS, {"vllm": body}, 60.0, harness.environment(tmp_path)), tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "### Conversations" in text and "Documents of" not in text and "Passages" not in text
    page = compare.combined(plan.TALKS, {"vllm": body}, 60.0, {})
    assert len(plots.panels_of(page)) == 2, "rates and turns"
    assert plots.panels_of({**page, "stages": {}, "cells": []}) == []
    first = compare.runs_of(plan.TALKS, ["vllm"])[0]
    assert [one.what for one in first.estimates()] == ["engines start", CONVERSATIONS, "conversations resumed"]


def talks(seconds: dict[str, float], units: int = 6) -> list[Batch]:
    return [
        visit(name, CONVERSATIONS, f"turn {turn}", str(unit), one * (1 + 0.02 * (unit % 3)), hits=100)
        for unit in range(units)
        for turn in (1, 2)
        for name, one in seconds.items()
    ]


@pytest.mark.parametrize(("ours", "status"), [(1.0, intervals.MET), (1.33, intervals.MISSED), (2.0, intervals.MISSED)])
def test_throughput_is_held_against_no_cache(ours: float, status: str) -> None:
    batches = talks({MEMKV: ours, NO_CACHE: 1.9})
    assert judge.judge_throughput(batches, CONVERSATIONS, MEMKV, [NO_CACHE], 1.5, "x").status == status


def test_throughput_is_held_against_the_best_peer_and_says_who_is_missing() -> None:
    batches = talks({MEMKV: 1.0, NATIVE: 0.9, PREFIX_CACHE: 2.0})
    one = judge.judge_throughput(batches, CONVERSATIONS, MEMKV, [PREFIX_CACHE, NATIVE, LMCACHE_FS], 1.0, "x")
    assert one.status == intervals.MISSED
    assert one.value == pytest.approx(0.9)
    assert LMCACHE_FS in one.note
    assert judge.judge_throughput(batches, CONVERSATIONS, MEMKV, [LMCACHE_FS], 1.0, "x").status == intervals.UNDECIDED


@pytest.mark.parametrize(("ratio", "status"), [(1.0, intervals.MET), (1.05, intervals.MISSED)])
def test_a_first_visit_may_cost_two_percent(ratio: float, status: str) -> None:
    batches = [
        visit(name, DOCUMENTS, FIRST, str(unit), seconds * (1 + unit))
        for unit in range(5)
        for name, seconds in ((MEMKV, ratio), (PREFIX_CACHE, 1.0))
    ]
    ttft, cpu, storing = judge.judge_first_visit(batches)
    assert [ttft.status, cpu.status, storing.status] == [status, status, intervals.MET]
    for batch in batches:
        batch["usage"]["io_process_cpu_s"] *= 3
    assert judge.judge_first_visit(batches)[2].status == intervals.MISSED


def hits(ratio: float, *, side_: str = MEMKV, units: int = 5, length: int = LENGTH) -> list[Batch]:
    return [
        visit(name, DOCUMENTS, AGAIN, str(unit), seconds * (1 + 0.01 * unit), hits=length, length=length)
        for unit in range(units)
        for name, seconds in ((side_, ratio), (PREFIX_CACHE, 1.0))
    ]


@pytest.mark.parametrize(
    ("ratio", "units", "status"),
    [
        (0.2, 5, intervals.MET),
        (1.02, 5, intervals.MET),
        (1.2, 5, intervals.MISSED),
        (0.2, 2, intervals.MET),
        (1.5, 2, intervals.MISSED),
        (1.02, 2, intervals.UNDECIDED),
        (0.2, 1, intervals.UNDECIDED),
    ],
)
def test_a_hit_may_be_slower_than_recomputing_by_noise(ratio: float, units: int, status: str) -> None:
    cells = judge.hit_cells(hits(ratio, units=units), MEMKV, (PREFIX_CACHE,), 0.05)
    assert [cell.status for cell in cells] == [status]
    assert judge.judge_hits(cells, MEMKV, [cells[0].what], 0.05).status == status


def test_one_slow_cell_is_enough_and_a_missing_one_leaves_it_open() -> None:
    batches = hits(0.2) + hits(1.4, length=1000)
    cells = judge.hit_cells(batches, MEMKV, (PREFIX_CACHE,), 0.05)
    one = judge.judge_hits(cells, MEMKV, [cell.what for cell in cells], 0.05)
    assert (one.status, one.value) == (intervals.MISSED, pytest.approx(1.4))
    assert "1000" in one.note
    good = judge.hit_cells(hits(0.2), MEMKV, (PREFIX_CACHE,), 0.05)
    assert judge.judge_hits(good, MEMKV, [good[0].what, "nothing"], 0.05).status == intervals.UNDECIDED
    unknown = judge.judge_hits(good, MEMKV, [good[0].what], None)
    assert (unknown.status, unknown.limit) == (intervals.MET, 1.0) and "noise was not measured" in unknown.note
    assert judge.judge_hits(good, THROTTLED, [], 0.05).status == intervals.UNDECIDED


def test_noise_is_what_equals_differ_by_and_has_a_bound() -> None:
    def firsts(ratio: Callable[[int], float]) -> list[Batch]:
        return [
            visit(name, DOCUMENTS, FIRST, str(unit), ratio(unit) if name == NO_CACHE else 1.0)
            for unit in range(6)
            for name in (NO_CACHE, PREFIX_CACHE)
        ]

    assert judge.noise_of(firsts(lambda unit: 1.0)) == 0.0
    assert judge.noise_of(firsts(lambda unit: 1.0 + 0.04 * (-1) ** unit)) == pytest.approx(0.042, abs=0.005)
    assert judge.noise_of(firsts(lambda unit: 2.0**unit)) == judge.MAX_NOISE
    assert judge.noise_of(firsts(lambda unit: 1.0)[:4]) is None


def test_requests_without_a_hit_are_no_hits() -> None:
    batches = [visit(MEMKV, RAG, "request", "1", 2.0), visit(NO_CACHE, RAG, "request", "1", 1.0)]
    assert judge.hit_pairs(batches, MEMKV, (NO_CACHE,)) == {}
    batches[0]["hits"]["connector"] = 128
    assert list(judge.hit_pairs(batches, MEMKV, (NO_CACHE,))) == [RAG]


# ------------------------------------------------------------------------------------------------------- what is asked


def test_prefix_repetition_is_what_vllm_makes() -> None:
    made = prompts.prefix_repetition(100, prefixes=3, prefix_tokens=20, suffix_tokens=5, prompts=7, seed=3)
    assert len(made) == 6
    assert {len(prompt) for prompt in made} == {25}
    assert len({tuple(prompt[:20]) for prompt in made}) == 3
    assert len({tuple(prompt) for prompt in made}) == 6
    assert made == prompts.prefix_repetition(100, prefixes=3, prefix_tokens=20, suffix_tokens=5, prompts=7, seed=3)
    with pytest.raises(ValueError, match="2 prompts for 3 prefixes"):
        prompts.prefix_repetition(100, prefixes=3, prefix_tokens=20, suffix_tokens=5, prompts=2)


class CountingCorpus:
    """Tokens that never repeat."""

    def __init__(self) -> None:
        self.next = 0

    def take(self, count: int) -> list[int]:
        self.next += count
        return list(range(self.next - count, self.next))


def test_rag_prompts_share_the_system_prompt_and_passages() -> None:
    corpus: Any = CountingCorpus()
    made = prompts.rag(
        corpus, system_tokens=10, passages=3, passage_tokens=6, per_request=2, question_tokens=4, requests=8
    )
    assert {len(prompt) for prompt in made} == {10 + 12 + 4}
    assert all(prompt[:10] == list(range(10)) for prompt in made)
    passages = {tuple(prompt[10:16]) for prompt in made} | {tuple(prompt[16:22]) for prompt in made}
    assert len(passages) == 3
    shared = [prompts.shared_prefix(prompt, made[:number]) for number, prompt in enumerate(made)]
    assert set(shared) <= {0, 10, 16, 22}
    assert {0, 10, 16} <= set(shared)


def test_conversations_are_all_different() -> None:
    corpus: Any = CountingCorpus()
    made = prompts.conversations(corpus, 3, 3, 20, 4)
    assert [len(talk.opening) for talk in made] == [20] * 3
    assert [len(message) for talk in made for message in talk.messages] == [4] * 6
    assert corpus.next == 3 * 28


# ------------------------------------------------------------------------------------------------- what processes used


def test_the_files_of_proc_are_read() -> None:
    text = "rchar: 9\nwchar: 8\nsyscr: 7\nsyscw: 6\nread_bytes: 4096\nwrite_bytes: 8192\ncancelled_write_bytes: 0\n"
    assert side.io_of(text, 1.5) == side.Usage(1.5, 4096, 8192, 7, 6)
    assert side.pss_of("0-1 [rollup]\nRss:  20 kB\nPss:  12 kB\nPss_Dirty: 3 kB\n") == 12 * 1024
    assert side.stat_fields("7 (a ) b) S 1 2 3\n") == ["S", "1", "2", "3"]


BUSY = "import time\nwhile time.process_time() < 0.3: pass\ninput()"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_meter_counts_the_tree_and_keeps_what_has_ended(tmp_path: Path) -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]]); input()"
    child = f"open({str(tmp_path / 'x')!r}, 'wb').write(bytes(1 << 20))\n" + BUSY
    process = subprocess.Popen([sys.executable, "-c", program, child], stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    try:
        meter = side.Meter([process.pid])
        wait_for(lambda: len(side.tree_of([process.pid])) == 2 and meter.usage().cpu_s > 0.2)
        before = meter.usage()
        meter.read_memory()
        assert meter.peak_rss_bytes > meter.peak_pss_bytes > 0
        process.stdin.write(b"\n")
        process.stdin.flush()
        wait_for(lambda: len(side.tree_of([process.pid])) == 1)
        assert meter.usage().cpu_s >= before.cpu_s
        assert meter.usage().since(before).cpu_s < 5
        assert side.tree_of([os.getpid()])[0] > 0
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


# ------------------------------------------------------------------------------------------------------------- results


def test_a_record_is_whole_at_any_moment_and_names_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record = Record(path, {"stage": "vllm"})
    assert json.loads(path.read_text())["complete"] is False
    record.add_side(MEMKV, "ours")
    record.fail(MEMKV, "start", RuntimeError("cannot open /srv/some/where/engine.log: no such file"))
    told = json.loads(path.read_text())["sides"][MEMKV]
    assert told["status"] == "failed"
    assert told["error"] == "start: RuntimeError: cannot open .../engine.log: no such file"
    assert without_paths("a/b/c and 3/4 stay") == "a/b/c and 3/4 stay"


def stage_body(
    stage: str, batches: list[Batch], raw_reads: list[dict[str, Any]], *, failed: str = ""
) -> dict[str, Any]:
    names = VLLM_SIDES if stage == "vllm" else SGLANG_SIDES
    sides: dict[str, Any] = {name: {"what": name, "status": "ok", "error": ""} for name in names}
    if failed:
        sides[failed].update(status="failed", error="start: SideFailed: it | broke\nmore")
    profile = asdict(replace(plan.DEFAULT, documents=replace(plan.DEFAULT.documents, lengths=(LENGTH,))))
    return {
        "stage": stage, "asked": list(names), "profile": profile, "complete": True,
        "environment": {"versions": {stage: "1.0"}, "stolen_share": 0.01, "page_costs_us": [16.8, 2.46]},
        "sides": sides, "notes": ["a note"], "raw_reads": raw_reads, "batches": batches,
    }  # fmt: skip


def test_the_results_show_judgements_failures_and_losses(tmp_path: Path) -> None:
    vllm = restores({MEMKV: 0.3, NATIVE: 0.2, LMCACHE_FS: 0.9}) + talks({MEMKV: 1.0, NO_CACHE: 2.0, PREFIX_CACHE: 1.9})
    sglang = talks({NO_STORAGE: 2.0, FILE: 1.0, HICACHE: 0.5})
    stages = {
        "vllm": stage_body("vllm", vllm, raw(0.1), failed=LMCACHE_FS),
        "sglang": stage_body("sglang", sglang, []),
    }
    body = compare.combined(plan.DEFAULT, stages, 60.0, harness.environment(tmp_path))
    json.dumps(body)
    report.write(body, tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert (tmp_path / report.PLOT).stat().st_size > 10_000
    assert "**missed**" in text and "**met**" in text and "**not decided**" in text
    assert "it / broke" in text and "more" not in text.split("it / broke")[1].split("\n")[0]
    # The native tier restores in less time, and a table says so.
    behind = text.split("### Where ours is behind")[1].split("###")[0]
    assert any(NATIVE in line and "later" in line and line.rstrip().endswith("yes |") for line in behind.splitlines())
    assert "cost 16.8 us" in text and "2.5 us when given back" in text
    assert str(tmp_path) not in text
    assert compare.problems_of(body) == [f"vllm: {LMCACHE_FS}: start: SideFailed: it / broke"]


def test_a_stage_that_dies_leaves_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(program: str) -> None:
        interpreter = tmp_path / ".venvs" / "vllm" / "bin" / "python"
        interpreter.parent.mkdir(parents=True, exist_ok=True)
        interpreter.write_text(f"#!{sys.executable}\n{program}")
        interpreter.chmod(0o755)

    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(plots, "draw", lambda body, path: None)
    arguments = ["--profile", "tiny", "--stages", "vllm", "--folder", str(tmp_path), "--output", str(tmp_path / "out")]
    assert compare.main(arguments) == 1
    assert (
        "could not be started" in json.loads((tmp_path / "out" / "compare.json").read_text())["stages"]["vllm"]["error"]
    )
    partial = {**stage_body("vllm", talks({MEMKV: 1.0}), []), "complete": False}
    (tmp_path / "partial.json").write_text(json.dumps(partial))
    fake(
        "import shutil, sys, os, signal\n"
        "output = sys.argv[sys.argv.index('--output') + 1]\n"
        f"shutil.copy({str(tmp_path / 'partial.json')!r}, output)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert compare.main(arguments) == 1
    body = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert body["stages"]["vllm"]["error"] == "it ended with code -9"
    assert len(body["stages"]["vllm"]["batches"]) == 12
    assert "did not reach its end" in (tmp_path / "out" / "RESULTS.md").read_text()
