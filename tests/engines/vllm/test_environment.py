"""The environment holds what the other engine tests stand on: a real vLLM, on a CPU, that repeats itself in fp32."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.environments.engine_env import ROOT, engine_env
from tests.environments.models import ensure_model

PROMPT = "The keys and values of every token are kept. " * 20
GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=2048, block_size=32,
          kv_cache_memory_bytes=64 << 20, disable_log_stats=True)
sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
answers = [list(llm.generate([sys.argv[2]], sampling)[0].outputs[0].token_ids) for _ in range(2)]
print("TOKENS", json.dumps(answers))
"""


def tokens_of(kind: str) -> list[list[int]]:
    """Returns the greedy tokens of a cold run and of one that hits vLLM's own prefix cache, from a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(ensure_model(kind)), PROMPT],
        env=engine_env(VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stderr[-4000:]
    answers: list[list[int]] = json.loads(lines[-1].removeprefix("TOKENS "))
    return answers


def test_greedy_tokens_are_the_same_cold_and_from_the_local_cache_and_differ_between_weights() -> None:
    cold, cached = tokens_of("tiny-llama")
    assert len(cold) == 16
    assert cold == cached
    assert len(set(cold)) > 1, "a model that repeats one token proves nothing"
    other_weights, _ = tokens_of("tiny-llama-b")
    assert other_weights != cold


@pytest.mark.parametrize("kind", ["tiny-gemma3"])
def test_a_model_with_sliding_windows_runs(kind: str) -> None:
    cold, cached = tokens_of(kind)
    assert cold == cached
