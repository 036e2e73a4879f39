"""`MemKVCacheLinker` behind SGLang's real radix cache: what comes back, and what faults may do."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from memkv_engines.chunk.codec import decode_header
from memkv_engines.errors import ConfigError, MemKVError
from memkv_engines.keys import ChunkName
from tests.engines.sglang.radix_caches import PAGE_TOKENS, Bench, LinkerSide, PoolName, PoolTransfer, same, sequence


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    return tmp_path / "tier"


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench() as made:
        yield made


@pytest.fixture
def reader(bench: Bench, tier: Path) -> LinkerSide:
    """A side that has stored nothing; nine pages wait in the tier."""
    bench.linked(tier, 1).store(sequence(9))
    return bench.linked(tier, 99)


def chunks_in(tier: Path) -> list[int]:
    """Pages of each chunk of full attention."""
    names = [ChunkName.parse(path.name) for path in tier.rglob("*.kv")]
    return sorted(name.block_count for name in names if name.group == 0)


def pages(count: int) -> int:
    return count * PAGE_TOKENS


@pytest.mark.parametrize("kind", ["full", "swa", "mla"])
def test_another_side_gets_every_byte_back(kind: str, tier: Path) -> None:
    tokens = sequence(9)
    with Bench(kind) as bench:
        stored = bench.linked(tier, 1).store(tokens)
        loaded = bench.linked(tier, 99).load(tokens)
    assert loaded is not None
    assert same(stored, loaded)
    assert sum(chunks_in(tier)) == 9
    assert len(chunks_in(tier)) <= 2, "not one object per page"


def test_the_comparison_can_fail(bench: Bench, tier: Path) -> None:
    tokens = sequence(9)
    assert not same(bench.linked(tier, 1).store(tokens), bench.linked(tier / "elsewhere", 99).store(tokens))


def test_a_prompt_that_diverges_inside_a_chunk(bench: Bench, tier: Path) -> None:
    one = sequence(9)
    two = [*one[: pages(5)], *sequence(6, first=5000)]
    first = bench.linked(tier, 1)
    first.store(one)
    stored = first.store(two)
    assert chunks_in(tier) == [6, 9]
    loaded = bench.linked(tier, 99).load(two)
    assert loaded is not None
    assert same(stored, loaded)


def test_a_load_that_starts_inside_a_chunk(bench: Bench, tier: Path) -> None:
    tokens = sequence(9)
    stored = bench.linked(tier, 1).store(tokens)
    other = bench.linked(tier, 99)
    loaded = other.load(tokens[: pages(4)])
    assert loaded is not None
    other.store(tokens[: pages(4)])
    rest = other.load(tokens)
    assert rest is not None
    assert same(rest, [part[pages(4) :] for part in stored])


def test_a_conversation_that_grows(bench: Bench, tier: Path) -> None:
    first = bench.linked(tier, 1)
    for length in (3, 4, 9, 14):
        stored = first.store(sequence(length))
    assert chunks_in(tier) == [1, 3, 5, 5]
    loaded = bench.linked(tier, 99).load(sequence(14))
    assert loaded is not None
    assert same(stored, loaded)


def test_what_is_stored_is_not_written_again(bench: Bench, tier: Path) -> None:
    bench.linked(tier, 1).store(sequence(9))
    (path,) = tier.rglob("*.kv")
    before = path.stat().st_mtime_ns
    bench.linked(tier, 1).store(sequence(9))
    assert [p.stat().st_mtime_ns for p in tier.rglob("*.kv")] == [before]


@pytest.mark.parametrize("change", [{"weights_id": "other"}, {"tenant": "other"}])
def test_other_weights_and_tenants_miss(change: dict[str, str], bench: Bench, tier: Path) -> None:
    bench.linked(tier, 1).store(sequence(9))
    assert bench.linked(tier, 99, **change).load(sequence(9)) is None


def test_an_encrypted_sequence_comes_back_with_the_key_only(bench: Bench, tier: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_text(bytes(range(100, 132)).hex())
    protected = {"protection": "encrypt", "protection_key_file": str(key)}
    stored = bench.linked(tier, 1, **protected).store(sequence(9))
    loaded = bench.linked(tier, 99, **protected).load(sequence(9))
    assert loaded is not None and same(stored, loaded)
    assert bench.linked(tier, 98).load(sequence(9)) is None
    assert bench.linked(tier, 97, **protected | {"protection": "auth"}).load(sequence(9)) is None
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        bench.linked(tier, 96, **protected)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"pathh": "x"}, "did you mean 'path'"),
        ({"weights_id": ""}, "weights_id"),
        ({"path": "/proc/none"}, "/proc/none"),
        ({"io_threads": "many"}, "io_threads"),
    ],
)
def test_what_cannot_work_is_refused_at_start(change: dict[str, Any], key: str, bench: Bench, tier: Path) -> None:
    with pytest.raises(MemKVError, match=key):
        bench.linked(tier, 1, **change)


@pytest.mark.parametrize("devices", [{"meta"}, {"cpu", "cuda:0"}, {"cuda:0", "cuda:1"}])
def test_pages_that_nothing_can_move_are_refused(devices: set[str]) -> None:
    from memkv_engines.sglang.device_pools import device_pages

    pools = [mock.Mock(devices={torch.device(name)}) for name in sorted(devices)]
    with pytest.raises(ConfigError, match=rf"lies on {', '.join(sorted(devices))};.*hierarchical cache"):
        device_pages(pools, None)


def test_pages_of_one_gpu_are_moved_behind_the_stream_of_the_forward() -> None:
    from memkv_engines.sglang.device_pools import device_pages

    pools = [mock.Mock(devices={torch.device("cuda:1")})] * 2
    pages = device_pages(pools, mock.Mock(cuda_stream=4711))
    assert pages is not None
    assert (pages.device, pages.stream()) == (1, 4711)


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("bad_page", [0, 4, 8])
def test_a_damaged_page_is_a_miss_and_no_abort(bad_page: int, reader: LinkerSide, tier: Path) -> None:
    free = reader.free_tokens()
    (path,) = tier.rglob("*.kv")
    data = bytearray(path.read_bytes())
    data[decode_header(data).geometry.block_offset(bad_page) + 77] ^= 0x10
    path.write_bytes(data)
    assert reader.load(sequence(9)) is None
    assert reader.free_tokens() == free, "slots leak"
    assert not list(tier.rglob("*.kv")), "a damaged chunk is not offered again"
    assert reader.load(sequence(9)) is None


def test_a_damaged_header_and_a_short_file_are_misses(reader: LinkerSide, tier: Path) -> None:
    free = reader.free_tokens()
    (path,) = tier.rglob("*.kv")
    good = path.read_bytes()
    for bad in (bytes([good[0] ^ 1]) + good[1:], good[:5000], b""):
        path.write_bytes(bad)
        assert reader.load(sequence(9)) is None
        assert reader.free_tokens() == free


def test_a_chunk_that_vanishes_after_the_look_up(reader: LinkerSide, tier: Path) -> None:
    free = reader.free_tokens()
    lookup = reader.linker.lookup

    def ask_and_remove(rid: str, transfers: list[PoolTransfer]) -> list[int]:
        found = lookup(rid, transfers)
        assert found == list(range(1, 10))
        for path in tier.rglob("*.kv"):
            path.unlink()
        return found

    reader.linker.lookup = ask_and_remove
    assert reader.load(sequence(9)) is None
    assert reader.free_tokens() == free


def test_a_killed_io_process_costs_misses_and_comes_back(bench: Bench, tier: Path) -> None:
    bench.linked(tier, 1).store(sequence(9))
    reader = bench.linked(tier, 99, miss_ttl_s=0.01)
    os.kill(reader.linker._stores.client._client.child_pid, signal.SIGKILL)
    assert reader.load(sequence(9)) is None
    deadline = time.monotonic() + 20
    while reader.load(sequence(9)) is None:
        assert time.monotonic() < deadline, "the I/O process did not come back"
        time.sleep(0.2)


def test_a_tier_that_takes_no_writes_leaves_the_node_unstored(bench: Bench, tier: Path) -> None:
    side = bench.linked(tier, 1, capacity_bytes=4096)
    side.store(sequence(9))
    assert not list(tier.rglob("*.kv"))
    node = side.cache.tree_core.node_by_id(side.cache.tree_core.match_prefix(_params(sequence(9))).last_device_node)
    assert not node.external_cache_stored
    assert node.write_through_pending_id is None


def _params(tokens: list[int]) -> Any:
    from array import array

    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    return MatchPrefixParams(key=RadixKey(array("q", tokens)))


def _explode(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a bug of ours")


@pytest.mark.parametrize("broken", ["store", "load", "leading"])
def test_a_bug_of_ours_is_a_miss(broken: str, reader: LinkerSide) -> None:
    free = reader.free_tokens()
    for pool in reader.linker._stores.by_pool.values():
        setattr(pool, broken, _explode)
    if broken == "store":
        reader.store(sequence(4, first=7000))
        assert reader.load(sequence(9)) is not None
    else:
        assert reader.load(sequence(9)) is None
        assert reader.free_tokens() == free
    assert any(thread.name == "memkv-offload" and thread.is_alive() for thread in threading.enumerate())


def test_no_method_raises_whatever_it_is_given(reader: LinkerSide) -> None:
    linker, key = reader.linker, "ab" * 32
    nonsense: list[Any] = [None, [], ["zz"], ["ab"], [key] * 3, "text", [None], [7]]
    for keys in nonsense:
        for indices in (None, 3, torch.arange(5)):
            transfer = PoolTransfer(PoolName.KV, device_indices=indices, keys=keys)
            stray = PoolTransfer(PoolName.DEEPSEEK_V4_C4, device_indices=indices, keys=keys)
            assert linker.lookup("request", [transfer, stray]) == []
            assert linker.load("request", [transfer, stray]) is False
            before = linker.num_completed_offloads()
            if linker.offload([transfer]):
                deadline = time.monotonic() + 20
                while linker.num_completed_offloads() == before:
                    assert time.monotonic() < deadline, "no result"
                    time.sleep(0.001)
                assert linker.pop_completed_offload() is False
    assert linker.start_layer_wise_loading() == -1
    assert linker.finish_layer_wise_loading(-1)
    assert not linker.cancel_queued_load("request")


def test_look_ups_of_waiting_requests_are_answered_from_memory(reader: LinkerSide) -> None:
    """SGLang matches a queued request again in every round, on the scheduler's thread."""
    keys = [f"{number:064x}" for number in range(1, 10)]
    first = reader.linker.lookup("request", [PoolTransfer(PoolName.KV, keys=keys)])
    asked = reader.linker._stores.client.counters()["probe_requests"]
    assert reader.linker.lookup("request", [PoolTransfer(PoolName.KV, keys=keys)]) == first == []
    assert reader.linker._stores.client.counters()["probe_requests"] == asked


def test_reset_waits_and_drops_results(bench: Bench, tier: Path) -> None:
    side = bench.linked(tier, 1)
    side._bench._insert(side.cache, side._allocator, side._requests, sequence(9))
    side.cache.reset()
    assert side.linker.num_completed_offloads() == 0
    assert not side.cache.linker.pending_offloads
    side.store(sequence(4, first=3000))
    assert 4 in chunks_in(tier)
