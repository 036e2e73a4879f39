"""The real NIXL behind our contract, and each of its traps, reproduced."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from memkv_engines.errors import ConfigError, TransferOverdue, TransportError
from memkv_engines.limits import ALIGN_BYTES, BOUNCE_BYTES
from memkv_engines.transports import nixl as module
from memkv_engines.transports.base import DeviceView
from memkv_engines.transports.files import address_of, prove
from memkv_engines.transports.nixl import NixlTransport
from tests.fast.samples import aligned, noise
from tests.fast.transport_contract import FileContract, blank

PAGE = ALIGN_BYTES


class NixlContract(FileContract):
    """POSIX plugin with one kind of queue."""

    direct: bool
    options: dict[str, str] | None = None
    name: str

    @pytest.fixture
    def transport(self, tmp_path: Path) -> Iterator[NixlTransport]:
        transport = NixlTransport(direct=self.direct, options=self.options)
        yield transport
        transport.close()

    def test_its_name_says_what_was_taken(self, transport: NixlTransport) -> None:
        assert transport.name == self.name
        assert not transport.moves_device_memory


class TestUringDirect(NixlContract):
    direct, name = True, "nixl/posix-uring/direct"

    def test_misalignment_is_told(self, transport: NixlTransport, path: Path) -> None:
        handle = self.opened(transport, path)
        with pytest.raises(TransportError, match="multiples of 4096"):
            transport.write(handle, [aligned(bytes(PAGE))[:100]], 0)
        transport.detach(handle)


class TestUringBuffered(NixlContract):
    direct, name = False, "nixl/posix-uring/buffered"


class TestAioDirect(NixlContract):
    direct, name, options = True, "nixl/posix/direct", {"use_aio": "true"}


@pytest.fixture
def transport() -> Iterator[NixlTransport]:
    transport = NixlTransport(direct=False, timeout_s=0.1)
    yield transport
    transport._timeout_s = 0.1
    transport.close()


# ---------------------------------------------------------------------------------------------------- what never ends


class Pipe:
    """An "object" whose reads end when the test says so: io_uring waits for a pipe as for a device that hangs."""

    def __init__(self, transport: NixlTransport, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "check_reach", lambda *_: None)
        self.fd, self._write_end = os.pipe()
        self.file = transport.attach(self.fd)

    def deliver(self, data: bytes) -> None:
        os.write(self._write_end, data)

    def close(self) -> None:
        os.close(self._write_end)


@pytest.fixture
def pipe(transport: NixlTransport, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    pipe = Pipe(transport, monkeypatch)
    yield pipe
    pipe.close()


def until(condition: object, timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


@pytest.fixture
def pool(transport: NixlTransport) -> memoryview:
    pool = blank(8 * PAGE)
    transport.register(address_of(pool), len(pool))
    return pool


def test_an_overdue_read_says_when_its_memory_is_free_again(
    transport: NixlTransport, pipe: Pipe, pool: memoryview, tmp_path: Path
) -> None:
    (tmp_path / "object").write_bytes(noise(2 * PAGE))
    other = transport.attach(os.open(tmp_path / "object", os.O_RDONLY))
    start = time.monotonic()
    with pytest.raises(TransferOverdue, match="not done") as caught:
        transport.read(pipe.file, [pool[:PAGE]], 0)
    assert 0.1 <= time.monotonic() - start < 2.0
    ended = caught.value.ended
    assert not ended()
    # Other memory is as good as ever; this memory is refused, also where a piece only touches it.
    transport.read(other, [pool[PAGE : 3 * PAGE]], 0)
    assert pool[PAGE : 3 * PAGE] == noise(2 * PAGE)
    for view in (pool[:PAGE], pool[: 2 * PAGE], pool[PAGE // 2 : PAGE]):
        with pytest.raises(TransportError, match="overdue transfer may still write"):
            transport.read(other, [view], 0)
    # This is why: the bytes land long after the call has failed.
    assert pool[:PAGE] == b"\xee" * PAGE
    pipe.deliver(b"A" * PAGE)
    assert until(ended)
    assert pool[:PAGE] == b"A" * PAGE
    transport.read(other, [pool[: 2 * PAGE]], 0)
    assert pool[: 2 * PAGE] == noise(2 * PAGE)
    transport.detach(other)
    transport.detach(pipe.file)


def test_the_number_of_a_descriptor_is_not_free_before_its_transfer_has_ended(
    transport: NixlTransport, pipe: Pipe, pool: memoryview
) -> None:
    with pytest.raises(TransferOverdue) as caught:
        transport.read(pipe.file, [pool[:PAGE]], 0)
    transport.detach(pipe.file)
    os.fstat(pipe.fd)
    pipe.deliver(b"A" * PAGE)
    assert until(caught.value.ended)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pipe.fd)


def test_late_bytes_for_memory_that_was_not_registered_land_in_memory_of_ours(
    transport: NixlTransport, pipe: Pipe, tmp_path: Path
) -> None:
    view = blank(PAGE)
    with pytest.raises(TransferOverdue) as caught:
        transport.read(pipe.file, [view], 0)
    pipe.deliver(b"A" * PAGE)
    assert until(caught.value.ended)
    assert view == b"\xee" * PAGE
    (tmp_path / "object").write_bytes(noise(PAGE))
    other = transport.attach(os.open(tmp_path / "object", os.O_RDONLY))
    transport.read(other, [view], 0)
    assert view == noise(PAGE)
    transport.detach(other)
    transport.detach(pipe.file)


def test_memory_of_an_overdue_transfer_stays_registered(transport: NixlTransport, pipe: Pipe, pool: memoryview) -> None:
    with pytest.raises(TransferOverdue) as caught:
        transport.read(pipe.file, [pool[:PAGE]], 0)
    transport.deregister(address_of(pool))
    pipe.deliver(b"A" * PAGE)
    assert until(caught.value.ended)
    assert pool[:PAGE] == b"A" * PAGE
    transport.detach(pipe.file)


def test_a_device_that_hangs_gets_a_bounded_number_of_transfers(
    transport: NixlTransport, pipe: Pipe, pool: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_OVERDUE_TRANSFERS", 3)
    transport._timeout_s = 0.01
    overdue = []
    for index in range(3):
        with pytest.raises(TransferOverdue) as caught:
            transport.read(pipe.file, [pool[index * PAGE : (index + 1) * PAGE]], 0)
        overdue.append(caught.value)
    with pytest.raises(TransportError, match="the device hangs"):
        transport.read(pipe.file, [pool[4 * PAGE : 5 * PAGE]], 0)
    pipe.deliver(b"A" * 3 * PAGE)
    assert until(lambda: all(error.ended() for error in overdue))
    pipe.deliver(b"B" * PAGE)
    transport.read(pipe.file, [pool[4 * PAGE : 5 * PAGE]], 0)
    assert pool[4 * PAGE : 5 * PAGE] == b"B" * PAGE
    transport.detach(pipe.file)


def test_one_piece_that_fails_does_not_hide_another_that_hangs(
    transport: NixlTransport, pipe: Pipe, pool: memoryview
) -> None:
    """NIXL would report a list of both as failed, and the late bytes of the second would land unseen."""
    other = blank(PAGE)
    transport.register(address_of(other), PAGE)
    pipe.deliver(b"A" * PAGE)
    failing = transport._post

    def post(file: object, run: object, *, reads: bool) -> object:
        if run.address == address_of(other):  # type: ignore[attr-defined]
            raise transport._errors[0]("a piece that fails")
        return failing(file, run, reads=reads)  # type: ignore[arg-type]

    transport._post = post  # type: ignore[method-assign,assignment]
    with pytest.raises(TransferOverdue) as caught:
        transport.read(pipe.file, [pool[:PAGE], pool[2 * PAGE : 3 * PAGE], other], 0)
    pipe.deliver(b"B" * PAGE)
    assert until(caught.value.ended)
    assert (pool[:PAGE], pool[2 * PAGE : 3 * PAGE]) == (b"A" * PAGE, b"B" * PAGE)
    transport.detach(pipe.file)


def test_closing_over_a_transfer_that_never_ends_keeps_its_memory(
    transport: NixlTransport, pipe: Pipe, pool: memoryview
) -> None:
    with pytest.raises(TransferOverdue) as caught:
        transport.read(pipe.file, [pool[:PAGE]], 0)
    start = time.monotonic()
    transport.close()
    assert time.monotonic() - start < 2.0
    assert transport in module._never_ended
    pipe.deliver(b"A" * PAGE)
    assert until(caught.value.ended)
    assert pool[:PAGE] == b"A" * PAGE
    transport.detach(pipe.file)
    module._never_ended.remove(transport)


# ------------------------------------------------------------------------------------------------------------ the rest


def test_memory_that_was_not_registered_goes_through_a_bounded_buffer(transport: NixlTransport, tmp_path: Path) -> None:
    data = noise(2 * BOUNCE_BYTES + 3 * PAGE)
    (tmp_path / "object").write_bytes(data)
    file = transport.attach(os.open(tmp_path / "object", os.O_RDWR), writable=True)
    view = blank(len(data))
    transport._timeout_s = 5.0
    transport.read(file, [view], 0)
    assert view == data
    assert len(transport._bounces) == 1
    view[:] = noise(len(data), 1)
    transport.write(file, [view[: len(data) // 2], view[len(data) // 2 :]], 0)
    assert (tmp_path / "object").read_bytes() == noise(len(data), 1)
    transport.detach(file)


def test_device_memory_is_refused_by_a_plugin_that_cannot_move_it(transport: NixlTransport, tmp_path: Path) -> None:
    (tmp_path / "object").write_bytes(noise(PAGE))
    file = transport.attach(os.open(tmp_path / "object", os.O_RDONLY))
    with pytest.raises(TransportError, match="does not register"):
        transport.register(1 << 20, PAGE, device=0)
    with pytest.raises(TransportError, match="must be registered"):
        transport.read(file, [DeviceView(1 << 20, PAGE)], 0)
    transport.detach(file)


def test_a_full_device_is_told_by_asking_for_room(
    transport: NixlTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NIXL says BACKEND for everything; here a read-only descriptor fails, and the file system has no room."""
    import errno

    from memkv_engines.errors import TierFull
    from memkv_engines.transports import files

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "object").write_bytes(b"")
    file = transport.attach(os.open(tmp_path / "object", os.O_RDONLY))
    with pytest.raises(TransportError, match="NIXL_ERR_BACKEND"):
        transport.write(file, [aligned(noise(PAGE))], 0)
    monkeypatch.setattr(files.os, "posix_fallocate", no_room)
    with pytest.raises(TierFull, match="No space left"):
        transport.write(file, [aligned(noise(PAGE))], 0)
    transport.detach(file)


