"""`MemKVHiCache` behind SGLang's real hierarchical cache: what comes back, and what faults may do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memkv_engines.chunk.codec import decode_header
from memkv_engines.errors import MemKVError
from memkv_engines.keys import ChunkName
from memkv_engines.metrics import Counters
from memkv_engines.offload.cost_gate import Candidate, CostGate
from memkv_engines.sglang.gating import PrefillWatch
from tests.engines.sglang.radix_caches import (
    LAYOUTS,
    PAGE_TOKENS,
    Bench,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    Side,
    memkv_config,
    same,
    sequence,
)


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    return tmp_path / "tier"


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench() as made:
        yield made


def chunks_in(tier: Path) -> list[ChunkName]:
    return [ChunkName.parse(path.name) for path in sorted(tier.rglob("*.kv"))]


def pages(count: int) -> int:
    return count * PAGE_TOKENS


# ------------------------------------------------------------------------------------------------ there and back again


@pytest.mark.parametrize(("io", "layout"), LAYOUTS)
@pytest.mark.parametrize("kind", ["full", "swa", "mla", "mamba"])
def test_another_side_gets_every_byte_back(kind: str, io: str, layout: str, tier: Path) -> None:
    if kind == "mamba" and layout == "layer_first":
        pytest.skip("SGLang's mamba pool says where its pages lie in page-first layouts only")
    tokens = sequence(9)
    with Bench(kind, io, layout) as bench:
        stored = bench.side(memkv_config(tier), 1).store(tokens)
        other = bench.side(memkv_config(tier), 99)
        assert other.prefetch(tokens) == len(tokens)
        assert same(stored, other.load_back(tokens))
    full = [name.block_count for name in chunks_in(tier) if name.group == 0]
    # A window ends a node of the radix tree, and a node a chunk.
    assert sorted(full) == ([2, 7] if kind == "swa" else [9]), "not one object per page"


@pytest.mark.parametrize(("io", "layout"), LAYOUTS)
@pytest.mark.parametrize("kind", ["full", "mla", "swa"])
def test_flat_pages_come_back_too(kind: str, io: str, layout: str, tier: Path) -> None:
    """Without `interface_v1`, copied once more; prefetches start inside chunks here as well."""
    tokens, config = sequence(9), memkv_config(tier, interface_v1=0)
    with Bench(kind, io, layout) as bench:
        stored = bench.side(config, 1).store(tokens)
        other = bench.side(config, 99)
        other.store(tokens[: pages(4)])
        assert other.prefetch(tokens) == len(tokens)
        loaded = other.load_back(tokens)
    whole = [part[pages(4) :] for part in loaded[: len(stored)] if len(part) == len(tokens)]
    assert same(whole, [part[pages(4) :] for part in stored if len(part) == len(tokens)])
    assert sum(name.block_count for name in chunks_in(tier) if name.group == 0) == 9


def test_the_comparison_can_fail(bench: Bench, tier: Path) -> None:
    tokens = sequence(9)
    one, other = bench.side(memkv_config(tier), 1), bench.side(memkv_config(tier / "elsewhere"), 99)
    assert not same(one.store(tokens), other.store(tokens))


def test_a_prefetch_that_starts_inside_a_chunk(bench: Bench, tier: Path) -> None:
    tokens = sequence(9)
    stored = bench.side(memkv_config(tier), 1).store(tokens)
    other = bench.side(memkv_config(tier), 99)
    computed = other.store(tokens[: pages(4)])
    assert other.prefetch(tokens) == len(tokens)
    loaded = other.load_back(tokens)
    assert same([part[: pages(4)] for part in loaded], computed)
    assert same([part[pages(4) :] for part in loaded], [part[pages(4) :] for part in stored])


def test_a_prompt_that_diverges_inside_a_chunk_and_a_node_that_starts_there(bench: Bench, tier: Path) -> None:
    one = sequence(9)
    two = [*one[: pages(5)], *sequence(6, first=5000)]
    first = bench.side(memkv_config(tier), 1)
    first.store(one)
    stored = first.store(two)  # splits the node; only what is new is written
    assert sorted(name.block_count for name in chunks_in(tier)) == [6, 9]
    other = bench.side(memkv_config(tier), 99)
    assert other.prefetch(two) == len(two)
    assert same(stored, other.load_back(two))
    # The leading pages of a third prompt hit as well.
    three = [*one[: pages(2)], *sequence(7, first=9000)]
    third = bench.side(memkv_config(tier), 7)
    assert third.prefetch(three) == pages(2)


def test_a_conversation_that_grows(bench: Bench, tier: Path) -> None:
    first = bench.side(memkv_config(tier), 1)
    for length in (3, 4, 9, 14):
        stored = first.store(sequence(length))
    assert sorted(name.block_count for name in chunks_in(tier)) == [1, 3, 5, 5]
    other = bench.side(memkv_config(tier), 99)
    assert other.prefetch(sequence(14)) == pages(14)
    assert same(stored, other.load_back(sequence(14)))


def test_what_is_stored_is_not_written_again(bench: Bench, tier: Path) -> None:
    bench.side(memkv_config(tier), 1).store(sequence(9))
    (path,) = tier.rglob("*.kv")
    before = path.stat().st_mtime_ns
    bench.side(memkv_config(tier), 1).store(sequence(9))
    assert [p.stat().st_mtime_ns for p in tier.rglob("*.kv")] == [before]


# ------------------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("change", [{"weights_id": "other"}, {"tenant": "other"}])
def test_other_weights_and_tenants_miss(change: dict[str, str], bench: Bench, tier: Path) -> None:
    bench.side(memkv_config(tier), 1).store(sequence(9))
    assert bench.side(memkv_config(tier, **change), 99).prefetch(sequence(9)) == 0


def test_layouts_of_equal_size_never_meet(tier: Path) -> None:
    with Bench("full", "kernel", "layer_first") as bench:
        bench.side(memkv_config(tier), 1).store(sequence(9))
    with Bench("full", "kernel", "page_first") as bench:
        assert bench.side(memkv_config(tier), 99).prefetch(sequence(9)) == 0


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"hicache_storage_pass_prefix_keys": False}, "hicache_storage_pass_prefix_keys"),
        ({"pathh": "x"}, "did you mean 'path'"),
        ({"weights_id": ""}, "weights_id"),
        ({"path": "/proc/none"}, "/proc/none"),
        ({"io_threads": "many"}, "io_threads"),
    ],
)
def test_what_cannot_work_is_refused_at_start(change: dict[str, Any], key: str, bench: Bench, tier: Path) -> None:
    with pytest.raises(MemKVError, match=key):
        bench.side(memkv_config(tier, **change), 1)


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.fixture
def reader(bench: Bench, tier: Path) -> Side:
    """A side that has stored nothing; nine pages wait in the tier."""
    bench.side(memkv_config(tier), 1).store(sequence(9))
    return bench.side(memkv_config(tier), 99)


def check_unharmed(side: Side, free_tokens: int) -> None:
    """No thread died, no host slot leaked."""
    assert all(thread.is_alive() for thread in side.threads)
    assert side.free_host_tokens() == free_tokens


@pytest.mark.parametrize("bad_page", [0, 4, 8])
def test_a_damaged_page_ends_the_prefix(
    bad_page: int, reader: Side, tier: Path, caplog: pytest.LogCaptureFixture
) -> None:
    free = reader.free_host_tokens()
    (path,) = tier.rglob("*.kv")
    data = bytearray(path.read_bytes())
    geometry = decode_header(data).geometry
    data[geometry.block_offset(bad_page) + 77] ^= 0x10
    path.write_bytes(data)
    assert reader.prefetch(sequence(9)) == pages(bad_page)
    assert "will be recomputed: damaged" in caplog.text
    check_unharmed(reader, free - pages(bad_page))
    assert not list(tier.rglob("*.kv")), "a damaged chunk is not offered again"
    assert reader.prefetch(sequence(9)) == pages(bad_page)


def test_what_is_slower_than_recomputing_is_not_loaded(reader: Side) -> None:
    stores = reader.backend._stores
    gate, free = stores.gate.gate, reader.free_host_tokens()
    gate.enabled = True
    for _ in range(3):
        gate.load_ended(gate.load_began(Candidate(0, 1000, 1 << 20)), 1 << 20, 100.0)
        gate.observe_prefill([(0, 4096)], 0.01)
    gate._next_trial = float("inf")
    assert reader.prefetch(sequence(9)) == 0
    check_unharmed(reader, free)
    assert stores.counters()["gate_slower"] == 1
    gate.enabled = False
    assert reader.prefetch(sequence(9)) == pages(9)


def test_prefills_are_watched_and_the_scheduler_is_left_as_it_was() -> None:
    class Scheduler:
        def process_batch_result(self, batch: Any, result: Any) -> Any:
            return result

    scheduler, gate = Scheduler(), CostGate(enabled=True)
    watch = PrefillWatch(scheduler, gate, Counters())
    extend = SimpleNamespace(is_extend=lambda: True)
    for _ in range(2):
        batch = SimpleNamespace(
            forward_mode=extend, prefix_lens=[0, 64], extend_lens=[512, 512], launch_ts=time.monotonic() - 1.0
        )
        assert scheduler.process_batch_result(batch, "result") == "result"
    assert gate._prefill.known
    assert scheduler.process_batch_result(None, "nonsense") == "nonsense"
    assert scheduler.process_batch_result(SimpleNamespace(launch_ts=1.0), "nonsense") == "nonsense"
    assert watch.counters["boundary_errors"] == 1
    watch.stop()
    assert "process_batch_result" not in vars(scheduler)


def test_a_damaged_header_and_a_short_file_are_misses(reader: Side, tier: Path) -> None:
    free = reader.free_host_tokens()
    (path,) = tier.rglob("*.kv")
    good = path.read_bytes()
    for bad in (bytes([good[0] ^ 1]) + good[1:], good[:5000], b""):
        path.write_bytes(bad)
        assert reader.prefetch(sequence(9)) == 0
        check_unharmed(reader, free)


def test_a_chunk_that_vanishes_after_the_look_up(reader: Side, tier: Path) -> None:
    free = reader.free_host_tokens()
    ask = reader.backend.batch_exists

    def ask_and_remove(keys: list[str], extra_info: Any = None) -> int:
        found = ask(keys, extra_info)
        for path in tier.rglob("*.kv"):
            path.unlink()
        return found

    reader.backend.batch_exists = ask_and_remove
    assert reader.prefetch(sequence(9)) == 0
    check_unharmed(reader, free)


def test_a_killed_io_process_costs_misses_and_comes_back(reader: Side) -> None:
    free = reader.free_host_tokens()
    client = reader.backend._stores.client
    os.kill(client._client.child_pid, signal.SIGKILL)
    assert reader.prefetch(sequence(9)) == 0
    check_unharmed(reader, free)
    deadline = time.monotonic() + 20
    while reader.prefetch(sequence(9)) == 0:
        assert time.monotonic() < deadline, "the I/O process did not come back"
        time.sleep(0.2)


def test_a_tier_that_takes_no_writes_costs_nothing_but_the_store(
    bench: Bench, tier: Path, caplog: pytest.LogCaptureFixture
) -> None:
    side = bench.side(memkv_config(tier, capacity_bytes=4096), 1)
    side.store(sequence(9))
    assert not list(tier.rglob("*.kv"))
    assert "chunks were not stored: full" in caplog.text
    assert all(thread.is_alive() for thread in side.threads)


def _explode(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a bug of ours")


@pytest.mark.parametrize("broken", ["store", "load", "leading", "present"])
def test_a_bug_of_ours_kills_no_thread(broken: str, reader: Side) -> None:
    free = reader.free_host_tokens()
    for pool in reader.backend._stores.by_pool.values():
        setattr(pool, broken, _explode)
    assert reader.prefetch(sequence(9)) == (0 if broken in ("load", "leading") else pages(9))
    if broken == "store":
        reader.store(sequence(4, first=7000))
        assert all(thread.is_alive() for thread in reader.threads)
    elif broken in ("load", "leading"):
        check_unharmed(reader, free)


def test_no_method_raises_whatever_it_is_given(reader: Side) -> None:
    backend, key = reader.backend, "ab" * 32
    nonsense: list[Any] = [None, [], ["zz"], ["ab"], [key], [key] * 3, "text", [None], [7]]
    for keys in nonsense:
        transfer = PoolTransfer(PoolName.KV, host_indices=None, keys=keys)
        unknown = PoolTransfer(PoolName.DEEPSEEK_V4_C4, keys=keys, hit_policy=PoolHitPolicy.TRAILING_PAGES)
        for indices in (None, 3):
            assert not any(backend.batch_get_v1(keys, indices) or [])
            assert not any(backend.batch_set_v1(keys, indices) or [])
        assert backend.batch_exists(keys) == 0
        assert backend.batch_exists_v2(keys, [transfer, unknown]).kv_hit_pages == 0
        assert not any(backend.batch_get_v2([transfer])[PoolName.KV] or [])
        assert not any(backend.batch_set_v2([unknown])[PoolName.DEEPSEEK_V4_C4] or [])
        assert backend.get(keys) is None
        assert backend.set(keys) is False
    assert backend.exists(key) is False


def test_sglangs_own_failure_injection(bench: Bench, tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.side(memkv_config(tier), 1).store(sequence(9))
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", "0.5")
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY", "0.01")
    side = bench.side(memkv_config(tier), 99)
    reached = {side.prefetch(sequence(9)) for _ in range(12)}
    assert reached <= {0, pages(9)}
    assert all(thread.is_alive() for thread in side.threads)


def test_block_groups_hit_by_whole_groups_and_the_rest_goes_without_them(reader: Side, tier: Path) -> None:
    (path,) = tier.rglob("*.kv")
    keys = [block.chain_hash.hex() for block in decode_header(path.read_bytes()).blocks]
    groups = PoolTransfer(PoolName.KV, keys=keys, hit_policy=PoolHitPolicy.BLOCK_GROUPS, block_pages=4)
    found = reader.backend._stores.hits(keys, [groups], ())
    assert found.by_pool[PoolName.KV] == 8
    assert found.usable == set(range(1, 10))


def test_clear_empties_the_namespace_only(bench: Bench, tier: Path) -> None:
    side = bench.side(memkv_config(tier), 1)
    side.store(sequence(9))
    bench.side(memkv_config(tier, tenant="other"), 1).store(sequence(9))
    assert len(chunks_in(tier)) == 2
    assert side.cache.clear_storage_backend()
    assert len(chunks_in(tier)) == 1
