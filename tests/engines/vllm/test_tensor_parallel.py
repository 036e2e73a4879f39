"""Two tensor-parallel ranks in a real vLLM: each stores its own heads, and one rank's damage is everybody's miss."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.engine_run import FORKS_FROM, Engine, EngineSpec
from memkv_engines.chunk.codec import decode_header
from memkv_engines.keys import ChunkName
from tests.engines.prompts import tokens_of
from tests.engines.vllm.scenario import MAX_TOKENS, MIB, engines, model

PROMPT = tokens_of(1, 1500)
BLOCK_TOKENS = 32
FULL_BLOCKS = len(PROMPT) // BLOCK_TOKENS


def spec(tier: Path) -> EngineSpec:
    return EngineSpec(
        model("tiny-llama"),
        "float32",
        threads="0|1",
        arguments={
            "tensor_parallel_size": 2,
            "max_model_len": 2048,
            "block_size": BLOCK_TOKENS,
            "kv_cache_memory_bytes": 16 * MIB,
            "enable_prefix_caching": True,
        },
        connector={"path": str(tier), "chunk_target_bytes": 2 * MIB, "probe_timeout_ms": 20_000},
    )


def blocks_by_shard(tier: Path) -> dict[str, int]:
    """Blocks in the tier, by shard."""
    found: dict[str, int] = {}
    for path in tier.rglob("*.kv"):
        name = ChunkName.parse(path.name)
        found[name.shard_text] = found.get(name.shard_text, 0) + name.block_count
    return found


def wait_until_stored(tier: Path) -> None:
    deadline = time.monotonic() + 30
    while len(counts := blocks_by_shard(tier)) < 2 or min(counts.values()) < FULL_BLOCKS:
        assert time.monotonic() < deadline, f"stored: {counts}"
        time.sleep(0.1)


def damage_one(tier: Path) -> None:
    """Flip a bit in the first block of one rank's largest chunk."""
    victim = max(tier.rglob("*.kv"), key=lambda path: (path.stat().st_size, path.name))
    data = bytearray(victim.read_bytes())
    data[decode_header(data).geometry.block_offset(0) + 77] ^= 4
    victim.write_bytes(data)


@pytest.mark.timeout(400)
def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORKS_FROM, engines().forks())
    tier = tmp_path / "tier"
    with Engine(spec(tier), tmp_path / "first.log") as engine:
        cold, external = engine.ask(PROMPT, MAX_TOKENS)
        assert external == 0
        wait_until_stored(tier)
    with Engine(spec(tier), tmp_path / "second.log") as engine:
        restored, external = engine.ask(PROMPT, MAX_TOKENS)
        assert external == FULL_BLOCKS * BLOCK_TOKENS
        assert restored.tokens == cold.tokens
        engine.reset_prefix_cache()
        damage_one(tier)
        damaged, _ = engine.ask(PROMPT, MAX_TOKENS)
        assert damaged.tokens == cold.tokens
        assert sum(v for k, v in engine.metrics().items() if "miss_damaged" in k) == 1
        engine.reset_prefix_cache()
        again, _ = engine.ask(PROMPT, MAX_TOKENS)
        assert again.tokens == cold.tokens
