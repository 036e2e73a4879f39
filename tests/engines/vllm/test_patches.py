"""Our patches for vLLM: they fit the release to the byte, come off again, and change what they say they change."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from memkv_engines.config import load_config
from tests.engines.patched import apply_and_take_back, stock_and_patched

BLOCK_TOKENS = 128
PROMPT_TOKENS = 1_000


def test_every_patch_applies_and_comes_off_to_the_byte(tmp_path: Path) -> None:
    apply_and_take_back("vllm", "0.32.0", tmp_path)


# ------------------------------------------------------------------------------------- 0001: the policy of a child


def policy_of_the_scheduler(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *wishes: str) -> str:
    """What the scheduler reads after MultiConnector was made with children of ours that wish for a policy."""
    from vllm.config import KVTransferConfig

    from memkv_engines.vllm.scheduler_side import SchedulerSide

    left = list(wishes)

    class Child:
        """Does what `MemKVConnector` does about the policy, and nothing else."""

        def __init__(self, vllm_config: Any, role: object, kv_cache_config: object) -> None:
            config = load_config({"path": "/nowhere", "on_load_failure": left.pop(0)})
            SchedulerSide._set_failure_policy(SimpleNamespace(_vllm_config=vllm_config, _config=config))

    monkeypatch.setattr(module.KVConnectorFactory, "get_connector_class", lambda config: Child)
    monkeypatch.setattr(module.KVConnectorFactory, "supports_hma_config", lambda config: True)
    children = [{"kv_connector": "MemKVConnector", "kv_role": "kv_both"} for _ in wishes]
    outer = KVTransferConfig(
        kv_connector="MultiConnector", kv_role="kv_both", kv_connector_extra_config={"connectors": children}
    )
    scheduler = SimpleNamespace(disable_hybrid_kv_cache_manager=False)
    module.MultiConnector(SimpleNamespace(kv_transfer_config=outer, scheduler_config=scheduler), None, None)
    assert not left
    return str(outer.kv_load_failure_policy)


def test_a_failed_load_below_multi_connector_is_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stock_and_patched("vllm", "0001-multi-connector-failure-policy", tmp_path) as (stock, patched):
        assert policy_of_the_scheduler(stock, monkeypatch, "fail", "recompute") == "fail"
        assert policy_of_the_scheduler(patched, monkeypatch, "fail", "recompute") == "recompute"
        assert policy_of_the_scheduler(patched, monkeypatch, "recompute", "fail") == "recompute"
        assert policy_of_the_scheduler(patched, monkeypatch, "fail", "fail") == "fail"


# ------------------------------------------------------------------------------- 0002: what is reported as cached


def reported_after_failure(module: ModuleType, bad_block: int, *, preemptions: int = 0) -> tuple[int, int, int]:
    """Local, external and computed tokens that a request reports whose load failed at a block; two were local."""
    from vllm.v1.metrics.stats import PrefillStats

    request = SimpleNamespace(
        request_id="r",
        num_computed_tokens=7 * BLOCK_TOKENS,
        num_tokens=PROMPT_TOKENS,
        num_preemptions=preemptions,
        prefill_stats=PrefillStats(),
    )
    request.prefill_stats.set(PROMPT_TOKENS, 2 * BLOCK_TOKENS, 5 * BLOCK_TOKENS)
    scheduler = SimpleNamespace(
        connector=object(),
        block_size=BLOCK_TOKENS,
        kv_cache_manager=SimpleNamespace(
            get_block_ids=lambda request_id: (list(range(10, 18)),),
            cache_blocks=lambda request, tokens: None,
            free=lambda request: None,
        ),
        needs_kv_cache_zeroing=False,
        failed_recving_kv_req_ids={"r"},
        finished_recving_kv_req_ids={"r"},
        _mark_prefix_replay=lambda *_, **__: 0,
        _load_restores_replay_window=lambda request: False,
    )
    module.Scheduler._update_requests_with_invalid_blocks(scheduler, [request], {10 + bad_block}, {}, False)
    assert request.num_computed_tokens == bad_block * BLOCK_TOKENS
    module.Scheduler._update_waiting_for_remote_kv(scheduler, request)
    stats = request.prefill_stats
    assert stats.num_cached_tokens == stats.num_local_cached_tokens + stats.num_external_cached_tokens
    return stats.num_local_cached_tokens, stats.num_external_cached_tokens, stats.num_computed_tokens


def test_tokens_whose_load_failed_are_not_reported_as_cached(tmp_path: Path) -> None:
    promised = (2 * BLOCK_TOKENS, 5 * BLOCK_TOKENS, PROMPT_TOKENS - 7 * BLOCK_TOKENS)
    with stock_and_patched("vllm", "0002-cached-tokens-after-failed-load", tmp_path) as (stock, patched):
        for bad_block in range(1, 7):
            assert reported_after_failure(stock, bad_block) == promised
            assert reported_after_failure(patched, bad_block) == (
                min(2, bad_block) * BLOCK_TOKENS,
                max(0, bad_block - 2) * BLOCK_TOKENS,
                PROMPT_TOKENS - bad_block * BLOCK_TOKENS,
            )
        # Statistics are those of the first prefill; at block 0 the request is looked up anew, which sets them.
        assert reported_after_failure(patched, 3, preemptions=1) == promised
        assert reported_after_failure(patched, 0) == promised
