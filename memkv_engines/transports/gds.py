"""GDS transport: files through kvikio, into and out of device memory or host memory.

Two names, and nothing in between: ``gds/gpudirect`` where kvikio uses cuFile, cuFile has the GPUDirect path, and the
fallback inside cuFile is off, so that a file it cannot serve directly is an error and not a slow success;
``gds/compat`` where kvikio copies through host buffers of its own. Pieces of device memory below kvikio's
``gds_threshold`` (16 KiB: headers) go through host buffers in either case.

kvikio's settings belong to the process: they are set here, once. The I/O process has no other user of kvikio; in the
engine's process (device memory) another one would get the same settings.
``task_size`` is 4 MiB, so that a chunk of the default size is one request and larger ones are split over threads;
``num_threads`` is the number of chunks in flight (``io_threads``); ``bounce_buffer_size`` is 4 MiB per thread, because
it is page-locked and only the compatibility path uses it. None of this was measured on a GPU yet.

kvikio writes into read-only buffers, reports a short file without an error number, and opens files by path only: the
first is refused here, the second is asked of the file, and for the third the path is one below ``/proc/self/fd``, which
names the very inode that the tier has opened, also when it was unlinked meanwhile.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from memkv_engines.errors import ChunkMissing, ChunkTruncated, ConfigError, MemKVError, TierFull, TransportError
from memkv_engines.limits import (
    ALIGN_BYTES,
    GDS_BOUNCE_BYTES,
    GDS_TASK_BYTES,
    MAX_CACHED_FILES,
    MAX_IO_THREADS,
    MAX_TRANSFERS_PER_CALL,
    TRANSFER_TIMEOUT_S,
)
from memkv_engines.log import get_logger
from memkv_engines.transports.base import DeviceView, FileTransport, View
from memkv_engines.transports.files import (
    NO_ROOM,
    check_reach,
    total_bytes,
    why_read_failed,
    why_write_failed,
)

log = get_logger(__name__)

DISTRIBUTIONS = ("kvikio-cu13", "kvikio-cu12")
GPUDIRECT, COMPAT = "gds/gpudirect", "gds/compat"
# All that kvikio raises: C++ exceptions become RuntimeError, arguments it dislikes ValueError.
_ERRORS = (RuntimeError, ValueError, OSError)


class _OpenFile:
    """kvikio's handle of an inode, shared by those who read it."""

    def __init__(self, cufile: Any, key: tuple[int, int] | None) -> None:
        self.cufile, self.key, self.users = cufile, key, 1


@dataclass
class _File:
    """A handle: the tier's descriptor, and what kvikio has open."""

    fd: int
    open: _OpenFile


