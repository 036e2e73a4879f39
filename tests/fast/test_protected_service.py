"""Protected chunks through the I/O service: pages to chunks and back, beside somebody who writes without the key."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from memkv_engines.chunk.codec import Geometry, build_header, decode_header, read_header
from memkv_engines.chunk.protection import Protection
from memkv_engines.offload.messages import Probe, ProtectionSpec
from memkv_engines.offload.probing import ChainWalk
from memkv_engines.tier.memory import MemoryTier
from tests.fast.io_samples import (
    JobClient,
    block_outermost,
    make_run,
    make_store,
    path_of,
    quick_folder,
    setup_for,
    started,
    started_device,
    store,
)
from tests.fast.protected_samples import KEY, OTHER_KEY
from tests.fast.samples import NAMESPACE, SHARD, aligned, chain, chain_hash, make_chunk, make_key, noise
from tests.fast.service_samples import GEOMETRY, POOL, POOLS, N, Service, check_load, flip, rewrite, signed

ENCRYPTED, AUTHENTICATED = ProtectionSpec(True, KEY), ProtectionSpec(False, KEY)
STRANGER = ProtectionSpec(True, OTHER_KEY)
WAYS = [("on", ENCRYPTED), ("off", AUTHENTICATED), ("device", ENCRYPTED)]


def started_in(mode: str, setup: Any) -> JobClient:
    return started_device(setup)[0] if mode == "device" else started(setup, mode)


@pytest.fixture(scope="module", params=WAYS, ids=["process, encrypted", "threads, authenticated", "device, encrypted"])
def protected(request: pytest.FixtureRequest) -> Iterator[tuple[Service, Protection]]:
    mode, spec = request.param
    with quick_folder() as root:
        client = started_in(mode, setup_for(root, list(POOLS.values()), protection=spec))
        yield Service(client, root, mode), Protection(spec.key, encrypt=spec.encrypt)
        client.close()


@pytest.mark.parametrize("layout", POOLS)
def test_any_blocks_come_back_into_other_pages(protected: tuple[Service, Protection], layout: str) -> None:
    service, guardian = protected
    pool, hashes = POOLS[layout], service.prompt(2 * N)
    plain = [pool.block(page) for page in range(2 * N)]
    chunks = [make_store(pool, hashes[at : at + N], range(at, at + N)) for at in (0, N)]
    assert store(service.client, *chunks) == ("stored", "stored")
    run = make_run(pool, hashes, range(8, 16), chunk_count=2)
    check_load(service.client, pool, run, {8 + i: i for i in range(8)})
    for first in range(N):
        run = make_run(pool, hashes[: first + 1], [20], take_first=first, last=hashes[N - 1])
        check_load(service.client, pool, run, {20: first})
    data = path_of(service.root, pool, hashes[:N]).read_bytes()
    header = decode_header(data, guardian)
    g = header.geometry
    stored = [data[g.block_offset(i) : g.block_offset(i) + g.block_bytes] for i in range(N)]
    assert (stored == plain[:N]) != guardian.encrypt
    if guardian.encrypt:
        assert not any(block[at : at + 64] in data for block in plain for at in (0, 512, len(block) - 64))
    padding = g.block_stride_bytes - g.block_bytes
    assert all(data[g.block_offset(i + 1) - padding : g.block_offset(i + 1)] == bytes(padding) for i in range(N))


def test_holes_come_back_as_holes(protected: tuple[Service, Protection]) -> None:
    service, _ = protected
    hashes = service.prompt()
    store(service.client, make_store(POOL, hashes, [2, 3], holes=2))
    run = make_run(POOL, hashes, [10, 11], take_first=2, holes=2)
    check_load(service.client, POOL, run, {10: 2, 11: 3})
    run = make_run(POOL, hashes, [12, 13, 14], take_first=1, holes=2)
    check_load(service.client, POOL, run, {}, kind="damaged", good=0)


# ------------------------------------------------------------------------------------------------- without the key


def plant(path: Path, hashes: list[bytes], guardian: Protection | None) -> None:
    """What somebody would write who knows everything but the key: all of it valid, but the tokens' values."""
    payload = bytearray(noise(GEOMETRY.payload_bytes, 99))
    key = make_key(N)
    key = type(key)(NAMESPACE.digest, hashes[0], hashes[-1], N, POOL.group, SHARD)
    header = build_header(key, 16, POOL.block_bytes, hashes, 0, memoryview(payload), guardian)
    path.write_bytes(header.encode() + payload)


