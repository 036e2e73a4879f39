"""`MemKVL2Adapter` below LMCache's own controllers: what comes back, what stays apart, and what faults may do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc

from memkv_engines.errors import ConfigError, IdentityError
from memkv_engines.lmcache.l2_adapter import MemKVL2Adapter
from tests.engines.lmcache.children import io_processes, stopped
from tests.engines.lmcache.levels import LAYOUT, OBJECT_BYTES, SHAPE, content, key, levels, parameters
from tests.engines.vllm import damage

KEYS = [key(number) for number in range(6)]


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    return tmp_path / "tier"


def fill(tier: Path, keys: list[ObjectKey], **keys_of_ours: Any) -> None:
    """Store objects in one life of LMCache's first level."""
    with levels(tier, **keys_of_ours) as one:
        one.write(keys, range(len(keys)))
        one.await_counter("store_chunks", len(keys))


def file_of(tier: Path, number: int, keys: list[ObjectKey] = KEYS) -> Path:
    """The chunk with an object's content."""
    wanted = content(number).tobytes()
    (found,) = [file for file in damage.chunk_files(tier) if file.read_bytes().endswith(wanted)]
    return found


# ------------------------------------------------------------------------------------------------ there and back again


@pytest.mark.parametrize("io_process", ["on", "off"])
def test_another_life_gets_every_byte_back(io_process: str, tier: Path) -> None:
    fill(tier, KEYS, io_process=io_process)
    with levels(tier, io_process=io_process) as one:
        assert one.read([*KEYS, key(77)]) == [content(number).tobytes() for number in range(6)]
        assert one.counter("load_chunks") == 6 and one.counter("load_jobs_failed") == 0
        assert one.adapter.report_status()["is_healthy"]


def test_objects_of_several_sizes_and_parts(tier: Path) -> None:
    odd = MemoryLayoutDesc([torch.Size((2, 3, 100, 7)), torch.Size((5, 11))], [torch.float32, torch.uint8])
    window = [key(number, object_group_id=1) for number in range(3)]
    with levels(tier) as one:
        one.write(KEYS, range(6))
        one.write(window, range(10, 13), odd)
        one.await_counter("store_chunks", 9)
    with levels(tier) as one:
        size = 2 * 3 * 100 * 7 * 4 + 55
        assert one.read(window, odd) == [content(number, size).tobytes() for number in range(10, 13)]
        assert one.read(KEYS) == [content(number).tobytes() for number in range(6)]


def test_what_is_stored_is_not_written_again(tier: Path) -> None:
    fill(tier, KEYS)
    with levels(tier) as one:
        one.write(KEYS, range(6))
        one.await_counter("store_present", 6)
        assert one.counter("store_chunks") == 0


def test_more_than_staging_holds_is_stored_all_the_same(tier: Path) -> None:
    many = [key(number) for number in range(100, 160)]
    fill(tier, many, staging_bytes=8 << 20)
    assert len(damage.chunk_files(tier)) == len(many)


# ------------------------------------------------------------------------------------------------ what stays apart

OTHER_KEYS = {
    "model": {"model_name": "org/other"},
    "rank": {"kv_rank": ObjectKey.ComputeKVRank(2, 0, 2, 0)},
    "world": {"kv_rank": ObjectKey.ComputeKVRank(4, 1, 4, 1)},
    "group": {"object_group_id": 1},
    "salt": {"cache_salt": "somebody"},
    "tokens": {"chunk_hash": bytes(31) + b"\x99"},
}
OTHER_LAYOUTS = {
    "dtype": MemoryLayoutDesc(LAYOUT.shapes, [torch.float16]),
    "shape": MemoryLayoutDesc([torch.Size((2, 4, 128, 256))], LAYOUT.dtypes),
    "parts": MemoryLayoutDesc([torch.Size((1, *SHAPE[1:]))] * 2, LAYOUT.dtypes * 2),
}
OTHER_CONFIGURATIONS = {"tenant": {"tenant": "somebody"}, "weights": {"weights_id": "other"}}


def test_only_the_same_object_is_found(tier: Path) -> None:
    fill(tier, KEYS[:1])
    with levels(tier) as one:
        for name, fields in OTHER_KEYS.items():
            assert one.read([key(0, **fields)]) == [], name
        for name, layout in OTHER_LAYOUTS.items():
            assert one.read([key(0)], layout) == [], name
        assert one.counter("load_jobs") == 0
        assert one.read([key(0)]) == [content(0).tobytes()]
    for name, ours in OTHER_CONFIGURATIONS.items():
        with levels(tier, **ours) as one:
            assert one.read([key(0)]) == [], name


