"""Messages that contradict themselves fail alone; probes walk the chain. In a child process and on threads."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import pytest

from memkv_engines.keys import Shard
from memkv_engines.offload.messages import LoadRun, Manifest, Probe, ProbeDone, StoreChunk
from tests.fast.io_samples import (
    load,
    make_run,
    make_store,
    path_of,
    probe,
    store,
)
from tests.fast.samples import NAMESPACE, SHARD, chain
from tests.fast.service_samples import PAGES, POOL, N, Service, flip

# --------------------------------------------------------------------------------------------------- senseless messages

HASHES = chain(N, "malformed")


def run_with(**changes: object) -> LoadRun:
    good = make_run(POOL, HASHES, range(12, 16))
    values = {field: getattr(good, field) for field in LoadRun.__struct_fields__}
    return LoadRun(**{**values, **changes})  # type: ignore[arg-type]


BAD_RUNS = {
    "ragged hashes": run_with(hashes=b"x" * 33),
    "ragged pages": run_with(block_ids=b"x" * 15),
    "fewer pages than blocks": run_with(block_ids=bytes(4)),
    "no pages": run_with(block_ids=b"", hashes=b"", last=bytes(16)),
    "a negative first block": run_with(take_first=-1, block_ids=bytes(20)),
    "a first block beyond the chunk": run_with(take_first=4, block_ids=b"", last=bytes(16)),
    "no chunk": run_with(chunk_count=0),
    "chunks without hashes": run_with(chunk_count=2**40),
    "a named chunk among others": run_with(chunk_count=2, last=bytes(16)),
    "a named chunk with more blocks than it has": run_with(block_count=2, last=bytes(16)),
    "a short name": run_with(last=b"x"),
    "an unknown group": run_with(group=9),
    "a negative group": run_with(group=-1),
    "a short namespace": run_with(namespace=b"x"),
    "a page outside the pool": run_with(block_ids=(b"\xff\xff\xff\x7f" * N)),
    "a negative page": run_with(block_ids=(b"\xff" * 4 * N)),
    "more holes than blocks": run_with(holes=9),
    "negative holes": run_with(holes=-1),
    "a chunk of no size": run_with(block_count=0, last=bytes(16)),
    "a chunk of impossible size": run_with(block_count=2**62, last=bytes(16)),
}


@pytest.mark.parametrize("what", BAD_RUNS)
def test_a_senseless_load_fails_alone(service: Service, what: str) -> None:
    pid = service.client.child_pid
    if what == "a page outside the pool" or what == "a negative page":
        store(service.client, make_store(POOL, HASHES, range(N)))  # else it is only missing
    result = load(service.client, BAD_RUNS[what])
    assert result.good_blocks == (0,)
    assert result.kinds[0]
    service.check_alive(pid)


def chunk_with(**changes: object) -> StoreChunk:
    good = make_store(POOL, HASHES, range(N))
    values = {field: getattr(good, field) for field in StoreChunk.__struct_fields__}
    return StoreChunk(**{**values, **changes})  # type: ignore[arg-type]


BAD_CHUNKS = {
    "nothing": chunk_with(hashes=b"", block_ids=()),
    "ragged hashes": chunk_with(hashes=b"x" * 31),
    "a hash too few": chunk_with(hashes=b"".join(HASHES[:3])),
    "only holes": chunk_with(holes=N, block_ids=()),
    "negative holes": chunk_with(holes=-1, block_ids=tuple(range(N + 1))),
    "an unknown group": chunk_with(group=9),
    "a short namespace": chunk_with(namespace=b"x"),
    "a page outside the pool": chunk_with(block_ids=(0, 1, 2, PAGES)),
    "a negative page": chunk_with(block_ids=(0, 1, 2, -1)),
    "a page beyond all numbers": chunk_with(block_ids=(0, 1, 2, 2**64 - 1)),
    "a negative position": chunk_with(first_position=-1),
    "more blocks than a chunk has": chunk_with(hashes=b"".join(chain(5000)), block_ids=(0,) * 5000),
}


@pytest.mark.parametrize("what", BAD_CHUNKS)
def test_a_senseless_store_fails_alone(service: Service, what: str) -> None:
    pid, hashes = service.client.child_pid, service.prompt()
    good = make_store(POOL, hashes, range(N))
    assert store(service.client, BAD_CHUNKS[what], good) == ("failed", "stored")
    service.check_alive(pid)


def probe_with(number: int = 1, **changes: object) -> Probe:
    values: dict[str, object] = {
        "namespace": NAMESPACE.digest,
        "group": POOL.group,
        "blocks_per_chunk": N,
        "start": 0,
        "need_from": 0,
        "hashes": b"".join(chain(N, "never stored")),
        "shards": (SHARD.as_tuple(),),
    }
    return Probe(number, **{**values, **changes})  # type: ignore[arg-type]


BAD_PROBES = {
    "ragged hashes": probe_with(hashes=b"x" * 31),
    "chunks of no blocks": probe_with(blocks_per_chunk=0),
    "chunks of too many blocks": probe_with(blocks_per_chunk=2**62),
    "no shards": probe_with(shards=()),
    "an impossible shard": probe_with(shards=((1, 1, 1, 0, 1, 1),)),
    "a negative start": probe_with(start=-1),
    "a short namespace": probe_with(namespace=b"x"),
    "no hashes": probe_with(hashes=b""),
}


@pytest.mark.parametrize("what", BAD_PROBES)
def test_a_senseless_probe_finds_nothing(service: Service, what: str) -> None:
    pid = service.client.child_pid
    assert probe(service.client, BAD_PROBES[what]).segments == ()
    service.check_alive(pid)


@pytest.mark.parametrize("fields", [b"", b"{", b"[1]", b"1", b"{}", b"\xff", b'{"format_version":7}', b'{"a":1e999}'])
def test_a_senseless_manifest_is_passed_over(service: Service, fields: bytes) -> None:
    pid = service.client.child_pid
    service.client.submit_manifest(Manifest(fields))
    assert probe(service.client, probe_with(7, hashes=b"")).probe_id == 7
    service.check_alive(pid)


def test_a_manifest_is_written(service: Service) -> None:
    service.client.submit_manifest(Manifest(json.dumps(dict(NAMESPACE.fields)).encode()))
    probe(service.client, probe_with(8, hashes=b""))
    assert (service.root / NAMESPACE.folder / "manifest.json").read_bytes() == NAMESPACE.canonical_json


def test_empty_jobs_are_answered(service: Service) -> None:
    assert load(service.client).kinds == ()
    assert store(service.client) == ()


# --------------------------------------------------------------------------------------------------------------- probes


def found(service: Service, hashes: Sequence[bytes], **changes: object) -> list[tuple[int, int, int, int]]:
    """What a probe finds: position, blocks, holes and blocks taken of each segment."""
    result: ProbeDone = probe(service.client, probe_with(hashes=b"".join(hashes), **changes))
    return [(s.position, s.block_count, s.holes, s.take) for s in result.segments]


def put(service: Service, hashes: Sequence[bytes], holes: int = 0) -> None:
    pages = [i % PAGES for i in range(len(hashes) - holes)]
    assert store(service.client, make_store(POOL, hashes, pages, holes=holes)) == ("stored",)


def test_a_probe_walks_full_chunks_and_a_tail(service: Service) -> None:
    hashes = service.prompt(3 * N + 1)
    assert found(service, hashes) == []
    for start in (0, N):
        put(service, hashes[start : start + N])
    assert found(service, hashes) == [(0, N, 0, N), (N, N, 0, N)]
    assert found(service, hashes[N:], start=N) == [(N, N, 0, N)]
    put(service, hashes[2 * N : 2 * N + 3])
    assert found(service, hashes) == [(0, N, 0, N), (N, N, 0, N), (2 * N, 3, 0, 3)]
    # The prompt ends, or diverges, inside a chunk.
    assert found(service, hashes[:2]) == [(0, N, 0, 2)]
    assert found(service, [*hashes[: N + 1], *chain(5, "else")]) == [(0, N, 0, N), (N, N, 0, 1)]
    assert found(service, chain(N, "else")) == []


def test_of_several_variants_the_one_that_shares_most(service: Service) -> None:
    hashes = service.prompt(N)
    put(service, [hashes[0], *chain(3, "b")])
    put(service, [*hashes[:3], *chain(1, "c")])
    put(service, [*hashes[:2], *chain(2, "d")])
    assert found(service, hashes) == [(0, N, 0, 3)]
    put(service, hashes)
    assert found(service, hashes) == [(0, N, 0, N)]


def test_a_tail_is_followed_by_what_begins_after_it(service: Service) -> None:
    hashes = service.prompt(N + 3)
    put(service, hashes[:2])
    put(service, hashes[2 : 2 + N])
    assert found(service, hashes) == [(0, 2, 0, 2), (2, N, 0, N)]


def test_holes_are_taken_only_where_nothing_is_needed(service: Service) -> None:
    hashes = service.prompt(2 * N)
    put(service, hashes[:N], holes=2)
    put(service, hashes[N:])
    assert found(service, hashes) == []
    assert found(service, hashes, need_from=1) == []
    assert found(service, hashes, need_from=2) == [(0, N, 2, N), (N, N, 0, N)]
    assert found(service, hashes[:2], need_from=2) == []


def test_a_hit_needs_every_shard(service: Service) -> None:
    hashes = service.prompt(N)
    other = Shard(SHARD.head_first, 1, 9, 0, 30, 30)
    put(service, hashes)
    shards = (SHARD.as_tuple(), other.as_tuple())
    assert found(service, hashes, shards=shards) == found(service, hashes, shards=shards[::-1]) == []
    source = path_of(service.root, POOL, hashes)
    os.link(source, source.with_name(source.name.replace(SHARD.text, other.text)))
    assert found(service, hashes, shards=shards) == [(0, N, 0, N)]
    # The first shard's header says how much of a variant is shared.
    assert found(service, hashes[:3], shards=shards) == [(0, N, 0, 3)]


def test_a_variant_with_a_senseless_header_is_not_believed(service: Service) -> None:
    hashes = service.prompt(N)
    put(service, hashes)
    flip(600)(path_of(service.root, POOL, hashes))
    assert found(service, hashes[:3]) == []
