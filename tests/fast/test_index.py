"""The index answers as a dictionary would, as long as it is not full; and it forgets in time."""

from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.limits import INDEX_WAYS, KEY_BYTES
from memkv_engines.offload.index import ChunkIndex
from tests.fast.samples import chain, chain_hash

HASHES = chain(40, "index")


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


keys = st.tuples(st.integers(0, 11), st.integers(1, 3), st.integers(0, 2))
steps = st.one_of(
    st.tuples(st.just("insert"), st.lists(st.tuples(keys, st.integers(0, 4095)), max_size=6)),
    st.tuples(st.just("remove"), keys),
    st.tuples(st.just("wait"), st.integers(0, 30)),
    st.tuples(st.just("sweep"), st.none()),
    st.tuples(st.just("clear"), st.none()),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(steps, max_size=25))
def test_it_answers_as_a_dictionary_does(script: list[tuple[str, object]]) -> None:
    clock = Clock()
    index, model = ChunkIndex(4096, 60, clock), {}
    for action, what in script:
        if action == "insert":
            assert isinstance(what, list)
            for group in range(3):
                mine = [(k, holes) for k, holes in what if k[2] == group]
                index.insert([HASHES[k[0]] for k, _ in mine], [k[1] for k, _ in mine], [h for _, h in mine], group)
            model.update({key: (holes, clock.now) for key, holes in what})
        elif action == "remove":
            assert isinstance(what, tuple)
            index.remove(HASHES[what[0]], what[1], what[2])
            model.pop(what, None)
        elif action == "wait":
            assert isinstance(what, int)
            clock.now += what
        elif action == "sweep":
            for _ in range(3):
                index.sweep()
        else:
            index.clear()
            model.clear()
        for number in range(12):
            for count in range(1, 4):
                for group in range(3):
                    holes, since = model.get((number, count, group), (None, 0.0))
                    known = index.holes_of(HASHES[number], count, group)
                    age = clock.now - since
                    assert known == holes if age < 59 else known in (holes, None) if age < 62 else known is None


@settings(max_examples=80, deadline=None)
@given(st.sets(st.integers(0, 39)), st.integers(1, 5), st.integers(0, 39))
def test_leading_chunks_are_those_before_the_first_unknown(known: set[int], n: int, start: int) -> None:
    index = ChunkIndex(1024, 60)
    index.insert([HASHES[k] for k in known], [n] * len(known), [0] * len(known), 0)
    expected = 0
    while start + (expected + 1) * n <= len(HASHES) and start + (expected + 1) * n - 1 in known:
        expected += 1
    assert index.leading_chunks(HASHES, start, n, 0) == expected
    assert index.leading_chunks(HASHES, start, n, 1) == 0
    assert index.leading_chunks(HASHES, start, n + 1, 0) == 0


def test_a_prompt_shorter_than_a_chunk_has_none() -> None:
    index = ChunkIndex(1024, 60)
    index.insert([HASHES[3]], [4], [0], 0)
    assert [index.leading_chunks(HASHES[:i], 0, 4, 0) for i in (0, 3, 4)] == [0, 0, 1]


def test_only_half_of_a_hash_is_kept() -> None:
    index = ChunkIndex(1024, 60)
    index.insert([HASHES[0][:KEY_BYTES]], [1], [7], 0)
    assert index.holes_of(HASHES[0], 1, 0) == index.holes_of(HASHES[0][:KEY_BYTES] + bytes(16), 1, 0) == 7
    # Eight bytes are compared, the others choose the bucket: 2**-64 is chance enough, and the header has the last word.
    for byte in range(KEY_BYTES // 2, KEY_BYTES):
        other = bytearray(HASHES[0])
        other[byte] ^= 0x80
        assert index.holes_of(bytes(other), 1, 0) is None


def test_a_full_bucket_forgets_what_expires_first() -> None:
    clock = Clock()
    index = ChunkIndex(8, 60, clock)
    low = bytes(8)  # the same bucket for all
    hashes = [low + os.urandom(24) for _ in range(INDEX_WAYS + 3)]
    for number, one in enumerate(hashes):
        clock.now = 1000 + 2 * number
        index.insert([one], [1], [number], 0)
    known = [index.holes_of(one, 1, 0) for one in hashes]
    assert known == [None] * 3 + list(range(3, INDEX_WAYS + 3))
    # Told again, an entry is renewed and not doubled.
    for _ in range(20):
        index.insert([hashes[5]], [1], [1], 0)
    assert len(index) == INDEX_WAYS
    assert index.holes_of(hashes[5], 1, 0) == 1


def test_many_of_one_bucket_at_once_do_not_overwrite_each_other() -> None:
    index = ChunkIndex(8, 60)
    hashes = [bytes(8) + os.urandom(24) for _ in range(INDEX_WAYS)]
    index.insert(hashes, [1] * INDEX_WAYS, [0] * INDEX_WAYS, 0)
    assert all(index.holes_of(one, 1, 0) == 0 for one in hashes)


def test_it_holds_what_it_was_made_for() -> None:
    index = ChunkIndex(10_000, 60)
    noise = os.urandom(32 * 10_000)
    hashes = [noise[i : i + 32] for i in range(0, len(noise), 32)]
    index.insert(hashes, [2] * len(hashes), [0] * len(hashes), 0)
    assert len(index) > 9_800
    assert sum(index.holes_of(one, 2, 0) == 0 for one in hashes) == len(index)


def test_sweeping_forgets_all_that_expired_and_nothing_else() -> None:
    clock = Clock()
    index = ChunkIndex(10_000, 60, clock)
    old, new = chain(500, "old"), chain(500, "new")
    index.insert(old, [1] * 500, [0] * 500, 0)
    clock.now += 40
    index.insert(new, [1] * 500, [0] * 500, 0)
    clock.now += 30
    for _ in range(64):
        index.sweep()
    assert len(index) == 500
    assert index.leading_chunks(new, 0, 1, 0) == 500
    assert index.leading_chunks(old, 0, 1, 0) == 0
    index.remove(chain_hash(0, "new"), 1, 0)
    index.remove(chain_hash(0, "unknown"), 1, 0)
    assert index.leading_chunks(new, 0, 1, 0) == 0
    assert index.leading_chunks(new, 1, 1, 0) == 499