class GdsTransport(FileTransport[_File]):
    """Files through kvikio.

    Args:
        gpudirect: take the direct path or refuse; else take the compatibility path, on any machine with a CUDA driver.
        direct: whether files are opened with O_DIRECT.
        threads: transfers at a time; a setting of the process.

    Raises:
        ConfigError: kvikio or the driver is missing, or ``gpudirect`` is not to be had; says what is missing.
    """

    moves_device_memory = True

    def __init__(self, *, gpudirect: bool, direct: bool = True, threads: int = 8) -> None:
        if not 1 <= threads <= MAX_IO_THREADS:
            raise ConfigError(f"io_threads={threads}: give a number from 1 to {MAX_IO_THREADS}")
        self._kvikio = _load()
        if gpudirect:
            # cuFile's driver is asked last: where its parts are missing it may hang, and leaves a log file behind.
            missing = what_gpudirect_lacks() or self._driver_lacks()
            if missing:
                raise ConfigError(f"gds=on, but GPUDirect Storage lacks {'; '.join(missing)}. Set gds=auto or gds=off")
        self._configure(gpudirect=gpudirect, direct=direct, threads=threads)
        self._gpudirect = gpudirect
        self.name = COMPAT if self._kvikio.defaults.is_compat_mode_preferred() else GPUDIRECT
        if gpudirect != (self.name == GPUDIRECT):
            raise ConfigError(f"kvikio took {self.name} unasked: set gds=off")
        self.open_flags = os.O_DIRECT if direct else 0
        self.align_bytes = ALIGN_BYTES if direct else 1
        self._lock = threading.Condition()
        self._cached: OrderedDict[tuple[int, int], _OpenFile] = OrderedDict()
        self._registered: dict[int, DeviceView] = {}
        self._calls = 0
        self._closed = False
        self._prove_driver()

    # --- starting ------------------------------------------------------------

    def _driver_lacks(self) -> list[str]:
        driver = self._kvikio.cufile_driver
        try:
            if not driver.get("is_gds_available"):
                return ["a cuFile driver that starts (run gdscheck -p)"]
            if driver.get("allow_compat_mode"):
                return ['"allow_compat_mode": false in cufile.json (cuFile would fall back unseen)']
        except _ERRORS as error:
            return [f"a cuFile driver that answers ({_words(error)})"]
        return []

    def _configure(self, *, gpudirect: bool, direct: bool, threads: int) -> None:
        kvikio = self._kvikio
        mode = kvikio.CompatMode.OFF if gpudirect else kvikio.CompatMode.ON
        kvikio.defaults.set(
            {
                "compat_mode": mode,
                "num_threads": threads,
                "task_size": GDS_TASK_BYTES,
                "bounce_buffer_size": GDS_BOUNCE_BYTES,
                "auto_direct_io_read": direct,
                "auto_direct_io_write": direct,
            }
        )

    def _prove_driver(self) -> None:
        """A byte from a file in memory: kvikio looks for the CUDA driver with its first transfer."""
        fd = os.memfd_create("memkv-kvikio-probe", os.MFD_CLOEXEC)
        os.write(fd, b"x")
        byte = bytearray(1)  # In a name: kvikio's futures do not hold their buffers.
        try:
            with self._kvikio.CuFile(f"/proc/self/fd/{fd}", "r") as file:
                file.pread(byte, 1, 0).get()
        except _ERRORS as error:
            if not self._gpudirect:  # A file in memory is none that cuFile takes.
                raise ConfigError(
                    f"transport=gds: kvikio cannot move a byte: {_words(error)}. Install the NVIDIA driver, or set "
                    "transport=posix"
                ) from error
        finally:
            os.close(fd)

    # --- memory and files ----------------------------------------------------

    def register(self, address: int, length_bytes: int, *, device: int | None = None) -> None:
        if device is None:
            return  # cuFile registers device memory only.
        view = DeviceView(address, length_bytes, device)
        try:
            _registrations.add(view, self._kvikio.memory_register)
        except _ERRORS as error:
            raise TransportError(f"cuFile does not register {length_bytes} B: {_words(error)}") from error
        self._registered[address] = view

    def deregister(self, address: int) -> None:
        view = self._registered.pop(address, None)
        if view is not None:
            try:
                _registrations.remove(view, self._kvikio.memory_deregister)
            except _ERRORS as error:
                raise TransportError(f"cuFile does not deregister memory: {_words(error)}") from error

    def attach(self, fd: int, *, writable: bool = False) -> _File:
        if writable:
            return _File(fd, _OpenFile(self._open(fd, "r+"), None))
        info = os.fstat(fd)
        key = (info.st_dev, info.st_ino)
        with self._lock:
            cached = self._cached.get(key)
            if cached is not None:
                # Open all the time, so the number of the inode cannot have become another file's.
                cached.users += 1
                self._cached.move_to_end(key)
                return _File(fd, cached)
        opened = _OpenFile(self._open(fd, "r"), key)
        with self._lock:
            if self._closed or key in self._cached:
                opened.key = None  # Another thread was first: this one closes with its handle.
            else:
                self._cached[key] = opened
                self._trim()
        return _File(fd, opened)

    def _open(self, fd: int, flags: str) -> Any:
        try:
            return self._kvikio.CuFile(f"/proc/self/fd/{fd}", flags)
        except _ERRORS as error:
            raise TransportError(f"kvikio does not open the file: {_words(error)}") from error

    def detach(self, handle: _File) -> None:
        gone = os.fstat(handle.fd).st_nlink == 0
        with self._lock:
            opened = handle.open
            opened.users -= 1
            if gone and opened.key is not None and self._cached.get(opened.key) is opened:
                del self._cached[opened.key]  # Evicted: let the file system have its space.
                opened.key = None
            if opened.key is None and not opened.users:
                opened.cufile.close()
        os.close(handle.fd)

    def _trim(self) -> None:
        """Close what was unused for longest; the lock is held."""
        for key in [k for k, o in self._cached.items() if not o.users][: max(0, len(self._cached) - MAX_CACHED_FILES)]:
            self._cached.pop(key).cufile.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._lock.wait_for(lambda: not self._calls, TRANSFER_TIMEOUT_S)
            for opened in self._cached.values():
                opened.key = None
                if not opened.users:
                    opened.cufile.close()
            self._cached.clear()
        for address in list(self._registered):
            self.deregister(address)

    # --- moving --------------------------------------------------------------

    def write(self, handle: _File, views: Sequence[View], offset: int) -> int:
        def failed(words: str) -> MemKVError:
            if _says(words, *NO_ROOM):
                return TierFull(f"no room on the device: {words}")
            return why_write_failed(handle.fd, views, offset, self.align_bytes, words)

        self._move(handle.open.cufile.pwrite, views, offset, failed)
        return total_bytes(views)

    def read(self, handle: _File, views: Sequence[View], offset: int) -> None:
        if any(isinstance(view, memoryview) and view.readonly for view in views):
            raise BufferError("read into memory that is read-only")
        total = total_bytes(views)
        if total:
            check_reach(handle.fd, offset + total)

        def failed(words: str) -> MemKVError:
            if _says(words, errno.ESTALE):
                return ChunkMissing("object vanished under the reader")
            if words.endswith("EOF"):
                return ChunkTruncated("object ends early")
            return why_read_failed(handle.fd, views, offset, self.align_bytes, words)

        self._move(handle.open.cufile.pread, views, offset, failed)

    def _move(
        self, start: Callable[..., Any], views: Sequence[View], offset: int, failed: Callable[[str], MemKVError]
    ) -> None:
        self._check_alignment(views, offset)
        wanted = [view for view in views if view.nbytes]
        with self._call():
            for first in range(0, len(wanted), MAX_TRANSFERS_PER_CALL):
                batch = wanted[first : first + MAX_TRANSFERS_PER_CALL]
                words = _Batch().run(start, batch, offset)
                if words:
                    raise failed(words)
                offset += total_bytes(batch)

    @contextmanager
    def _call(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise TransportError("the transport is closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                self._lock.notify_all()

    def _check_alignment(self, views: Sequence[View], offset: int) -> None:
        """Device memory only: kvikio would move what is misaligned through host memory, unseen."""
        position = offset
        for view in views:
            if isinstance(view, DeviceView):
                for what, number in (("address", view.address), ("length", view.nbytes), ("offset", position)):
                    if number % self.align_bytes:
                        raise TransportError(
                            f"{what} {number:#x} of a device buffer is no multiple of {self.align_bytes} B, which "
                            "GPUDirect needs: align the staging slots"
                        )
            position += view.nbytes


class _Registrations:
    """What cuFile knows of: a matter of the process, where each of several directories has a transport of its own."""

    def __init__(self) -> None:
        self._users: dict[DeviceView, int] = {}
        self._lock = threading.Lock()

    def add(self, view: DeviceView, register: Callable[[DeviceView], None]) -> None:
        """Register at its first use; raises what kvikio does."""
        with self._lock:
            if view not in self._users:
                register(view)
            self._users[view] = self._users.get(view, 0) + 1

    def remove(self, view: DeviceView, deregister: Callable[[DeviceView], None]) -> None:
        """Deregister after its last use; raises what kvikio does."""
        with self._lock:
            self._users[view] -= 1
            if not self._users[view]:
                del self._users[view]
                deregister(view)


_registrations = _Registrations()


class _Batch:
    """Transfers of one call. Buffers are held until the last of them has ended, whatever happens to the others."""

    def __init__(self) -> None:
        self._futures: list[tuple[Any, View]] = []

    def run(self, start: Callable[..., Any], views: Sequence[View], offset: int) -> str:
        """Start all, wait for all; what went wrong first, empty for nothing."""
        words = ""
        try:
            for view in views:
                self._futures.append((start(_as_buffer(view), view.nbytes, offset, GDS_TASK_BYTES), view))
                offset += view.nbytes
        except _ERRORS as error:
            words = _words(error)
        for future, view in self._futures:
            try:
                moved = future.get()
            except _ERRORS as error:
                words = words or _words(error)
            else:
                if moved != view.nbytes:
                    words = words or f"short transfer: {moved} of {view.nbytes} B"
        return words


def _as_buffer(view: View) -> Any:
    return view if isinstance(view, DeviceView) else view.cast("B") if view.format != "B" else view


def _words(error: BaseException) -> str:
    """What kvikio says, without the place in its sources."""
    return re.sub(r"^.*? at: \S+:\d+: ", "", str(error), flags=re.DOTALL)


def _says(words: str, *numbers: int) -> bool:
    return any(words.endswith(os.strerror(number)) for number in numbers)


# ------------------------------------------------------------------------------------------------ what is installed


def installed_version() -> str:
    """Version of the installed kvikio, empty if there is none. Imports nothing."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def what_gpudirect_lacks(root: Path = Path("/")) -> list[str]:
    """What this machine lacks for GPUDirect Storage, as far as files tell; empty for nothing. Starts no driver."""
    lacks = []
    if not any((root / "proc/driver/nvidia/gpus").glob("*")):
        lacks.append("a GPU with its driver")
    if not any((root / path).exists() for path in ("proc/driver/nvidia-fs/version", "sys/module/nvidia_fs")):
        lacks.append("the kernel module nvidia_fs (modprobe nvidia_fs, from package nvidia-fs or gds-tools)")
    if not installed_version():
        lacks.append("the package kvikio-cu13 or kvikio-cu12")
    return lacks


def _load() -> Any:
    try:
        import kvikio
        import kvikio.cufile_driver
        import kvikio.defaults
    except ImportError as error:
        raise ConfigError(
            f"transport=gds: kvikio cannot be imported ({error}): pip install kvikio-cu13, or set transport=posix"
        ) from error
    return kvikio
