"""`MemKVCacheLinker` in real SGLang engines: same answers, fewer computed tokens, and damage that aborts nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engines.prompts import tokens_of
from tests.engines.sglang.engines import PAGE_TOKENS, Answer, Engine, is_same, linker, wait_until
from tests.engines.sglang.forked_engines import ForkedEngine
from tests.engines.sglang.tier_of_engine import chunks_aside, damage, stored_tokens

PROMPT_TOKENS = 600
WHOLE = PROMPT_TOKENS - PAGE_TOKENS
PROMPT = tokens_of(5, PROMPT_TOKENS)
# Shares 20 pages with the first, and goes on from inside its chunk.
DIVERGING = [*PROMPT[: 20 * PAGE_TOKENS], *tokens_of(6, 200)]


@dataclass(frozen=True)
class Run:
    """What two engines answered, one after the other."""

    answers: dict[str, Answer]
    chunks: int
    damaged: int
    windowed: bool


@pytest.fixture(scope="module", params=["tiny-sg-llama", "tiny-sg-deepseek", "tiny-sg-mellum"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Asks two engines for everything."""
    tier, logs = tmp_path_factory.mktemp("tier"), tmp_path_factory.mktemp("logs")
    patient = linker(tier, probe_timeout_ms=20_000, miss_ttl_s=0.01)
    answers: dict[str, Answer] = {}
    with ForkedEngine(request.param, log=logs / "first.log", **patient) as engine:
        answers["cold"] = engine.generate(PROMPT)
        wait_until(lambda: stored_tokens(tier) >= WHOLE, "the prompt's pages are stored")
        engine.flush()
        answers["restored"] = engine.generate(PROMPT)
        engine.flush()
        with chunks_aside(tier):
            answers["diverging, computed"] = engine.generate(DIVERGING)
            engine.flush()
    chunks = len(list(tier.rglob("*-g0-*.kv")))
    with ForkedEngine(request.param, log=logs / "second.log", **patient) as engine:
        answers["fresh process"] = engine.generate(PROMPT)
        engine.flush()
        answers["diverging"] = engine.generate(DIVERGING)
        engine.flush()
        damaged = damage(tier)
        answers["damaged"] = engine.generate(PROMPT)
        answers["damaged, diverging"] = engine.generate(DIVERGING)
        kill_io_process(engine)
        engine.flush()
        answers["I/O process killed"] = engine.generate(PROMPT)
        deadline = time.monotonic() + 60
        while answers.get("I/O process back", answers["cold"]).cached < WHOLE and time.monotonic() < deadline:
            engine.flush()
            answers["I/O process back"] = engine.generate(PROMPT)
    yield Run(answers, chunks, damaged, request.param == "tiny-sg-mellum")


def kill_io_process(engine: Engine) -> None:
    for pid in engine.pids():
        if b"memkv_engines.offload.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("when", ["restored", "fresh process", "I/O process back"])
def test_what_comes_from_storage_gives_the_same_answer(when: str, run: Run) -> None:
    answer = run.answers[when]
    assert answer.cached >= WHOLE
    assert is_same(answer, run.answers["cold"])


def test_pages_are_not_objects_of_their_own(run: Run) -> None:
    assert run.chunks <= 3


def test_a_prompt_that_diverges_inside_a_chunk_hits_what_it_shares(run: Run) -> None:
    # A window's pages are kept where a node of the radix tree ends, not where another prompt turns off.
    assert run.answers["diverging"].cached >= (0 if run.windowed else 16 * PAGE_TOKENS)
    assert run.answers["diverging, computed"].cached == 0
    assert is_same(run.answers["diverging"], run.answers["diverging, computed"])
    assert not is_same(run.answers["diverging"], run.answers["cold"])


def test_damage_is_recomputed_and_aborts_nothing(run: Run) -> None:
    assert run.damaged
    assert run.answers["damaged"].cached < WHOLE
    assert is_same(run.answers["damaged"], run.answers["cold"])
    assert is_same(run.answers["damaged, diverging"], run.answers["diverging, computed"])


def test_a_dead_io_process_costs_a_hit_only(run: Run) -> None:
    assert is_same(run.answers["I/O process killed"], run.answers["cold"])
