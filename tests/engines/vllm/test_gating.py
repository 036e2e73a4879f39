"""What the cost gate is told in vLLM's scheduler: bytes of the slowest rank, and the time of steps with prefill."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from memkv_engines.limits import MIB
from memkv_engines.metrics import Counters
from memkv_engines.offload.residents import NOTHING, MemoryShare

FULL = {"group": 0, "block_tokens": 32, "blocks_per_chunk": 16, "window_tokens": 0}


@pytest.fixture
def gating() -> Any:
    from memkv_engines.vllm import gating

    return gating


def facts(block_bytes: int, **changes: int) -> SimpleNamespace:
    return SimpleNamespace(**{**FULL, **changes}, block_bytes=block_bytes)


def made(gating: Any, *ranks: list[SimpleNamespace]) -> tuple[Any, Counters]:
    counters = Counters()
    handshakes = [SimpleNamespace(groups=groups) for groups in ranks]
    return gating.HitGate(enabled=True, counters=counters, handshakes=handshakes, align_tokens=32), counters


def step(gate: Any, scheduled: dict[str, int], computed: dict[str, int]) -> int:
    output = SimpleNamespace(num_scheduled_tokens=scheduled, total_num_scheduled_tokens=sum(scheduled.values()))
    number: int = gate.step_began(output, computed.get)
    return number


def test_the_slowest_rank_counts_and_windows_hold_their_window_only(gating: Any) -> None:
    gate, _ = made(gating, [facts(100)], [facts(300), facts(50, group=1, window_tokens=64)])
    assert gate._candidate(0, 3200, NOTHING).size_bytes == 100 * 300 + 3 * 50


def test_steps_with_prefill_are_timed_and_others_are_not(gating: Any) -> None:
    gate, _ = made(gating, [facts(MIB)])
    assert step(gate, {f"r{i}": 1 for i in range(100)}, {f"r{i}": 50 for i in range(100)}) == 0
    assert step(gate, {"stranger": 2048}, {}) == 0
    numbers = [step(gate, {"a": 2048, "b": 1}, {"a": 2048 * i, "b": 7}) for i in range(3)]
    assert numbers == [1, 2, 3]
    for number in numbers:
        gate.step_ended(0)
        gate.step_ended(number)
    gate.step_ended(99)
    assert gate._gate._prefill.known


def nothing() -> MemoryShare:
    return NOTHING


def test_a_load_counts_when_every_rank_is_done(gating: Any) -> None:
    gate, counters = made(gating, [facts(MIB)], [facts(MIB)])
    first = gate.judge(None, 0, 3200, nothing)
    assert (first.hit.start, first.hit.stop, first.tokens) == (0, 3200, 3200)
    assert gate.judge(first, 0, 3200, nothing) is first, "a request is judged once"
    assert gate.load_began(1, first, 0, 3200) > 0
    assert gate.judge(None, 0, 640, nothing) is None, "who comes during the first load waits for what it tells"
    gate.load_measured(1, (100 * MIB, 0, 5_000_000, False))
    gate.load_measured(1, (100 * MIB, 0, 9_000_000, False))
    gate.load_measured(2, (1, 0, 1, False))
    gate.load_ended(1)
    gate.load_ended(1)
    assert gate._gate._load.seconds(100 * MIB) == pytest.approx(9.0, rel=0.01)
    assert gate.judge(None, 0, 640, nothing) is not None
    assert counters["gate_unmeasured"] == 1


def test_what_lies_in_memory_is_judged_for_itself(gating: Any) -> None:
    gate, counters = made(gating, [facts(MIB)], [facts(2 * MIB)])
    share = MemoryShare(1000, {0: 40})
    judged = gate.judge(None, 0, 3200, lambda: share)
    hit = judged.hit
    assert (hit.memory_tokens, hit.memory_bytes, hit.size_bytes) == (992, 80 * MIB, 200 * MIB), "the slowest rank's"
    assert judged.tokens == 3200 and counters["gate_unmeasured"] == 1
    # Begun as judged, with what is loaded of it; and for what nobody judged nothing is known of memory.
    assert gate.load_began(1, judged, 0, 3200) > 0
    gate.load_measured(1, (120 * MIB, 80 * MIB, 60_000_000, False))
    gate.load_ended(1)
    gate.step_ended(0)
    for number in range(3):
        gate._gate.observe_prefill([(0, 2048)], 1.0 + number / 100)
    again = gate.judge(None, 0, 3200, lambda: share)
    assert (again.tokens, counters["gate_memory"]) == (992, 1), "the rest takes a minute"
    assert again.part(0, 992).tier_bytes == 0 and again.part(32, 992) is None and again.part(0, 3232) is None
    everything = gate.judge(None, 0, 3200, lambda: MemoryShare(3200, {0: 100}))
    assert everything.tokens == 3200 and everything.hit.tier_bytes == 0
    assert gate.load_began(2, everything, 0, 3200) > 0
    gate.load_measured(2, (0, 200 * MIB, 100_000, False))
    gate.load_ended(2)
    assert gate._gate._memory.seconds(200 * MIB) == pytest.approx(0.1, rel=0.01)
    assert gate.load_began(3, None, 0, 640) > 0


def test_a_load_that_failed_everywhere_tells_nothing(gating: Any) -> None:
    gate, counters = made(gating, [facts(MIB)])
    gate.load_began(1, None, 0, 3200)
    gate.load_ended(1)
    assert gate.judge(None, 0, 3200, nothing).tokens == 3200
    assert counters["gate_unmeasured"] == 1


def test_below_multi_connector_its_own_policy_decides_whether_loads_may_be_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.v1 import multi_connector as module

    from memkv_engines.vllm import compat

    found: list[Any] = []

    class Child:
        def __init__(self, vllm_config: Any, role: object, kv_cache_config: object) -> None:
            found.append((vllm_config.kv_transfer_config, compat.deciding_transfer_config(vllm_config)))

    monkeypatch.setattr(module.KVConnectorFactory, "get_connector_class", lambda config: Child)
    monkeypatch.setattr(module.KVConnectorFactory, "supports_hma_config", lambda config: True)
    outer = KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"connectors": [{"kv_connector": "MemKVConnector", "kv_role": "kv_both"}]},
    )
    config = SimpleNamespace(
        kv_transfer_config=outer, scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False)
    )
    module.MultiConnector(config, None, None)
    ((own, deciding),) = found
    assert deciding is outer and own is not outer
    alone = SimpleNamespace(kv_transfer_config=outer)
    assert compat.deciding_transfer_config(alone) is outer
