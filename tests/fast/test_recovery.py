"""After a crash, a power loss, a jump of the clock or a restart: what is found is right, what was stored is found."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memkv_engines.errors import ChunkMissing, TierFull, TierUnavailable
from memkv_engines.keys import namespace_folder
from memkv_engines.limits import ALIGN_BYTES, CLOCK_SLACK_S, KEY_BYTES, TEMPORARY_MAX_AGE_S
from memkv_engines.offload.messages import Probe
from memkv_engines.offload.probing import ChainWalk
from memkv_engines.tier import listing
from memkv_engines.tier.check import check_chunk
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.policy import load_policy, load_quotas
from memkv_engines.tier.quotas import tenant_of
from memkv_engines.tier.usage import NAME
from memkv_engines.transports.posix import BUFFERED, PosixTransport
from tests.fast.cli_tier_samples import CHUNK_BYTES, ONE, chunk
from tests.fast.io_samples import (
    BLOCKS_PER_CHUNK,
    load,
    make_run,
    make_store,
    path_of,
    quick_folder,
    setup_for,
    started,
    store,
)
from tests.fast.samples import NAMESPACE, SHARD, aligned, chain, make_name, noise
from tests.fast.service_samples import GEOMETRY, POOL
from tests.fast.test_tiers import get, put
from tests.fast.tier_samples import fix_mode

ROOT = Path(__file__).resolve().parents[2]
PAGE = ALIGN_BYTES
OWNERS = frozenset({os.geteuid(), 0})


# ----------------------------------------------------------------------------------------------------- writers that die


def kill_writers(root: Path, how: str, seed: int, count: int) -> list[int]:
    command = [sys.executable, "-m", "tests.fast.dying_writer", str(root), how, str(seed), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=240)
    assert done.stderr == "", "a writer met an error before it was killed"
    ends: list[int] = json.loads(done.stdout)["ends"]
    return ends


def check_everything(root: Path) -> int:
    """Every chunk that can be found is whole; so are the records beside it. Returns how many chunks there are."""
    fd = os.open(root, os.O_RDONLY)
    chunks = 0
    for folder in listing.namespaces(fd):
        for entry in listing.chunks(fd, folder):
            check_chunk(entry, OWNERS)
            chunks += 1
        assert (root / folder / "manifest.json").read_bytes() == ONE.canonical_json or not chunks
        load_policy(fd, folder)
        assert tenant_of(fd, folder) in ("t", None)
    load_quotas(fd)
    os.close(fd)
    return chunks


@pytest.mark.parametrize(("how", "seed", "count"), [("steps", 0, 600), ("times", 1, 40), ("times", 2, 40)])
def test_a_writer_that_is_killed_at_any_moment_leaves_whole_chunks(
    tmp_path: Path, how: str, seed: int, count: int
) -> None:
    root = tmp_path / "kv"
    root.mkdir()
    ends = kill_writers(root, how, seed, count)
    killed = ends.count(9)
    if how == "steps":
        assert ends[-2:] == [0, 0], "the last one ran to its end, so every step was met"
        assert killed > 100
    else:
        assert killed == count
    assert check_everything(root) > 0
    leftovers = list(root.rglob(".tmp-*"))
    assert leftovers or how == "times", "some died while they wrote"
    # The next one starts, counts, and goes on; what the dead left is not touched yet: they may be alive.
    tier = DirectoryTier(root, direct_io="off", capacity_bytes=1000 * CHUNK_BYTES)
    held = tier.scan()
    assert held == tier.used_bytes() == CHUNK_BYTES * len(list(root.rglob("*.kv")))
    assert set(root.rglob(".tmp-*")) == set(leftovers)
    name, data = chunk(ONE, "after")
    tier.put(ONE.folder, name, [aligned(data)])
    for path in leftovers:
        when = time.time() - TEMPORARY_MAX_AGE_S - 60
        os.utime(path, (when, when))
    assert tier.scan() == held + CHUNK_BYTES == tier.used_bytes()
    assert not list(root.rglob(".tmp-*"))
    check_everything(root)
    tier.close()


def test_an_eviction_collects_leftovers_on_its_way(tmp_path: Path) -> None:
    """So they go without a restart too."""
    tier = DirectoryTier(tmp_path / "kv", direct_io="off", capacity_bytes=20 * PAGE)
    tier.scan()
    for number in range(20):
        put(tier, make_name(4, str(number)), noise(PAGE))
    bucket = next(tier.root.rglob("*.kv")).parent
    for text, age_s in ((".tmp-1-old", 2 * TEMPORARY_MAX_AGE_S), (".tmp-1-young", 0), (".keep", 10**6)):
        (bucket / text).write_bytes(b"x")
        os.utime(bucket / text, (time.time() - age_s,) * 2)
    assert tier.evict() > 0
    assert {path.name for path in bucket.glob(".*")} == {".tmp-1-young", ".keep"}
    tier.close()


def test_a_leftover_is_collected_even_if_its_writer_wakes_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that hung for longer than a temporary file lives fails; it publishes nothing and breaks nothing."""
    fix_mode(monkeypatch, tmp_path, BUFFERED)
    tier, other = (DirectoryTier(tmp_path / "kv", capacity_bytes=100 * PAGE) for _ in range(2))
    real = PosixTransport.write

    def hang(self: PosixTransport, handle: int, *rest: Any) -> int:
        done = real(self, handle, *rest)
        when = time.time() - TEMPORARY_MAX_AGE_S - 60
        os.utime(handle, (when, when))
        other.scan()
        return done

    with monkeypatch.context() as hanging:
        hanging.setattr(PosixTransport, "write", hang)
        with pytest.raises(TierUnavailable, match="cannot publish"):
            put(tier, make_name(), noise(PAGE))
    assert tier.exists(NAMESPACE.folder, [make_name()]) == [False]
    assert tier.used_bytes() == 0
    assert put(tier, make_name(), noise(PAGE))
    tier.close()
    other.close()


