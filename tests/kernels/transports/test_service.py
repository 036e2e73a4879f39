"""The I/O service over NIXL and over kvikio: the same tests as over posix, and what is overdue there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memkv_engines.errors import ConfigError
from memkv_engines.offload.messages import ProtectionSpec
from tests.fake_cuda.build import build
from tests.fast.io_samples import load, make_run, make_store, setup_for, started, store
from tests.fast.protected_samples import KEY
from tests.fast.samples import chain
from tests.fast.service_samples import POOL, POOLS, N, Service
from tests.fast.test_io_service import (  # noqa: F401 - collected here once more, with the fixture below
    test_a_bad_chunk_ends_its_run_but_not_the_others,
    test_a_bad_file_is_a_counted_miss_and_touches_no_page,
    test_a_chunk_with_holes_gives_what_follows_them,
    test_any_blocks_of_a_chunk,
    test_blocks_before_a_damaged_one_are_good,
    test_blocks_come_back_into_other_pages,
    test_groups_keep_apart,
    test_stores_say_what_became_of_each_chunk,
    test_what_a_slot_held_before_never_reaches_a_file,
)

NIXL, KVIKIO = "nixl/posix-uring/direct", "gds/compat"
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module", autouse=True)
def _child_finds_the_driver() -> Iterator[None]:
    """The child process is started anew: there the fake driver is found by the loader's path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_LIBRARY_PATH", str(build().parent))
        yield


@pytest.fixture(
    scope="module",
    params=[("nixl", "on", NIXL), ("nixl", "off", NIXL), ("gds", "on", KVIKIO)],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    transport, mode, name = request.param
    root = tmp_path_factory.mktemp("kv")
    setup = setup_for(root, list(POOLS.values()), transport=transport, direct_io="on")
    client = started(setup, mode)
    assert client.ready.tier_name == f"directory({name})"
    assert f"transport={transport}" in client.ready.mode_reason
    yield Service(client, root, mode)
    client.close()


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_a_plugin_that_does_not_load_is_a_refusal_to_start(tmp_path: Path, mode: str) -> None:
    setup = setup_for(tmp_path, [POOL], transport="nixl", nixl_plugin="NOWHERE")
    with pytest.raises(ConfigError, match=r"nixl_plugin='NOWHERE' cannot be used: no libplugin_NOWHERE\.so"):
        started(setup, mode)


@pytest.mark.parametrize("protection", [None, ProtectionSpec(True, KEY)], ids=["unprotected", "encrypted"])
def test_the_child_ends_in_order(tmp_path: Path, protection: ProtectionSpec | None) -> None:
    """Agents, rings and registered memory are still there when the interpreter ends."""
    client = started(setup_for(tmp_path, [POOL], transport="nixl", protection=protection), "on")
    child = client._backend._child  # type: ignore[union-attr]
    hashes = chain(N)
    assert store(client, make_store(POOL, hashes, range(N))) == ("stored",)
    assert load(client, make_run(POOL, hashes, range(12, 16))).kinds == ("",)
    assert [POOL.block(12 + i) for i in range(N)] == [POOL.block(i) for i in range(N)]
    client.close()
    assert child.returncode == 0


def test_what_posix_wrote_nixl_reads_and_the_other_way_round(tmp_path: Path) -> None:
    hashes = {"posix": chain(N, "p"), "nixl": chain(N, "n"), "gds": chain(N, "g")}
    for transport, prompt in hashes.items():
        client = started(setup_for(tmp_path, [POOL], transport=transport), "on")
        assert store(client, make_store(POOL, prompt, range(N))) == ("stored",)
        client.close()
    for transport in hashes:
        client = started(setup_for(tmp_path, [POOL], transport=transport), "on")
        for prompt in hashes.values():
            assert load(client, make_run(POOL, prompt, range(12, 16))).kinds == ("",)
            assert [POOL.block(12 + i) for i in range(N)] == [POOL.block(i) for i in range(N)]
        client.close()
