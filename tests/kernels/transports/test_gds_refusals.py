"""What kvikio and cuFile refuse, and what several transports of one process share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memkv_engines.errors import ConfigError, TransportError
from memkv_engines.limits import ALIGN_BYTES
from memkv_engines.transports.gds import GdsTransport
from tests.fast.samples import noise
from tests.fast.transport_contract import blank

PAGE = ALIGN_BYTES


@pytest.fixture
def transport() -> Iterator[GdsTransport]:
    transport = GdsTransport(gpudirect=False, direct=True, threads=4)
    yield transport
    transport.close()


def refuse(*_: object) -> None:
    raise RuntimeError("KvikIO failure at: somewhere.cpp:1: not this one")


def test_memory_and_files_that_kvikio_refuses(transport: GdsTransport, tmp_path: Path) -> None:
    (tmp_path / "object").write_bytes(noise(PAGE))
    known = transport._kvikio
    transport.register(PAGE, PAGE)  # Host memory is not for cuFile to know.
    transport._kvikio = SimpleNamespace(memory_register=lambda _: None)
    transport.register(PAGE, PAGE, device=0)
    transport._kvikio = SimpleNamespace(memory_register=refuse, memory_deregister=refuse, CuFile=refuse)
    with pytest.raises(TransportError, match="cuFile does not register 4096 B: not this one"):
        transport.register(2 * PAGE, PAGE, device=0)
    with pytest.raises(TransportError, match="cuFile does not deregister memory: not this one"):
        transport.deregister(PAGE)
    fd = os.open(tmp_path / "object", os.O_RDONLY)
    with pytest.raises(TransportError, match="kvikio does not open the file: not this one"):
        transport.attach(fd)
    os.close(fd)
    transport._kvikio = known


def test_memory_is_registered_once_for_all_transports_of_the_process() -> None:
    """Each of several directories has a transport; cuFile refuses what it knows already."""
    calls = list[tuple[str, int]]()
    stub = SimpleNamespace(
        memory_register=lambda view: calls.append(("register", view.address)),
        memory_deregister=lambda view: calls.append(("deregister", view.address)),
    )
    one, other = (GdsTransport(gpudirect=False) for _ in range(2))
    for each in (one, other):
        each._kvikio = stub
        each.register(PAGE, PAGE, device=0)
    assert calls == [("register", PAGE)]
    one.close()
    one.deregister(PAGE)
    assert calls == [("register", PAGE)]
    other.close()
    assert calls == [("register", PAGE), ("deregister", PAGE)]


@pytest.mark.parametrize("threads", [0, 1000])
def test_a_number_of_threads_out_of_bounds_is_refused(threads: int) -> None:
    with pytest.raises(ConfigError, match=f"io_threads={threads}: give a number from 1"):
        GdsTransport(gpudirect=False, threads=threads)


def test_what_a_driver_of_cufile_lacks(transport: GdsTransport) -> None:
    known = transport._kvikio
    answers = {"is_gds_available": True, "allow_compat_mode": False}
    transport._kvikio = SimpleNamespace(cufile_driver=answers)
    assert transport._driver_lacks() == []
    transport._kvikio = SimpleNamespace(cufile_driver=SimpleNamespace(get=refuse))
    assert transport._driver_lacks() == ["a cuFile driver that answers (not this one)"]
    transport._kvikio = known


def test_kvikio_that_moves_no_byte_is_refused_but_where_files_in_memory_are_none_of_its(
    transport: GdsTransport,
) -> None:
    known = transport._kvikio
    transport._kvikio = SimpleNamespace(CuFile=refuse)
    with pytest.raises(ConfigError, match="kvikio cannot move a byte: not this one"):
        transport._prove_driver()
    transport._gpudirect = True
    transport._prove_driver()
    transport._kvikio, transport._gpudirect = known, False


def test_of_two_threads_that_open_one_file_at_once_the_second_keeps_its_own(
    transport: GdsTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "object").write_bytes(noise(PAGE))
    first, second = (os.open(tmp_path / "object", os.O_RDONLY) for _ in range(2))
    opening, handles = transport._open, list[Any]()

    def open_between(fd: int, flags: str) -> Any:
        opened = opening(fd, flags)
        if not handles:
            handles.append(None)
            handles[0] = transport.attach(first)
        return opened

    monkeypatch.setattr(transport, "_open", open_between)
    handles.append(transport.attach(second))
    assert handles[0].open is not handles[1].open
    assert list(transport._cached.values()) == [handles[0].open]
    for handle in handles:
        view = blank(PAGE)
        transport.read(handle, [view], 0)
        assert view == noise(PAGE)
        transport.detach(handle)
    assert handles[1].open.cufile.closed
