"""The comparison goes on without a side that fails, wherever it does, and asks all others alike."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import plan, side, stage
from benchmarks.compare.driver import Clock, Driver
from benchmarks.compare.names import (
    AGAIN,
    CONVERSATIONS,
    DOCUMENTS,
    FIRST,
    LOCAL,
    NATIVE,
    PREFIX_CACHE,
    RAG,
    REPETITION,
    RESUMED,
    WORKLOADS,
)
from benchmarks.compare.record import Record, batches_of
from benchmarks.compare.side import Reply, Result, Side, SideFailed

DOCUMENTS_PLAN = plan.Documents(lengths=(8, 8, 4), answer_tokens=2, restores=2, gate_rounds=1)
TALK = plan.Conversations(count=4, together=2, turns=3, document_tokens=6, user_tokens=2, answer_tokens=2, rounds=2)


class Corpus:
    """Tokens that never repeat."""

    vocabulary = 100

    def __init__(self) -> None:
        self.next = 0

    def take(self, count: int) -> list[int]:
        self.next += count
        return list(range(self.next - count, self.next))


class FakeSide(Side):
    """Answers at once; fails where it is told to."""

    def __init__(self, name: str, folder: Path | None, *, fails_at: str = "", after: int = 0) -> None:
        self.name, self.what, self.folder = name, f"a {name}", folder
        self.fails_at, self.after = fails_at, after
        self.asked: list[list[list[int]]] = []
        self.forgot, self.closed = 0, 0
        self.forgot_at: list[int] = []

    def _may_fail(self, where: str) -> None:
        if where == self.fails_at and len(self.asked) >= self.after:
            raise SideFailed(f"died in {where}")

    def prepare(self) -> None:
        self._may_fail("prepare")

    def wait_until_ready(self) -> None:
        self._may_fail("start")

    def ask(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Result:
        self._may_fail("ask")
        self.asked.append([list(prompt) for prompt in prompts])
        replies = tuple(Reply((len(self.asked),) * max_tokens, len(prompt), 0.1) for prompt in prompts)
        return Result(replies, 0.1 * len(prompts), {"connector": 0})

    def forget(self) -> None:
        self._may_fail("forget")
        self.forgot += 1
        self.forgot_at.append(len(self.asked))

    def pids(self) -> list[int]:
        return [os.getpid()]

    def close(self) -> None:
        self.closed += 1
        if self.fails_at == "close":
            raise RuntimeError("cannot be ended")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to wait for, and no process to look at."""
    monkeypatch.setattr(side, "tree_of", lambda roots: [])
    monkeypatch.setattr(side, "SETTLE_S", 0.0)
    monkeypatch.setattr(side, "SETTLE_TIMEOUT_S", 0.0)


def started(one: FakeSide) -> FakeSide:
    """What starts a side."""
    one._may_fail("making")
    return one


def run_all(
    sides: Sequence[FakeSide], path: Path, minutes: float = 1.0, talk: plan.Conversations = TALK
) -> dict[str, Any]:
    """Runs what a stage runs; returns what is in the file."""
    record = Record(path, {})
    driver = Driver(record, Clock(minutes), lambda line: None)
    driver.add({one.name: partial(started, one) for one in sides})
    corpus: Any = Corpus()
    driver.start([corpus.take(3) for _ in sides])
    documents = {f"document {number}": corpus.take(length) for number, length in enumerate(DOCUMENTS_PLAN.lengths)}
    driver.documents_first(documents, DOCUMENTS_PLAN, "nobody", 4)
    driver.documents_again(documents, DOCUMENTS_PLAN, 1, driver.asked_for_documents())
    driver.forget_all()
    driver.conversations(talk, corpus, cold=True)
    driver.resume(talk, corpus)
    driver.requests(RAG, [corpus.take(5) for _ in range(5)], 2, 2)
    driver.finish()
    body: dict[str, Any] = json.loads(path.read_text())
    return body


