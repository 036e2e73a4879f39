"""`MemKVStoragePlugin` below LMCache's own storage manager."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lmcache.v1 import memory_management

from memkv_engines.errors import ConfigError, IdentityError
from memkv_engines.lmcache.storage_plugin import MemKVStoragePlugin
from tests.engines.lmcache.backends import (
    CHUNK_BYTES,
    KV_SHAPE,
    NAME,
    Backends,
    backends,
    chunk_key,
    config_of,
    metadata_of,
)
from tests.engines.lmcache.children import io_processes, stopped
from tests.engines.lmcache.levels import content
from tests.engines.vllm import damage

KEYS = [chunk_key(number) for number in range(6)]
CONTENT = [content(number, CHUNK_BYTES).tobytes() for number in range(6)]


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    return tmp_path / "tier"


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def put(one: Backends, keys: list[Any], numbers: range) -> None:
    one.put(keys, numbers)
    until(lambda: not any(one.plugin.exists_in_put_tasks(key) for key in keys))


def held(one: Backends) -> int:
    """Buffers of LMCache's that were not given back."""
    return int(one.plugin.local_cpu_backend.memory_allocator.pin_allocator.num_active_allocations)


def fill(tier: Path, **options: Any) -> None:
    with backends(tier, **options) as one:
        put(one, KEYS, range(6))
        assert one.plugin.status()["store_chunks"] == 6


def test_another_life_gets_every_byte_back(tier: Path) -> None:
    fill(tier)
    with backends(tier) as one:
        assert one.manager.batched_contains([*KEYS, chunk_key(77)])[0] == 6
        assert one.get([*KEYS, chunk_key(77)]) == [*CONTENT, None]
        assert held(one) == 0 and one.manager.memcheck()
        # Of single chunks LMCache keeps what it got.
        memory = one.manager.get(KEYS[2], NAME)
        assert bytes(memory.byte_array) == CONTENT[2] and held(one) == 1
        assert one.plugin.status()["load_chunks"] == 7


def test_the_asynchronous_side(tier: Path) -> None:
    fill(tier)
    with backends(tier) as one:
        damage.KINDS["flip_payload"](file_of(tier, 4), tier)

        async def ask() -> tuple[int, list[Any]]:
            count = await one.plugin.batched_async_contains("request", [*KEYS, chunk_key(77)], pin=True)
            return count, await one.plugin.batched_get_non_blocking("request", KEYS)

        count, found = asyncio.run_coroutine_threadsafe(ask(), one.manager.loop).result(20)
        assert count == 6 and [bytes(memory.byte_array) for memory in found] == CONTENT[:4]
        for memory in found:
            memory.ref_count_down()
        future = one.manager.get_non_blocking(KEYS[0], NAME)
        memory = future.result(20)
        assert bytes(memory.byte_array) == CONTENT[0]
        memory.ref_count_down()
        assert one.plugin.get_non_blocking(chunk_key(77)) is None
        assert held(one) == 0


def test_a_callback_per_chunk_and_errors_in_it_stay_there(tier: Path) -> None:
    told: list[Any] = []

    def tell(key: Any) -> None:
        told.append(key)
        raise RuntimeError("theirs")

    with backends(tier) as one:
        memory = [one.memory(number) for number in range(6)]
        one.plugin.batched_submit_put_task(KEYS, memory, on_complete_callback=tell)
        until(lambda: len(told) == 6)
        assert told == KEYS
        until(lambda: not one.plugin.exists_in_put_tasks(KEYS[0]))
        assert {own.get_ref_count() for own in memory} == {1}


OTHER_KEYS = {
    "model": {"model_name": "org/other"},
    "rank": {"worker_id": 0},
    "world": {"world_size": 4},
    "dtype": {"dtype": torch.float16},
    "tokens": {"chunk_hash": 12345},
    "tag": {"request_configs": {"lmcache.tag.user": "somebody"}},
}