def test_a_file_that_shrinks_under_the_read_is_truncated(
    transport: NixlTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memkv_engines.errors import ChunkTruncated

    (tmp_path / "object").write_bytes(noise(PAGE))
    file = transport.attach(os.open(tmp_path / "object", os.O_RDONLY))
    monkeypatch.setattr(module, "check_reach", lambda *_: None)
    with pytest.raises(ChunkTruncated):
        transport.read(file, [blank(2 * PAGE)], 0)
    transport.detach(file)


def test_many_threads_share_one_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NIXL's default mode is not for threads. It does not crash reliably, so the mode itself is looked at too."""
    asked: list[object] = []
    api, errors = module._load()

    def config(**arguments: object) -> object:
        asked.append(arguments["sync_mode"])
        return api.nixl_agent_config(**arguments)

    spied = SimpleNamespace(**{**vars(api), "nixl_agent_config": config})
    monkeypatch.setattr(module, "_load", lambda: (spied, errors))
    data = noise(64 * PAGE)
    (tmp_path / "object").write_bytes(data)
    transport = NixlTransport(direct=False)
    pool = blank(8 * PAGE)
    transport.register(address_of(pool), len(pool))

    def work(number: int) -> None:
        view = pool[number * PAGE : (number + 1) * PAGE]
        for step in range(40):
            handle = transport.attach(os.open(tmp_path / "object", os.O_RDONLY))
            at = (number * 31 + step * 7) % 64
            transport.read(handle, [view], at * PAGE)
            assert view == data[at * PAGE : (at + 1) * PAGE]
            transport.detach(handle)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    transport.close()
    assert asked == [api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT]


def test_a_probe_of_a_directory_leaves_nothing(transport: NixlTransport, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    prove(transport, fd, [aligned(noise(PAGE)), blank(PAGE)])
    os.close(fd)
    assert list(tmp_path.iterdir()) == []


def test_aio_is_taken_where_io_uring_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    start = NixlTransport._start

    def refuse_uring(self: NixlTransport, options: dict[str, str]) -> None:
        if "use_uring" in options:
            raise ConfigError("Operation not permitted")
        start(self, options)

    monkeypatch.setattr(NixlTransport, "_start", refuse_uring)
    transport = NixlTransport()
    assert transport.name == "nixl/posix-aio/direct"
    transport.close()
    monkeypatch.setattr(NixlTransport, "_prove_queue", lambda _: (_ for _ in ()).throw(TransportError("no aio")))
    with pytest.raises(ConfigError, match=r"uring.*aio.*transport=posix"):
        NixlTransport()


@pytest.mark.parametrize("version", ["1.4.1", "0.9", "1.4.99.post1"])
def test_releases_that_report_short_reads_as_done_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "installed_version", lambda: version)
    with pytest.raises(ConfigError, match=rf"NIXL {version}.*1\.5\.0 or later.*transport=posix"):
        NixlTransport()


def refusal_of(plugin: str) -> str:
    """What is said of a plugin, in a process of its own: beside the fake CUDA driver of these tests the real cuFile
    hangs, and UCX takes the process with it when that ends."""
    program = (
        "from memkv_engines.transports.nixl import NixlTransport\n"
        "from memkv_engines.errors import ConfigError\n"
        f"try: NixlTransport({plugin!r})\n"
        "except ConfigError as error: print(error)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environ)
    assert done.stdout, done.stderr
    return done.stdout


@pytest.mark.parametrize("plugin", ["GDS", "GDS_MT"])
def test_a_plugin_that_does_not_load_is_told_with_the_loaders_words(plugin: str) -> None:
    said = refusal_of(plugin)
    assert f"nixl_plugin='{plugin}' cannot be used: libcufile.so.0: cannot open" in said
    assert "transport=posix" in said


def test_a_plugin_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"no libplugin_NOWHERE\.so in .*POSIX"):
        NixlTransport("NOWHERE")


def test_a_plugin_that_moves_no_files_is_refused() -> None:
    assert "to FILE_SEG" in refusal_of("UCX")


# ------------------------------------------------------------------------------------------------ what NIXL refuses


class Refusing:
    """An agent one of whose methods raises; the others are the real one's."""

    def __init__(self, transport: NixlTransport, method: str) -> None:
        self._transport, self._agent, self._method = transport, transport._agent, method

    def __enter__(self) -> None:
        self._transport._agent = self

    def __exit__(self, *_: object) -> None:
        self._transport._agent = self._agent

    def __getattr__(self, name: str) -> object:
        if name != self._method:
            return getattr(self._agent, name)

        def refuse(*_: object, **__: object) -> None:
            raise self._transport._errors[0]("not this one")

        return refuse


def test_an_agent_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    api, errors = module._load()

    def refuse(*_: object) -> None:
        raise errors[0]("no agent")

    spied = SimpleNamespace(**{**vars(api), "nixl_agent": refuse})
    monkeypatch.setattr(module, "_load", lambda: (spied, errors))
    with pytest.raises(ConfigError, match="NIXL does not start: no agent"):
        NixlTransport(options={})


def test_a_queue_that_gives_other_bytes_back_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NixlTransport, "read", lambda *_: None)
    with pytest.raises(ConfigError, match="it reads other bytes than it wrote"):
        NixlTransport()


