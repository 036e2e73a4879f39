"""The tier contract, once for every implementation; ``test_directory_tier.py`` reaches behind the back of one."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from memkv_engines.errors import ChunkMissing, ChunkTruncated, TierFull
from memkv_engines.keys import ChunkKey, ChunkName, Shard
from memkv_engines.limits import ALIGN_BYTES, MAX_VARIANTS_EXAMINED
from memkv_engines.tier.base import Tier
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.memory import MemoryTier
from memkv_engines.tier.striped import StripedTier, open_directories
from memkv_engines.transports.posix import BUFFERED, DIRECT, DONTCACHE
from tests.fast.samples import NAMESPACE, SHARD, aligned, chain, chain_hash, make_name, noise
from tests.fast.tier_samples import fix_mode

FOLDER = NAMESPACE.folder
PAGE = ALIGN_BYTES


def get(tier: Tier, name: ChunkName, folder: str = FOLDER) -> bytes:
    """A whole object."""
    with tier.open(folder, name) as reader:
        view = aligned(bytes(reader.object_bytes))
        reader.read([view], 0)
    return bytes(view)


def put(tier: Tier, name: ChunkName, data: bytes, *, replace: bool = False) -> bool:
    """Store an object; returns whether it was written."""
    result = tier.put(FOLDER, name, [aligned(data)], replace=replace)
    assert result.written_bytes == (0 if result.already_present else len(data))
    return not result.already_present


def variant(count: int, prompt: str = "a", group: int = 0, shard: Shard = SHARD) -> ChunkName:
    """A chunk that begins with the prompt's first block and then goes its own way."""
    return ChunkKey(NAMESPACE.digest, chain_hash(0, prompt), chain_hash(count, prompt), count, group, shard).name


