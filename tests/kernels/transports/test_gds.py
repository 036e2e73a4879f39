"""The real kvikio behind our contract, on its compatibility path: the CUDA driver is ``tests/fake_cuda``.

What no test here can show, for want of a GPU: cuFile itself, and with it the path called ``gds/gpudirect``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memkv_engines.errors import ChunkMissing, ChunkTruncated, ConfigError, TierFull, TransportError
from memkv_engines.limits import ALIGN_BYTES, GDS_TASK_BYTES, MAX_CACHED_FILES, MIB
from memkv_engines.transports import gds as module
from memkv_engines.transports.base import DeviceView
from memkv_engines.transports.gds import COMPAT, GPUDIRECT, GdsTransport, what_gpudirect_lacks
from tests.fake_cuda.control import FakeCuda, load
from tests.fast.samples import aligned, noise
from tests.fast.transport_contract import FileContract, blank, open_descriptors

PAGE = ALIGN_BYTES
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def driver() -> FakeCuda:
    """The driver, and a context as PyTorch would have made it. Reset once: kvikio keeps its streams for ever."""
    fake = load()
    fake.reset()
    cuda, context, device = fake.library, ctypes.c_void_p(), ctypes.c_int()
    assert cuda.cuInit(0) == cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
    assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    assert cuda.cuCtxSetCurrent(context) == 0
    return fake


@pytest.fixture
def fake(driver: FakeCuda) -> Iterator[FakeCuda]:
    """The same, and nothing was done that a real driver would only forgive."""
    driver.clear_violations()
    yield driver
    assert driver.report().violations == []


class GdsContract(FileContract):
    direct: bool

    @pytest.fixture
    def transport(self, fake: FakeCuda) -> Iterator[GdsTransport]:
        transport = GdsTransport(gpudirect=False, direct=self.direct, threads=4)
        yield transport
        transport.close()

    def test_it_is_called_what_it_is(self, transport: GdsTransport) -> None:
        assert transport.name == COMPAT
        assert transport.moves_device_memory


class TestHostMemoryDirect(GdsContract):
    direct = True


class TestHostMemoryBuffered(GdsContract):
    direct = False


# -------------------------------------------------------------------------------------------------------- device memory


class DeviceMemory:
    """Memory of the fake device, looked into with the driver's own copies."""

    def __init__(self, fake: FakeCuda, nbytes: int) -> None:
        self._cuda, self.nbytes = fake.library, nbytes
        pointer = ctypes.c_uint64()
        assert self._cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(nbytes + PAGE)) == 0
        self.address = pointer.value + -pointer.value % PAGE
        self._allocation = pointer.value

    def view(self, start: int = 0, stop: int | None = None) -> DeviceView:
        return DeviceView(self.address + start, (self.nbytes if stop is None else stop) - start)

    def fill(self, data: bytes) -> None:
        assert self._cuda.cuMemcpyHtoD_v2(ctypes.c_uint64(self.address), data, ctypes.c_size_t(len(data))) == 0

    def bytes(self) -> bytes:
        held = ctypes.create_string_buffer(self.nbytes)
        assert self._cuda.cuMemcpyDtoH_v2(held, ctypes.c_uint64(self.address), ctypes.c_size_t(self.nbytes)) == 0
        return held.raw


@pytest.fixture
def transport(fake: FakeCuda) -> Iterator[GdsTransport]:
    transport = GdsTransport(gpudirect=False, direct=True, threads=4)
    yield transport
    transport.close()


def write_handle(transport: GdsTransport, path: Path) -> Any:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | transport.open_flags
    return transport.attach(os.open(path, flags, 0o600), writable=True)


def read_handle(transport: GdsTransport, path: Path) -> Any:
    return transport.attach(os.open(path, os.O_RDONLY | os.O_CLOEXEC | transport.open_flags))