def test_keys_of_a_weak_hash_are_not_used(tier: Path, caplog: pytest.LogCaptureFixture) -> None:
    weak = key(0, chunk_hash=bytes(8))
    with levels(tier) as one:
        one.write([weak, key(1)], [0, 1])
        one.await_counter("store_chunks", 1)
    assert len(damage.chunk_files(tier)) == 1
    with levels(tier) as one:
        assert one.read([weak]) == [] and one.read([key(1)]) == [content(1).tobytes()]
    assert "--hash-algorithm" in caplog.text


# ------------------------------------------------------------------------------------------------ damage

DAMAGE = [kind for kind in damage.KINDS if kind not in ("other_namespace", "owner", "plant")]


def test_no_damage_is_ever_loaded(tier: Path) -> None:
    keys = [key(number) for number in range(len(DAMAGE) + 1)]
    fill(tier, keys)
    files = [file_of(tier, number) for number in range(len(DAMAGE))]
    for file, kind in zip(files, DAMAGE, strict=True):
        damage.KINDS[kind](file, tier)
    with levels(tier) as one:
        for number, kind in enumerate(DAMAGE):
            assert one.read([keys[number]]) == [], kind
        assert one.read(keys[-1:]) == [content(len(DAMAGE)).tobytes()]
        counters = one.adapter.report_status()["counters"]
        missed = sum(count for name, count in counters.items() if name.startswith("miss_"))
        # What no longer stands under its name as a file of ours is not even found; all else is found and refused.
        assert missed == counters["load_jobs_failed"] >= len(DAMAGE) - 4, counters
        assert counters.get("boundary_errors", 0) == 0