class TierContract(ABC):
    """What every tier does."""

    @abstractmethod
    def make(self, tmp_path: Path, capacity_bytes: int = 0) -> Tier:
        """An empty tier."""

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        tier = self.make(tmp_path)
        yield tier
        tier.close()

    def test_it_says_what_it_is(self, tier: Tier) -> None:
        assert "(" in tier.name, "tier and transport"
        assert ALIGN_BYTES % tier.align_bytes == 0

    def test_what_was_put_is_read_whole_and_in_parts(self, tier: Tier) -> None:
        data = noise(5 * PAGE)
        views = [aligned(data[:PAGE]), aligned(data[PAGE : 3 * PAGE]), aligned(data[3 * PAGE :])]
        assert tier.put(FOLDER, make_name(), views).written_bytes == len(data)
        assert get(tier, make_name()) == data
        with tier.open(FOLDER, make_name()) as reader:
            assert reader.object_bytes == len(data)
            for first in range(5):
                parts = (
                    [aligned(bytes(PAGE)), aligned(bytes((4 - first) * PAGE))] if first < 4 else [aligned(bytes(PAGE))]
                )
                reader.read(parts, first * PAGE)
                assert b"".join(parts) == data[first * PAGE :]

    def test_reading_behind_the_end_is_truncated(self, tier: Tier) -> None:
        put(tier, make_name(), noise(PAGE))
        with tier.open(FOLDER, make_name()) as reader:
            for offset, length in ((0, 2 * PAGE), (PAGE, PAGE), (8 * PAGE, PAGE)):
                with pytest.raises(ChunkTruncated):
                    reader.read([aligned(bytes(length))], offset)

    def test_what_is_absent_is_missing(self, tier: Tier) -> None:
        put(tier, make_name(), noise(PAGE))
        for folder, name in ((FOLDER, make_name(5)), (FOLDER, make_name(4, "b")), ("0" * 32, make_name())):
            assert tier.exists(folder, [name]) == [False]
            assert tier.remove(folder, name) is False
            with pytest.raises(ChunkMissing):
                tier.open(folder, name)
        assert tier.variants("0" * 32, make_name().first, 0, SHARD.text) == []
        assert list(tier.names("0" * 32)) == []

    def test_an_object_is_immutable_unless_it_is_replaced(self, tier: Tier) -> None:
        old, new = noise(PAGE, 1), noise(2 * PAGE, 2)
        assert put(tier, make_name(), old)
        assert not put(tier, make_name(), new)
        assert get(tier, make_name()) == old
        assert put(tier, make_name(), new, replace=True)
        assert get(tier, make_name()) == new

    def test_the_writers_memory_is_its_own_again(self, tier: Tier) -> None:
        view = aligned(noise(PAGE))
        tier.put(FOLDER, make_name(), [view])
        view[:] = bytes(PAGE)
        assert get(tier, make_name()) == noise(PAGE)

    @pytest.mark.parametrize("how", ["remove", "replace"])
    def test_a_reader_keeps_what_it_opened(self, tier: Tier, how: str) -> None:
        put(tier, make_name(), noise(2 * PAGE))
        with tier.open(FOLDER, make_name()) as reader:
            if how == "remove":
                assert tier.remove(FOLDER, make_name())
            else:
                put(tier, make_name(), noise(PAGE, 9), replace=True)
            view = aligned(bytes(2 * PAGE))
            reader.read([view], 0)
            assert view == noise(2 * PAGE)

    def test_a_reader_can_be_closed_twice(self, tier: Tier) -> None:
        put(tier, make_name(), noise(PAGE))
        with tier.open(FOLDER, make_name()) as reader:
            reader.close()

    def test_removing_and_putting_again(self, tier: Tier) -> None:
        for round_ in range(3):
            assert put(tier, make_name(), noise(PAGE, round_))
            assert tier.exists(FOLDER, [make_name()]) == [True]
            assert get(tier, make_name()) == noise(PAGE, round_)
            assert tier.remove(FOLDER, make_name()) is True
            assert tier.remove(FOLDER, make_name()) is False
            assert tier.exists(FOLDER, [make_name()]) == [False]

    def test_namespaces_are_apart(self, tier: Tier) -> None:
        other = NAMESPACE.derive(adapter="x").folder
        put(tier, make_name(), noise(PAGE))
        assert tier.exists(other, [make_name()]) == [False]
        tier.put(other, make_name(), [aligned(noise(PAGE, 1))])
        assert (get(tier, make_name()), get(tier, make_name(), other)) == (noise(PAGE), noise(PAGE, 1))
        assert tier.remove(other, make_name())
        assert get(tier, make_name()) == noise(PAGE)

    def test_exists_answers_in_the_order_of_the_question(self, tier: Tier) -> None:
        names = [make_name(4, str(i)) for i in range(8)]
        for name in names[::3]:
            put(tier, name, noise(PAGE))
        assert tier.exists(FOLDER, iter(names)) == [True, False, False] * 2 + [True, False]
        assert tier.exists(FOLDER, []) == []
        assert sorted(tier.names(FOLDER), key=lambda n: n.text) == sorted(names[::3], key=lambda n: n.text)

    def test_variants_start_at_one_block_and_are_of_one_group_and_shard(self, tier: Tier) -> None:
        other_shard = Shard(0, 1, 3, 0, 30, 30)
        wanted = [variant(n) for n in (2, 3, 5)]
        for name in (*wanted, variant(2, "b"), variant(2, group=1), variant(2, shard=other_shard)):
            put(tier, name, noise(PAGE))
        first = chain_hash(0)[:16]
        assert set(tier.variants(FOLDER, first, 0, SHARD.text)) == set(wanted)
        assert tier.variants(FOLDER, first, 1, SHARD.text) == [variant(2, group=1)]
        assert tier.variants(FOLDER, first, 0, other_shard.text) == [variant(2, shard=other_shard)]
        assert tier.variants(FOLDER, chain_hash(1)[:16], 0, SHARD.text) == []
        assert tier.remove(FOLDER, wanted[0])
        assert set(tier.variants(FOLDER, first, 0, SHARD.text)) == set(wanted[1:])

    def test_variants_are_bounded(self, tier: Tier) -> None:
        for count in range(1, MAX_VARIANTS_EXAMINED + 5):
            put(tier, variant(count), noise(PAGE))
        assert len(tier.variants(FOLDER, chain_hash(0)[:16], 0, SHARD.text)) == MAX_VARIANTS_EXAMINED

    def test_a_manifest_can_be_written_twice(self, tier: Tier) -> None:
        tier.write_manifest(NAMESPACE)
        tier.write_manifest(NAMESPACE)
        put(tier, make_name(), noise(PAGE))
        assert list(tier.names(FOLDER)) == [make_name()]

    def test_capacity_bounds_what_is_held(self, tmp_path: Path) -> None:
        tier = self.make(tmp_path, capacity_bytes=4 * PAGE)
        put(tier, make_name(4, "a"), noise(2 * PAGE))
        put(tier, make_name(4, "b"), noise(2 * PAGE))
        with pytest.raises(TierFull):
            put(tier, make_name(4, "c"), noise(PAGE))
        assert tier.exists(FOLDER, [make_name(4, "c")]) == [False]
        assert not put(tier, make_name(4, "a"), noise(2 * PAGE)), "what is there needs no room"
        assert tier.remove(FOLDER, make_name(4, "a"))
        assert put(tier, make_name(4, "c"), noise(2 * PAGE)), "what was removed left room"
        tier.close()

    def test_capacity_holds_between_threads(self, tmp_path: Path) -> None:
        tier = self.make(tmp_path, capacity_bytes=4 * PAGE)
        start = threading.Barrier(8)

        def store(index: int) -> bool:
            start.wait()
            try:
                return put(tier, make_name(4, str(index)), noise(PAGE))
            except TierFull:
                return False

        with ThreadPoolExecutor(8) as threads:
            assert sum(threads.map(store, range(8))) == 4
        assert len(list(tier.names(FOLDER))) == 4
        tier.close()

    def test_replacing_does_not_count_twice(self, tmp_path: Path) -> None:
        tier = self.make(tmp_path, capacity_bytes=8 * PAGE)
        for round_ in range(10):
            put(tier, make_name(), noise(4 * PAGE, round_), replace=True)
        assert put(tier, make_name(5), noise(4 * PAGE))
        tier.close()

    def test_threads_use_one_tier(self, tier: Tier) -> None:
        names = [make_name(4, str(i)) for i in range(12)]

        def work(seed: int) -> None:
            for step in range(24):
                index = (seed * 5 + step * 7) % len(names)
                put(tier, names[index], noise(2 * PAGE, index), replace=step % 3 == 0)
                try:
                    assert get(tier, names[index]) == noise(2 * PAGE, index)
                except ChunkMissing:
                    pass
                if step % 5 == seed % 5:
                    tier.remove(FOLDER, names[index])
                tier.variants(FOLDER, names[index].first, 0, SHARD.text)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))
        for name in tier.names(FOLDER):
            assert get(tier, name) == noise(2 * PAGE, names.index(name))

    def test_threads_put_the_same_object(self, tier: Tier) -> None:
        start = threading.Barrier(6)

        def store(_: int) -> bool:
            start.wait()
            return put(tier, make_name(), noise(4 * PAGE))

        with ThreadPoolExecutor(6) as threads:
            assert any(threads.map(store, range(6)))
        assert get(tier, make_name()) == noise(4 * PAGE)
        assert list(tier.names(FOLDER)) == [make_name()]

    def test_threads_list_variants_of_one_bucket(self, tier: Tier) -> None:
        wanted = {variant(n) for n in range(1, MAX_VARIANTS_EXAMINED)}
        for name in wanted:
            put(tier, name, noise(PAGE))

        def whole_list(_: int) -> bool:
            return set(tier.variants(FOLDER, chain_hash(0)[:16], 0, SHARD.text)) == wanted

        with ThreadPoolExecutor(6) as threads:
            assert all(threads.map(whole_list, range(120)))

    def test_used_bytes_are_what_is_held(self, tier: Tier) -> None:
        if isinstance(tier, (DirectoryTier, StripedTier)):
            assert tier.used_bytes() is None, "not counted yet"
            assert tier.scan() == 0
        put(tier, make_name(4), noise(3 * PAGE))
        put(tier, make_name(5), noise(PAGE))
        put(tier, make_name(5), noise(2 * PAGE), replace=True)
        assert tier.used_bytes() == 5 * PAGE
        tier.remove(FOLDER, make_name(4))
        assert tier.used_bytes() == 2 * PAGE

    def test_long_chains_have_names_too(self, tier: Tier) -> None:
        hashes = chain(4096)
        widest = Shard(65_534, 1, 65_535, 65_534, 1, 65_535)
        name = ChunkKey(NAMESPACE.digest, hashes[0], hashes[-1], 4096, 65_535, widest, 4095).name
        put(tier, name, noise(PAGE))
        assert get(tier, name) == noise(PAGE)
        assert list(tier.names(FOLDER)) == [name]