@pytest.mark.parametrize("pages", [1, 3, 2 * GDS_TASK_BYTES // PAGE + 5])
def test_device_memory_goes_out_and_comes_back(
    transport: GdsTransport, fake: FakeCuda, tmp_path: Path, pages: int
) -> None:
    data = noise(pages * PAGE)
    source, target = DeviceMemory(fake, len(data)), DeviceMemory(fake, len(data))
    source.fill(data)
    for memory in (source, target):
        transport.register(memory.address, memory.nbytes, device=0)
    handle = write_handle(transport, tmp_path / "object")
    assert transport.write(handle, [source.view()], 0) == len(data)
    assert (tmp_path / "object").read_bytes() == data
    transport.read(handle, [target.view()], 0)
    assert target.bytes() == data
    transport.detach(handle)
    for memory in (source, target):
        transport.deregister(memory.address)


def test_header_in_host_memory_and_payload_in_device_memory(
    transport: GdsTransport, fake: FakeCuda, tmp_path: Path
) -> None:
    header, payload = noise(2 * PAGE), noise(5 * PAGE, 1)
    memory = DeviceMemory(fake, 8 * PAGE)
    memory.fill(payload + bytes(3 * PAGE))
    handle = write_handle(transport, tmp_path / "object")
    transport.write(handle, [aligned(header), memory.view(0, 3 * PAGE), memory.view(3 * PAGE, 5 * PAGE)], 0)
    assert (tmp_path / "object").read_bytes() == header + payload
    memory.fill(b"\xee" * 8 * PAGE)
    view = blank(2 * PAGE)
    transport.read(handle, [view, memory.view(PAGE, 6 * PAGE)], 0)
    assert view == header
    assert memory.bytes() == b"\xee" * PAGE + payload + b"\xee" * 2 * PAGE
    transport.detach(handle)


@pytest.mark.parametrize(
    ("start", "stop", "offset", "what"),
    [(512, PAGE + 512, 0, "address"), (0, PAGE - 1, 0, "length"), (0, PAGE, 100, "offset")],
)
def test_misaligned_device_memory_is_refused_before_anything_moves(
    transport: GdsTransport, fake: FakeCuda, tmp_path: Path, start: int, stop: int, offset: int, what: str
) -> None:
    memory = DeviceMemory(fake, 4 * PAGE)
    handle = write_handle(transport, tmp_path / "object")
    with pytest.raises(TransportError, match=f"^{what} .* no multiple of 4096"):
        transport.write(handle, [memory.view(0, PAGE), memory.view(start, stop)], offset)
    assert (tmp_path / "object").read_bytes() == b""
    transport.detach(handle)


@pytest.mark.parametrize("length", [0, 1, PAGE, 3 * PAGE - 1])
def test_a_truncated_file_is_truncated_for_device_memory_too(
    transport: GdsTransport, fake: FakeCuda, tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = DeviceMemory(fake, 3 * PAGE)
    (tmp_path / "object").write_bytes(noise(length))
    handle = read_handle(transport, tmp_path / "object")
    with pytest.raises(ChunkTruncated):
        transport.read(handle, [memory.view()], 0)
    # The file may also become shorter after its size was looked at: then kvikio's error decides.
    monkeypatch.setattr(module, "check_reach", lambda *_: None)
    with pytest.raises(ChunkTruncated):
        transport.read(handle, [memory.view()], 0)
    transport.detach(handle)


def test_device_memory_that_is_none_is_an_error(transport: GdsTransport, fake: FakeCuda, tmp_path: Path) -> None:
    """kvikio takes an address that no driver knows for host memory, so memory must come from who allocated it."""
    (tmp_path / "object").write_bytes(noise(PAGE))
    handle = read_handle(transport, tmp_path / "object")
    with pytest.raises(TransportError):
        transport.read(handle, [DeviceView(0, PAGE)], 0)
    transport.detach(handle)


@pytest.mark.parametrize("call", ["cuMemcpyBatchAsync", "cuStreamSynchronize"])
def test_errors_of_the_driver_are_ours(transport: GdsTransport, fake: FakeCuda, tmp_path: Path, call: str) -> None:
    (tmp_path / "object").write_bytes(noise(4 * PAGE))
    memory = DeviceMemory(fake, 4 * PAGE)
    handle = read_handle(transport, tmp_path / "object")
    fake.fail(call, 719)
    with pytest.raises(TransportError, match="read failed"):
        transport.read(handle, [memory.view()], 0)
    fake.unfail(call)
    transport.read(handle, [memory.view()], 0)
    assert memory.bytes() == noise(4 * PAGE)
    transport.detach(handle)


def test_threads_move_device_memory_at_the_same_time(transport: GdsTransport, fake: FakeCuda, tmp_path: Path) -> None:
    count, size = 12, 64 * PAGE
    memory = DeviceMemory(fake, count * size)
    for index in range(count):
        (tmp_path / str(index)).write_bytes(noise(size, index))

    def read(index: int) -> None:
        handle = read_handle(transport, tmp_path / str(index))
        transport.read(handle, [memory.view(index * size, (index + 1) * size)], 0)
        transport.detach(handle)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(read, range(count)))
    held = memory.bytes()
    assert all(held[i * size : (i + 1) * size] == noise(size, i) for i in range(count))


# ----------------------------------------------------------------------------------------------------- errors, by table


class Future:
    """Of a transfer that ends as the test wants."""

    def __init__(self, result: int | Exception, after: threading.Event | None = None) -> None:
        self._result, self._after, self.asked = result, after, False

    def get(self) -> int:
        self.asked = True
        if self._after is not None:
            assert self._after.wait(5.0)
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


def failing(transport: GdsTransport, path: Path, *results: int | Exception) -> tuple[Any, list[Future]]:
    """A handle whose transfers end as given, one after the other."""
    path.write_bytes(noise(8 * PAGE))
    handle = write_handle(transport, path)
    handle.open.cufile.close()
    futures = [Future(result) for result in results]
    taken = iter(futures)

    def start(*_: object) -> Future:
        return next(taken)

    handle.open.cufile = SimpleNamespace(pread=start, pwrite=start, close=lambda: None)
    return handle, futures


def said(number: int, call: str = "pwrite") -> RuntimeError:
    return RuntimeError(f"KvikIO failure at: /a/b/posix_io.hpp:90: POSIX error on {call}: {os.strerror(number)}")


@pytest.mark.parametrize(
    ("error", "ours", "says"),
    [
        (said(errno.ENOSPC), TierFull, "No space left"),
        (said(errno.EDQUOT), TierFull, "quota"),
        (said(errno.EFBIG), TierFull, "too large"),
        (said(errno.EIO), TransportError, "write failed: POSIX error on pwrite: Input/output error"),
        (
            RuntimeError("KvikIO failure at: /a:1: POSIX error: Operation not permitted"),
            TransportError,
            "not permitted",
        ),
        (ValueError("Size is greater than the size of the buffer"), TransportError, "Size is greater"),
        (RuntimeError("CUDA error at: /a/shim.cpp:12: CUDA_ERROR_ILLEGAL_ADDRESS"), TransportError, "ILLEGAL_ADDRESS"),
        (RuntimeError("cuFile error at: /a.cpp:1: GPUDirect Storage internal error"), TransportError, "internal error"),
        (PAGE - 1, TransportError, "short transfer: 4095 of 4096 B"),
    ],
)
def test_what_kvikio_says_of_a_write(
    transport: GdsTransport, tmp_path: Path, error: int | Exception, ours: type[Exception], says: str
) -> None:
    handle, _ = failing(transport, tmp_path / "object", error)
    with pytest.raises(ours, match=says) as caught:
        transport.write(handle, [aligned(bytes(PAGE))], 0)
    assert type(caught.value) is ours
    transport.detach(handle)


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (said(errno.ESTALE, "pread"), ChunkMissing),
        (said(errno.EIO, "pread"), TransportError),
        (RuntimeError("KvikIO failure at: /a:1: POSIX error on pread: EOF"), ChunkTruncated),
        (17, TransportError),
    ],
)
def test_what_kvikio_says_of_a_read(
    transport: GdsTransport, tmp_path: Path, error: int | Exception, ours: type[Exception]
) -> None:
    handle, _ = failing(transport, tmp_path / "object", error)
    with pytest.raises(ours) as caught:
        transport.read(handle, [blank(PAGE)], 0)
    assert type(caught.value) is ours
    transport.detach(handle)


