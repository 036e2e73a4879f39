"""The part of `tenants.py` that runs in an engine's environment.

python -m tests.trust.tenants_in_engine DOOR TENANTS SALTS PROMPTS SEED ANSWER
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 650

Visit = dict[str, Any]


def named(count: int, kind: str) -> list[str]:
    """So many names, the first empty."""
    return ["", *(f"{kind} {number}" for number in range(1, count))]


def in_vllm(folder: Path, tenants: list[str], salts: list[str], prompts: int, seed: int) -> Iterator[Visit]:
    """Ask vLLM."""
    from tests.engines.prompts import tokens_of
    from tests.engines.vllm.scenario import Step, ask, play, reset, settle, start

    texts = [tokens_of(1000 * seed + number, PROMPT_TOKENS) for number in range(prompts)]
    whole = (PROMPT_TOKENS - 1) // 32 * 32
    cold = play(start("tiny-llama"), ask("cold", texts))["cold"]["tokens"]

    def asked(salt: str, when: str) -> list[Step]:
        salted = {"salt": salt} if salt else {}
        return [ask(f"{salt}/{when}", texts, **salted), settle(), reset()]

    for fresh in (False, True):
        for tenant in tenants:
            steps = [start("tiny-llama", folder / "kv", tenant=tenant)]
            for when in ("fresh process",) if fresh else ("first", "again"):
                for salt in salts:
                    steps += asked(salt, when)
            for name, report in play(*steps).items():
                salt, when = name.split("/")
                for number in range(prompts):
                    yield {
                        "tenant": tenant,
                        "salt": salt,
                        "prompt": number,
                        "when": when,
                        "hit_tokens": report["cached"][number],
                        "whole_tokens": whole,
                        "right": report["tokens"][number] == cold[number],
                    }


def in_sglang(
    folder: Path, door: str, tenants: list[str], salts: list[str], prompts: int, seed: int
) -> Iterator[Visit]:
    """Ask SGLang, through one of its doors."""
    from tests.engines.prompts import tokens_of
    from tests.engines.sglang.engines import PAGE_TOKENS, Engine, hicache, linker, memkv_extra, wait_until
    from tests.engines.sglang.forked_engines import ForkedEngine
    from tests.engines.sglang.tier_of_engine import stored_tokens

    model, tier = "tiny-sg-llama", folder / "kv"
    texts = [tokens_of(1000 * seed + number, PROMPT_TOKENS) for number in range(prompts)]
    whole = (PROMPT_TOKENS - 1) // PAGE_TOKENS * PAGE_TOKENS
    with ForkedEngine(model, log=folder / "cold.log") as engine:
        cold = [engine.generate(text).tokens for text in texts]

    def door_of(tenant: str) -> dict[str, Any]:
        keys = {"probe_timeout_ms": 20_000, "miss_ttl_s": 0.01, "tenant": tenant}
        return linker(tier, **keys) if door == "sglang-linker" else hicache("dynamic", **memkv_extra(tier, **keys))

    def visit(engine: Engine, tenant: str, salt: str, number: int, when: str) -> Visit:
        before = stored_tokens(tier)
        answer = engine.generate(texts[number], salt=salt)
        if when == "first":
            wait_until(lambda: stored_tokens(tier) >= before + whole - answer.cached, "it is stored")
        engine.flush()
        found = {"tenant": tenant, "salt": salt, "prompt": number, "when": when}
        right = answer.tokens == cold[number]
        return {**found, "hit_tokens": answer.cached, "whole_tokens": whole, "right": right}

    for rounds in (("first", "again"), ("fresh process",)):
        for tenant in tenants:
            with ForkedEngine(model, log=folder / "engine.log", **door_of(tenant)) as engine:
                for when, salt, number in itertools.product(rounds, salts, range(prompts)):
                    yield visit(engine, tenant, salt, number, when)


def main() -> None:
    """Ask, and write what came of it."""
    door, *numbers, answer = sys.argv[1:]
    tenants, salts, prompts, seed = map(int, numbers)
    names = named(tenants, "tenant"), named(salts, "salt")
    with tempfile.TemporaryDirectory() as folder:
        if door == "vllm":
            visits = list(in_vllm(Path(folder), *names, prompts, seed))
        else:
            visits = list(in_sglang(Path(folder), door, *names, prompts, seed))
    Path(answer).write_text(json.dumps(visits))


if __name__ == "__main__":
    main()
