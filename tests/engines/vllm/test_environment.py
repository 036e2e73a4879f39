"""What the other vLLM tests stand on: a real engine on a CPU that repeats itself in float32, and models that notice."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from tests.environments.engine_env import ROOT, engine_env
from tests.environments.models import ensure_model

PROMPT_TOKENS = 900
GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
job = json.loads(sys.argv[1])
llm = LLM(model=job["model"], dtype="float32", enforce_eager=True, max_model_len=2048, block_size=32,
          kv_cache_memory_bytes=64 << 20, enable_lora=bool(job["loras"]), max_loras=2)
sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
loras = [None] + [LoRARequest(path, number, path) for number, path in enumerate(job["loras"], start=1)]
def answer(prompt, lora=None):
    output = llm.generate([{"prompt_token_ids": prompt}], sampling, lora_request=lora, use_tqdm=False)[0]
    return {"tokens": output.outputs[0].token_ids, "cached": output.num_cached_tokens}
print("ANSWERS", json.dumps([answer(prompt, lora) for lora in loras for prompt in job["prompts"]]))
"""


def prompts() -> list[list[int]]:
    """Returns a prompt, the same again, and one that differs from it in a single early token."""
    choice = random.Random(5)
    first = [choice.randrange(4, 260) for _ in range(PROMPT_TOKENS)]
    return [first, first, [*first[:40], 4 + (first[40] + 1) % 256, *first[41:]]]


def answers_of(kind: str, loras: tuple[str, ...] = ()) -> list[dict[str, object]]:
    """Returns the greedy tokens for each prompt, without and then with each adapter, from one fresh engine."""
    job = {
        "model": str(ensure_model(kind)),
        "prompts": prompts(),
        "loras": [str(ensure_model(lora)) for lora in loras],
    }
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, json.dumps(job)],
        env=engine_env(VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, done.stderr[-4000:]
    answers: list[dict[str, object]] = json.loads(lines[-1].removeprefix("ANSWERS "))
    return answers


@pytest.mark.parametrize(("kind", "loras"), [("tiny-llama", ("lora-a", "lora-b")), ("tiny-gemma3", ())])
def test_tokens_repeat_from_the_local_cache_and_depend_on_prompt_and_adapter(kind: str, loras: tuple[str, ...]) -> None:
    cold, cached, changed, *adapted = answers_of(kind, loras)
    assert cold["cached"] == 0
    assert cached["cached"], "the engine's own prefix cache was not used"
    assert cold["tokens"] == cached["tokens"]
    different = [cold, changed, *adapted[::3]]
    assert len({json.dumps(answer["tokens"]) for answer in different}) == 2 + len(loras)
