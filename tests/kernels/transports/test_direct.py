"""The GPUDirect path with the real mover and the real kvikio: the suite of the I/O service, and files of the host path.

Without a GPU kvikio takes its compatibility path, which is let through here only: its name is ``gds/compat``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memkv_engines.chunk.layout import KVLayout, Tile, align_up
from memkv_engines.gpu.mover import DeviceMover
from memkv_engines.offload.direct_client import DirectIoClient, slots_needed
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.transports.gds import COMPAT
from memkv_engines.transports.select import Decision, Policy, TransportPlan
from tests.fake_cuda.control import LATE, FakeCuda, load
from tests.fast.io_samples import load as load_run
from tests.fast.io_samples import make_run, make_store, path_of, setup_for, started, store
from tests.fast.service_samples import PAGES, POOL, POOLS, N, Service
from tests.fast.test_io_service import (  # noqa: F401 - collected here once more, with the fixture below
    test_a_bad_chunk_ends_its_run_but_not_the_others,
    test_a_bad_file_is_a_counted_miss_and_touches_no_page,
    test_a_chunk_that_ends_beyond_the_prompt,
    test_a_chunk_with_holes_gives_what_follows_them,
    test_a_run_that_starts_inside_its_first_chunk,
    test_any_blocks_of_a_chunk,
    test_blocks_before_a_damaged_one_are_good,
    test_blocks_come_back_into_other_pages,
    test_groups_keep_apart,
    test_stores_say_what_became_of_each_chunk,
    test_what_a_slot_held_before_never_reaches_a_file,
)
from tests.kernels.routes import build_route


class Gpu:
    """The engine's part: a context, a stream, pools that count as device memory."""

    def __init__(self, fake: FakeCuda) -> None:
        from cuda.bindings import driver

        self.fake, self._api = fake, driver
        fake.set_kernels(build_route("host"))
        fake.reset(0, LATE)
        self.ok("cuInit", 0)
        self.ok("cuCtxPushCurrent", self.ok("cuDevicePrimaryCtxRetain", 0))
        self.stream = int(self.ok("cuStreamCreate", 0))
        for pool in POOLS.values():
            fake.adopt(pool.memory.ctypes.data, pool.memory.nbytes)

    def ok(self, name: str, *arguments: Any) -> Any:
        code, *results = getattr(self._api, name)(*arguments)
        assert int(code) == 0, (name, code)
        return results[0] if results else None

    def client(self, root: Path) -> DirectIoClient:
        setup = setup_for(root, list(POOLS.values()), direct_io="on")
        plan = TransportPlan(Policy(), Decision(COMPAT, "gpu", "a test"), threads=setup.io_threads)
        tier = DirectoryTier(root, direct_io="on", transport=plan)
        slots = slots_needed(setup.io_threads) + 4
        slot_bytes = max(g.blocks_per_chunk * align_up(g.block_bytes) for g in setup.groups)
        mover = DeviceMover(0, slot_bytes=slot_bytes, slots=slots, medium="gpu")
        for group in setup.groups:
            tiles = [Tile(t.base, t.block_stride_bytes, t.length_bytes) for t in group.tiles]
            mover.add_group(group.group, KVLayout.plan(group.num_blocks, tiles))
        client = DirectIoClient(setup, tier, mover, slots, stream=lambda: self.stream, io_process="on")
        client.start()
        assert client.ready.tier_name == f"directory({COMPAT})"
        return client


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu(load())


@pytest.fixture(scope="module")
def service(gpu: Gpu, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("kv")
    client = gpu.client(root)
    yield Service(client, root, "direct")
    client.close()
    assert gpu.fake.report().violations == []


@pytest.mark.parametrize("layout", POOLS)
@pytest.mark.parametrize("holes", [0, 2])
def test_files_and_pages_are_those_of_the_host_path(gpu: Gpu, tmp_path: Path, layout: str, holes: int) -> None:
    pool = POOLS[layout]
    direct, host = gpu.client(tmp_path), started(setup_for(tmp_path, list(POOLS.values())), "on")
    hashes = Service(direct, tmp_path, layout).prompt()
    files = []
    for client in (host, direct):
        assert store(client, make_store(pool, hashes, range(holes, N), holes=holes, replace=True)) == ("stored",)
        files.append(path_of(tmp_path, pool, hashes, holes=holes).read_bytes())
    assert files[0] == files[1]
    # The file that the GPU has written goes into pages of the host path, and the other way round.
    for writer, reader in ((direct, host), (host, direct)):
        assert store(writer, make_store(pool, hashes, range(holes, N), holes=holes, replace=True)) == ("stored",)
        expected = pool.with_copies(pool.memory, {PAGES - N + i: i for i in range(holes, N)})
        run = make_run(pool, hashes, range(PAGES - N + holes, PAGES), take_first=holes, holes=holes)
        assert load_run(reader, run).kinds == ("",)
        assert (pool.memory == expected).all()
        pool.memory[:] ^= 0x5A
    host.close()
    direct.close()


def test_the_engine_may_overwrite_pages_behind_the_fence(gpu: Gpu, tmp_path: Path) -> None:
    client = gpu.client(tmp_path)
    hashes, before = Service(client, tmp_path, "fence").prompt(), [POOL.block(page) for page in range(N)]
    client.submit_store(1, (make_store(POOL, hashes, range(N)),))
    assert client.fence()
    gpu.ok("cuStreamSynchronize", gpu.stream)  # what the engine's stream does next
    POOL.memory[:] ^= 0xFF
    while not (results := client.poll()):
        client.wait(0.01)
    assert results[0].outcomes == ("stored",)  # type: ignore[union-attr]
    assert load_run(client, make_run(POOL, hashes, range(8, 8 + N))).kinds == ("",)
    assert [POOL.block(8 + i) for i in range(N)] == before
    client.close()


def test_an_engine_that_slept_goes_on(gpu: Gpu, tmp_path: Path) -> None:
    client = gpu.client(tmp_path)
    hashes = Service(client, tmp_path, "sleep").prompt()
    before = [POOL.block(page) for page in range(N)]
    assert store(client, make_store(POOL, hashes, range(N))) == ("stored",)
    live = gpu.fake.report().live
    client.suspend()
    assert sum(gpu.fake.report().live.values()) < sum(live.values()), "device slots and tables are given back"
    asleep = POOL.memory.copy()
    assert load_run(client, make_run(POOL, hashes, range(8, 8 + N))).kinds != ("",)
    assert (POOL.memory == asleep).all()
    client.wake()
    deadline = time.monotonic() + 30
    while client.mode == "down":
        assert time.monotonic() < deadline
        client.poll()
        time.sleep(0.01)
    assert load_run(client, make_run(POOL, hashes, range(8, 8 + N))).kinds == ("",)
    assert [POOL.block(8 + i) for i in range(N)] == before
    client.close()