_REPLICA = """
import sys
from memkv_engines.tier.directory import DirectoryTier
from tests.fast.samples import NAMESPACE, aligned, make_name, noise
sys.stdin.readline()
tier = DirectoryTier(sys.argv[1], direct_io="off", capacity_bytes=1 << 30)
tier.write_manifest(NAMESPACE)
tier.scan()
for step in range(60):
    number = step * 2 + int(sys.argv[2])
    tier.put(NAMESPACE.folder, make_name(4, str(number % 90)), [aligned(noise(4096, number % 90))])
"""


def test_replicas_that_start_together_share_one_directory(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    command = [sys.executable, "-c", _REPLICA, str(root)]
    replicas = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for number in range(3)
    ]
    for replica in replicas:
        assert replica.communicate("go\n", timeout=60)[1] == ""
    tier = DirectoryTier(root, direct_io="off", capacity_bytes=1 << 30)
    count = len(list(root.rglob("*.kv")))
    assert count >= 60
    used = tier.used_bytes()
    assert used is not None and count * PAGE <= used <= 2 * count * PAGE, "too much may be counted, too little never"
    tier.scan()
    assert all(get(tier, name) for name in tier.names(NAMESPACE.folder))
    tier.close()
    again = DirectoryTier(root, direct_io="off", capacity_bytes=1 << 30)
    assert again.scan() == count * PAGE
    again.close()


# ----------------------------------------------------------------------------------------------------------- power loss


@pytest.fixture
def quick() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


def zero(path: Path, first: int, stop: int) -> None:
    data = bytearray(path.read_bytes())
    data[first:stop] = bytes(len(data[first:stop]))
    path.write_bytes(data)