def test_all_sides_are_asked_for_the_same_and_none_always_first(tmp_path: Path) -> None:
    sides = [FakeSide("a", tmp_path), FakeSide("b", None), FakeSide("c", tmp_path)]
    body = run_all(sides, tmp_path / "record.json")
    for step, count in ((FIRST, 3), (AGAIN, 3), ("turn 3", 4), ("request", 3)):
        assert [len(list(batches_of(body["batches"], side=one.name, step=step))) for one in sides] == [count] * 3
    # Only what stores has a local hit to measure its restores against.
    assert {batch["side"] for batch in batches_of(body["batches"], step=LOCAL)} == {"a", "c"}
    first = [batch["side"] for batch in body["batches"] if batch["workload"] == CONVERSATIONS][::3]
    assert set(first) == {"a", "b", "c"}
    for batch in batches_of(body["batches"], workload=CONVERSATIONS, step="turn 2"):
        others = batches_of(body["batches"], workload=CONVERSATIONS, step="turn 2", unit=batch["unit"])
        assert len({other["requests"][0]["prompt_tokens"] for other in others}) == 1
    # Each goes on from its own answers: a prompt holds the one before, its answer, and the next message.
    talks = [prompts for prompts in sides[0].asked if len(prompts) == 2][:6]
    assert talks[2][0][: len(talks[0][0])] == talks[0][0]
    assert len(talks[2][0]) == len(talks[0][0]) + TALK.answer_tokens + TALK.user_tokens
    assert {name: one["status"] for name, one in body["sides"].items()} == dict.fromkeys("abc", "ok")
    assert all(one.closed for one in sides)


def test_a_side_that_keeps_its_memory_is_not_asked_for_what_has_to_come_from_the_disk(tmp_path: Path) -> None:
    sides = [FakeSide("a", tmp_path), FakeSide("talks", tmp_path)]
    sides[1].keeps_memory = True
    body = run_all(sides, tmp_path / "record.json")
    asked = {one.name: {b["workload"] for b in batches_of(body["batches"], side=one.name)} for one in sides}
    assert asked["a"] - asked["talks"] == {DOCUMENTS, RESUMED} and CONVERSATIONS in asked["talks"]


@pytest.mark.parametrize("workloads", [(CONVERSATIONS,), (DOCUMENTS,), (RAG, REPETITION), WORKLOADS])
def test_a_profile_asks_for_its_workloads_and_no_other(tmp_path: Path, workloads: tuple[str, ...]) -> None:
    profile = replace(plan.TINY, documents=DOCUMENTS_PLAN, conversations=TALK, workloads=workloads)
    record, clock = Record(tmp_path / "x.json", {}), Clock(1.0)
    driver = Driver(record, clock, lambda line: None)
    driver.add({NATIVE: lambda: FakeSide(NATIVE, tmp_path), PREFIX_CACHE: lambda: FakeSide(PREFIX_CACHE, None)})
    corpus: Any = Corpus()
    stage.run_vllm(driver, profile, corpus, stage.Run(record, clock, lambda line: None))
    asked = {batch["workload"] for batch in record.body["batches"]}
    assert asked == {*workloads, *([RESUMED] if CONVERSATIONS in workloads else [])}
    driver.close()


def test_each_set_of_processes_is_ended_before_the_next_and_who_failed_is_out(tmp_path: Path) -> None:
    profile = replace(plan.TINY, conversations=replace(TALK, rounds=1), workloads=(CONVERSATIONS,))
    record, clock, corpus = Record(tmp_path / "x.json", {}), Clock(1.0), Corpus()
    run = stage.Run(record, clock, lambda line: None)
    made: list[FakeSide] = []

    def make(name: str, fails_at: str) -> FakeSide:
        assert all(one.closed for one in made if one.name == name)
        made.append(FakeSide(name, tmp_path, fails_at=fails_at))
        return made[-1]

    makers: Any = {NATIVE: partial(make, NATIVE, ""), PREFIX_CACHE: partial(make, PREFIX_CACHE, "ask")}
    for number in (1, 2, 3):
        anyhow: Any = corpus
        stage.run_set("vllm", Driver(record, clock, run.say, number), makers, profile, anyhow, run)
    assert [one.name for one in made] == [NATIVE, PREFIX_CACHE, NATIVE, NATIVE] and all(one.closed for one in made)
    batches = list(batches_of(record.body["batches"], side=NATIVE, workload=CONVERSATIONS))
    assert {(batch["processes"], batch["round"], batch["unit"][0]) for batch in batches} == {
        (1, 1, "1"), (2, 2, "2"), (3, 3, "3"),
    }  # fmt: skip
    assert len({(batch["unit"], batch["step"]) for batch in batches}) == len(batches)
    assert {batch["round"] for batch in batches_of(record.body["batches"], workload=RESUMED)} == {1, 2, 3}
    assert record.body["sides"][PREFIX_CACHE]["status"] == "failed"


