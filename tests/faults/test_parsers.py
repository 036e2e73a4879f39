"""Bytes from elsewhere: messages, usage files and chunk files that were changed anywhere fail as data, not as code.

Headers alone and names are fuzzed in `tests/fast/test_codec.py` and `test_keys.py`.
"""

from __future__ import annotations

import queue
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memkv_engines.errors import IoServiceError, TierError
from memkv_engines.limits import HASH_BYTES
from memkv_engines.offload.messages import (
    InMemory,
    Load,
    LoadDone,
    LoadRun,
    Probe,
    ProbeDone,
    Reply,
    Segment,
    Setup,
    Store,
    StoreChunk,
    StoreDone,
    decode_reply,
    decode_request,
    encode,
)
from memkv_engines.offload.pages import MappedPages
from memkv_engines.offload.service import IoService
from memkv_engines.tier import directory
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.transports.posix import BUFFERED, ModeReport
from tests.fast.io_samples import BLOCKS_PER_CHUNK, block_outermost, make_run, make_store, path_of
from tests.fast.samples import NAMESPACE, SHARD, aligned, chain, make_name

N = BLOCKS_PER_CHUNK
POOL = block_outermost(0, 3 * N, 4096)
HASHES = chain(N, "parsers")
mutations = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6)

CORPUS = [
    encode(message)
    for message in (
        Setup("/kv", "auto", 0, False, 8, 1 << 28, (POOL.spec(),), 7, 9, b"c" * 16, "lru"),
        Store(3, (make_store(POOL, HASHES, range(N)),)),
        Load(4, (make_run(POOL, HASHES, range(N)),)),
        Probe(5, NAMESPACE.digest, 0, N, 0, 0, b"".join(HASHES), (SHARD.as_tuple(),), True, 0, 8, True),
    )
]
REPLIES = [
    encode(message)
    for message in (
        LoadDone(4, (N,), ("",), 1, 4096, 12),
        StoreDone(3, ("stored",), 4096, 4096),
        InMemory((b"c" * 18,), (b"w" * 18,)),
        ProbeDone(5, (Segment(0, HASHES[-1][:16], N, 0, N, b"".join(HASHES)),), 3),
    )
]