def test_only_the_same_chunk_is_found(tier: Path) -> None:
    fill(tier)
    with backends(tier) as one:
        for name, fields in OTHER_KEYS.items():
            assert not one.plugin.contains(chunk_key(0, **fields)), name
        assert one.plugin.contains(chunk_key(0))
    layers, _, tokens, heads, size = KV_SHAPE
    other_metadata = [
        metadata_of(kv_dtype=torch.float16),
        metadata_of(kv_shape=(layers // 2, 2, tokens, heads * 2, size)),
        metadata_of(chunk_size=tokens // 2),
    ]
    for metadata in other_metadata:
        with backends(tier, metadata=metadata) as one:
            assert not one.plugin.contains(chunk_key(0)), metadata
    for ours in ({"tenant": "somebody"}, {"weights_id": "other"}):
        with backends(tier, ours=ours) as one:
            assert not one.plugin.contains(chunk_key(0)), ours


def test_a_short_last_chunk_is_left_to_lmcache(tier: Path) -> None:
    with backends(tier) as one:
        one.manager.batched_put([chunk_key(0), chunk_key(1)], [one.memory(0), one.memory(1, tokens=40)])
        until(lambda: not one.plugin.exists_in_put_tasks(chunk_key(0)))
        assert one.plugin.status()["store_chunks"] == 1


def file_of(tier: Path, number: int) -> Path:
    (found,) = [file for file in damage.chunk_files(tier) if file.read_bytes().endswith(CONTENT[number])]
    return found


@pytest.mark.parametrize("kind", ["flip_payload", "flip_header", "truncate", "delete", "other_prefix"])
def test_damage_is_a_miss_in_the_middle(kind: str, tier: Path) -> None:
    fill(tier)
    damage.KINDS[kind](file_of(tier, 3), tier)
    with backends(tier) as one:
        assert one.get(KEYS) == [*CONTENT[:3], None, *CONTENT[4:]]
        misses = {name: n for name, n in one.plugin.status().items() if name.startswith("miss_")}
        assert sum(misses.values()) == 1, misses
        assert held(one) == 0


def test_a_hang_costs_a_deadline(tier: Path) -> None:
    fill(tier)
    with backends(tier, ours={"load_timeout_ms": 1000, "probe_timeout_ms": 300}) as one:
        assert one.get(KEYS[:1]) == CONTENT[:1]
        with stopped(io_processes()):
            started = time.monotonic()
            assert one.manager.batched_contains(KEYS)[0] == 0
            assert one.get(KEYS[1:]) == [None] * 5
            assert time.monotonic() - started < 10
        assert held(one) == 0


def test_removal(tier: Path) -> None:
    fill(tier)
    with backends(tier) as one:
        assert one.manager.remove(KEYS[0], [NAME]) == 1 and one.manager.remove(KEYS[0], [NAME]) == 0
        assert one.manager.batched_remove(KEYS, [NAME]) == 5
        assert not damage.chunk_files(tier)


def test_nothing_touches_memory_that_lmcache_has_freed(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LMCache frees its memory first and closes us after that."""
    free, alive = memory_management._free_cpu_memory, []

    def watched(*arguments: Any, **options: Any) -> None:
        alive.append((io_processes(), one.plugin._putting))
        free(*arguments, **options)

    monkeypatch.setattr(memory_management, "_free_cpu_memory", watched)
    many = [chunk_key(number) for number in range(100, 160)]
    with backends(tier) as one:
        one.put(many, range(60))
        assert io_processes()
    assert alive == [([], set())]
    # What was written is whole.
    with backends(tier) as one:
        found = one.get(many)
        wanted = [content(number, CHUNK_BYTES).tobytes() for number in range(60)]
        assert all(got in (None, right) for got, right in zip(found, wanted, strict=True))
        assert one.plugin.status().get("miss_damaged", 0) == 0


def test_an_error_of_ours_is_a_miss(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tier)
    with backends(tier) as one:

        def broken(*_: object) -> list[bool]:
            raise RuntimeError("ours")

        with monkeypatch.context() as patched:
            patched.setattr(one.plugin._objects, "load", broken)
            patched.setattr(one.plugin._objects, "find", broken)
            assert not one.plugin.contains(KEYS[0]) and one.get(KEYS) == [None] * 6
        assert one.plugin.status()["boundary_errors"] == 2
        assert held(one) == 0
        assert one.get(KEYS) == CONTENT


def test_a_scheduler_only_looks_up(tier: Path) -> None:
    fill(tier)
    plugin = MemKVStoragePlugin(config_of(tier), metadata_of(role="scheduler"))
    try:
        assert plugin.batched_contains(KEYS) == 6
        assert plugin.batched_get_blocking(KEYS) == [None] * 6
    finally:
        plugin.close()


@pytest.mark.parametrize(
    ("theirs", "ours", "error", "words"),
    [
        ({}, {"weights_id": None}, IdentityError, ["weights_id"]),
        ({}, {"tennant": "x"}, ConfigError, ["tennant", "'tenant'"]),
        ({"pre_caching_hash_algorithm": "builtin"}, {}, IdentityError, ["builtin", "sha256_cbor"]),
        ({"pre_caching_hash_algorithm": "nonsense"}, {}, IdentityError, ["nonsense", "sha256_cbor"]),
        ({"use_layerwise": True}, {}, ConfigError, ["use_layerwise"]),
        ({"enable_blending": True}, {}, ConfigError, ["enable_blending"]),
    ],
)
def test_refusals(
    theirs: dict[str, Any], ours: dict[str, Any], error: type[Exception], words: list[str], tier: Path
) -> None:
    with pytest.raises(error) as refused:
        MemKVStoragePlugin(config_of(tier, ours=ours, **theirs), metadata_of())
    assert all(word in str(refused.value) for word in words)
    assert not io_processes()


def test_an_unseeded_process_is_refused(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED")
    with pytest.raises(IdentityError, match="PYTHONHASHSEED=0"):
        MemKVStoragePlugin(config_of(tier), metadata_of())
