"""The GPUDirect path while the engine sleeps: its pages are unmapped, and at the wake-up they are other memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memkv_engines.errors import GpuOverdue, TransportError
from memkv_engines.offload import client as client_module
from memkv_engines.offload.results import LoadResult
from tests.fast.direct_samples import started_direct
from tests.fast.io_samples import load, make_run, make_store, results_of, setup_for, store, until
from tests.fast.samples import chain
from tests.fast.service_samples import N
from tests.fast.test_direct_client import IO_THREADS, POOL, Served, check_works


@pytest.fixture
def served(quick: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(client_module, "SERVICE_RESTART_BACKOFF_S", 0.01)
    setup = setup_for(quick, [POOL], io_threads=IO_THREADS)
    client, mover, transport = started_direct(setup, fence_timeout_ms=300, load_timeout_ms=1_000)
    yield client, mover, transport
    transport.gate.set()
    client.close()


def test_while_the_engine_sleeps_no_page_is_touched_and_then_all_is_as_before(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, mover, transport = served
    hashes, calls = chain(N, "kept"), list[str]()
    assert store(client, make_store(POOL, hashes, range(N))) == ("stored",)
    monkeypatch.setattr(transport, "register", lambda *_, **__: calls.append("register"))
    monkeypatch.setattr(transport, "deregister", lambda *_: calls.append("deregister"))
    mover.lagging = {"scatter"}
    client.submit_load(1, (make_run(POOL, hashes, range(40, 44)),))
    until(lambda: mover.scatters == 1)
    client.suspend()
    assert calls == ["deregister"]
    POOL.memory[:] ^= 0xFF
    asleep = POOL.memory.copy()
    mover.lagging = set()
    (result,) = results_of(client)
    assert isinstance(result, LoadResult) and result.kinds != ("",)
    for _ in range(20):
        client.poll()
        assert load(client, make_run(POOL, hashes, range(48, 52))).kinds != ("",)
    assert store(client, make_store(POOL, chain(N, "asleep"), range(N))) == ("failed",)
    assert (POOL.memory == asleep).all()
    assert client.mode == "down"
    client.wake()
    assert calls == ["deregister", "register"]
    check_works(client, mover, "awake")
    assert load(client, make_run(POOL, hashes, range(48, 52))).kinds == ("",)


def test_a_hung_transfer_does_not_keep_the_engine_awake_but_its_memory(served: Served) -> None:
    client, mover, transport = served
    hashes = chain(N, "kept")
    assert store(client, make_store(POOL, hashes, range(N))) == ("stored",)
    transport.gate.clear()
    client.submit_load(1, (make_run(POOL, hashes, range(40, 44)),))
    until(lambda: transport.waiting == 1)
    client.suspend()
    asleep = POOL.memory.copy()
    assert client._slots.is_prepared, "the transport may still write there"
    transport.gate.set()
    until(lambda: not transport.waiting)
    results_of(client)
    assert (POOL.memory == asleep).all()
    client.wake()
    check_works(client, mover, "awake")


def test_a_copy_that_does_not_end_keeps_the_engine_awake(served: Served) -> None:
    client, mover, _ = served
    hashes = chain(N, "kept")
    assert store(client, make_store(POOL, hashes, range(N))) == ("stored",)
    mover.lagging = {"scatter"}
    client.submit_load(1, (make_run(POOL, hashes, range(40, 44)),))
    until(lambda: mover.scatters == 1)
    mover.hang = "scatter"
    for ticket in mover.order:
        ticket.hold = lambda _stream: None  # type: ignore[method-assign]
    with pytest.raises(GpuOverdue):
        client.suspend()
    mover.lagging, mover.hang = set(), ""
    client.wake()
    results_of(client)
    check_works(client, mover, "awake")


def test_a_transport_that_does_not_take_our_memory_at_wake_up_leaves_an_engine_that_misses(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client, _, transport = served
    client.suspend()

    def refuse(*_: object, **__: object) -> None:
        raise TransportError("no memory of yours")

    with monkeypatch.context() as patch:
        patch.setattr(transport, "register", refuse)
        client.wake()
    assert "nothing is stored or loaded any more" in caplog.text and "no memory of yours" in caplog.text
    assert store(client, make_store(POOL, chain(N, "none"), range(N))) == ("failed",)
    client.wake()
    until(lambda: client.poll() == [] and client.mode == "process")
    assert store(client, make_store(POOL, chain(N, "some"), range(N))) == ("stored",)