def test_after_a_failure_the_other_transfers_are_waited_for(transport: GdsTransport, tmp_path: Path) -> None:
    """Or they would land in memory that is someone else's by then."""
    handle, futures = failing(transport, tmp_path / "object", PAGE, said(errno.EIO), PAGE, said(errno.ENOSPC))
    with pytest.raises(TransportError, match="Input/output error"):
        transport.read(handle, [blank(PAGE) for _ in range(4)], 0)
    assert all(future.asked for future in futures)
    transport.detach(handle)


def test_a_transfer_that_does_not_start_waits_for_those_that_did(transport: GdsTransport, tmp_path: Path) -> None:
    handle, futures = failing(transport, tmp_path / "object", PAGE, PAGE)
    start, calls = handle.open.cufile.pread, iter(range(3))

    def third_fails(*arguments: object) -> Future:
        if next(calls) == 2:
            raise RuntimeError("no more")
        future: Future = start(*arguments)
        return future

    handle.open.cufile.pread = third_fails
    with pytest.raises(TransportError, match="no more"):
        transport.read(handle, [blank(PAGE) for _ in range(3)], 0)
    assert all(future.asked for future in futures)
    transport.detach(handle)


def test_buffers_are_held_until_their_transfer_has_ended(transport: GdsTransport, tmp_path: Path) -> None:
    import gc
    import weakref

    handle, (future,) = failing(transport, tmp_path / "object", PAGE)
    future._after = threading.Event()

    class Watched(bytearray):
        pass

    memory = Watched(PAGE)
    gone = weakref.ref(memory)
    views = [memoryview(memory)]
    thread = threading.Thread(target=lambda: transport.read(handle, [views.pop()], 0))
    thread.start()
    while not future.asked:
        time.sleep(0.001)
    del memory
    gc.collect()
    assert gone() is not None
    future._after.set()
    thread.join()
    gc.collect()
    assert gone() is None
    transport.detach(handle)