class TestMemory(TierContract):
    def make(self, tmp_path: Path, capacity_bytes: int = 0) -> MemoryTier:
        return MemoryTier(capacity_bytes)


class DirectoryContract(TierContract):
    mode: str

    @pytest.fixture(autouse=True)
    def _mode(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        fix_mode(monkeypatch, tmp_path, self.mode)

    def make(self, tmp_path: Path, capacity_bytes: int = 0) -> DirectoryTier:
        return DirectoryTier(tmp_path / "kv", capacity_bytes=capacity_bytes)


class TestDirectoryDirect(DirectoryContract):
    mode = DIRECT


class TestDirectoryDontcache(DirectoryContract):
    mode = DONTCACHE


class TestDirectoryBuffered(DirectoryContract):
    mode = BUFFERED


class TestStriped(TierContract):
    """Three directories; one is lost where a capacity is asked for, of which each directory has its own."""

    @pytest.fixture(autouse=True)
    def _mode(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        fix_mode(monkeypatch, tmp_path, BUFFERED)

    def make(self, tmp_path: Path, capacity_bytes: int = 0) -> StripedTier:
        for number in range(1 if capacity_bytes else 3):
            (tmp_path / str(number)).mkdir()
        tier = open_directories([str(tmp_path / str(number)) for number in range(3)], capacity_bytes=capacity_bytes)
        assert isinstance(tier, StripedTier)
        return tier
