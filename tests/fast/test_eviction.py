"""Capacity over processes, and what goes when a directory is nearly full."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.errors import ChunkMissing, TierFull
from memkv_engines.keys import ChunkName
from memkv_engines.limits import ALIGN_BYTES, EVICT_ABOVE_SHARE, EVICT_TO_SHARE
from memkv_engines.offload.keeping import Keeper
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.eviction import LRU, OFF, POLICIES, PROBATION_SHARE, SEGMENTED_LRU, StoredChunk, choose_victims
from memkv_engines.tier.usage import NAME, Count, UsageFile
from tests.fast.samples import NAMESPACE, aligned, make_name, noise
from tests.fast.test_tiers import get, put

ROOT = Path(__file__).resolve().parents[2]
SIZE = 4 * ALIGN_BYTES
CAPACITY = 100 * SIZE


def name(number: int) -> ChunkName:
    return make_name(4, f"chunk {number}")


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DirectoryTier]:
    made = DirectoryTier(tmp_path / "kv", direct_io="off", capacity_bytes=CAPACITY)
    made.scan()
    made.wait_for_pressure(0)
    yield made
    made.close()


def held(tier: DirectoryTier) -> set[str]:
    return {path.name for path in tier.root.rglob("*.kv")}


def fill(tier: DirectoryTier, count: int, first: int = 0) -> None:
    """Store chunks whose times of writing are in order, however coarse the clock is."""
    for number in range(first, first + count):
        put(tier, name(number), noise(SIZE, number))
        path = next(tier.root.rglob(name(number).text))
        os.utime(path, ns=(10**18 + number, 10**18 + number))


# ---------------------------------------------------------------------------------------------------------- the choice

chunk_lists = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 1000), st.integers(0, 1000)), max_size=60).map(
    lambda rows: [StoredChunk(f"chunk {i}", size, written, used) for i, (size, written, used) in enumerate(rows)]
)


@settings(max_examples=300, deadline=None)
@given(chunks=chunk_lists, free_bytes=st.integers(-5, 1500), policy=st.sampled_from([SEGMENTED_LRU, LRU]))
def test_enough_goes_and_little_more(chunks: list[StoredChunk], free_bytes: int, policy: str) -> None:
    victims = choose_victims(iter(chunks), free_bytes, policy)
    freed, total = sum(v.size_bytes for v in victims), sum(c.size_bytes for c in chunks)
    assert len(set(victims)) == len(victims)
    assert set(victims) <= set(chunks)
    assert freed >= min(free_bytes, total)
    # Each of the two segments may overshoot by its last chunk.
    largest = max((c.size_bytes for c in chunks), default=0)
    assert freed < max(1, free_bytes + 2 * largest)


@settings(max_examples=300, deadline=None)
@given(chunks=chunk_lists, free_bytes=st.integers(1, 1500))
def test_nothing_stays_that_was_used_less_recently_in_its_segment(chunks: list[StoredChunk], free_bytes: int) -> None:
    for policy, segments in (
        (LRU, [chunks]),
        (SEGMENTED_LRU, [[c for c in chunks if c.was_read == r] for r in (0, 1)]),
    ):
        victims = set(choose_victims(chunks, free_bytes, policy))
        for segment in segments:
            gone = [c.last_use_ns for c in segment if c in victims]
            kept = [c.last_use_ns for c in segment if c not in victims]
            assert not gone or not kept or max(gone) <= min(kept)


def test_chunks_that_were_never_read_go_first_but_keep_a_share() -> None:
    unread = [StoredChunk(f"unread {i}", 1, 1000 + i, 0) for i in range(50)]
    read = [StoredChunk(f"read {i}", 1, 0, 1 + i) for i in range(50)]
    assert choose_victims(unread + read, 10) == unread[:10]
    victims = choose_victims(unread + read, 45)
    kept = int(PROBATION_SHARE * 100)
    assert victims == unread[: 50 - kept] + read[: 45 - (50 - kept)]


def hit_rate(policy: str, capacity: int, seed: int) -> float:
    """Hits of hot prompts that come again and again, between many that are seen once."""
    choice, held_chunks, hits, asked = random.Random(seed), dict[str, StoredChunk](), 0, 0
    for now in range(1, 6001):
        hot = choice.random() < 0.4
        path = f"hot {choice.randrange(60)}" if hot else f"once {now}"
        known = held_chunks.get(path)
        asked += hot
        hits += hot and known is not None
        written = known.written_ns if known else now
        held_chunks[path] = StoredChunk(path, 1, written, now if known else 0)
        if len(held_chunks) > capacity:
            for victim in choose_victims(held_chunks.values(), capacity // 10, policy):
                del held_chunks[victim.path]
    return hits / asked


@pytest.mark.parametrize("seed", range(3))
def test_a_scan_does_not_flush_what_is_hot(seed: int) -> None:
    segmented, plain = hit_rate(SEGMENTED_LRU, 100, seed), hit_rate(LRU, 100, seed)
    assert segmented > 0.9
    assert segmented > plain + 0.05


# ----------------------------------------------------------------------------------------------------------- the count


@pytest.fixture
def usage(tmp_path: Path) -> Iterator[UsageFile]:
    fd = os.open(tmp_path, os.O_RDONLY)
    made = UsageFile(fd)
    yield made
    made.close()
    os.close(fd)


def test_the_count_is_bounded_and_survives(usage: UsageFile, tmp_path: Path) -> None:
    assert usage.reserve(60, 100) == (True, Count(60, 0))
    assert usage.reserve(60, 100) == (False, Count(60, 0))
    usage.add(-20)
    fd = os.open(tmp_path, os.O_RDONLY)
    again = UsageFile(fd)
    os.close(fd)
    assert again.count().used_bytes == 40
    again.add(-1000)
    assert usage.count().used_bytes == 0
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600
    again.close()


@pytest.mark.parametrize("content", [b"", b"x", b"not ours" + bytes(16), os.urandom(100)])
def test_a_count_that_is_damaged_is_counted_anew(content: bytes, usage: UsageFile, tmp_path: Path) -> None:
    usage.add(50)
    (tmp_path / NAME).write_bytes(content)
    before = usage.count()
    assert before.used_bytes == 0
    usage.correct(70, before)
    assert usage.count().used_bytes == 70


def test_of_scans_that_overlap_one_counts(usage: UsageFile) -> None:
    first, second = usage.count(), usage.count()
    usage.add(5)  # Written meanwhile.
    usage.correct(100, first)
    usage.correct(100, second)
    assert usage.count().used_bytes == 105


_RESERVER = """
import os, sys
from memkv_engines.tier.usage import UsageFile
usage = UsageFile(os.open(sys.argv[1], os.O_RDONLY))
sys.stdin.readline()
print(sum(usage.reserve(7, 1000)[0] for _ in range(200)))
"""


def test_processes_share_the_count(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _RESERVER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, cwd=ROOT, **pipes) for _ in range(3)]
    granted = [int(process.communicate("go\n", timeout=60)[0]) for process in processes]
    assert sum(granted) == 1000 // 7


# ---------------------------------------------------------------------------------------------------------- a directory


def test_it_evicts_down_to_the_low_mark(tier: DirectoryTier) -> None:
    fill(tier, 94)
    assert tier.evict() == 0, "not nearly full"
    assert not tier.wait_for_pressure(0)
    fill(tier, 4, first=94)
    assert tier.wait_for_pressure(0)
    assert tier.evict() == 8 * SIZE
    assert tier.used_bytes() == 90 * SIZE == int(EVICT_TO_SHARE * CAPACITY)
    assert held(tier) == {name(number).text for number in range(8, 98)}
    assert tier.evict() == 0


def test_a_store_beyond_the_capacity_fails_until_there_is_room(tier: DirectoryTier) -> None:
    fill(tier, 100)
    with pytest.raises(TierFull, match=str(CAPACITY)):
        put(tier, name(100), noise(SIZE, 100))
    assert tier.evict()
    assert put(tier, name(100), noise(SIZE, 100))


def test_what_was_loaded_stays(tier: DirectoryTier) -> None:
    fill(tier, 98)
    for number in (0, 3):
        assert get(tier, name(number)) == noise(SIZE, number)
    tier.evict()
    assert {name(0).text, name(3).text} <= held(tier)
    assert name(1).text not in held(tier)


def test_a_reader_is_not_torn(tier: DirectoryTier) -> None:
    fill(tier, 98)
    victim = next(tier.root.rglob(name(0).text))
    with tier.open(NAMESPACE.folder, name(0)) as reader:
        os.utime(victim, ns=(0, 10**18))
        tier.evict()
        assert not victim.exists()
        view = aligned(bytes(SIZE))
        reader.read([view], 0)
        assert view == noise(SIZE, 0)
    with pytest.raises(ChunkMissing):
        tier.open(NAMESPACE.folder, name(0))


def test_foreign_files_stay(tier: DirectoryTier) -> None:
    fill(tier, 98)
    bucket = next(tier.root.rglob("*.kv")).parent
    foreign = [tier.root / "notes.txt", bucket / "readme", bucket / "nonsense.kv", bucket.parent / name(0).text]
    for path in foreign:
        path.write_bytes(b"mine")
        os.utime(path, (0, 0))
    link = bucket / name(500).text
    link.symlink_to(foreign[0])
    tier.evict()
    assert all(path.read_bytes() == b"mine" for path in foreign)
    assert link.is_symlink()


def test_off_evicts_nothing(tmp_path: Path) -> None:
    assert OFF in POLICIES
    tier = DirectoryTier(tmp_path / "kv", direct_io="off", capacity_bytes=CAPACITY, eviction=OFF)
    fill(tier, 100)
    assert tier.evict() == 0
    assert len(held(tier)) == 100
    tier.close()


def test_two_tiers_on_one_directory_keep_one_bound(tier: DirectoryTier) -> None:
    other = DirectoryTier(tier.root, direct_io="off", capacity_bytes=CAPACITY)
    for number in range(120):
        try:
            put(tier if number % 2 else other, name(number), noise(SIZE, number))
        except TierFull:
            assert number >= 100
    assert len(held(tier)) == 100
    other.close()


def test_a_scan_corrects_the_count(tier: DirectoryTier) -> None:
    fill(tier, 97)
    (tier.root / NAME).write_bytes(b"gone")
    assert tier.used_bytes() == 0
    tier.scan()
    assert tier.used_bytes() == 97 * SIZE
    assert tier.wait_for_pressure(0), "a directory that is nearly full at the start is seen to be"
    assert 97 > EVICT_ABOVE_SHARE * 100


def test_the_keeper_makes_room(tier: DirectoryTier) -> None:
    keeper = Keeper(tier)
    deadline = time.monotonic() + 30
    stored = 0
    while stored < 150:
        try:
            stored += put(tier, name(stored), noise(SIZE, stored))
        except TierFull:
            assert time.monotonic() < deadline, "no room is made"
            time.sleep(0.02)
        assert len(held(tier)) <= 100
    keeper.stop()