def forge_payload(path: Path) -> None:
    """Other bytes, and digests that fit them."""

    def change(data: bytearray) -> bytearray:
        at = GEOMETRY.block_offset(1)
        data[at] ^= 1
        digest = (
            build_header(make_key(1), 16, POOL.block_bytes, chain(1), 0, memoryview(bytes(GEOMETRY.block_stride_bytes)))
            .blocks[0]
            .digest
        )
        data[512 + 96 + 32 : 512 + 96 + 48] = digest
        return signed(data)

    rewrite(path, change)


def cut_tag(path: Path) -> None:
    def change(data: bytearray) -> bytearray:
        data[512 + 64 + 8 : 512 + 80] = bytes(8)
        return signed(data)

    rewrite(path, change)


PLANTED: dict[str, tuple[Callable[[Path, list[bytes], Protection], None], str, bool]] = {
    "no MAC": (lambda path, hashes, _: plant(path, hashes, None), "unauthenticated", True),
    "another key": (
        lambda path, hashes, own: plant(path, hashes, Protection(OTHER_KEY, encrypt=own.encrypt)),
        "other_key",
        False,
    ),
    "the other way": (
        lambda path, hashes, own: plant(path, hashes, Protection(KEY, encrypt=not own.encrypt)),
        "other_key",
        False,
    ),
    "a forged digest": (lambda path, *_: forge_payload(path), "forged", True),
    "half a tag": (lambda path, *_: cut_tag(path), "forged", True),
    "a flipped bit": (lambda path, *_: flip(GEOMETRY.block_offset(0) + 7)(path), "damaged", True),
    "a bit of the MAC": (lambda path, *_: flip(470)(path), "damaged", True),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_was_written_without_the_key_is_a_counted_miss(protected: tuple[Service, Protection], what: str) -> None:
    service, guardian = protected
    change, kind, removed = PLANTED[what]
    hashes = service.prompt()
    store(service.client, make_store(POOL, hashes, range(N)))
    path = path_of(service.root, POOL, hashes)
    change(path, hashes, guardian)
    before = service.client.counters[f"miss_{kind}"]
    check_load(service.client, POOL, make_run(POOL, hashes, range(12, 16)), {}, kind=kind)
    assert service.client.counters[f"miss_{kind}"] == before + 1
    assert os.path.lexists(path) != removed
    # What has failed is stored anew over whatever lies there.
    assert store(service.client, make_store(POOL, hashes, range(N), replace=True)) == ("stored",)
    check_load(service.client, POOL, make_run(POOL, hashes, range(12, 16)), {12 + i: i for i in range(N)})


def test_blocks_before_a_forged_one_are_good(protected: tuple[Service, Protection]) -> None:
    service, guardian = protected
    one, two = service.prompt(), service.prompt()
    for hashes in (one, two):
        store(service.client, make_store(POOL, hashes, range(N)))
    other = path_of(service.root, POOL, two).read_bytes()
    path = path_of(service.root, POOL, one)

    def splice(data: bytearray) -> bytearray:
        at = GEOMETRY.block_offset(2)
        data[at:] = other[at:]
        return data

    rewrite(path, splice)
    if guardian.encrypt:
        check_load(service.client, POOL, make_run(POOL, one, range(12, 16)), {12: 0, 13: 1}, kind="damaged")
    else:
        # The same pages were stored under both names: to the last byte what belongs there.
        check_load(service.client, POOL, make_run(POOL, one, range(12, 16)), {12 + i: i for i in range(N)})


def test_a_chunk_under_another_name_is_a_miss(protected: tuple[Service, Protection]) -> None:
    service, _ = protected
    one, two = service.prompt(), service.prompt()
    for hashes in (one, two):
        store(service.client, make_store(POOL, hashes, range(N)))
    path_of(service.root, POOL, one).write_bytes(path_of(service.root, POOL, two).read_bytes())
    check_load(service.client, POOL, make_run(POOL, one, range(12, 16)), {}, kind="foreign")


def test_a_reader_without_the_key_and_one_with_another_miss_and_remove_nothing(quick: Path) -> None:
    hashes = chain(N)
    writer = started(setup_for(quick, [POOL], protection=ENCRYPTED), "off")
    assert store(writer, make_store(POOL, hashes, range(N))) == ("stored",)
    before = path_of(quick, POOL, hashes).read_bytes()
    for spec in (None, STRANGER, AUTHENTICATED):
        reader = started(setup_for(quick, [POOL], protection=spec), "off")
        check_load(reader, POOL, make_run(POOL, hashes, range(12, 16)), {}, kind="other_key")
        reader.close()
    assert path_of(quick, POOL, hashes).read_bytes() == before
    check_load(writer, POOL, make_run(POOL, hashes, range(12, 16)), {12 + i: i for i in range(N)})
    writer.close()


def test_an_unprotected_tier_reads_as_ever(quick: Path) -> None:
    """A chunk of this build without protection is byte for byte the one of before."""
    hashes = chain(N)
    writer = started(setup_for(quick, [POOL]), "off")
    store(writer, make_store(POOL, hashes, range(N)))
    header = read_header(path_of(quick, POOL, hashes).read_bytes())
    assert header.seal is None and all(block.tag == bytes(16) for block in header.blocks)
    writer.close()


# --------------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("spec", [ENCRYPTED, AUTHENTICATED], ids=["encrypted", "authenticated"])
def test_a_chunk_longer_than_a_staging_slot_comes_in_pieces(spec: ProtectionSpec, quick: Path) -> None:
    pool, hashes = block_outermost(0, 40, 200_000), chain(16)
    setup = setup_for(quick, [pool], protection=spec)
    writer = started(msgspec.structs.replace(setup, groups=(pool.spec(blocks_per_chunk=16),)), "off")
    assert store(writer, make_store(pool, hashes, range(16))) == ("stored",)
    writer.close()
    reader = started(msgspec.structs.replace(setup, groups=(pool.spec(blocks_per_chunk=1),)), "off")
    run = make_run(pool, hashes, range(25, 36), block_count=16, take_first=5)
    check_load(reader, pool, run, dict(zip(range(25, 36), range(5, 16), strict=True)))
    flip(Geometry(16, 200_000, 16).block_offset(9))(path_of(quick, pool, hashes))
    run = make_run(pool, hashes, range(20, 36), block_count=16)
    check_load(reader, pool, run, dict(zip(range(20, 29), range(9), strict=True)), kind="damaged")
    reader.close()


def test_a_look_up_does_not_advertise_what_is_not_authentic() -> None:
    """The prompt ends inside the chunk, so that a look-up reads its header."""
    guardian = Protection(KEY, encrypt=True)
    tier, plain = MemoryTier(), make_chunk(4, 64)[0]
    payload = memoryview(bytearray(plain.geometry.payload_bytes))
    right = build_header(plain.key, 16, 64, chain(4), 0, payload, guardian)
    probe = Probe(1, NAMESPACE.digest, 0, 4, 0, 0, b"".join(chain(2)), (SHARD.as_tuple(),))
    for header, reader, found in (
        (right, guardian, 2),
        (plain, None, 2),
        (plain, guardian, 0),
        (right, None, 0),
        (right, Protection(OTHER_KEY, encrypt=True), 0),
    ):
        tier.put(NAMESPACE.folder, plain.key.name, [aligned(header.encode() + bytes(payload))], replace=True)
        segments = ChainWalk(probe, tier, reader).run()
        assert sum(segment.take for segment in segments) == found
    assert plain.blocks[0].chain_hash == chain_hash(0)
