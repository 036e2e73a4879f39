"""The I/O service, once in a child process and once on threads: pages to chunks, chunks to other pages, and faults."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from memkv_engines.chunk.codec import Geometry, decode_header
from memkv_engines.limits import MIB
from memkv_engines.tier.usage import read_count
from tests.fast.io_samples import (
    block_outermost,
    load,
    make_run,
    make_store,
    path_of,
    setup_for,
    started,
    store,
)
from tests.fast.samples import NAMESPACE, chain
from tests.fast.service_samples import GEOMETRY, PAGES, POOL, POOLS, N, Service, check_load, flip, rewrite, signed

# ------------------------------------------------------------------------------------------------ there and back again


@pytest.mark.parametrize("layout", POOLS)
def test_blocks_come_back_into_other_pages(service: Service, layout: str) -> None:
    pool, hashes = POOLS[layout], service.prompt(2 * N)
    pages = [5, 0, 3, 7, 1, 1, 6, 2]  # any order, a page twice
    chunks = [make_store(pool, hashes[:N], pages[:N]), make_store(pool, hashes[N:], pages[N:])]
    assert store(service.client, *chunks) == ("stored", "stored")
    target = [20, 11, 13, 12, 19, 9, 23, 10]
    run = make_run(pool, hashes, target, chunk_count=2)
    check_load(service.client, pool, run, dict(zip(target, pages, strict=True)))


@pytest.mark.parametrize("layout", POOLS)
@pytest.mark.parametrize("first", range(N))
def test_any_blocks_of_a_chunk(service: Service, layout: str, first: int) -> None:
    pool, hashes = POOLS[layout], service.prompt()
    store(service.client, make_store(pool, hashes, range(N)))
    for stop in range(first + 1, N + 1):
        target = range(12 + first, 12 + stop)
        run = make_run(pool, hashes[:stop], target, take_first=first, last=hashes[-1])
        check_load(service.client, pool, run, dict(zip(target, range(first, stop), strict=True)))


def test_a_run_that_starts_inside_its_first_chunk(service: Service) -> None:
    hashes = service.prompt(3 * N)
    store(service.client, *(make_store(POOL, hashes[i : i + N], range(i, i + N)) for i in (0, N, 2 * N)))
    target = range(2 * N + 2, 2 * N + 2 + 10)
    run = make_run(POOL, hashes, target, chunk_count=3, take_first=2)
    # Two of the sources are overwritten by the load itself: the file has what they held before.
    check_load(service.client, POOL, run, dict(zip(target, range(2, 12), strict=True)))


def test_a_chunk_that_ends_beyond_the_prompt(service: Service) -> None:
    hashes = service.prompt()
    store(service.client, make_store(POOL, hashes, range(N)))
    run = make_run(POOL, hashes[:3], [10, 11, 12], last=hashes[-1])
    check_load(service.client, POOL, run, {10: 0, 11: 1, 12: 2})


def test_a_chunk_with_holes_gives_what_follows_them(service: Service) -> None:
    hashes = service.prompt()
    store(service.client, make_store(POOL, hashes, [2, 3], holes=2))
    run = make_run(POOL, hashes, [10, 11], take_first=2, holes=2)
    check_load(service.client, POOL, run, {10: 2, 11: 3})
    check_load(
        service.client, POOL, make_run(POOL, hashes, [12, 13, 14], take_first=1, holes=2), {}, kind="damaged", good=0
    )


@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_chunk_longer_than_a_staging_slot_comes_in_pieces(mode: str, quick: Path) -> None:
    """An engine with longer chunks has written it."""
    pool, hashes = block_outermost(0, 40, 200_000), chain(16)
    writer = started(setup_for(quick, [pool], groups=(pool.spec(blocks_per_chunk=16),)), "off")
    assert store(writer, make_store(pool, hashes, range(16))) == ("stored",)
    writer.close()
    reader = started(setup_for(quick, [pool], groups=(pool.spec(blocks_per_chunk=1),)), mode)
    for first in (0, 5):
        target = range(20 + first, 36)
        run = make_run(pool, hashes, target, block_count=16, take_first=first)
        check_load(reader, pool, run, dict(zip(target, range(first, 16), strict=True)))
    flip(Geometry(16, 200_000, 16).block_offset(9))(path_of(quick, pool, hashes))
    run = make_run(pool, hashes, range(20, 36), block_count=16)
    check_load(reader, pool, run, dict(zip(range(20, 29), range(9), strict=True)), kind="damaged")
    reader.close()


def test_groups_keep_apart(service: Service) -> None:
    hashes = service.prompt()
    one, other = POOLS["layers outermost"], POOLS["block outermost"]
    store(service.client, make_store(one, hashes, range(N)), make_store(other, hashes, range(N)))
    result = load(service.client, make_run(one, hashes, range(8, 12)), make_run(other, hashes, range(8, 12)))
    assert (result.kinds, result.good_blocks) == (("", ""), (N, N))
    assert [one.block(8 + i) for i in range(N)] == [one.block(i) for i in range(N)]
    assert [other.block(8 + i) for i in range(N)] == [other.block(i) for i in range(N)]
    check_load(service.client, POOL, make_run(POOL, hashes, range(8, 12)), {}, kind="missing")


def test_what_a_slot_held_before_never_reaches_a_file(service: Service) -> None:
    """Every slot is dirty by now; padding and holes must be zero all the same."""
    dirty = POOLS["block outermost"]
    for _ in range(8):
        hashes = service.prompt()
        store(service.client, make_store(dirty, hashes, range(N)))
    hashes = service.prompt()
    store(service.client, make_store(POOL, hashes, [4, 5], holes=2))
    data = path_of(service.root, POOL, hashes, holes=2).read_bytes()
    geometry = Geometry(N, POOL.block_bytes, 16)
    assert len(data) == geometry.object_bytes
    header = decode_header(data)
    assert header.encode() == data[: geometry.header_bytes]
    stride = geometry.block_stride_bytes
    slots = [data[geometry.block_offset(i) : geometry.block_offset(i) + stride] for i in range(N)]
    assert slots[:2] == [bytes(stride)] * 2
    assert slots[2:] == [POOL.block(page).ljust(stride, b"\0") for page in (4, 5)]


def test_stores_say_what_became_of_each_chunk(service: Service) -> None:
    client, hashes = service.client, service.prompt()
    chunk = make_store(POOL, hashes, range(N))
    before = client.counters.as_dict()
    assert store(client, chunk) == ("stored",)
    assert store(client, chunk) == ("present",)
    assert store(client, make_store(POOL, hashes, range(N), replace=True)) == ("stored",)
    written = 2 * Geometry(N, POOL.block_bytes, 16).object_bytes
    counted = {k: client.counters[k] - before.get(k, 0) for k in ("store_chunks", "store_present", "store_bytes")}
    assert counted == {"store_chunks": 2, "store_present": 1, "store_bytes": written}
    assert store(client) == ()


# ----------------------------------------------------------------------------------------------------- faults on disk


def bump_version(path: Path) -> None:
    def change(data: bytearray) -> bytearray:
        struct.pack_into("<H", data, 8, 2)
        return signed(data)

    rewrite(path, change)


def change_namespace(path: Path) -> None:
    def change(data: bytearray) -> bytearray:
        at = bytes(data).index(NAMESPACE.digest)
        data[at : at + 32] = NAMESPACE.derive(adapter="x").digest
        return signed(data)

    rewrite(path, change)


def link(path: Path) -> None:
    path.rename(path.with_suffix(".aside"))
    path.symlink_to(path.with_suffix(".aside").name)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FAULTS: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "a bit of the magic": (flip(0), "foreign", True),
    "a bit of the header": (flip(40), "damaged", True),
    "a bit of the header's length": (flip(13), "truncated", True),
    "a bit of the block table": (flip(512 + 96 + 3), "damaged", True),
    "a bit after the block table": (flip(GEOMETRY.header_bytes - 1), "damaged", True),
    "cut in the payload": (lambda path: os.truncate(path, GEOMETRY.object_bytes - 1), "truncated", True),
    "cut in the header": (lambda path: os.truncate(path, 100), "truncated", True),
    "empty": (lambda path: os.truncate(path, 0), "truncated", True),
    "longer": (lambda path: os.truncate(path, GEOMETRY.object_bytes + 4096), "foreign", True),
    "gone": (lambda path: path.unlink(), "missing", True),
    "another namespace": (change_namespace, "foreign", True),
    "a later version": (bump_version, "version", False),
    "a link": (link, "foreign", True),
    "a folder": (make_folder, "foreign", False),
    "a pipe": (make_pipe, "foreign", True),
}


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_a_counted_miss_and_touches_no_page(service: Service, fault: str, first: int) -> None:
    damage, kind, removed = FAULTS[fault]
    hashes = service.prompt()
    store(service.client, make_store(POOL, hashes, range(N)))
    path = path_of(service.root, POOL, hashes)
    damage(path)
    before = service.client.counters[f"miss_{kind}"]
    run = make_run(POOL, hashes, range(12 + first, 16), take_first=first)
    check_load(service.client, POOL, run, {}, kind=kind)
    assert service.client.counters[f"miss_{kind}"] == before + 1
    assert os.path.lexists(path) != removed


@pytest.mark.parametrize("first", range(N))
@pytest.mark.parametrize("bad", range(N))
def test_blocks_before_a_damaged_one_are_good(service: Service, bad: int, first: int) -> None:
    hashes = service.prompt()
    store(service.client, make_store(POOL, hashes, range(N)))
    path = path_of(service.root, POOL, hashes)
    flip(GEOMETRY.block_offset(bad) + POOL.block_bytes - 1)(path)
    good = range(first, bad) if bad >= first else range(first, N)
    kind = "damaged" if bad >= first else ""
    run = make_run(POOL, hashes, range(12 + first, 16), take_first=first)
    check_load(service.client, POOL, run, {12 + i: i for i in good}, kind=kind)
    assert path.exists() == (not kind)


def test_padding_may_hold_anything(service: Service) -> None:
    hashes = service.prompt()
    store(service.client, make_store(POOL, hashes, range(N)))
    flip(GEOMETRY.block_offset(1) - 1)(path_of(service.root, POOL, hashes))
    check_load(service.client, POOL, make_run(POOL, hashes, range(12, 16)), {12 + i: i for i in range(N)})


def test_a_bad_chunk_ends_its_run_but_not_the_others(service: Service) -> None:
    hashes, second = service.prompt(3 * N), service.prompt()
    for start in (0, N, 2 * N):
        store(service.client, make_store(POOL, hashes[start : start + N], range(N)))
    store(service.client, make_store(POOL, second, range(N)))
    flip(GEOMETRY.block_offset(2))(path_of(service.root, POOL, hashes[N : 2 * N]))
    before = [POOL.block(page) for page in range(PAGES)]
    runs = make_run(POOL, hashes, range(8, 20), chunk_count=3), make_run(POOL, second, range(20, 24))
    result = load(service.client, *runs)
    assert (result.good_blocks, result.kinds) == ((N + 2, N), ("damaged", ""))
    after = [POOL.block(page) for page in range(PAGES)]
    assert after[8:14] == [before[i % N] for i in range(6)]
    assert after[20:] == before[:N]
    assert after[:8] + after[14:16] == before[:8] + before[14:16]
    # The third chunk is good, and may or may not have been loaded by another thread: no one is told that it was.
    assert all(after[16 + i] in (before[i], before[16 + i]) for i in range(N))


# --------------------------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize("mode", ["on", "off"])
def test_stores_are_shed_when_staging_is_full(mode: str, quick: Path) -> None:
    pool = block_outermost(0, 8, MIB)
    client = started(setup_for(quick, [pool], staging_bytes=8 * MIB, io_threads=1), mode)
    prompts = [chain(N, f"shed{i}") for i in range(24)]
    outcomes = store(client, *(make_store(pool, hashes, range(N)) for hashes in prompts))
    assert set(outcomes) == {"stored", "shed"}
    assert client.counters["store_shed"] == outcomes.count("shed")
    assert client.counters["store_chunks"] == outcomes.count("stored") == len(list(quick.rglob("*.kv")))
    # There is room again.
    hashes = prompts[outcomes.index("shed")]
    assert store(client, make_store(pool, hashes, range(N))) == ("stored",)
    client.close()


def await_first_count(root: Path) -> None:
    """What is stored while the tier is counted for the first time may be counted twice until the second."""
    fd = os.open(root, os.O_RDONLY)
    deadline = time.monotonic() + 30
    while not ((count := read_count(fd)) and count.corrections):
        assert time.monotonic() < deadline, count
        time.sleep(0.005)
    os.close(fd)


@pytest.mark.parametrize("mode", ["on", "off"])
def test_stores_stop_at_the_capacity(mode: str, quick: Path) -> None:
    size = GEOMETRY.object_bytes
    client = started(setup_for(quick, [POOL], capacity_bytes=2 * size + size // 2), mode)
    await_first_count(quick)
    outcomes = [store(client, make_store(POOL, chain(N, f"full{i}"), range(N)))[0] for i in range(4)]
    assert outcomes == ["stored", "stored", "full", "full"]
    assert client.counters["store_full"] == 2
    assert load(client, make_run(POOL, chain(N, "full0"), range(12, 16))).kinds == ("",)
    client.close()
