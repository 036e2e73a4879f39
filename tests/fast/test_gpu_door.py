"""Which client a KV cache on a GPU gets, and when it is refused."""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
from memkv_engines.transports import select
from memkv_engines.transports.select import Facts, TransportPlan
from tests.fast.direct_samples import AddressTransport, LateSlotMover
from tests.fast.io_samples import layer_outermost, make_run, make_store, store
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


def config_for(path: Path, **keys: object) -> Config:
    return load_config({"path": str(path), "direct_io": "off", "io_threads": 2, "staging_bytes": 16 << 20, **keys}, {})


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