def test_sides_without_a_tier_take_part_in_the_first_rounds_only(tmp_path: Path) -> None:
    talk = replace(TALK, recomputed_rounds=1)
    body = run_all([FakeSide("a", tmp_path), FakeSide("b", None)], tmp_path / "record.json", talk=talk)
    asked = {
        name: {batch["round"] for batch in batches_of(body["batches"], side=name, workload=CONVERSATIONS)}
        for name in "ab"
    }
    assert asked == {"a": {1, 2}, "b": {1}}
    assert {batch["round"] for batch in batches_of(body["batches"], side="a", workload=RESUMED)} == {1, 2}


def test_conversations_are_resumed_by_sides_that_store_with_nothing_in_memory(tmp_path: Path) -> None:
    sides = [FakeSide("a", tmp_path), FakeSide("b", None)]
    body = run_all(sides, tmp_path / "record.json")
    resumed = list(batches_of(body["batches"], workload=RESUMED))
    assert {batch["side"] for batch in resumed} == {"a"}
    assert [batch["unit"] for batch in resumed] == [
        batch["unit"] for batch in batches_of(body["batches"], workload=CONVERSATIONS, side="a", step="turn 3")
    ]
    prompts = [prompts for prompts in sides[0].asked if len(prompts) == 2]
    # Lengths tell turns apart; the first of each is that of the first conversation.
    before, longest = sorted({len(prompt[0]) for prompt in prompts})[-2:]
    last = next(prompt for prompt in prompts if len(prompt[0]) == before)
    more = next(prompt for prompt in prompts if len(prompt[0]) == longest)
    assert more[0][: len(last[0])] == last[0]
    assert len(more[0]) == len(last[0]) + TALK.answer_tokens + TALK.user_tokens
    assert sides[0].forgot_at.count(sides[0].asked.index(more)) == 1, "memory is emptied once, right before"


@pytest.mark.parametrize(
    ("fails_at", "after"),
    [("prepare", 0), ("start", 0), ("ask", 0), ("ask", 1), ("ask", 5), ("ask", 14), ("forget", 2)],
)
def test_a_side_that_fails_leaves_the_others_alone(tmp_path: Path, fails_at: str, after: int) -> None:
    bad = FakeSide("bad", tmp_path, fails_at=fails_at, after=after)
    good = [FakeSide("a", tmp_path), FakeSide("b", None)]
    body = run_all([good[0], bad, good[1]], tmp_path / "record.json")
    alone = run_all([FakeSide("a", tmp_path), FakeSide("b", None)], tmp_path / "alone.json")
    for name in "ab":
        labels = [(b["workload"], b["step"], b["unit"], b["round"]) for b in batches_of(body["batches"], side=name)]
        assert labels == [
            (b["workload"], b["step"], b["unit"], b["round"]) for b in batches_of(alone["batches"], side=name)
        ]
    told = body["sides"]["bad"]
    assert told["status"] == "failed" and f"died in {fails_at}" in told["error"]
    assert bad.closed == (fails_at != "making")
    assert len(list(batches_of(body["batches"], side="bad"))) == max(0, len(bad.asked) - 1)


def test_one_that_cannot_be_ended_does_not_keep_the_others(tmp_path: Path) -> None:
    sides = [FakeSide("a", tmp_path, fails_at="close"), FakeSide("b", None)]
    run_all(sides, tmp_path / "record.json")
    assert [one.closed for one in sides] == [1, 1]


def test_out_of_time_the_first_round_is_run_and_the_rest_noted(tmp_path: Path) -> None:
    body = run_all([FakeSide("a", tmp_path)], tmp_path / "record.json", minutes=0.0)
    assert {batch["round"] for batch in batches_of(body["batches"], workload=CONVERSATIONS)} == {1}
    assert any("before round 2 of 2" in note for note in body["notes"])
    assert len(list(batches_of(body["batches"], workload=DOCUMENTS, step=AGAIN))) == 3


def test_sides_may_go_and_come(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.json", {})
    driver = Driver(record, Clock(1.0), lambda line: None)
    early, late = FakeSide("early", tmp_path), FakeSide("late", tmp_path)
    driver.add({"early": lambda: early})
    driver.start([[1]])
    driver.retire(["early", "nobody"])
    assert early.closed == 1 and driver.asked_for_documents() == []
    driver.join("late", lambda: late, [[1, 2], [3]])
    driver.join("bad", partial(started, FakeSide("bad", None, fails_at="making")), [[1]])
    assert driver.asked_for_documents() == ["late"] and late.asked == [[[1, 2]], [[3]]]
    driver.finish()
    assert {name: one["status"] for name, one in record.body["sides"].items()} == {
        "early": "ok", "late": "ok", "bad": "failed",
    }  # fmt: skip
    assert all("stored_files" in record.body["sides"][name] for name in ("early", "late"))