def mutated(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    body = bytearray(data)
    for position, value in changes:
        body[position % len(body)] = value
    return bytes(body)


@given(st.sampled_from(CORPUS + REPLIES), mutations, st.integers(0, 1 << 20))
@settings(deadline=None, max_examples=400)
def test_changed_messages_are_refused_or_are_messages(data: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    for body in (mutated(data, changes), data[: cut % len(data)], data + data[:3]):
        for decode in (decode_request, decode_reply):
            try:
                message = decode(body)
            except IoServiceError:
                continue
            assert decode(encode(message)) == message


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=300)
def test_random_bytes_are_no_message(data: bytes) -> None:
    for decode in (decode_request, decode_reply):
        with pytest.raises(IoServiceError):
            decode(data)


numbers = st.one_of(st.integers(-3, 9), st.sampled_from([-(2**31), 2**31, 2**62, -(2**62)]))
digests = st.one_of(st.just(NAMESPACE.digest), st.binary(max_size=40))
hashes = st.one_of(st.integers(0, N).map(lambda count: b"".join(HASHES[:count])), st.binary(max_size=3 * HASH_BYTES))
block_ids = st.lists(st.integers(-2, 3 * N + 1), max_size=N + 1)
runs = st.builds(
    LoadRun,
    digests,
    st.integers(-1, 1),
    numbers,
    numbers,
    numbers,
    st.one_of(st.just(b""), st.just(HASHES[-1][:16]), st.binary(max_size=17)),
    numbers,
    hashes,
    st.one_of(
        block_ids.map(lambda ids: b"".join(i.to_bytes(4, "little", signed=True) for i in ids)), st.binary(max_size=17)
    ),
)
stores = st.builds(
    StoreChunk, digests, st.integers(-1, 1), numbers, numbers, hashes, block_ids.map(tuple), st.booleans()
)
probes = st.builds(
    Probe,
    st.integers(0, 1 << 40),
    digests,
    numbers,
    numbers,
    numbers,
    numbers,
    hashes,
    st.lists(st.tuples(*[st.integers(-1, 4)] * 6), max_size=2).map(tuple),
    st.booleans(),
    numbers,
    numbers,
    st.booleans(),
)


def quick_tier(folder: Path, **options: object) -> DirectoryTier:
    with mock.patch.object(directory, "probe_modes", lambda *_: ModeReport(BUFFERED, "not probed", {}, {})):
        return DirectoryTier(folder, **options)  # type: ignore[arg-type]


@given(st.lists(st.one_of(runs, stores, probes), min_size=1, max_size=8))
@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
def test_a_service_answers_any_message_once_and_lives(messages: list[LoadRun | StoreChunk | Probe]) -> None:
    replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
    setup = Setup("", "off", 0, False, 1, 8 << 20, (POOL.spec(),))
    before = POOL.memory.copy()
    with tempfile.TemporaryDirectory() as folder:
        service = IoService(setup, quick_tier(Path(folder)), MappedPages(), replies.put)
        service.start()
        for number, message in enumerate(messages):
            if isinstance(message, LoadRun):
                service.submit(Load(number, (message,)))
            elif isinstance(message, StoreChunk):
                service.submit(Store(number, (message,)))
            else:
                service.submit(message.numbered(number))
        # It still works: what is stored now is found again.
        service.submit(Store(1000, (make_store(POOL, HASHES, range(N), replace=True),)))
        answered = take(replies, len(messages) + 1)
        service.submit(Load(1001, (make_run(POOL, HASHES, range(N)),)))
        (last,) = take(replies, 1).values()
        service.stop(20)
    assert set(answered) == {*range(len(messages)), 1000}
    assert isinstance(last, LoadDone) and last.kinds == ("",)
    # Nothing outside the pool's pages was written, and in here nothing but what was read from here.
    assert (POOL.memory[:4096] == before[:4096]).all() and (POOL.memory[-4096:] == before[-4096:]).all()


def take(replies: queue.SimpleQueue[Reply], count: int) -> dict[int, Reply]:
    found: dict[int, Reply] = {}
    while len(found) < count:
        reply = replies.get(timeout=20)
        if isinstance(reply, (LoadDone, StoreDone, ProbeDone)):
            number = reply.probe_id if isinstance(reply, ProbeDone) else reply.job_id
            assert number not in found, "answered twice"
            found[number] = reply
    return found


@given(st.binary(max_size=64))
@settings(deadline=None, max_examples=60)
def test_any_usage_file_is_survived(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, ".usage").write_bytes(data)
        tier = quick_tier(Path(folder), capacity_bytes=1 << 20)
        name = make_name()
        try:
            tier.put(NAMESPACE.folder, name, [aligned(bytes(4096))])
        except TierError:
            pass  # It claims to be full.
        tier.scan()
        assert tier.used_bytes() in (0, 4096)
        tier.put(NAMESPACE.folder, name, [aligned(bytes(4096))], replace=True)
        assert tier.used_bytes() == 4096
        tier.close()


@given(mutations, st.one_of(st.none(), st.integers(0, 1 << 20)))
@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
def test_a_chunk_file_that_was_changed_anywhere(changes: list[tuple[int, int]], cut: int | None) -> None:
    replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
    setup = Setup("", "off", 0, False, 1, 8 << 20, (POOL.spec(),))
    with tempfile.TemporaryDirectory() as folder:
        service = IoService(setup, quick_tier(Path(folder)), MappedPages(), replies.put)
        service.start()
        service.submit(Store(1, (make_store(POOL, HASHES, range(N)),)))
        take(replies, 1)
        path = path_of(Path(folder), POOL, HASHES)
        data = mutated(path.read_bytes(), changes)
        path.write_bytes(data if cut is None else data[: cut % len(data)])
        expected = [POOL.block(page) for page in range(N)]
        own = [POOL.block(2 * N + page) for page in range(N)]
        probe = Probe(2, NAMESPACE.digest, 0, N, 0, 0, b"".join(HASHES[:2]), (SHARD.as_tuple(),))
        service.submit(probe)
        take(replies, 1)
        service.submit(Load(3, (make_run(POOL, HASHES, range(2 * N, 3 * N)),)))
        (done,) = take(replies, 1).values()
        service.stop(20)
    assert isinstance(done, LoadDone)
    good = done.good_blocks[0]
    found = [POOL.block(2 * N + page) for page in range(N)]
    assert found == expected[:good] + own[good:]
