"""A real vLLM with its KV cache on a real device: same tokens from the tier, damage recomputed. Not run on a GPU yet.

The oracle is vLLM's own prefix cache, which computes the same rows as a full hit from the tier; a cold prompt is
computed in other shapes, and in 16 bits rounds in another way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks.engine_run import Answer, Engine, EngineSpec
from benchmarks.tier_files import contents_of, wait_for_blocks
from memkv_engines.chunk.codec import read_header
from memkv_engines.transports.gds import what_gpudirect_lacks
from tests.engines.prompts import tokens_of
from tests.environments.models import ensure_model

pytest.importorskip("vllm", reason="vLLM is not installed here: give its Python to tests.gpu.run as --vllm")

PROMPT = tokens_of(31, 3000)
BLOCK_TOKENS = 32
MAX_TOKENS = 16
START_TIMEOUT_S = 600.0
# How chunks are staged, and whether vLLM replays CUDA graphs beside our launches.
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "host staging": ({"gds": "off"}, True),
    "host staging, CUDA graphs": ({"gds": "off"}, False),
    "GPUDirect": ({"gds": "on", "staging_medium": "gpu"}, True),
}


@dataclass(frozen=True)
class Run:
    """What engines answered to one prompt, by name, and what they logged."""

    answers: dict[str, Answer]
    external: dict[str, int]
    damaged_misses: float
    log: str
    on_gpu: bool


def spec(eager: bool, connector: dict[str, Any] | None) -> EngineSpec:
    arguments = {
        "max_model_len": 4096,
        "block_size": BLOCK_TOKENS,
        "gpu_memory_utilization": 0.3,
        "enforce_eager": eager,
    }
    return EngineSpec(str(ensure_model("tiny-llama")), "bfloat16", arguments=arguments, connector=connector)


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, device: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Four engines, one after the other: without us, a first visit, a restart, a restart beside damage."""
    keys, eager = CASES[request.param]
    if keys["gds"] == "on" and (lacks := what_gpudirect_lacks()):
        pytest.skip(f"GPUDirect Storage lacks {'; '.join(lacks)}")
    folder = tmp_path_factory.mktemp("vllm")
    tier = folder / "tier"
    connector = {"path": str(tier), "cost_gate": "off", "probe_timeout_ms": 20_000, **keys}
    answers, external = dict[str, Answer](), dict[str, int]()

    def ask(engine: Engine, name: str) -> None:
        answers[name], external[name] = engine.ask(PROMPT, MAX_TOKENS)

    with Engine(spec(eager, None), folder / "alone.log", timeout_s=START_TIMEOUT_S) as engine:
        ask(engine, "cold")
        ask(engine, "local hit")
    tier.mkdir(mode=0o700)
    with Engine(spec(eager, connector), folder / "first.log", timeout_s=START_TIMEOUT_S) as engine:
        before = contents_of(tier)
        ask(engine, "first visit")
        wait_for_blocks(tier, before, len(PROMPT) // BLOCK_TOKENS)
        engine.reset_prefix_cache()
        ask(engine, "external hit")
    with Engine(spec(eager, connector), folder / "second.log", timeout_s=START_TIMEOUT_S) as engine:
        ask(engine, "restart")
    for chunk in tier.rglob("*.kv"):
        data = bytearray(chunk.read_bytes())
        data[read_header(data).geometry.block_offset(0) + 100] ^= 1
        chunk.write_bytes(data)
    with Engine(spec(eager, connector), folder / "third.log", timeout_s=START_TIMEOUT_S) as engine:
        ask(engine, "damaged")
        ask(engine, "after damage")
        misses = engine.metrics().get("vllm:memkv_engines_miss_damaged", 0.0)
    yield Run(answers, external, misses, (folder / "second.log").read_text(), keys["gds"] == "on")


def test_the_path_for_gpus_was_taken(run: Run) -> None:
    medium = "gpu" if run.on_gpu else "host"
    assert f"staged in {medium} memory" in run.log
    assert "goes by" in run.log, "the mover names the route of every group"


@pytest.mark.parametrize("name", ["external hit", "restart"])
def test_tokens_from_the_tier_are_those_of_a_local_hit(run: Run, name: str) -> None:
    assert run.external[name] >= 0.9 * len(PROMPT)
    assert run.answers[name].cached_tokens == run.answers["local hit"].cached_tokens
    assert run.answers[name].tokens == run.answers["local hit"].tokens


def test_storing_changes_no_token(run: Run) -> None:
    assert run.external["first visit"] == 0
    assert run.answers["first visit"].tokens == run.answers["cold"].tokens


def test_damage_is_a_counted_miss_and_a_recompute(run: Run) -> None:
    assert run.damaged_misses >= 1
    assert run.answers["damaged"].tokens == run.answers["cold"].tokens
    assert run.answers["after damage"].tokens == run.answers["local hit"].tokens
