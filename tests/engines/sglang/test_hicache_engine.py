"""`MemKVHiCache` in real SGLang engines: same answers, fewer computed tokens, and damage that nobody notices."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engines.prompts import tokens_of
from tests.engines.sglang.engines import (
    PAGE_TOKENS,
    Answer,
    hicache,
    is_same,
    memkv_extra,
    wait_until,
)
from tests.engines.sglang.forked_engines import ForkedEngine
from tests.engines.sglang.tier_of_engine import chunks_aside, damage, plant, stored_tokens

PROMPT_TOKENS = 600
PROMPT = tokens_of(5, PROMPT_TOKENS)
# Shares 20 pages with the first, and goes on from inside its chunk.
DIVERGING = [*PROMPT[: 20 * PAGE_TOKENS], *tokens_of(6, 200)]


def memkv(tier: Path, **keys: Any) -> dict[str, Any]:
    """The engine's arguments for our backend. The weights are fingerprinted, as a user's would be."""
    return hicache("dynamic", **memkv_extra(tier, probe_timeout_ms=20_000, **keys))


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
    answers: dict[str, Answer] = {}
    with ForkedEngine(request.param, log=logs / "first.log", **memkv(tier)) as engine:
        answers["cold"] = engine.generate(PROMPT)
        answers["cached"] = engine.generate(PROMPT)
        wait_until(lambda: stored_tokens(tier) >= PROMPT_TOKENS - PAGE_TOKENS, "the prompt's pages are stored")
        engine.flush()
        answers["restored"] = engine.generate(PROMPT)
        engine.flush()
        with chunks_aside(tier):
            answers["diverging, computed"] = engine.generate(DIVERGING)
            engine.flush()
    chunks = len(list(tier.rglob("*-g0-*.kv")))
    with ForkedEngine(request.param, log=logs / "second.log", **memkv(tier)) as engine:
        answers["fresh process"] = engine.generate(PROMPT)
        engine.flush()
        answers["diverging"] = engine.generate(DIVERGING)
        engine.flush()
        damaged = damage(tier)
        answers["damaged"] = engine.generate(PROMPT)
        answers["damaged, diverging"] = engine.generate(DIVERGING)
    yield Run(answers, chunks, damaged, request.param == "tiny-sg-mellum")


@pytest.mark.parametrize("when", ["restored", "fresh process"])
def test_what_comes_from_storage_gives_the_same_answer(when: str, run: Run) -> None:
    answer = run.answers[when]
    assert answer.from_storage >= PROMPT_TOKENS - PAGE_TOKENS
    assert answer.details["storage_backend"] == "MemKVHiCache"
    assert is_same(answer, run.answers["cold"])


def test_pages_are_not_objects_of_their_own(run: Run) -> None:
    assert run.chunks <= 3


def test_a_prompt_that_diverges_inside_a_chunk_hits_what_it_shares(run: Run) -> None:
    # A window's pages are kept where a node of the radix tree ends, not where another prompt turns off.
    assert run.answers["diverging"].from_storage >= (0 if run.windowed else 16 * PAGE_TOKENS)
    assert run.answers["diverging, computed"].from_storage == 0
    assert is_same(run.answers["diverging"], run.answers["diverging, computed"])
    assert not is_same(run.answers["diverging"], run.answers["cold"])


def test_damage_is_recomputed_and_never_shows(run: Run) -> None:
    assert run.damaged
    assert run.answers["damaged"].from_storage < PROMPT_TOKENS - PAGE_TOKENS
    assert is_same(run.answers["damaged"], run.answers["cold"])
    assert is_same(run.answers["damaged, diverging"], run.answers["diverging, computed"])


def test_other_weights_do_not_hit(tmp_path: Path) -> None:
    """The same model file under other weights: only the fingerprint tells them apart."""
    tier = tmp_path / "tier"
    with ForkedEngine("tiny-sg-llama", log=tmp_path / "a.log", **memkv(tier)) as engine:
        engine.generate(PROMPT)
        wait_until(lambda: stored_tokens(tier) >= PROMPT_TOKENS - PAGE_TOKENS, "the prompt's pages are stored")
    with ForkedEngine("tiny-sg-llama", log=tmp_path / "b.log", **memkv(tier), dtype="bfloat16") as engine:
        assert engine.generate(PROMPT).from_storage == 0
    manifests = [json.loads(path.read_text()) for path in tier.glob("*/manifest.json")]
    assert len({m["weights"] for m in manifests}) == 2
    assert all(m["weights"].startswith("sums:") for m in manifests)


def test_encrypted_chunks_come_back_and_planted_ones_do_not(tmp_path: Path) -> None:
    """Somebody who can write the tier, and has no key, writes other values with digests that fit."""
    tier, key = tmp_path / "tier", tmp_path / "key"
    key.touch(0o600)
    key.write_text("5f1c" + "0123456789abcdef" * 3 + "90817263544f")
    protected = memkv(tier, protection="encrypt", protection_key_file=str(key))
    with ForkedEngine("tiny-sg-llama", log=tmp_path / "a.log", **protected) as engine:
        cold = engine.generate(PROMPT)
        wait_until(lambda: stored_tokens(tier) >= PROMPT_TOKENS - PAGE_TOKENS, "the prompt's pages are stored")
    with ForkedEngine("tiny-sg-llama", log=tmp_path / "b.log", **protected) as engine:
        restored = engine.generate(PROMPT)
        engine.flush()
        plant(tier)
        planted = engine.generate(PROMPT)
    assert restored.from_storage >= PROMPT_TOKENS - PAGE_TOKENS and is_same(restored, cold)
    assert planted.from_storage == 0 and is_same(planted, cold)
    assert "unauthenticated" in (tmp_path / "b.log").read_text()


def test_an_unknown_key_stops_the_engine_with_a_hint(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    with pytest.raises(AssertionError), ForkedEngine("tiny-sg-llama", log=log, **memkv(tmp_path, pathh="x")):
        pass
    assert "did you mean 'path'" in log.read_text()


def test_a_dead_io_process_costs_hits_only(tmp_path: Path) -> None:
    """The engine answers on, and hits again once the I/O process has come back."""
    tier = tmp_path / "tier"
    with ForkedEngine("tiny-sg-llama", log=tmp_path / "engine.log", **memkv(tier)) as engine:
        cold = engine.generate(PROMPT)
        wait_until(lambda: stored_tokens(tier) >= PROMPT_TOKENS - PAGE_TOKENS, "the prompt's pages are stored")
        for pid in engine.pids():
            if b"memkv_engines.offload.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        engine.flush()
        assert is_same(engine.generate(PROMPT), cold)
        deadline = time.monotonic() + 60
        hit = False
        while not hit and time.monotonic() < deadline:
            engine.flush()
            answer = engine.generate(PROMPT)
            assert is_same(answer, cold)
            hit = answer.from_storage >= PROMPT_TOKENS - PAGE_TOKENS
        assert hit
