"""Chunks that start anywhere: cutting batches, walking the chain, and what a walk finds against a perfect memory."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.chunk.codec import build_header
from memkv_engines.chunk.layout import align_up, choose_blocks_per_chunk
from memkv_engines.keys import ChunkKey
from memkv_engines.limits import MAX_CHUNK_TARGET_BYTES, MIB, MIN_CHUNK_TARGET_BYTES
from memkv_engines.offload import batches
from memkv_engines.offload.blocking import BlockingClient
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.messages import Probe, Segment
from memkv_engines.offload.probing import ChainWalk
from memkv_engines.tier.memory import MemoryTier
from tests.fast.io_samples import BLOCK_TOKENS, block_outermost, quick_folder, setup_for, until
from tests.fast.samples import NAMESPACE, SHARD, chain

FULL, BLOCK_BYTES = 3, 4096
LARGEST = 5

# ------------------------------------------------------------------------------------------------------------ cutting


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 8 * MIB))
def test_a_batch_is_cut_without_small_neighbours(blocks: int, full: int, block_bytes: int) -> None:
    sizes = batches.chunk_sizes(blocks, full, block_bytes)
    assert sum(sizes) == blocks and all(size > 0 for size in sizes)
    assert all(size == full for size in sizes[:-1])
    assert max(sizes) <= batches.largest_chunk_blocks(full, block_bytes)
    small = [s for s in sizes if s * align_up(block_bytes) < MIN_CHUNK_TARGET_BYTES]
    if full * align_up(block_bytes) >= MIN_CHUNK_TARGET_BYTES:
        assert not small or len(sizes) == 1, "a small object beside a neighbour"


@given(st.integers(1, 16 * MIB))
def test_no_chunk_outgrows_the_limit(block_bytes: int) -> None:
    full = choose_blocks_per_chunk(block_bytes, 4 * MIB)
    largest = batches.largest_chunk_blocks(full, block_bytes) * align_up(block_bytes)
    assert largest <= max(MAX_CHUNK_TARGET_BYTES, align_up(block_bytes))


def test_a_conversation_of_97_pages() -> None:
    page = 1_474_560
    assert batches.chunk_sizes(97, 3, page) == [3] * 31 + [4]
    assert batches.chunk_sizes(98, 3, page) == [3] * 32 + [2], "2 pages are more than 2 MiB"
    assert batches.chunk_sizes(1, 3, page) == [1]


def test_what_is_missing() -> None:
    segments = [Segment(0, b"", 3, 0, 3), Segment(5, b"", 4, 0, 2)]
    assert batches.covered(segments, 1, 9) == [True, True, False, False, True, True, False, False]
    assert batches.missing_runs([True, False, False, True, False]) == [(1, 3), (4, 5)]
    assert batches.missing_runs([True]) == []
    assert batches.missing_runs([False] * 3) == [(0, 3)]


# ------------------------------------------------------------------------------------------------------------ walking


def walk(tier: MemoryTier, hashes: list[bytes], wanted: int, *, survey: bool = False) -> list[Segment]:
    probe = Probe(
        1,
        NAMESPACE.digest,
        0,
        FULL,
        0,
        0,
        b"".join(hashes),
        (SHARD.as_tuple(),),
        anywhere=True,
        wanted=wanted,
        largest_chunk=LARGEST,
        survey=survey,
    )
    return ChainWalk(probe, tier).run()


def put(tier: MemoryTier, hashes: list[bytes]) -> None:
    key = ChunkKey(NAMESPACE.digest, hashes[0], hashes[-1], len(hashes), 0, SHARD)
    payload = memoryview(bytes(len(hashes) * BLOCK_BYTES))
    header = build_header(key, BLOCK_TOKENS, BLOCK_BYTES, hashes, 0, payload)
    tier.put(NAMESPACE.folder, key.name, [memoryview(header.encode()), payload], replace=True)


def test_a_prefetch_that_starts_inside_a_chunk() -> None:
    tier, hashes = MemoryTier(), chain(9)
    put(tier, hashes[:5])
    put(tier, hashes[5:8])
    segments = walk(tier, hashes, 3)
    assert [(s.position, s.take) for s in segments] == [(0, 5), (5, 3)]
    runs = batches.load_runs(NAMESPACE.digest, 0, hashes, 3, segments, [7, 8, 9, 10, 11, 12])
    assert [(first, run.take_first, len(run.block_ids) // 4) for first, run in runs] == [(0, 3, 2), (2, 0, 3)]


def test_a_node_that_starts_where_another_prompt_went_on() -> None:
    """A chunk of one prompt is shared up to block 2; what follows was stored by another node from there on."""
    tier, one = MemoryTier(), chain(6, "one")
    two = [*one[:2], *chain(5, "two")]
    put(tier, one[:3])
    put(tier, two[2:6])
    assert [(s.position, s.take) for s in walk(tier, two, 0)] == [(0, 2), (2, 4)]


def test_a_gap_ends_a_prefix_but_not_a_survey() -> None:
    tier, hashes = MemoryTier(), chain(12)
    put(tier, hashes[:3])
    put(tier, hashes[6:11])
    assert [(s.position, s.take) for s in walk(tier, hashes, 0)] == [(0, 3)]
    assert [(s.position, s.take) for s in walk(tier, hashes, 0, survey=True)] == [(0, 3), (6, 5)]


Run = tuple[int, int]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 14), st.integers(1, LARGEST)), max_size=8),
    st.lists(st.tuples(st.integers(6, 14), st.integers(1, LARGEST)), max_size=4),
    st.integers(0, 12),
)
def test_a_walk_finds_what_is_there(runs: list[Run], of_another: list[Run], wanted: int) -> None:
    """Two prompts share blocks 0-7; a block counts as stored when a chunk of the prompt, begun near enough, has it."""
    mine = chain(16)
    other = [*mine[:8], *chain(8, "other")]
    tier = MemoryTier()
    stored: set[bytes] = set()
    for prompt, cuts in ((mine, runs), (other, of_another)):
        for start, length in cuts:
            put(tier, prompt[start : start + length])
            if start >= wanted - (LARGEST - 1):
                stored |= set(prompt[start : start + length])
    expected = [h in stored for h in mine[wanted:]]
    assert batches.covered(walk(tier, mine, wanted, survey=True), wanted, 16) == expected
    found = batches.covered(walk(tier, mine, wanted), wanted, 16)
    leading = expected.index(False) if False in expected else len(expected)
    assert (found.index(False) if False in found else len(found)) == leading


# ------------------------------------------------------------------------------------------------- callers that wait


@pytest.fixture
def client() -> Iterator[BlockingClient]:
    with quick_folder() as folder:
        yield from _client(folder)


POOL = block_outermost(0, 64, BLOCK_BYTES)


def _client(folder: Path) -> Iterator[BlockingClient]:
    made = BlockingClient(IoClient(setup_for(folder, [POOL]), load_timeout_ms=5_000))
    made.start()
    yield made
    made.close()


def probe_of(hashes: list[bytes]) -> Probe:
    return Probe(0, NAMESPACE.digest, 0, 4, 0, 0, b"".join(hashes), (SHARD.as_tuple(),), anywhere=True, largest_chunk=4)


def test_callers_on_many_threads_get_their_own_answers(client: BlockingClient) -> None:
    errors: list[BaseException] = []

    def converse(number: int) -> None:
        try:
            hashes, pages = chain(4, f"prompt {number}"), list(range(4 * number, 4 * number + 4))
            assert client.probe(probe_of(hashes), 5) == ()
            sizes = (4, BLOCK_BYTES)
            (pair,) = batches.store_chunks(NAMESPACE.digest, 0, hashes, pages, [(0, 4)], 0, sizes)
            assert client.store([pair[1]]).outcomes == ("stored",)
            segments = client.probe(probe_of(hashes), 5)
            assert [(s.position, s.take) for s in segments] == [(0, 4)]
            target = [32 + page for page in pages]
            runs = batches.load_runs(NAMESPACE.digest, 0, hashes, 0, segments, target)
            assert client.load([run for _, run in runs]).good_blocks == (4,)
            assert [POOL.block(t) for t in target] == [POOL.block(p) for p in pages]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=converse, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not errors and not any(thread.is_alive() for thread in threads)
    assert client.counters()["load_jobs"] == 8


def test_a_service_that_dies_answers_everyone(client: BlockingClient) -> None:
    pid = client._client.child_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    answers: list[object] = []
    hashes = chain(4)
    (pair,) = batches.store_chunks(NAMESPACE.digest, 0, hashes, [0, 1, 2, 3], [(0, 4)], 0, (4, BLOCK_BYTES))
    runs = batches.load_runs(NAMESPACE.digest, 0, hashes, 0, [Segment(0, hashes[3][:16], 4, 0, 4)], [8, 9, 10, 11])
    calls = [
        threading.Thread(target=lambda: answers.append(client.store([pair[1]]).outcomes)),
        threading.Thread(target=lambda: answers.append(client.load([run for _, run in runs]).kinds)),
        threading.Thread(target=lambda: answers.append(client.probe(probe_of(hashes), 0.2))),
    ]
    for call in calls:
        call.start()
    calls[2].join(5)
    assert answers == [()], "a look-up waits for its own deadline only"
    os.kill(pid, signal.SIGKILL)
    for call in calls:
        call.join(10)
    assert set(answers) == {(), ("failed",), ("io_service",)}
    # It comes back, and serves again.
    until(lambda: client.store([pair[1]]).outcomes == ("stored",), 20)


def test_a_look_up_while_the_service_is_down_is_a_miss_at_once(client: BlockingClient) -> None:
    with client._lock:
        client._client.abandon("a test")
    started = time.monotonic()
    assert client.probe(probe_of(chain(4)), 60) == ()
    assert time.monotonic() - started < 20, "it waited for a service that never got the question"
    until(lambda: client._client.mode == "process", 20)


def test_a_store_that_hangs_ends(client: BlockingClient) -> None:
    """Its pages are the engine's own again afterwards: the service is gone."""
    pid = client._client.child_pid
    assert pid is not None
    client._store_timeout_s = 0.3
    os.kill(pid, signal.SIGSTOP)
    (pair,) = batches.store_chunks(NAMESPACE.digest, 0, chain(4), [0, 1, 2, 3], [(0, 4)], 0, (4, BLOCK_BYTES))
    assert client.store([pair[1]]).outcomes == ("failed",)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    client._store_timeout_s = 20
    until(lambda: client.store([pair[1]]).outcomes == ("stored",), 20)


def test_closing_answers_those_who_wait(client: BlockingClient) -> None:
    os.kill(client._client.child_pid or 0, signal.SIGSTOP)
    answers: list[object] = []
    waiting = threading.Thread(target=lambda: answers.append(client.probe(probe_of(chain(4)), 60)))
    waiting.start()
    until(lambda: client._wanted)
    os.kill(client._client.child_pid or 0, signal.SIGKILL)
    client.close()
    waiting.join(10)
    assert answers == [()]
