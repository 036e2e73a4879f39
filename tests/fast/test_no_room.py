"""A device, or a user's share of it, that is full sheds stores and nothing else: no load, look-up, removal or start."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memkv_engines.errors import TierFull
from memkv_engines.limits import ALIGN_BYTES, MIB
from memkv_engines.offload.messages import Manifest
from memkv_engines.tier import directory
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.policy import NamespacePolicy, Quotas, load_policy, save_policy, save_quotas
from memkv_engines.tier.usage import NAME
from tests.fast.io_samples import BLOCKS_PER_CHUNK, load, make_run, make_store, setup_for, started, store, until
from tests.fast.samples import NAMESPACE, SHARD, chain, make_name, noise
from tests.fast.service_samples import GEOMETRY, POOL
from tests.fast.test_tiers import get, put

PAGE = ALIGN_BYTES
FOLDER = NAMESPACE.folder


def mounted(tmp_path: Path, options: str) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "memkv", str(mount)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a small file system here; every call is made to fail by injection below")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path, "size=2m")


@pytest.fixture
def few_inodes(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path, "size=8m,nr_inodes=40")


def fill_up(tier: DirectoryTier) -> int:
    """Store until the device is full; how many chunks it took."""
    for number in range(10_000):
        try:
            put(tier, make_name(4, str(number)), noise(4 * PAGE, number))
        except TierFull:
            return number
    raise AssertionError("it was never full")


def use_up(folder: Path) -> None:
    """Somebody else takes the last bytes and inodes."""
    for number in range(10_000):
        try:
            (folder / f"other {number}").write_bytes(bytes(PAGE))
        except OSError:
            return


def check_all_but_stores(tier: DirectoryTier, count: int) -> None:
    """Everything that needs no room works on a full device."""
    names = [make_name(4, str(number)) for number in range(count)]
    assert tier.exists(FOLDER, names) == [True] * count
    assert all(get(tier, name) == noise(4 * PAGE, number) for number, name in enumerate(names))
    assert tier.variants(FOLDER, names[0].first, 0, SHARD.text) == names[:1]
    assert set(tier.names(FOLDER)) == set(names)
    assert tier.scan() == count * 4 * PAGE
    assert not list(tier.root.rglob(".tmp-*"))


@pytest.mark.parametrize("capacity_bytes", [0, 64 * MIB])
@pytest.mark.parametrize("disk", ["small_disk", "few_inodes"])
def test_a_full_device(
    disk: str, capacity_bytes: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = request.getfixturevalue(disk) / "kv"
    tier = DirectoryTier(root, direct_io="off", capacity_bytes=capacity_bytes)
    count = fill_up(tier)
    assert count > 5
    use_up(root.parent)
    check_all_but_stores(tier, count)
    assert tier.used_bytes() == count * 4 * PAGE
    # A new process starts on the full device, and knows it.
    again = DirectoryTier(root, direct_io="off", capacity_bytes=capacity_bytes)
    check_all_but_stores(again, count)
    with pytest.raises(TierFull):
        again.write_manifest(NAMESPACE)
    # Room comes back: what stores need is only a moment's patience.
    for number in range(count // 2):
        assert again.remove(FOLDER, make_name(4, str(number)))
    monkeypatch.setattr(directory, "_FULL_BACKOFF_S", 0.0)
    monkeypatch.setattr(tier, "_full_until", 0.0)
    assert put(tier, make_name(4, "more"), noise(PAGE))
    tier.close()
    again.close()


def test_what_is_evicted_makes_room_on_a_full_device(small_disk: Path) -> None:
    """Removing, and counting what was removed, needs no room itself."""
    tier = DirectoryTier(small_disk / "kv", direct_io="off", capacity_bytes=64 * MIB)
    count = fill_up(tier)
    smaller = DirectoryTier(small_disk / "kv", direct_io="off", capacity_bytes=count * 3 * PAGE)
    smaller.scan()
    assert smaller.evict() > 0
    used = smaller.used_bytes()
    assert used == sum(path.stat().st_size for path in tier.root.rglob("*.kv")) < count * 3 * PAGE
    assert put(smaller, make_name(4, "more"), noise(PAGE))
    tier.close()
    smaller.close()


def test_a_service_on_a_full_device_sheds_stores_and_goes_on_loading(small_disk: Path) -> None:
    client = started(setup_for(small_disk / "kv", [POOL], capacity_bytes=64 * MIB), "on")
    pages, target = range(BLOCKS_PER_CHUNK), range(8, 8 + BLOCKS_PER_CHUNK)
    outcomes = []
    for number in range(2 * MIB // GEOMETRY.object_bytes + 5):
        outcomes += store(client, make_store(POOL, chain(BLOCKS_PER_CHUNK, f"{number}"), pages))
    stored = outcomes.count("stored")
    assert outcomes == ["stored"] * stored + ["full"] * (len(outcomes) - stored)
    assert "full" in outcomes
    assert client.counters["store_full"] == outcomes.count("full")
    for number in range(0, stored, 5):
        assert load(client, make_run(POOL, chain(BLOCKS_PER_CHUNK, f"{number}"), target)).kinds == ("",)
    client.submit_manifest(Manifest(b'{"model": "x"}'))  # Only told.
    pid = client.child_pid
    assert load(client, make_run(POOL, chain(BLOCKS_PER_CHUNK, "0"), target)).kinds == ("",)
    # Somebody makes room.
    for path in list((small_disk / "kv").rglob("*.kv"))[:20]:
        path.unlink()
    fresh = chain(BLOCKS_PER_CHUNK, "fresh")
    until(lambda: store(client, make_store(POOL, fresh, pages)) == ("stored",), timeout_s=20)
    assert load(client, make_run(POOL, fresh, target)).kinds == ("",)
    assert client.child_pid == pid, "nothing died of it"
    client.close()


# Calls that may say there is no room, and what they write to.
CALLS = ("open", "mkdir", "pwritev", "rename", "pwrite")


def failing(real: Callable[..., Any], code: int) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        reads = real.__name__ == "open" and not arguments[1] & os.O_CREAT
        if reads:
            return real(*arguments, **options)
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", CALLS)
def test_no_call_that_finds_no_room_costs_more_than_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    tier = DirectoryTier(tmp_path / "kv", direct_io="off", capacity_bytes=64 * MIB)
    for number in range(5):
        put(tier, make_name(4, str(number)), noise(4 * PAGE, number))
    tier.scan()
    real = getattr(os, call)
    with monkeypatch.context() as full:
        full.setattr(os, call, failing(real, code))
        with pytest.raises(TierFull):
            put(tier, make_name(4, "new"), noise(PAGE))
        if call != "pwrite":  # There the scan itself cannot write what it counted.
            check_all_but_stores(tier, 5)
        assert tier.remove(FOLDER, make_name(4, "4")), "removing needs no room, even if it cannot be counted"
    assert not list(tier.root.rglob(".tmp-*"))
    monkeypatch.setattr(tier, "_full_until", 0.0)
    assert put(tier, make_name(4, "new"), noise(PAGE))
    tier.evict(recount=True)
    assert tier.used_bytes() in (4 * 4 * PAGE + PAGE, 5 * 4 * PAGE + PAGE)
    tier.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_count_that_cannot_be_made_yet_is_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if path == NAME and flags & os.O_CREAT:
            raise OSError(code, os.strerror(code))
        return real(path, flags, *rest, **options)

    with monkeypatch.context() as full:
        full.setattr(os, "open", refuse)
        tier = DirectoryTier(tmp_path / "kv", direct_io="off", capacity_bytes=64 * MIB)
        with pytest.raises(TierFull):
            put(tier, make_name(), noise(PAGE))
        assert tier.exists(FOLDER, [make_name()]) == [False]
    assert put(tier, make_name(), noise(PAGE))
    assert tier.used_bytes() == PAGE
    tier.close()


def test_policies_that_find_no_room_leave_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FOLDER).mkdir()
    fd = os.open(tmp_path, os.O_RDONLY)
    save_policy(fd, FOLDER, NamespacePolicy(priority=3))
    with monkeypatch.context() as full:
        full.setattr(os, "rename", failing(os.rename, errno.ENOSPC))
        with pytest.raises(TierFull):
            save_policy(fd, FOLDER, NamespacePolicy(priority=4))
        with pytest.raises(TierFull):
            save_quotas(fd, Quotas({"t": 1}))
    assert load_policy(fd, FOLDER).priority == 3
    assert not list(tmp_path.rglob(".tmp-*"))
    os.close(fd)
