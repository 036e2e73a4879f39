"""Objects of any size at any place of an arena, as LMCache's doors store and load them; no LMCache in here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.chunk.layout import KVLayout, Tile
from memkv_engines.config import Config, load_config
from memkv_engines.errors import ConfigError, LayoutError
from memkv_engines.keys import ChunkName, Namespace
from memkv_engines.limits import KEY_BYTES, MAX_OBJECT_SIZES
from memkv_engines.lmcache import objects
from memkv_engines.lmcache.objects import Arena, ObjectBuffer, ObjectName, ObjectStore
from memkv_engines.offload.messages import Probe
from memkv_engines.offload.probing import ChainWalk
from memkv_engines.tier.memory import MemoryTier
from tests.fast.io_samples import quick_folder
from tests.fast.samples import NAMESPACE, SHARD

ALIGN_BYTES = 4096
ARENA_BYTES = 8 << 20
OTHER = Namespace({"engine": "other"})


def name(number: int, namespace: Namespace = NAMESPACE) -> ObjectName:
    return ObjectName(namespace, hashlib.sha256(number.to_bytes(8, "big")).digest())


class Memory:
    """An arena that the test hands out itself."""

    def __init__(self) -> None:
        self._backing = np.zeros(ARENA_BYTES + ALIGN_BYTES, dtype=np.uint8)
        start = -self._backing.ctypes.data % ALIGN_BYTES
        self.bytes = self._backing[start : start + ARENA_BYTES]
        self.arena = Arena(self.bytes.ctypes.data, ARENA_BYTES, ALIGN_BYTES)

    def buffer(self, own: ObjectName, page: int, size: int, number: int | None = None) -> ObjectBuffer:
        """A buffer at a place, with the content of an object or noise."""
        at = page * ALIGN_BYTES
        seed = 1 << 20 if number is None else number
        self.bytes[at : at + size] = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
        return ObjectBuffer(own, self.arena.base + at, size)

    def holds(self, buffer: ObjectBuffer, number: int) -> bool:
        at = buffer.address - self.arena.base
        wanted = np.random.default_rng(number).integers(0, 256, buffer.size_bytes, dtype=np.uint8)
        return bool((self.bytes[at : at + buffer.size_bytes] == wanted).all())


@pytest.fixture
def quick() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def memory() -> Memory:
    return Memory()


def config_of(folder: Path, environ: dict[str, str] | None = None, **other: object) -> Config:
    keys = {"path": str(folder), "direct_io": "off", "io_process": "off", "io_threads": 2, "staging_bytes": 16 << 20}
    return load_config({**keys, **other}, environ=environ or {})


@pytest.fixture
def store(quick: Path, memory: Memory) -> Iterator[ObjectStore]:
    made = ObjectStore(config_of(quick), memory.arena)
    yield made
    made.close()


# ---------------------------------------------------------------------------------------------------------- places


@given(st.integers(1, 50_000), st.data())
@settings(deadline=None, max_examples=200)
def test_a_place_is_a_page_of_the_group(size: int, data: st.DataObject) -> None:
    arena = Arena(1 << 40, 1 << 16, 64)
    page = data.draw(st.integers(0, (arena.size_bytes - size) // 64))
    address = arena.base + page * 64
    assert arena.place(address, size) == page
    spec = arena.group(size)
    (tile,) = spec.tiles
    layout = KVLayout.plan(spec.num_blocks, [Tile(tile.base, tile.block_stride_bytes, tile.length_bytes, True)])
    assert layout.iovecs([page]).tolist() == [[address, size]]


@pytest.mark.parametrize(("offset", "size"), [(-64, 64), (1, 64), (0, (1 << 16) + 1), ((1 << 16) - 64, 65)])
def test_what_lies_outside_has_no_place(offset: int, size: int) -> None:
    assert Arena(1 << 40, 1 << 16, 64).place((1 << 40) + offset, size) is None


def test_only_in_an_arena_may_blocks_be_longer_than_their_distance() -> None:
    with pytest.raises(LayoutError, match="overlaps"):
        Tile(0, 64, 65)
    with pytest.raises(LayoutError):
        Tile(0, 0, 65, in_arena=True)
    assert KVLayout.plan(2, [Tile(0, 64, 65, in_arena=True)]).block_bytes == 65


# ---------------------------------------------------------------------------------------------------------- transfers


@pytest.mark.parametrize(("io_process", "sizes"), [("off", [100_000, 100_000, 4096, 1]), ("on", [100_000] * 4)])
def test_objects_come_back_to_other_places(io_process: str, sizes: list[int], quick: Path, memory: Memory) -> None:
    first = ObjectStore(config_of(quick, io_process=io_process), memory.arena)
    stored = [memory.buffer(name(i), 30 * i + 1, size, i) for i, size in enumerate(sizes)]
    assert first.store(stored) == ["stored"] * 4 and first.store(stored) == ["present"] * 4
    first.close()
    again = ObjectStore(config_of(quick, io_process=io_process), memory.arena)
    try:
        assert again.find([name(9), *(b.name for b in stored)]) == [False, True, True, True, True]
        wanted = [memory.buffer(name(i), 200 + 30 * (3 - i), size) for i, size in enumerate(sizes)]
        around = memory.bytes.copy()
        assert again.load(wanted) == [True] * 4
        assert all(memory.holds(buffer, i) for i, buffer in enumerate(wanted))
        for buffer in wanted:
            at = buffer.address - memory.arena.base
            around[at : at + buffer.size_bytes] = memory.bytes[at : at + buffer.size_bytes]
        assert (around == memory.bytes).all(), "bytes beside the buffers have changed"
    finally:
        again.close()


def test_namespaces_and_sizes_keep_apart(store: ObjectStore, memory: Memory) -> None:
    assert store.store([memory.buffer(name(1), 0, 5000, 1)]) == ["stored"]
    assert store.find([name(1), name(1, OTHER)]) == [True, False]
    assert store.load([memory.buffer(name(1, OTHER), 8, 5000), memory.buffer(name(1), 16, 4999)]) == [False, False]
    # Of another size under the same name: foreign, and gone with that.
    assert store.counters()["miss_foreign"] == 1


def test_a_damaged_object_is_a_miss_until_it_is_stored_anew(store: ObjectStore, memory: Memory, quick: Path) -> None:
    buffers = [memory.buffer(name(i), 8 * i, 20_000, i) for i in range(3)]
    store.store(buffers)
    wanted = np.random.default_rng(1).integers(0, 256, 20_000, dtype=np.uint8).tobytes()
    (file,) = [file for file in quick.rglob("*.kv") if wanted in file.read_bytes()]
    data = bytearray(file.read_bytes())
    data[data.index(wanted) + 19_999] ^= 1
    file.write_bytes(data)
    fresh = [memory.buffer(name(i), 100 + 8 * i, 20_000) for i in range(3)]
    assert store.load(fresh) == [True, False, True]
    assert store.counters()["miss_damaged"] == 1
    assert store.find([name(0), name(1)]) == [True, False]
    assert store.store(buffers[1:2]) == ["stored"] and store.find([name(1)]) == [True]
    assert store.load(fresh[1:2]) == [True] and memory.holds(fresh[1], 1)


def test_a_failed_object_is_found_again_after_a_while(
    store: ObjectStore, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = memory.buffer(name(1), 0, 5000, 1)
    store.store([buffer])
    store._mark_bad(name(1))
    assert store.find([name(1)]) == [False]
    monkeypatch.setattr(objects, "BAD_OBJECT_S", 0.0)
    store._mark_bad(name(1))
    assert store.find([name(1)]) == [True]


def test_objects_are_protected_as_all_chunks_are(quick: Path, memory: Memory) -> None:
    def protected(digit: str) -> ObjectStore:
        environ = {"MEMKV_ENGINES_PROTECTION_KEY": hashlib.sha256(digit.encode()).hexdigest()}
        return ObjectStore(config_of(quick, environ, protection="encrypt"), memory.arena)

    stored, fresh = memory.buffer(name(1), 0, 5000, 1), memory.buffer(name(1), 8, 5000)
    results = []
    for digit, call in (("1", "store"), ("2", "load"), ("1", "load")):
        one = protected(digit)
        results.append(one.store([stored]) if call == "store" else one.load([fresh]))
        one.close()
        if call == "store":
            (file,) = quick.rglob("*.kv")
            aside = file.read_bytes()
            assert memory.bytes[:5000].tobytes() not in aside
        # The wrong key may have removed it.
        file.write_bytes(aside)
    assert results == [["stored"], [False], [True]] and memory.holds(fresh, 1)


def test_removal(store: ObjectStore, memory: Memory) -> None:
    store.store([memory.buffer(name(i), i, 100, i) for i in range(3)])
    assert store.remove([name(0), name(7), name(2)]) == [True, False, True]
    assert store.find([name(0), name(1), name(2)]) == [False, True, False]


# ---------------------------------------------------------------------------------------------------------- bounds


def test_more_than_staging_holds(quick: Path, memory: Memory) -> None:
    store = ObjectStore(config_of(quick, staging_bytes=8 << 20), memory.arena)
    try:
        size = 300_000
        buffers = [memory.buffer(name(i), 74 * i, size, i) for i in range(27)]
        assert store.store(buffers) == ["stored"] * 27
        memory.bytes[:] = 0
        assert store.load(buffers) == [True] * 27 and all(memory.holds(b, i) for i, b in enumerate(buffers))
    finally:
        store.close()


def test_sizes_are_bounded(store: ObjectStore, memory: Memory) -> None:
    buffers = [memory.buffer(name(i), i, 100 + i, i) for i in range(MAX_OBJECT_SIZES + 1)]
    assert store.store(buffers) == ["stored"] * MAX_OBJECT_SIZES + ["failed"]
    assert store.load(buffers)[-1] is False


def test_buffers_that_lie_elsewhere_are_left_alone(store: ObjectStore, memory: Memory) -> None:
    elsewhere = np.zeros(5000, dtype=np.uint8)
    stranger = ObjectBuffer(name(1), elsewhere.ctypes.data, 5000)
    assert store.store([stranger, memory.buffer(name(2), 0, 5000, 2)]) == ["failed", "stored"]
    store.store([memory.buffer(name(1), 8, 5000, 1)])
    assert store.load([stranger]) == [False] and not elsewhere.any()


def test_switched_off(quick: Path, memory: Memory) -> None:
    store = ObjectStore(config_of(quick), memory.arena)
    buffer = memory.buffer(name(1), 0, 5000, 1)
    store.store([buffer])
    store.close()
    for keys, found in (({"load": "off"}, [False]), ({"store": "off"}, [True])):
        one = ObjectStore(config_of(quick, **keys), memory.arena)
        assert one.find([name(1)]) == found and one.load([buffer]) == found
        assert one.store([memory.buffer(name(2), 8, 5000, 2)]) == (["stored"] if "load" in keys else ["shed"])
        one.close()


def test_after_the_end_everything_is_a_miss(quick: Path, memory: Memory) -> None:
    store = ObjectStore(config_of(quick), memory.arena)
    buffer = memory.buffer(name(1), 0, 5000, 1)
    store.store([buffer])
    store.close()
    store.close()
    assert store.find([name(1)]) == [False] and store.load([buffer]) == [False] and store.store([buffer]) == ["failed"]
    assert not store.is_up


def test_a_directory_that_cannot_be_used_is_refused(quick: Path, memory: Memory) -> None:
    (quick / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        ObjectStore(config_of(quick / "file"), memory.arena)


def test_lmcache_has_its_own_level_of_memory(quick: Path, memory: Memory) -> None:
    with pytest.raises(ConfigError, match=r"memory_bytes=1048576: .*--l1-size-gb"):
        ObjectStore(config_of(quick, memory_bytes=1 << 20), memory.arena)


# ---------------------------------------------------------------------------------------------------------- look-ups


def test_an_exact_probe_lists_nothing() -> None:
    tier = MemoryTier()
    hashes = [name(i).digest for i in range(5)]
    for i in (1, 3):
        own = ChunkName(hashes[i][:KEY_BYTES], hashes[i][:KEY_BYTES], 1, 0, 0, SHARD.text)
        tier.put(NAMESPACE.folder, own, [memoryview(b"x")])
    listed: list[object] = []
    tier.variants = lambda *asked: listed.append(asked) or []  # type: ignore[method-assign]
    probe = Probe(1, NAMESPACE.digest, 0, 1, 0, 0, b"".join(hashes), (SHARD.as_tuple(),), survey=True, exact=True)
    assert [segment.position for segment in ChainWalk(probe, tier).run()] == [1, 3]
    assert not listed