def test_every_byte_of_an_object_is_checked(tier: Path) -> None:
    fill(tier, KEYS)
    header_bytes = damage.header_of(file_of(tier, 0)).geometry.header_bytes
    places = [0, 1, OBJECT_BYTES // 3, OBJECT_BYTES - 4097, OBJECT_BYTES - 1]
    for number, place in enumerate(places):
        damage.flip_bit(file_of(tier, number), header_bytes + place)
    with levels(tier) as one:
        for number in range(len(places)):
            assert one.read([KEYS[number]]) == []
        assert one.counter("miss_damaged") == len(places)
        assert one.read(KEYS[5:]) == [content(5).tobytes()]


def test_a_damaged_object_ends_the_prefix_and_is_stored_anew(tier: Path) -> None:
    fill(tier, KEYS)
    damage.KINDS["flip_payload"](file_of(tier, 3), tier)
    with levels(tier) as one:
        assert one.read(KEYS) == [content(number).tobytes() for number in range(3)]
        # It is not found a second time, so that nobody waits for it again.
        assert one.read(KEYS[3:4]) == [] and one.counter("miss_damaged") == 1
        one.write(KEYS[3:4], [3])
        one.await_counter("store_chunks", 1)
    with levels(tier) as one:
        assert one.read(KEYS) == [content(number).tobytes() for number in range(6)]


# ------------------------------------------------------------------------------------------------ faults


def test_a_tier_that_hangs_costs_a_deadline_and_writes_nothing_late(tier: Path) -> None:
    fill(tier, KEYS)
    with levels(tier, load_timeout_ms=1000, probe_timeout_ms=300) as one:
        assert one.read(KEYS[:1]) == [content(0).tobytes()]
        with stopped(io_processes()):
            started = time.monotonic()
            assert one.read(KEYS[1:2]) == []
            assert time.monotonic() - started < 10
            assert one.counter("probe_timeouts") == 1
        deadline = time.monotonic() + 30
        while one.read(KEYS[1:2]) != [content(1).tobytes()]:
            assert time.monotonic() < deadline, one.adapter.report_status()
            time.sleep(0.2)


def test_a_hang_in_the_middle_of_a_load(tier: Path) -> None:
    fill(tier, KEYS)
    with levels(tier, load_timeout_ms=1000) as one:
        (prober,) = io_processes()
        assert one.read(KEYS[:1]) == [content(0).tobytes()]
        movers = [pid for pid in io_processes() if pid != prober]
        assert movers
        with stopped(movers):
            assert one.read(KEYS[1:3]) == []
            # Who hung was ended, so that nothing of it can come late.
            assert not set(movers) & set(io_processes())
        assert one.counter("miss_io_service") >= 1


def test_services_that_die_are_started_again(tier: Path) -> None:
    fill(tier, KEYS)
    with levels(tier) as one:
        assert one.read(KEYS[:1]) == [content(0).tobytes()]
        for pid in io_processes():
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while one.read(KEYS[1:]) != [content(number).tobytes() for number in range(1, 6)]:
            assert time.monotonic() < deadline, one.adapter.report_status()
            time.sleep(0.2)


def test_a_full_tier_is_told(tier: Path) -> None:
    with levels(tier, capacity_bytes=3 * OBJECT_BYTES, eviction="off") as one:
        one.write(KEYS, range(6))
        one.await_counter("store_full", 1)
    assert 0 < len(damage.chunk_files(tier)) < 6


def test_an_error_of_ours_is_a_miss_and_counted(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tier, KEYS)
    with levels(tier) as one:

        def broken(names: object) -> list[bool]:
            raise RuntimeError("ours")

        with monkeypatch.context() as patched:
            patched.setattr(one.adapter._objects, "find", broken)
            assert one.read(KEYS) == []
        assert one.counter("boundary_errors") == 1
        assert len(one.read(KEYS)) == 6


def test_a_stop_amid_stores_leaves_only_whole_objects(tier: Path) -> None:
    many = [key(number) for number in range(100)]
    with levels(tier) as one:
        one.write(many, range(100))
    assert not io_processes()
    with levels(tier) as one:
        found = {number: one.read([many[number]]) for number in range(0, 100, 9)}
        assert one.counter("load_jobs_failed") == 0
    assert all(got in ([], [content(number).tobytes()]) for number, got in found.items())


# ------------------------------------------------------------------------------------------------ the interface


def adapter_of(tier: Path, **ours: Any) -> MemKVL2Adapter:
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    return MemKVL2Adapter(parameters(tier, **ours), L1MemoryDesc(memory.data_ptr(), 1 << 20, 4096))


def test_results_come_once_and_after_the_end_at_once(tier: Path) -> None:
    adapter = adapter_of(tier)
    fds = {adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()}
    assert len(fds) == 3
    task = adapter.submit_lookup_and_lock_task(KEYS, {0: LAYOUT})
    deadline = time.monotonic() + 10
    while (found := adapter.query_lookup_and_lock_result(task)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(found) == len(KEYS) and found.popcount() == 0
    assert adapter.query_lookup_and_lock_result(task) is None and adapter.query_load_result(12345) is None
    adapter.submit_unlock(KEYS)
    adapter.close()
    late = adapter.submit_lookup_and_lock_task(KEYS, {0: LAYOUT})
    assert adapter.query_lookup_and_lock_result(late).popcount() == 0
    load = adapter.submit_load_task([], [])
    assert adapter.query_load_result(load) is not None
    store = adapter.submit_store_task([], [])
    assert not adapter.pop_completed_store_tasks()[store].is_successful()


def test_quotas_can_delete(tier: Path) -> None:
    mine, theirs = key(0, cache_salt="mine"), key(0, cache_salt="theirs")
    with levels(tier) as one:
        one.write([mine, theirs], [0, 0])
        one.await_counter("store_chunks", 2)
        deadline = time.monotonic() + 10
        while (usage := one.adapter.get_usage()).total_bytes_used < 2 * OBJECT_BYTES:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert dict(usage.bytes_by_cache_salt) == {"mine": OBJECT_BYTES, "theirs": OBJECT_BYTES}
        one.adapter.delete([mine])
        assert dict(one.adapter.get_usage().bytes_by_cache_salt) == {"theirs": OBJECT_BYTES}
    with levels(tier) as one:
        assert one.read([mine]) == [] and one.read([theirs]) == [content(0).tobytes()]


@pytest.mark.parametrize(
    ("ours", "error", "words"),
    [
        ({"weights_id": ""}, IdentityError, ["weights_id", "checkpoint"]),
        ({"pathh": "/x"}, ConfigError, ["pathh", "'path'"]),
        ({"path": ""}, ConfigError, ["path"]),
        ({"staging_bytes": "much"}, ConfigError, ["staging_bytes", "much"]),
    ],
)
def test_refusals_name_key_and_remedy(
    ours: dict[str, Any], error: type[Exception], words: list[str], tier: Path
) -> None:
    with pytest.raises(error) as refused:
        adapter_of(tier, **ours)
    assert all(word in str(refused.value) for word in words)


def test_a_tier_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        adapter_of(tmp_path / "file")
    assert not io_processes()


def test_a_first_level_without_host_memory_is_refused(tier: Path) -> None:
    with pytest.raises(ConfigError, match="l1-size-gb"):
        MemKVL2Adapter(parameters(tier), None)
