"""Which client a KV cache on a GPU gets, and when it is refused."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from memkv_engines.config import Config, load_config
from memkv_engines.doors import io_client
from memkv_engines.doors.io_client import DevicePages, worker_client
from memkv_engines.errors import ConfigError, TransportError
from memkv_engines.offload.device_client import DeviceIoClient
from memkv_engines.offload.direct_client import DirectIoClient
from memkv_engines.offload.messages import GroupSpec
from memkv_engines.offload.pinned import PinnedStaging
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.striped import ID_FILE
from memkv_engines.transports import select
from memkv_engines.transports.base import View
from memkv_engines.transports.select import Facts, TransportPlan
from tests.fast.direct_samples import AddressTransport, LateSlotMover
from tests.fast.io_samples import layer_outermost, load, make_run, make_store, store
from tests.fast.late_mover import STREAM, LateMover
from tests.fast.samples import chain
from tests.fast.service_samples import N, check_load
from tests.fast.test_transport_choice import EVERYTHING, NOTHING

POOL = layer_outermost(0, 64, 6, 1000, gap_bytes=24)
PAGES = DevicePages(0, lambda: STREAM)


@pytest.fixture
def movers(monkeypatch: pytest.MonkeyPatch) -> list[LateMover]:
    """A host that has everything, but whose memory of the GPU is memory of the host."""
    made: list[LateMover] = []

    def on_device(_: int, groups: Sequence[GroupSpec], slots: int, medium: str) -> LateMover:
        assert medium == "gpu"
        made.append(LateSlotMover(groups, slots))
        return made[-1]

    def pinned(_: int, groups: Sequence[GroupSpec], staging: PinnedStaging) -> LateMover:
        made.append(LateMover(groups, staging))
        return made[-1]

    monkeypatch.setattr(io_client, "_device_mover", on_device)
    monkeypatch.setattr(io_client, "_pinned_mover", pinned)
    monkeypatch.setattr(select, "facts_of", lambda _: EVERYTHING)
    monkeypatch.setattr(TransportPlan, "_make", lambda _, mode: AddressTransport(mode))
    return made


KEYS: dict[str, object] = {"direct_io": "off", "io_threads": 2, "staging_bytes": 16 << 20}


def config_for(path: Path, **keys: object) -> Config:
    return load_config({**KEYS, "path": str(path), **keys}, {})


def test_gpudirect_is_taken_where_it_works(
    movers: list[LateMover], quick: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        client = worker_client(config_for(quick), [POOL.spec()], stores=True, pages=PAGES)
    assert isinstance(client, DirectIoClient)
    assert "gds/gpudirect, staged in gpu memory (GPUDirect: " in caplog.text
    client.start()
    hashes = chain(N, "door")
    assert store(client, make_store(POOL, hashes, range(N))) == ("stored",)
    check_load(client, POOL, make_run(POOL, hashes, range(20, 24)), {20 + i: i for i in range(N)})
    client.close()
    assert [mover.closed for mover in movers] == [True]


def broken(*_: object) -> int:
    raise TransportError("cuFile says no")


def test_auto_goes_through_host_memory_where_the_proof_fails(
    movers: list[LateMover], quick: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(AddressTransport, "write", broken)
    client = worker_client(config_for(quick), [POOL.spec()], stores=True, pages=PAGES)
    assert isinstance(client, DeviceIoClient)
    assert "cuFile says no" in caplog.text and "staging in host memory" in caplog.text
    assert [mover.closed for mover in movers] == [True, False]
    client.close()


@pytest.mark.parametrize("asked", [{"gds": "on"}, {"staging_medium": "gpu"}])
def test_gpudirect_that_was_asked_for_is_had_or_refused(
    movers: list[LateMover], quick: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, str]
) -> None:
    client = worker_client(config_for(quick, **asked), [POOL.spec()], stores=True, pages=PAGES)
    assert isinstance(client, DirectIoClient)
    client.start()
    client.close()
    monkeypatch.setattr(AddressTransport, "write", broken)
    with pytest.raises(ConfigError, match="cuFile says no"):
        worker_client(config_for(quick, **asked), [POOL.spec()], stores=True, pages=PAGES)
    assert [mover.closed for mover in movers] == [True, True]
    monkeypatch.setattr(select, "facts_of", lambda _: NOTHING)
    with pytest.raises(ConfigError, match="GPUDirect Storage lacks a GPU"):
        worker_client(config_for(quick, **asked), [POOL.spec()], stores=True, pages=PAGES)


@pytest.mark.parametrize("facts", [NOTHING, EVERYTHING])
def test_the_process_behind_host_staging_is_not_refused_for_it(
    movers: list[LateMover], quick: Path, monkeypatch: pytest.MonkeyPatch, facts: Facts
) -> None:
    monkeypatch.setattr(select, "facts_of", lambda _: facts)
    client = worker_client(config_for(quick, staging_medium="host"), [POOL.spec()], stores=True, pages=PAGES)
    assert isinstance(client, DeviceIoClient)
    assert client._client._setup.gds == "auto"
    client.start()
    hashes = chain(N, "host")
    assert store(client, make_store(POOL, hashes, range(N))) == ("stored",)
    client.close()


@pytest.mark.usefixtures("movers")
def test_a_level_of_memory_is_in_the_hosts(quick: Path) -> None:
    client = worker_client(config_for(quick, memory_bytes=8 << 20), [POOL.spec()], stores=True, pages=PAGES)
    assert isinstance(client, DeviceIoClient)
    client.start()
    hashes = chain(N, "kept")
    assert store(client, make_store(POOL, hashes, range(N))) == ("stored",)
    check_load(client, POOL, make_run(POOL, hashes, range(20, 24)), {20 + i: i for i in range(N)})
    client.close()


@pytest.mark.usefixtures("movers")
@pytest.mark.parametrize(("key", "value"), [("gds", "on"), ("staging_medium", "gpu")])
def test_gpudirect_and_a_level_of_memory_exclude_each_other(quick: Path, key: str, value: str) -> None:
    both = config_for(quick, memory_bytes=8 << 20, **{key: value})
    with pytest.raises(ConfigError, match=f"{key}={value} and memory_bytes={8 << 20}: .*leave out one of the two"):
        worker_client(both, [POOL.spec()], stores=True, pages=PAGES)


# -------------------------------------------------------------------------------------------------- several directories


@pytest.fixture
def drives(quick: Path) -> list[Path]:
    drives = [quick / name for name in ("a", "b", "c")]
    for number, drive in enumerate(drives, start=1):
        drive.mkdir()
        (drive / ID_FILE).write_text(f"{number:032x}")  # So that chunks lie the same way each time.
    return drives


def many(client: DirectIoClient, count: int = 12) -> list[list[bytes]]:
    """As many prompts stored, each to lie on some drive."""
    prompts = [chain(N, f"drives {number}") for number in range(count)]
    for hashes in prompts:
        assert store(client, make_store(POOL, hashes, range(N))) == ("stored",)
    return prompts


def test_gpudirect_writes_to_every_drive_and_finds_everything(movers: list[LateMover], drives: list[Path]) -> None:
    config = load_config({**KEYS, "path": [str(drive) for drive in drives], "gds": "on"}, {})
    client = worker_client(config, [POOL.spec()], stores=True, pages=PAGES)
    assert isinstance(client, DirectIoClient)
    client.start()
    assert client.ready.tier_name == f"striped({', '.join(['directory(test/by-address)'] * 3)})"
    prompts = many(client)
    assert all(list(drive.rglob("*.kv")) for drive in drives)
    assert sum(len(list(drive.rglob("*.kv"))) for drive in drives) == len(prompts)
    for hashes in prompts:
        check_load(client, POOL, make_run(POOL, hashes, range(20, 24)), {20 + i: i for i in range(N)})
    assert len(client._keepers) == len(drives)
    client.close()
    # The I/O process of the host path finds all of it, and a drive that is lost costs its share.
    lost = len(list(drives[1].rglob("*.kv")))
    drives[1].rename(drives[1].with_name("elsewhere"))
    again = worker_client(config, [POOL.spec()], stores=True, pages=PAGES)
    assert isinstance(again, DirectIoClient)
    again.start()
    kinds = [load(again, make_run(POOL, hashes, range(20, 24))).kinds for hashes in prompts]
    assert kinds.count(("",)) == len(prompts) - lost
    again.close()


def test_one_drive_that_cannot_is_named(
    movers: list[LateMover], drives: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proved = DirectoryTier.prove

    def prove(tier: DirectoryTier, views: Sequence[View]) -> None:
        if tier.root == drives[1]:
            broken()
        proved(tier, views)

    monkeypatch.setattr(DirectoryTier, "prove", prove)
    asked = {**KEYS, "path": [str(drive) for drive in drives]}
    with pytest.raises(ConfigError, match=f"does not move device memory here: {drives[1]}: cuFile says no"):
        worker_client(load_config({**asked, "gds": "on"}, {}), [POOL.spec()], stores=True, pages=PAGES)
    client = worker_client(load_config(asked, {}), [POOL.spec()], stores=True, pages=PAGES)
    assert isinstance(client, DeviceIoClient)
    assert "staging in host memory" in caplog.text
    client.close()


def test_what_one_drive_lacks_is_lacking_and_a_lost_one_does_not_count(
    movers: list[LateMover], drives: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {str(drive): EVERYTHING for drive in drives}
    monkeypatch.setattr(select, "facts_of", lambda folder: facts[str(folder)])
    config = load_config({**KEYS, "path": [str(drive) for drive in drives]}, {})
    facts[str(drives[2])] = replace(EVERYTHING, gpudirect_lacks=("a working path",))
    client = worker_client(config, [POOL.spec()], stores=True, pages=PAGES)
    assert isinstance(client, DeviceIoClient)
    client.close()
    del facts[str(drives[2])]
    drives[2].rename(drives[2].with_name("gone"))
    client = worker_client(config, [POOL.spec()], stores=True, pages=PAGES)
    assert isinstance(client, DirectIoClient)
    client.close()
