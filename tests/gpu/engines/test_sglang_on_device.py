"""A real SGLang with its pools on a real device: both doors, same answers, damage recomputed. Not run on a GPU yet.

The oracle is SGLang's own radix cache, which computes the same rows as a full hit from storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memkv_engines.transports.gds import what_gpudirect_lacks
from tests.engines.prompts import tokens_of
from tests.engines.sglang.engines import (
    PAGE_TOKENS,
    Answer,
    Engine,
    hicache,
    is_same,
    linker,
    memkv_extra,
    wait_until,
)
from tests.engines.sglang.tier_of_engine import damage, stored_tokens

pytest.importorskip("sglang", reason="SGLang is not installed here: give its Python to tests.gpu.run as --sglang")

PROMPT = tokens_of(41, 1600)
WHOLE = len(PROMPT) - PAGE_TOKENS
ON_DEVICE: dict[str, Any] = {
    "device": "cuda",
    "attention_backend": "triton",
    "sampling_backend": None,
    "dtype": "bfloat16",
    "mem_fraction_static": 0.3,
}
DOORS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "hierarchical cache": lambda tier: hicache("dynamic", **memkv_extra(tier)),
    "linker": lambda tier: linker(tier, gds="off", probe_timeout_ms=20_000, miss_ttl_s=0.01),
    "linker, GPUDirect": lambda tier: linker(
        tier, gds="on", staging_medium="gpu", probe_timeout_ms=20_000, miss_ttl_s=0.01
    ),
}


@dataclass(frozen=True)
class Run:
    """What engines answered to one prompt, by name, and what was damaged."""

    answers: dict[str, Answer]
    damaged: int


def start(door: str, tier: Path, log: Path) -> Engine:
    # The variable that makes these tests' engines CPU engines is taken back.
    environ = {"SGLANG_USE_CPU_ENGINE": "0"}
    return Engine("tiny-sg-llama", log=log, env=environ, timeout_s=600, **{**ON_DEVICE, **DOORS[door](tier)})


@pytest.fixture(scope="module", params=DOORS)
def run(request: pytest.FixtureRequest, device: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Two engines, one after the other, so that the second has nothing but the tier."""
    if "GPUDirect" in request.param and (lacks := what_gpudirect_lacks()):
        pytest.skip(f"GPUDirect Storage lacks {'; '.join(lacks)}")
    folder = tmp_path_factory.mktemp("sglang")
    tier = folder / "tier"
    answers = dict[str, Answer]()
    with start(request.param, tier, folder / "first.log") as engine:
        answers["cold"] = engine.generate(PROMPT)
        wait_until(lambda: stored_tokens(tier) >= WHOLE, "the prompt's pages are stored")
        answers["device hit"] = engine.generate(PROMPT)
        engine.flush()
        answers["restored"] = engine.generate(PROMPT)
    with start(request.param, tier, folder / "second.log") as engine:
        answers["fresh process"] = engine.generate(PROMPT)
        engine.flush()
        damaged = damage(tier)
        answers["damaged"] = engine.generate(PROMPT)
        answers["after damage"] = engine.generate(PROMPT)
    yield Run(answers, damaged)


@pytest.mark.parametrize("name", ["restored", "fresh process"])
def test_answers_from_the_tier_are_those_of_a_device_hit(run: Run, name: str) -> None:
    assert run.answers[name].cached == run.answers["device hit"].cached >= WHOLE
    assert is_same(run.answers[name], run.answers["device hit"])


def test_damage_is_recomputed_and_aborts_nothing(run: Run) -> None:
    assert run.damaged
    assert run.answers["damaged"].cached < WHOLE
    assert len(run.answers["damaged"].tokens) == len(run.answers["cold"].tokens)
    assert is_same(run.answers["after damage"], run.answers["device hit"])