HEADER, SIZE = GEOMETRY.header_bytes, GEOMETRY.object_bytes
LAST = GEOMETRY.block_offset(BLOCKS_PER_CHUNK - 1)
PATTERNS: dict[str, Callable[[Path], object]] = {
    "renamed, nothing written": lambda path: path.write_bytes(b""),
    "renamed, size known, all zeros": lambda path: path.write_bytes(bytes(SIZE)),
    "header right, payload zeros": lambda path: zero(path, HEADER, SIZE),
    "header zeros, payload right": lambda path: zero(path, 0, HEADER),
    "header cut": lambda path: os.truncate(path, 512 + 96),
    "only the header": lambda path: os.truncate(path, HEADER),
    "last page missing": lambda path: os.truncate(path, SIZE - PAGE),
    "last block zeros": lambda path: zero(path, LAST, SIZE),
    "one page of zeros in the middle": lambda path: zero(path, HEADER + PAGE, HEADER + 2 * PAGE),
    "half of a page": lambda path: zero(path, HEADER + 100, HEADER + 2048),
    "second sector of the header": lambda path: zero(path, 512, 1024),
    "longer than it was": lambda path: path.write_bytes(path.read_bytes() + bytes(PAGE)),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_a_power_loss_leaves_is_a_miss_and_heals(quick: Path, pattern: str) -> None:
    hashes = chain(BLOCKS_PER_CHUNK, pattern)
    client = started(setup_for(quick, [POOL]), "off")
    pages = range(BLOCKS_PER_CHUNK)
    assert store(client, make_store(POOL, hashes, pages)) == ("stored",)
    PATTERNS[pattern](path_of(quick, POOL, hashes))
    client.close()
    # The machine starts again; somebody asks for the prompt.
    client = started(setup_for(quick, [POOL]), "off")
    before = POOL.memory.copy()
    target = range(8, 8 + BLOCKS_PER_CHUNK)
    result = load(client, make_run(POOL, hashes, target))
    assert result.kinds[0] in ("truncated", "damaged", "foreign")
    good = result.good_blocks[0]
    assert good < BLOCKS_PER_CHUNK
    copies = dict(zip(list(target)[:good], pages, strict=False))
    assert (POOL.memory == POOL.with_copies(before, copies)).all(), "nothing but verified blocks reached a page"
    # It is stored again, and then it is there.
    assert store(client, make_store(POOL, hashes, pages, replace=True)) == ("stored",)
    assert load(client, make_run(POOL, hashes, target)).kinds == ("",)
    client.close()


# ------------------------------------------------------------------------------------------------------- clocks, counts


@pytest.mark.parametrize("jump_s", [2 * CLOCK_SLACK_S, 10 * 365 * 86_400])
def test_a_chunk_from_the_future_gets_a_time_that_can_be_believed(tmp_path: Path, jump_s: float) -> None:
    tier = DirectoryTier(tmp_path / "kv", direct_io="off", capacity_bytes=100 * PAGE)
    put(tier, make_name(), noise(PAGE))
    path = next(tier.root.rglob("*.kv"))
    os.utime(path, (time.time() + jump_s,) * 2)
    assert get(tier, make_name()) == noise(PAGE)
    info = path.stat()
    assert abs(info.st_mtime - time.time()) < 60
    assert info.st_atime_ns > info.st_mtime_ns, "it counts as read"
    tier.close()


def test_a_count_that_is_lost_under_way_is_made_anew_for_all(tmp_path: Path) -> None:
    tiers = [DirectoryTier(tmp_path / "kv", direct_io="off", capacity_bytes=20 * PAGE) for _ in range(2)]
    for number in range(10):
        put(tiers[number % 2], make_name(4, str(number)), noise(PAGE))
    for tier in tiers:
        tier.scan()
        tier.wait_for_pressure(0)
    (tmp_path / "kv" / NAME).unlink()
    put(tiers[0], make_name(4, "10"), noise(PAGE))
    put(tiers[1], make_name(4, "11"), noise(PAGE))
    assert tiers[0].used_bytes() == tiers[1].used_bytes() == 2 * PAGE, "they share the new file"
    assert tiers[0].wait_for_pressure(0), "and the keeper is called to count"
    tiers[0].evict()
    assert tiers[0].used_bytes() == tiers[1].used_bytes() == 12 * PAGE
    for tier in tiers:
        tier.close()


def test_a_count_that_claims_too_much_evicts_nothing(tmp_path: Path) -> None:
    tier = DirectoryTier(tmp_path / "kv", direct_io="off", capacity_bytes=100 * PAGE)
    tier.scan()
    for number in range(50):
        put(tier, make_name(4, str(number)), noise(PAGE))
    assert tier._usage is not None
    tier._usage.add(10**15)
    with pytest.raises(TierFull):
        put(tier, make_name(4, "50"), noise(PAGE))
    assert tier.evict() == 0
    assert tier.used_bytes() == 50 * PAGE
    put(tier, make_name(4, "50"), noise(PAGE))
    tier.close()


@pytest.mark.parametrize("call", ["scandir", "stat"])
def test_a_part_that_cannot_be_listed_is_not_taken_for_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    tier = DirectoryTier(tmp_path / "kv", direct_io="off", capacity_bytes=100 * PAGE)
    for number in range(98):
        put(tier, make_name(4, str(number)), noise(PAGE))
    tier.scan()
    with monkeypatch.context() as broken:
        broken.setattr(
            listing.os, call, lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
        )
        for action in (tier.scan, tier.evict, lambda: list(tier.names(NAMESPACE.folder))):
            with pytest.raises(TierUnavailable, match="cannot list"):
                action()
        assert tier.used_bytes() == 98 * PAGE
    assert tier.evict() == 8 * PAGE
    tier.close()


@pytest.mark.parametrize("plant", ["link", "fifo", "folder", "socket"])
@pytest.mark.timeout(20)
def test_a_count_that_is_no_file_of_ours_is_refused_with_a_remedy(tmp_path: Path, plant: str) -> None:
    (tmp_path / "kv").mkdir()
    path = tmp_path / "kv" / NAME
    if plant == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif plant == "fifo":
        os.mkfifo(path)
    elif plant == "folder":
        path.mkdir()
    else:
        os.mknod(path, 0o140600)
    with pytest.raises(TierUnavailable, match=r"\.usage"):
        DirectoryTier(tmp_path / "kv", direct_io="off", capacity_bytes=100 * PAGE)
    assert not (tmp_path / "elsewhere").exists()


def test_a_start_lists_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it takes as long with a million chunks as with none; the keeper counts in the background."""
    fix_mode(monkeypatch, tmp_path, BUFFERED)
    tier = DirectoryTier(tmp_path / "kv", capacity_bytes=100 * PAGE)
    put(tier, make_name(), noise(PAGE))
    tier.close()

    def refuse(*_: object) -> None:
        raise AssertionError("listed")

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    again = DirectoryTier(tmp_path / "kv", capacity_bytes=100 * PAGE)
    assert get(again, make_name()) == noise(PAGE)
    again.close()


# ------------------------------------------------------------------------------------------------------------ a restart


def test_after_a_restart_what_was_stored_is_found(quick: Path) -> None:
    """At least 99% of the blocks that were reported stored; here, where nothing was evicted, all of them."""
    client = started(setup_for(quick, [POOL], capacity_bytes=1 << 30), "on")
    prompts = [chain(2 * BLOCKS_PER_CHUNK + number % 4, f"prompt {number}") for number in range(150)]
    stored = 0
    for hashes in prompts:
        cuts = [hashes[at : at + BLOCKS_PER_CHUNK] for at in range(0, len(hashes), BLOCKS_PER_CHUNK)]
        outcomes = store(client, *(make_store(POOL, cut, range(len(cut))) for cut in cuts))
        stored += sum(len(cut) for cut, outcome in zip(cuts, outcomes, strict=True) if outcome == "stored")
    pid = client.child_pid
    assert pid is not None
    os.kill(pid, 9)  # No orderly end either.
    client.close()
    tier = DirectoryTier(quick, direct_io="off", capacity_bytes=1 << 30)
    found = loadable = 0
    client = started(setup_for(quick, [POOL], capacity_bytes=1 << 30), "off")
    for number, hashes in enumerate(prompts):
        probe = Probe(
            number, NAMESPACE.digest, POOL.group, BLOCKS_PER_CHUNK, 0, 0, b"".join(hashes), (SHARD.as_tuple(),)
        )
        segments = ChainWalk(probe, tier).run()
        found += sum(segment.take for segment in segments)
        for segment in segments[:: 7 if number % 10 else 1]:
            cut = hashes[segment.position : segment.position + segment.take]
            run = make_run(POOL, cut, range(8, 8 + len(cut)), block_count=segment.block_count, last=segment.last)
            assert load(client, run).kinds == ("",)
            loadable += 1
    client.close()
    tier.close()
    assert stored > 1000 and loadable > 150
    assert found >= 0.99 * stored
    assert found == stored


# ------------------------------------------------------------------------------------------- a directory that goes away


def test_a_directory_that_is_moved_and_comes_back(tmp_path: Path) -> None:
    tier = DirectoryTier(tmp_path / "kv", direct_io="off", capacity_bytes=100 * PAGE)
    put(tier, make_name(), noise(PAGE))
    (tmp_path / "kv").rename(tmp_path / "moved")
    assert get(tier, make_name()) == noise(PAGE), "it is held open, wherever it is"
    assert put(tier, make_name(5), noise(PAGE))
    again = DirectoryTier(tmp_path / "moved", direct_io="off", capacity_bytes=100 * PAGE)
    assert get(again, make_name(5)) == noise(PAGE)
    assert again.used_bytes() == 2 * PAGE
    assert not (tmp_path / "kv").exists()
    tier.close()
    again.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "memkv", str(mount)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a file system here; the same is tested by injection below")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_a_mount_that_becomes_read_only_and_writable_again(disk: Path) -> None:
    tier = DirectoryTier(disk / "kv", direct_io="off")
    put(tier, make_name(), noise(PAGE))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for _ in range(2):
        with pytest.raises(TierUnavailable, match="Read-only"):
            put(tier, make_name(5), noise(PAGE))
    assert get(tier, make_name()) == noise(PAGE)
    with pytest.raises(TierUnavailable, match="Read-only"):
        tier.remove(NAMESPACE.folder, make_name())
    with pytest.raises(TierUnavailable, match="Read-only"):
        tier.write_manifest(NAMESPACE)
    with pytest.raises(TierUnavailable, match=r"not writable|Read-only"):
        DirectoryTier(disk / "kv", direct_io="off")
    reader = DirectoryTier(disk / "kv", direct_io="off", read_only=True)
    assert get(reader, make_name()) == noise(PAGE)
    reader.close()
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert put(tier, make_name(5), noise(PAGE))
    tier.close()


def test_a_device_that_refuses_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read-only under our feet, with a count that cannot be written either."""
    tier = DirectoryTier(tmp_path / "kv", direct_io="off", capacity_bytes=100 * PAGE)
    put(tier, make_name(), noise(PAGE))
    with monkeypatch.context() as broken:
        for call in ("pwrite", "pwritev", "unlink", "rename", "mkdir", "utime"):
            broken.setattr(os, call, lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only")))
        for number in range(3):
            with pytest.raises(TierUnavailable, match="Read-only"):
                put(tier, make_name(4, str(number)), noise(PAGE))
        with pytest.raises(TierUnavailable):
            tier.remove(NAMESPACE.folder, make_name())
        assert get(tier, make_name()) == noise(PAGE)
        with pytest.raises(ChunkMissing):
            tier.open(NAMESPACE.folder, make_name(6))
        assert tier.exists(namespace_folder(NAMESPACE.digest), [make_name()]) == [True]
        assert tier.variants(NAMESPACE.folder, make_name().first[:KEY_BYTES], 0, SHARD.text) == [make_name()]
        with pytest.raises(TierUnavailable):  # The keeper says so, and goes on.
            tier.evict()
    assert put(tier, make_name(5), noise(PAGE))
    tier.close()
