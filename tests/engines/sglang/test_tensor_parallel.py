"""Two tensor-parallel ranks in real SGLang: each stores its own heads, MLA is stored once, and ranks stay in step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memkv_engines.keys import ChunkName
from tests.engines.prompts import tokens_of
from tests.engines.sglang.engines import (
    PAGE_TOKENS,
    hicache,
    is_same,
    linker,
    memkv_extra,
    wait_until,
)
from tests.engines.sglang.forked_engines import ForkedEngine
from tests.engines.sglang.tier_of_engine import damage_file

PROMPT_TOKENS = 600
WHOLE = PROMPT_TOKENS - PAGE_TOKENS
PROMPT = tokens_of(5, PROMPT_TOKENS)
# SGLang would give each rank a NUMA node of its own.
CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
DOORS = {
    "hicache": lambda tier: hicache("dynamic", **memkv_extra(tier, probe_timeout_ms=20_000)),
    "linker": lambda tier: linker(tier, probe_timeout_ms=20_000, miss_ttl_s=0.01),
}


def blocks_by_shard(tier: Path) -> dict[str, int]:
    """Pages of full attention in the tier, by shard."""
    found: dict[str, int] = {}
    for path in tier.rglob("*-g0-*.kv"):
        name = ChunkName.parse(path.name)
        found[name.shard_text] = found.get(name.shard_text, 0) + name.block_count
    return found


@pytest.mark.parametrize(
    ("door", "model", "shards"),
    [("hicache", "tiny-sg-llama", 2), ("linker", "tiny-sg-llama", 2), ("hicache", "tiny-sg-deepseek", 1)],
)
def test_two_ranks(door: str, model: str, shards: int, tmp_path: Path) -> None:
    tier = tmp_path / "tier"
    parallel: dict[str, Any] = {"tp_size": 2, **DOORS[door](tier)}
    pages = WHOLE // PAGE_TOKENS

    def is_stored() -> bool:
        counts = blocks_by_shard(tier)
        return len(counts) == shards and min(counts.values()) >= pages

    with ForkedEngine(model, log=tmp_path / "first.log", env=CORES, **parallel) as engine:
        cold = engine.generate(PROMPT)
        wait_until(is_stored, "every rank has stored the prompt's pages")
    with ForkedEngine(model, log=tmp_path / "second.log", env=CORES, **parallel) as engine:
        restored = engine.generate(PROMPT)
        assert restored.cached >= WHOLE
        assert is_same(restored, cold)
        engine.flush()
        # One rank's bytes only: the other must not go on with a hit of its own.
        damage_file(max(tier.rglob("*-g0-*.kv"), key=lambda path: (path.stat().st_size, path.name)))
        again = engine.generate(PROMPT)
        assert again.cached < WHOLE
        assert is_same(again, cold)
        engine.flush()
        assert is_same(engine.generate(PROMPT), cold), "the ranks are still in step"
