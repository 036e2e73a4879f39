"""vLLM on a CPU, LMCache's connector and server, our adapter below: the same tokens, over restarts of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engines.lmcache.server import CHUNK_TOKENS, Server, server
from tests.engines.prompts import tokens_of
from tests.engines.vllm import damage
from tests.engines.vllm.scenario import Reports, ask, play, start

PROMPTS = [tokens_of(1, 1500), tokens_of(2, 1300)]
CHUNKS = [len(prompt) // CHUNK_TOKENS for prompt in PROMPTS]
TRANSFER = {
    "kv_connector": "LMCacheMPConnector",
    "kv_connector_module_path": "tests.engines.lmcache.cpu_connector",
}


def parameters(folder: Path, **other: Any) -> dict[str, Any]:
    # A look-up that is late on a busy machine would be an honest miss, but not what these tests are about.
    return {"path": str(folder), "weights_id": "tiny-llama", "probe_timeout_ms": 20_000, **other}


def answers(name: str, lmcache: Server | None = None) -> dict[str, Any]:
    """An engine process of its own that answers the prompts."""
    begin = start("tiny-llama")
    if lmcache is not None:
        begin |= {"connector": lmcache.connector(), "transfer": TRANSFER}
    reports: Reports = play(begin, ask(name, PROMPTS), {"do": "stop"})
    return reports[name]


@pytest.fixture(scope="module")
def computed() -> list[list[int]]:
    """What the model says, without any cache."""
    tokens: list[list[int]] = answers("computed")["tokens"]
    return tokens


def test_restarts_of_server_and_engine_change_no_token(computed: list[list[int]], tmp_path: Path) -> None:
    tier = tmp_path / "tier"
    with server(tmp_path / "first.log", parameters(tier)) as first:
        assert answers("stored", first)["tokens"] == computed
        first.await_counter("store_chunks", sum(CHUNKS))
    files = damage.chunk_files(tier)
    assert len(files) == sum(CHUNKS)

    with server(tmp_path / "second.log", parameters(tier)) as second:
        report = answers("restarted", second)
        counters = second.counters()
    assert report["tokens"] == computed
    assert counters["load_chunks"] == sum(CHUNKS) and "load_jobs_failed" not in counters
    assert report["cached"] == [count * CHUNK_TOKENS for count in CHUNKS]

    # What every byte is checked for: the first object of each prompt is rotten, in a third life of both.
    for file in files:
        damage.KINDS["flip_payload"](file, tier)
    with server(tmp_path / "third.log", parameters(tier)) as third:
        report = answers("damaged", third)
        counters = third.await_counter("store_chunks", 1)
    assert report["tokens"] == computed and report["cached"] == [0, 0]
    assert counters["miss_damaged"] == sum(CHUNKS) and counters["load_chunks"] == 0


def test_the_tokens_would_show_wrong_bytes(computed: list[list[int]], tmp_path: Path) -> None:
    tier = tmp_path / "tier"
    with server(tmp_path / "first.log", parameters(tier)) as first:
        answers("stored", first)
        first.await_counter("store_chunks", sum(CHUNKS))
    for file in damage.chunk_files(tier):
        damage.KINDS["plant"](file, tier)
    with server(tmp_path / "second.log", parameters(tier)) as second:
        report = answers("forged", second)
        counters = second.counters()
    assert counters["load_chunks"] == sum(CHUNKS)
    assert report["tokens"] != computed