def test_closing_waits_for_what_is_under_way_and_then_refuses(transport: GdsTransport, tmp_path: Path) -> None:
    handle, (future,) = failing(transport, tmp_path / "object", PAGE)
    future._after = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        reading = threads.submit(transport.read, handle, [blank(PAGE)], 0)
        while not future.asked:
            time.sleep(0.001)
        closing = threads.submit(transport.close)
        time.sleep(0.05)
        assert not closing.done()
        future._after.set()
        reading.result(5.0)
        closing.result(5.0)
    with pytest.raises(TransportError, match="closed"):
        transport.read(handle, [blank(PAGE)], 0)
    transport.detach(handle)


# ------------------------------------------------------------------------------------------------------- handle cache


def test_a_file_is_opened_once_by_kvikio(transport: GdsTransport, tmp_path: Path) -> None:
    (tmp_path / "object").write_bytes(noise(PAGE))
    first, second = read_handle(transport, tmp_path / "object"), read_handle(transport, tmp_path / "object")
    assert first.open is second.open
    transport.detach(first)
    view = blank(PAGE)
    transport.read(second, [view], 0)
    assert view == noise(PAGE)
    transport.detach(second)
    third = read_handle(transport, tmp_path / "object")
    assert third.open is first.open
    transport.detach(third)


def test_open_files_are_bounded(transport: GdsTransport, tmp_path: Path) -> None:
    before = len(open_descriptors())
    for index in range(2 * MAX_CACHED_FILES):
        (tmp_path / str(index)).write_bytes(noise(PAGE, index))
        transport.detach(read_handle(transport, tmp_path / str(index)))
    assert len(transport._cached) == MAX_CACHED_FILES
    # kvikio holds two descriptors per file.
    assert len(open_descriptors()) - before <= 2 * MAX_CACHED_FILES
    transport.close()
    assert len(open_descriptors()) <= before


def test_an_evicted_file_is_not_held(transport: GdsTransport, tmp_path: Path) -> None:
    (tmp_path / "object").write_bytes(noise(PAGE))
    handle = read_handle(transport, tmp_path / "object")
    (tmp_path / "object").unlink()
    transport.detach(handle)
    assert not transport._cached
    assert not [d for d in open_descriptors() if _target(d).startswith(str(tmp_path))]


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


# ------------------------------------------------------------------------------------------------------------ bad input


def run_python(program: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=env)


def test_without_a_cuda_driver_it_says_so() -> None:
    done = run_python(
        "from memkv_engines.transports.gds import GdsTransport\n"
        "from memkv_engines.errors import ConfigError\n"
        "try: GdsTransport(gpudirect=False)\n"
        "except ConfigError as error: print(error)\n"
    )
    assert "libcuda.so.1: cannot open shared object file" in done.stdout, done.stderr
    assert "transport=posix" in done.stdout


def test_gpudirect_without_its_kernel_module_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a GPU with its driver; the kernel module nvidia_fs .*gds=auto"):
        GdsTransport(gpudirect=True)


def test_gpudirect_that_could_fall_back_unseen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "what_gpudirect_lacks", lambda: [])
    kvikio = module._load()
    answers = {"is_gds_available": True, "allow_compat_mode": True}
    fake_driver = SimpleNamespace(get=answers.get)
    monkeypatch.setattr(kvikio, "cufile_driver", fake_driver)
    with pytest.raises(ConfigError, match="cuFile would fall back unseen"):
        GdsTransport(gpudirect=True)
    answers["is_gds_available"] = False
    with pytest.raises(ConfigError, match="gdscheck"):
        GdsTransport(gpudirect=True)


def test_a_fallback_is_never_called_gpudirect(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda) -> None:
    """kvikio was told to use cuFile and prefers its own path all the same."""
    monkeypatch.setattr(module, "what_gpudirect_lacks", lambda: [])
    monkeypatch.setattr(GdsTransport, "_driver_lacks", lambda _: [])
    monkeypatch.setattr(GdsTransport, "_configure", lambda *_, **__: None)
    kvikio = module._load()
    kvikio.defaults.set("compat_mode", kvikio.CompatMode.ON)
    with pytest.raises(ConfigError, match=COMPAT):
        GdsTransport(gpudirect=True)


def test_a_machine_that_has_it_all(tmp_path: Path) -> None:
    (tmp_path / "proc/driver/nvidia/gpus/0000:1b:00.0").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia-fs").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia-fs/version").write_text("version: 2.27")
    assert what_gpudirect_lacks(tmp_path) == []
    assert len(what_gpudirect_lacks(tmp_path / "nowhere")) == 2


def test_settings_are_those_stated(transport: GdsTransport) -> None:
    kvikio = module._load()
    assert kvikio.defaults.get("task_size") == 4 * MIB
    assert kvikio.defaults.get("num_threads") == 4
    assert GPUDIRECT != COMPAT == transport.name
