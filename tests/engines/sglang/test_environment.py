"""What the other SGLang tests stand on: stock SGLang on a CPU, whose own file storage gives back what it was given.

No code of ours takes part. Each kind of KV that SGLang keeps has a model: see `sglang_models.py`. One engine starts as
a user's would, the others are forked, and both give the same answers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engines.prompts import tokens_of
from tests.engines.sglang.engines import PAGE_TOKENS, Answer, Engine, hicache, is_same, wait_until
from tests.engines.sglang.forked_engines import ForkedEngine

PROMPT_TOKENS = 600
PAGES = PROMPT_TOKENS // PAGE_TOKENS
PROMPT = tokens_of(5, PROMPT_TOKENS)
# Differs in a single early token.
CHANGED_PROMPT = [*PROMPT[:40], 4 + (PROMPT[40] + 1) % 256, *PROMPT[41:]]
PLAIN, FORKED = (Engine, "tiny-sg-llama"), (ForkedEngine, "tiny-sg-llama")


@dataclass(frozen=True)
class Run:
    """What one engine answered, what it held in shared memory while it ran, and what was left of it after its end."""

    answers: dict[str, Answer]
    held: list[Path]
    pids: list[int]
    shared_memory: list[Path]


def damage(folder: Path) -> None:
    """Overwrites every stored page with the one that follows it in a listing: valid numbers, wrong place."""
    by_size: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("*.bin")):
        by_size.setdefault(path.stat().st_size, []).append(path)
    for paths in by_size.values():
        pages = [path.read_bytes() for path in paths]
        for path, page in zip(paths, [*pages[1:], pages[0]], strict=True):
            path.write_bytes(page)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[type[Engine], str]], Run]:
    """Returns what runs one engine and asks it for everything, once for each way to start it and each model."""
    return functools.cache(lambda kind: run_engine(*kind, tmp_path_factory.mktemp("engine")))


@pytest.fixture(
    scope="module",
    params=[PLAIN, FORKED, (ForkedEngine, "tiny-sg-deepseek"), (ForkedEngine, "tiny-sg-mellum")],
    ids=lambda kind: f"{kind[0].__name__}-{kind[1]}",
)
def run(request: pytest.FixtureRequest, run_of: Callable[[tuple[type[Engine], str]], Run]) -> Run:
    """Each of the engines."""
    return run_of(request.param)


def run_engine(start: type[Engine], model: str, work: Path) -> Run:
    """Asks one engine for everything."""
    folder = work / "stored"
    folder.mkdir()
    answers = {}
    with start(model, log=work / "engine.log", **hicache("file", file_storage_path=str(folder))) as engine:
        answers["cold"] = engine.generate(PROMPT)
        answers["cached"] = engine.generate(PROMPT)
        answers["changed"] = engine.generate(CHANGED_PROMPT)
        wait_until(lambda: len(list(folder.glob("*.bin"))) >= PAGES, "the prompt's pages are stored")
        engine.flush()
        answers["restored"] = engine.generate(PROMPT)
        engine.flush()
        damage(folder)
        answers["damaged"] = engine.generate(PROMPT)
        held = engine.shared_memory()
    return Run(answers, held, engine.pids(), engine.shared_memory())


def test_every_part_of_a_prompt_decides(run: Run) -> None:
    assert not is_same(run.answers["changed"], run.answers["cold"])


def test_the_engine_s_own_cache_changes_nothing(run: Run) -> None:
    assert run.answers["cached"].cached >= PROMPT_TOKENS - PAGE_TOKENS
    assert run.answers["cached"].from_storage == 0
    assert is_same(run.answers["cached"], run.answers["cold"])


def test_a_prompt_restored_from_storage_gets_the_same_answer(run: Run) -> None:
    assert run.answers["restored"].from_storage >= PROMPT_TOKENS - PAGE_TOKENS
    assert run.answers["restored"].details["storage_backend"] == "HiCacheFile"
    assert is_same(run.answers["restored"], run.answers["cold"])
    # The engine computes the same few tokens after a hit in its own cache: to the last bit, if the KV is the same.
    assert run.answers["restored"].tokens == run.answers["cached"].tokens
    assert run.answers["restored"].logprobs == run.answers["cached"].logprobs


def test_damaged_pages_show_in_the_answer(run: Run) -> None:
    assert run.answers["damaged"].from_storage >= PROMPT_TOKENS - PAGE_TOKENS
    assert not is_same(run.answers["damaged"], run.answers["cold"])


def test_an_engine_that_was_forked_answers_as_one_that_was_started(
    run_of: Callable[[tuple[type[Engine], str]], Run],
) -> None:
    plain, forked = run_of(PLAIN), run_of(FORKED)
    for name in ("cold", "cached", "changed", "restored"):
        assert is_same(forked.answers[name], plain.answers[name])
        assert forked.answers[name].details == plain.answers[name].details


def test_nothing_of_an_engine_is_left(run: Run) -> None:
    assert run.held, "an engine without shared memory would make the rest of this test void"
    assert run.pids == []
    assert run.shared_memory == []
