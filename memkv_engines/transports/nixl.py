"""NIXL transport: transfers between registered memory and files through a NIXL storage plugin, chosen by name.

What NIXL does not promise, and what is done about it (each reproduced with 1.5.1, see ``tests/kernels/transports``):

* Releases before 1.5.0 report a short read as done, with the old bytes behind it: they are refused. A file's size is
  asked before each read all the same, and our digests decide in the end.
* A transfer cannot be called back: releasing one that is under way "succeeds", and its bytes land later. So a transfer
  is never released before it has ended. One that is overdue becomes a ``TransferOverdue``: the descriptor stays open
  (its number could else become another chunk's), the memory stays registered and referenced, its owner withholds it,
  and reads into it are refused until the transfer has been seen to end. If it never ends, staging runs dry, the load's
  deadline passes, and the engine kills the I/O process: after that nothing can land.
* The state of a list of pieces says "failed" while others of them are under way: each piece is a transfer of its own.
* An agent shared by threads crashes in the default synchronisation mode: STRICT it is.
* ``use_posix_aio`` stays broken after one error: it is never used.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from memkv_engines.errors import ConfigError, TransferOverdue, TransportError
from memkv_engines.limits import (
    ALIGN_BYTES,
    BOUNCE_BYTES,
    MAX_CHUNK_BYTES,
    MAX_OVERDUE_TRANSFERS,
    MAX_TRANSFERS_PER_CALL,
    TRANSFER_POLL_S,
    TRANSFER_TIMEOUT_S,
)
from memkv_engines.log import get_logger
from memkv_engines.transports.base import DeviceView, FileTransport, View
from memkv_engines.transports.files import address_of, check_reach, total_bytes, why_read_failed, why_write_failed
from memkv_engines.transports.nixl_install import installed_version, why_missing, why_unusable

log = get_logger(__name__)

POSIX = "POSIX"
# Plugins over cuFile.
GDS_PLUGINS = ("GDS", "GDS_MT")
_ENGINES_OF_POSIX = (("uring", {"use_uring": "true"}), ("aio", {"use_aio": "true"}))
_DRAM, _VRAM, _FILE = "DRAM", "VRAM", "FILE"
_agent_numbers = itertools.count()


@dataclass
class _File:
    """An open file; its registration lives as long as it."""

    fd: int
    registration: Any
    under_way: int = 0
    detached: bool = False


@dataclass(frozen=True)
class _Region:
    """Registered memory ``[start, stop)``."""

    start: int
    stop: int
    device: int | None
    registration: Any


@dataclass(eq=False)
class _Transfer:
    """One piece under way: between memory ``[start, stop)`` and a file."""

    handle: Any
    file: _File
    reads: bool
    start: int
    stop: int
    keeps: object = None
    ended: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class _Run:
    """Consecutive bytes in memory and file."""

    address: int
    nbytes: int
    offset: int
    device: int | None
    views: tuple[View, ...] = ()


class NixlTransport(FileTransport[_File]):
    """Files through one NIXL agent with one plugin.

    Args:
        plugin: name of the storage plugin: ``POSIX`` (host memory; io_uring, else libaio), ``GDS``, ``GDS_MT``, or any
            other that NIXL finds, in ``NIXL_PLUGIN_DIR`` if that is set. It must move DRAM or VRAM to FILE.
        direct: whether files are opened with O_DIRECT.
        options: the plugin's own options; for ``POSIX`` they are chosen here.
        timeout_s: age at which a transfer is given up.

    Raises:
        ConfigError: NIXL is absent or too old, or the plugin does not work here; the message says why and what to do.
    """

    def __init__(
        self,
        plugin: str = POSIX,
        *,
        direct: bool = True,
        options: dict[str, str] | None = None,
        timeout_s: float = TRANSFER_TIMEOUT_S,
    ) -> None:
        self._api, self._errors = _load()
        self._plugin, self._timeout_s = plugin, timeout_s
        self.open_flags = os.O_DIRECT if direct else 0
        self.align_bytes = ALIGN_BYTES if direct else 1
        self._lock = threading.Lock()
        self._regions: tuple[_Region, ...] = ()
        self._overdue: tuple[_Transfer, ...] = ()
        self._bounces: list[_Bounce] = []
        self._lost_bounces: list[_Bounce] = []
        self._closed = False
        kind = plugin.lower()
        if plugin == POSIX and options is None:
            kind = f"{kind}-{self._start_posix()}"
        else:
            self._start(options or {})
        self.name = f"nixl/{kind}/{'direct' if direct else 'buffered'}"
        self.moves_device_memory = f"{_VRAM}_SEG" in self._agent.get_backend_mem_types(plugin)

    # --- starting ------------------------------------------------------------

    def _start_posix(self) -> str:
        """Start POSIX with the first kind of queue that works here; returns its name."""
        refused = {}
        for kind, options in _ENGINES_OF_POSIX:
            try:
                self._start(options)
                self._prove_queue()
                return kind
            except (ConfigError, TransportError) as error:
                refused[kind] = str(error)
        raise ConfigError(
            f"nixl_plugin=POSIX does not work here: {refused}. Allow io_uring or Linux AIO in the container's seccomp "
            "profile, or set transport=posix"
        )

    def _start(self, options: dict[str, str]) -> None:
        config = self._api.nixl_agent_config(
            backends=[],
            enable_prog_thread=False,
            sync_mode=self._api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
        )
        try:
            agent = self._api.nixl_agent(f"memkv-{os.getpid()}-{next(_agent_numbers)}", config)
        except self._errors as error:
            raise ConfigError(f"NIXL does not start: {error}. Set transport=posix, or mend NIXL_PLUGIN_DIR") from error
        try:
            agent.create_backend(self._plugin, options)
        except self._errors as error:
            raise ConfigError(
                f"nixl_plugin={self._plugin!r} cannot be used: {why_missing(self._plugin, agent.get_plugin_list())} "
                f"({error}). Set nixl_plugin to one that loads, or transport=posix"
            ) from error
        kinds = agent.get_backend_mem_types(self._plugin)
        if f"{_FILE}_SEG" not in kinds or not {f"{_DRAM}_SEG", f"{_VRAM}_SEG"} & set(kinds):
            raise ConfigError(
                f"nixl_plugin={self._plugin!r} moves {', '.join(kinds) or 'nothing'}: a directory tier needs a plugin "
                "that moves memory to FILE_SEG"
            )
        self._agent, self._regions = agent, ()
        self._bounces.clear()

    def _prove_queue(self) -> None:
        """A page there and back through a file in memory: some kernels refuse io_uring only when it is used."""
        fd = os.memfd_create("memkv-nixl-probe", os.MFD_CLOEXEC)
        file = self.attach(fd, writable=True)
        try:
            page = memoryview(mmap.mmap(-1, 2 * ALIGN_BYTES))
            page[:ALIGN_BYTES] = os.urandom(ALIGN_BYTES)
            self.write(file, [page[:ALIGN_BYTES]], 0)
            self.read(file, [page[ALIGN_BYTES:]], 0)
            if page[:ALIGN_BYTES] != page[ALIGN_BYTES:]:
                raise TransportError("it reads other bytes than it wrote")
        finally:
            self.detach(file)

    # --- memory and files ----------------------------------------------------

    def register(self, address: int, length_bytes: int, *, device: int | None = None) -> None:
        kind = _DRAM if device is None else _VRAM
        try:
            registration = self._agent.register_memory(
                [(address, length_bytes, device or 0, "")], kind, backends=[self._plugin]
            )
        except self._errors as error:
            raise TransportError(f"{self._plugin} does not register {length_bytes} B of {kind}: {error}") from error
        with self._lock:
            self._regions += (_Region(address, address + length_bytes, device, registration),)

    def deregister(self, address: int) -> None:
        with self._lock:
            gone = [r for r in self._regions if r.start == address]
            self._regions = tuple(r for r in self._regions if r.start != address)
        for region in gone:
            if self._is_overdue(region.start, region.stop):
                continue  # Registered until the process ends: the device may still write there.
            self._take_back(region.registration)

    def attach(self, fd: int, *, writable: bool = False) -> _File:
        try:
            registration = self._agent.register_memory([(0, MAX_CHUNK_BYTES, fd, "")], _FILE, backends=[self._plugin])
        except self._errors as error:
            raise TransportError(f"{self._plugin} does not take the file: {error}") from error
        return _File(fd, registration)

    def detach(self, handle: _File) -> None:
        with self._lock:
            handle.detached = True
            if handle.under_way:
                return  # An overdue transfer still has the descriptor; what sees it end closes it.
        self._release_file(handle)

    def _release_file(self, file: _File) -> None:
        self._take_back(file.registration)
        os.close(file.fd)

    def _take_back(self, registration: Any) -> None:
        try:
            self._agent.deregister_memory(registration, backends=[self._plugin])
        except self._errors as error:
            log.warning("%s does not deregister memory: %s", self._plugin, error)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + self._timeout_s
        while self._reap() and time.monotonic() < deadline:
            time.sleep(TRANSFER_POLL_S)
        if self._overdue:
            log.warning("%d NIXL transfers never ended; their memory stays registered", len(self._overdue))
            _never_ended.append(self)
            return
        for region in self._regions:
            self._take_back(region.registration)
        self._regions = ()
        self._bounces.clear()

    # --- moving --------------------------------------------------------------

    def write(self, handle: _File, views: Sequence[View], offset: int) -> int:
        try:
            self._move(handle, views, offset, reads=False)
        except self._errors as error:
            raise why_write_failed(handle.fd, views, offset, self.align_bytes, str(error)) from error
        return total_bytes(views)

    def read(self, handle: _File, views: Sequence[View], offset: int) -> None:
        total = total_bytes(views)
        if not total:
            return
        if any(isinstance(view, memoryview) and view.readonly for view in views):
            raise BufferError("read into memory that is read-only")
        check_reach(handle.fd, offset + total)
        try:
            self._move(handle, views, offset, reads=True)
        except self._errors as error:
            raise why_read_failed(handle.fd, views, offset, self.align_bytes, str(error)) from error

    def _move(self, file: _File, views: Sequence[View], offset: int, *, reads: bool) -> None:
        if len(self._reap()) >= MAX_OVERDUE_TRANSFERS:
            raise TransportError(f"{MAX_OVERDUE_TRANSFERS} transfers are overdue: the device hangs")
        direct: list[_Run] = []
        for run in _runs(views, offset):
            if reads and self._is_overdue(run.address, run.address + run.nbytes):
                raise TransportError("an overdue transfer may still write into this memory")
            if self._region_of(run) is not None:
                direct.append(run)
            elif run.device is not None:
                raise TransportError("device memory must be registered before it is read into or written from")
            else:
                self._bounce(file, run, reads=reads)
        for start in range(0, len(direct), MAX_TRANSFERS_PER_CALL):
            self._transfer(file, direct[start : start + MAX_TRANSFERS_PER_CALL], reads=reads)

    def _bounce(self, file: _File, run: _Run, *, reads: bool) -> None:
        """Memory that is not registered goes through a buffer that is: late bytes then land in ours."""
        memory = memoryview((ctypes.c_ubyte * run.nbytes).from_address(run.address)).cast("B")
        bounce = self._take_bounce()
        try:
            for start in range(0, run.nbytes, BOUNCE_BYTES):
                stop = min(start + BOUNCE_BYTES, run.nbytes)
                if not reads:
                    bounce.view[: stop - start] = memory[start:stop]
                self._transfer(file, [_Run(bounce.address, stop - start, run.offset + start, None)], reads=reads)
                if reads:
                    memory[start:stop] = bounce.view[: stop - start]
        except TransferOverdue:
            with self._lock:
                self._lost_bounces.append(bounce)
            raise
        except BaseException:
            self._give_bounce(bounce)
            raise
        self._give_bounce(bounce)

    def _give_bounce(self, bounce: _Bounce) -> None:
        with self._lock:
            self._bounces.append(bounce)

    def _take_bounce(self) -> _Bounce:
        with self._lock:
            if self._bounces:
                return self._bounces.pop()
        bounce = _Bounce()
        self.register(bounce.address, BOUNCE_BYTES)
        return bounce

    def _transfer(self, file: _File, runs: Sequence[_Run], *, reads: bool) -> None:
        """Move some runs at the same time. Returns, or raises what NIXL does, when none is under way any more."""
        deadline = time.monotonic() + self._timeout_s
        failure: Exception | None = None
        under_way: list[_Transfer] = []
        try:
            for run in runs:
                transfer = self._post(file, run, reads=reads)
                if transfer is not None:
                    under_way.append(transfer)
        except self._errors as error:
            failure = error
        while under_way:
            time.sleep(TRANSFER_POLL_S)
            for transfer in list(under_way):
                try:
                    if not self._has_ended(transfer):
                        continue
                except self._errors as error:
                    failure = failure or error
                under_way.remove(transfer)
            if under_way and time.monotonic() > deadline:
                self._give_up(under_way, reads=reads)
        if failure is not None:
            raise failure

    def _post(self, file: _File, run: _Run, *, reads: bool) -> _Transfer | None:
        """Start one transfer; None if it is done already."""
        agent, device = self._agent, run.device
        handle = agent.initialize_xfer(
            "READ" if reads else "WRITE",
            agent.get_xfer_descs([(run.address, run.nbytes, device or 0)], _DRAM if device is None else _VRAM),
            agent.get_xfer_descs([(run.offset, run.nbytes, file.fd)], _FILE),
            agent.name,
            backends=[self._plugin],
        )
        transfer = _Transfer(handle, file, reads, run.address, run.address + run.nbytes, run.views)
        with self._lock:
            file.under_way += 1
        try:
            state = agent.transfer(handle)
        except self._errors:
            self._end(transfer)
            raise
        if state == "PROC":
            return transfer
        self._end(transfer)
        return None

    def _has_ended(self, transfer: _Transfer) -> bool:
        """Look at a transfer, and let go of it if it has ended; raises what NIXL does if it failed."""
        with transfer.lock:
            if transfer.ended:
                return True
            try:
                if self._agent.check_xfer_state(transfer.handle) == "PROC":
                    return False
            except self._errors:
                self._end(transfer)
                raise
            self._end(transfer)
            return True

    def _end(self, transfer: _Transfer) -> None:
        transfer.ended = True
        transfer.keeps = None
        try:
            self._agent.release_xfer_handle(transfer.handle)
        except self._errors as error:
            log.warning("NIXL does not release a transfer that has ended: %s", error)
        file = transfer.file
        with self._lock:
            file.under_way -= 1
            closes = file.detached and not file.under_way
        if closes:
            self._release_file(file)

    # --- what does not end in time -------------------------------------------

    def _give_up(self, transfers: Sequence[_Transfer], *, reads: bool) -> None:
        with self._lock:
            self._overdue += tuple(transfers)
        what = "read" if reads else "write"
        raise TransferOverdue(
            f"{len(transfers)} {what}(s) by {self._plugin} are not done after {self._timeout_s:g} s",
            lambda: all([self._ended_or_failed(t) for t in transfers]),
        )

    def _ended_or_failed(self, transfer: _Transfer) -> bool:
        try:
            return self._has_ended(transfer)
        except self._errors:
            return True

    def _reap(self) -> tuple[_Transfer, ...]:
        """Let go of overdue transfers that have ended meanwhile; returns the others."""
        if not self._overdue:
            return ()
        ended = [t for t in self._overdue if self._ended_or_failed(t)]
        with self._lock:
            self._overdue = tuple(t for t in self._overdue if t not in ended)
            return self._overdue

    def _is_overdue(self, start: int, stop: int) -> bool:
        return any(t.reads and not t.ended and t.start < stop and start < t.stop for t in self._overdue)

    def _region_of(self, run: _Run) -> _Region | None:
        for region in self._regions:
            if region.start <= run.address and run.address + run.nbytes <= region.stop and region.device == run.device:
                return region
        return None


class _Bounce:
    """A page-aligned buffer."""

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, BOUNCE_BYTES))
        self.address = address_of(self.view)


def _load() -> tuple[Any, tuple[type[Exception], ...]]:
    """NIXL's API and all its errors, which have no common base; RuntimeError is its Python part's."""
    why = why_unusable(installed_version())
    if why:
        raise ConfigError(f"transport=nixl: {why}; or set transport=posix")
    try:
        import nixl
        from nixl import _bindings as bindings
    except ImportError as error:
        raise ConfigError(f"transport=nixl: NIXL cannot be imported: {error}. Set transport=posix") from error
    errors = tuple(c for c in vars(bindings).values() if isinstance(c, type) and issubclass(c, Exception))
    return nixl, (*errors, RuntimeError)


# Transports that were closed over a transfer that never ended: what the device may still touch must not be freed.
_never_ended: list[NixlTransport] = []


def _runs(views: Sequence[View], offset: int) -> Iterator[_Run]:
    """The views as few pieces as possible: those that follow each other in memory are one."""
    address = nbytes = 0
    device: int | None = None
    group: list[View] = []
    for view in views:
        if not view.nbytes:
            continue
        begin, where = address_of(view), view.device if isinstance(view, DeviceView) else None
        if group and begin == address + nbytes and where == device:
            group.append(view)
            nbytes += view.nbytes
            continue
        if group:
            yield _Run(address, nbytes, offset, device, tuple(group))
            offset += nbytes
        address, nbytes, device, group = begin, view.nbytes, where, [view]
    if group:
        yield _Run(address, nbytes, offset, device, tuple(group))