def test_a_file_that_is_refused_and_memory_that_is_kept(transport: NixlTransport, tmp_path: Path) -> None:
    (tmp_path / "object").write_bytes(noise(PAGE))
    fd = os.open(tmp_path / "object", os.O_RDONLY)
    with Refusing(transport, "register_memory"), pytest.raises(TransportError, match="does not take the file"):
        transport.attach(fd)
    handle = transport.attach(fd)
    with Refusing(transport, "deregister_memory"):
        transport.detach(handle)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_transfer_that_is_done_when_it_was_posted(transport: NixlTransport, tmp_path: Path) -> None:
    (tmp_path / "object").write_bytes(noise(PAGE))
    handle, view = transport.attach(os.open(tmp_path / "object", os.O_RDONLY)), blank(PAGE)
    real = transport._agent

    class AtOnce(Refusing):
        def transfer(self, request: object) -> str:
            state = real.transfer(request)
            while state == "PROC":
                state = real.check_xfer_state(request)
            return str(state)

    with AtOnce(transport, ""):
        transport.read(handle, [view], 0)
    assert view == noise(PAGE)
    transport.detach(handle)


def test_a_transfer_that_is_not_released_has_ended_all_the_same(transport: NixlTransport, tmp_path: Path) -> None:
    (tmp_path / "object").write_bytes(noise(PAGE))
    handle, view = transport.attach(os.open(tmp_path / "object", os.O_RDONLY)), blank(PAGE)
    with Refusing(transport, "release_xfer_handle"):
        transport.read(handle, [view], 0)
    assert view == noise(PAGE)
    transport.detach(handle)


def test_an_overdue_transfer_that_fails_has_ended(transport: NixlTransport, pipe: Pipe, pool: memoryview) -> None:
    with pytest.raises(TransferOverdue) as caught:
        transport.read(pipe.file, [pool[:PAGE]], 0)
    pipe.deliver(b"A" * PAGE)  # It ends for NIXL as well, so that the handle can be released.
    with Refusing(transport, "check_xfer_state"):
        assert until(caught.value.ended)
    transport.detach(pipe.file)


def test_empty_pieces_are_none(transport: NixlTransport, tmp_path: Path) -> None:
    (tmp_path / "object").write_bytes(noise(PAGE))
    handle, view = transport.attach(os.open(tmp_path / "object", os.O_RDONLY)), blank(PAGE)
    transport.read(handle, [view[:0], view, view[:0]], 0)
    assert view == noise(PAGE)
    transport.detach(handle)
