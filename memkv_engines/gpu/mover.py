"""Moves blocks between the engine's pages on a GPU and staging. The only class other parts use.

Process and threads: lives in the engine's worker process. Any thread may call; a lock makes calls one at a time. No
call waits for the device except those that say so, and nothing ever waits for all of the device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy.typing as npt

from memkv_engines.chunk.layout import KVLayout, align_up
from memkv_engines.errors import GpuError, GpuLost, GpuOverdue
from memkv_engines.gpu.book import TicketBook
from memkv_engines.gpu.kernels import Ids, check_ids
from memkv_engines.gpu.resources import Resources
from memkv_engines.gpu.routes import DeviceGroup, Medium, choose_route
from memkv_engines.gpu.staging import DeviceRing, DeviceSlot
from memkv_engines.gpu.submissions import Submissions
from memkv_engines.gpu.tickets import DigestTicket, Ticket
from memkv_engines.limits import (
    ALIGN_BYTES,
    GPU_COPY_CTAS,
    GPU_DEFAULT_SLOTS,
    GPU_DRAIN_TIMEOUT_S,
    GPU_MAX_TICKETS,
    GPU_POLL_MAX_S,
    GPU_POLL_MIN_S,
    MIB,
)
from memkv_engines.log import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True)
class MoverStats:
    """Counted since the start; ``in_flight`` and ``overdue`` are of now.

    ``overdue`` are tickets that someone's ``wait`` gave up on: their slots are quarantined until the work has ended.
    """

    gathers: int
    scatters: int
    moved_bytes: int
    failed: int
    in_flight: int
    overdue: int
    free_slots: int


class DeviceMover:
    """Gathers and scatters blocks; see ``gpu/README.md`` for the contract with the engine's streams.

    ``gather``, ``scatter`` and their device variants either raise, and then nothing was queued; or return None when no
    slot is free (poll tickets, try again, or shed); or return a ticket. A failure after the first queued operation is
    the ticket's: it is ``done`` when the memory is quiet, and ``check`` raises.

    Order: a gather reads, and a scatter writes, the pages only after all that ``after_stream`` had been given when the
    call was made. So the caller hands over the stream that the forward pass runs on, after having queued that pass.
    The other direction, the engine's later work against ours, is ``ticket.hold(stream)``.

    Args:
        device: ordinal among the visible devices.
        slot_bytes: what a device slot holds: header and payload of a chunk, as ``offload.groups.Group.slot_bytes``.
        slots: device slots; each is one chunk in flight.
        copy_ctas: multiprocessors that a gather or scatter may occupy.
        bulk: use the bulk-copy kernels where possible (sm_90+).
        medium: where staging lies: ``host`` or ``gpu`` (GPUDirect).

    Raises:
        GpuUnavailable: no driver, device, or kernels: take another path.
        GpuError: no memory. Blocking: tens of milliseconds.
    """

    def __init__(
        self,
        device: int = 0,
        *,
        slot_bytes: int,
        slots: int = GPU_DEFAULT_SLOTS,
        copy_ctas: int = GPU_COPY_CTAS,
        bulk: bool = False,
        medium: Medium = "host",
    ) -> None:
        self._resources = Resources(device, slot_bytes, slots, copy_ctas, bulk=bulk)
        self._driver, self._medium = self._resources.driver, medium
        self._book = TicketBook(self._driver, self._slot_ended)
        self._submissions = Submissions(self._resources, self._book, self._advance, self._hold)
        self._groups: dict[int, DeviceGroup] = {}
        self._host: tuple[int, int] | None = None
        self._lock = threading.RLock()
        self._paused = self._closed = False
        self._gathers = self._scatters = self._moved_bytes = 0
        _log.info(
            "GPU staging: %d slots of %.1f MiB on device %d, kernels from %s, %s",
            slots, slot_bytes / MIB, device, self._resources.kernels.origin,
            self._driver.reason_no_batch or "batch copies",
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------- set-up

    def add_group(self, group: int, layout: KVLayout) -> DeviceGroup:
        """Make a KV group known: plans its tiles and uploads them (once per pool; blocks for the upload).

        The log gets its route and the reason.

        Raises:
            LayoutError: the layout cannot be moved.
            GpuError: known already, a block is larger than a slot, addresses that are no device memory, or the driver
                failed.
        """
        stride_bytes = align_up(layout.block_bytes)
        with self._device():
            self._refuse_unusable()
            if group in self._groups:
                raise GpuError(f"group {group} is known already")
            if stride_bytes > self._ring.slot_bytes:
                raise GpuError(f"a block of {layout.block_bytes} B is larger than a slot of {self._ring.slot_bytes} B")
            route = choose_route(layout, self._medium, batch_copies=self._driver.batch_copies)
            self._resources.make_tiles(group, layout, stride_bytes)
            self._groups[group] = DeviceGroup(layout, stride_bytes, route)
        _log.info("group %d goes by %s: %s", group, route.kind, route.reason)
        return self._groups[group]

    def register_host(self, address: int, size_bytes: int) -> None:
        """Pin the staging region that this process shares with the I/O process. Blocking: about 0.3 s per GiB.

        It must stay mapped until ``pause`` or ``close`` has returned. One region at a time.

        Raises:
            GpuError: misaligned, there is one already, or it cannot be pinned.
        """
        with self._device():
            self._refuse_unusable()
            if self._host is not None:
                raise GpuError("there is a host region already")
            self._resources.pin(address, size_bytes)
            self._host = address, size_bytes

    # --------------------------------------------------------------------------------------------- host staging

    def gather(
        self, group: int, block_ids: npt.ArrayLike, payload_address: int, *, after_stream: int, holes: int = 0
    ) -> Ticket | None:
        """Copy blocks into a host slot. When done, block i lies at ``payload_address + (holes + i) * stride_bytes``.

        Holes and the padding behind each block are zero then, whatever the slot held before; the slot's other bytes
        (header) are left alone. The slot must not be touched by anyone until ``done``.

        Args:
            group: as given to ``add_group``.
            block_ids: pages, in chunk order.
            payload_address: of block index 0 in the registered region, a multiple of 4 KiB.
            after_stream: the engine's compute stream (``torch.cuda.current_stream().cuda_stream``).
            holes: leading blocks that are absent.

        Raises:
            GpuError: bad arguments, ``after_stream`` is being captured into a CUDA graph, or paused.
            GpuLost: the context is broken.
        """
        with self._device():
            known, ids = self._checked(group, block_ids, after_stream, distinct=False)
            if holes < 0:
                raise GpuError(f"holes={holes} must not be negative")
            size_bytes = (holes + ids.size) * known.stride_bytes
            self._check_host(payload_address, size_bytes)
            if known.route.direct:
                if not self._room():
                    return None
                ticket = self._submissions.gather_direct(
                    known.layout, known.stride_bytes, ids, payload_address, holes, after_stream
                )
                return self._count(ticket)
            self._check_fits(size_bytes)
            slot = self._take_slot()
            if slot is None:
                return None
            return self._count(
                self._submissions.gather_staged(group, ids, slot, 0, holes, after_stream, payload_address)
            )

    def scatter(
        self, group: int, payload_address: int, block_ids: npt.ArrayLike, *, after_stream: int
    ) -> Ticket | None:
        """Copy verified blocks from a host slot into pages; the first lies at ``payload_address``.

        The pages must be allocated to the request already and not be used before ``done`` and ``check``, or before
        ``hold`` where the caller checks later. Arguments and errors as for ``gather``; ids must be distinct.
        """
        with self._device():
            known, ids = self._checked(group, block_ids, after_stream, distinct=True)
            size_bytes = (ids.size - 1) * known.stride_bytes + known.layout.block_bytes
            self._check_host(payload_address, size_bytes)
            if known.route.direct:
                if not self._room():
                    return None
                ticket = self._submissions.scatter_direct(
                    known.layout, known.stride_bytes, ids, payload_address, after_stream
                )
                return self._count(ticket)
            self._check_fits(size_bytes)
            slot = self._take_slot()
            if slot is None:
                return None
            return self._count(
                self._submissions.scatter_staged(group, ids, slot, 0, after_stream, (payload_address, size_bytes))
            )

    # ------------------------------------------------------------------------------------------- device staging

    def acquire_slot(self) -> DeviceSlot | None:
        """A device slot for a transport that reads and writes device memory itself, or None at once."""
        with self._device():
            self._refuse_unusable()
            return self._take_slot()

    def release_slot(self, slot: DeviceSlot) -> None:
        """Give it back; reused when the work of its tickets has ended. The transport must have finished with it."""
        with self._lock:
            if self._resources.ring is not None:
                self._resources.ring.release(slot)

    def gather_to_device(
        self,
        group: int,
        block_ids: npt.ArrayLike,
        slot: DeviceSlot,
        offset_bytes: int,
        *,
        after_stream: int,
        holes: int = 0,
    ) -> Ticket:
        """As ``gather``, into a device slot: block index 0 at ``slot.address + offset_bytes`` (a multiple of 4 KiB)."""
        with self._device():
            known, ids = self._checked(group, block_ids, after_stream, distinct=False)
            if holes < 0:
                raise GpuError(f"holes={holes} must not be negative")
            self._check_slot(slot, offset_bytes, (holes + ids.size) * known.stride_bytes)
            return self._count(
                self._submissions.gather_staged(group, ids, slot, offset_bytes, holes, after_stream, None)
            )

    def scatter_from_device(
        self, group: int, slot: DeviceSlot, offset_bytes: int, block_ids: npt.ArrayLike, *, after_stream: int
    ) -> Ticket:
        """As ``scatter``, from a device slot whose content the transport has reported as read."""
        with self._device():
            known, ids = self._checked(group, block_ids, after_stream, distinct=True)
            self._check_slot(slot, offset_bytes, (ids.size - 1) * known.stride_bytes + known.layout.block_bytes)
            return self._count(self._submissions.scatter_staged(group, ids, slot, offset_bytes, after_stream, None))

    def leaf_digests(
        self, group: int, slot: DeviceSlot, offset_bytes: int, block_count: int, *, loading: bool
    ) -> DigestTicket:
        """Digest blocks in a device slot; feed ``leaf_bytes`` to ``checksum.block_digest_of_leaves``.

        Args:
            group: whose blocks they are.
            slot: acquired by the caller.
            offset_bytes: of the first block in the slot, a multiple of 4 KiB.
            block_count: consecutive blocks.
            loading: False: runs after the gathers submitted so far. True: at once, beside them.
        """
        with self._device():
            known = self._group(group)
            if block_count < 1:
                raise GpuError(f"block_count={block_count} must be at least 1")
            self._check_slot(slot, offset_bytes, (block_count - 1) * known.stride_bytes + known.layout.block_bytes)
            stream = self._resources.streams["scatter" if loading else "gather"]
            return self._submissions.leaf_digests(
                slot, offset_bytes, block_count, known.layout.block_bytes, known.stride_bytes, stream
            )

    # --------------------------------------------------------------------------------------------------- life

    def poll(self) -> int:
        """Look at all tickets in flight, so that slots of dropped ones come free; returns how many remain."""
        with self._device():
            return self._book.poll()

    def stats(self) -> MoverStats:
        """What was done so far."""
        with self._lock:
            ring = self._resources.ring
            return MoverStats(
                self._gathers,
                self._scatters,
                self._moved_bytes,
                self._book.failed,
                len(self._book.in_flight),
                sum(ticket.overdue for ticket in self._book.in_flight),
                ring.free_slots if ring else 0,
            )

    def pause(self, timeout_s: float = GPU_DRAIN_TIMEOUT_S) -> None:
        """For an engine's sleep mode: drain, unpin the host region, free tile tables and device slots. Blocking.

        Groups and the host region stay known; slots handed out by ``acquire_slot`` must have been given back.

        Raises:
            GpuOverdue: work has not ended: nothing was freed, no new work is taken; call again.
            GpuError: a slot is held.
        """
        with self._lock:
            self._refuse_closed()
            self._paused = True
        self._drain(timeout_s)
        with self._device():
            self._refuse_lost()
            self._resources.free_memory()

    def resume(self) -> None:
        """Allocate again what ``pause`` freed. The pages must be at their old addresses.

        Raises:
            GpuError: no memory: still paused.
        """
        with self._device():
            self._refuse_closed()
            if not self._paused:
                return
            if self._resources.ring is None:
                self._resources.make_ring()
            for group, known in self._groups.items():
                if group not in self._resources.tiles:
                    self._resources.make_tiles(group, known.layout, known.stride_bytes)
            if self._host is not None and self._resources.host is None:
                self._resources.pin(*self._host)
            self._paused = False

    def close(self, timeout_s: float = GPU_DRAIN_TIMEOUT_S) -> bool:
        """Drain and free everything; may be called again. Blocking.

        Returns:
            Whether all is given back. What a late copy may still reach is not, on purpose, and must stay mapped.
        """
        with self._lock:
            if self._closed:
                return not self._book.in_flight
            self._paused = True
        try:
            self._drain(timeout_s)
            with self._device():
                self._closed = True
                if self._book.lost is None:
                    self._book.destroy_events()
                    self._resources.free_all()
        except GpuLost:
            pass  # Nothing runs any more, and nothing can be freed.
        except GpuError as error:
            self._closed = True
            _log.error("the GPU path ends, and memory that may be in use is left allocated: %s", error)
            return False
        self._closed = True
        self._driver.close()
        return True

    # ------------------------------------------------------------------------------------------------- inside

    def _count(self, ticket: Ticket) -> Ticket:
        if ticket.kind == "gather":
            self._gathers += 1
        else:
            self._scatters += 1
        self._moved_bytes += ticket.size_bytes
        return ticket

    def _slot_ended(self, slot: DeviceSlot, owned: bool) -> None:
        self._ring.end(slot)
        if owned:
            self._ring.release(slot)

    def _advance(self, ticket: Ticket) -> bool:
        if ticket.work.complete:
            return True
        with self._lock:
            if self._closed:
                return ticket.work.complete
            try:
                with self._driver.current():
                    return self._book.advance(ticket)
            except GpuLost as error:
                self._book.lose(error)
            except GpuError as error:
                _log.warning("the CUDA context cannot be made current: %s", error)
            return ticket.work.complete

    def _hold(self, ticket: Ticket, stream: int) -> None:
        with self._device():
            if ticket.work.complete:
                return
            if ticket.work.pages_event is None:
                raise GpuError(
                    f"nothing stands behind this {ticket.kind}, its submission failed: wait until it is done"
                )
            self._driver.wait(stream, ticket.work.pages_event)

    def _drain(self, timeout_s: float) -> None:
        deadline, pause_s = time.monotonic() + timeout_s, GPU_POLL_MIN_S
        while True:
            left = why = None
            try:
                left = self.poll()
            except GpuLost:
                raise
            except GpuError as error:
                why = error
            if left == 0:
                return
            if time.monotonic() >= deadline:
                raise GpuOverdue(f"{why or f'{left} copies have not ended'} after {timeout_s} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, GPU_POLL_MAX_S)

    @contextmanager
    def _device(self) -> Iterator[None]:
        with self._lock:
            self._refuse_closed()
            try:
                with self._driver.current():
                    yield
            except GpuLost as error:
                self._book.lose(error)
                raise

    @property
    def _ring(self) -> DeviceRing:
        assert self._resources.ring is not None, "used while paused"
        return self._resources.ring

    def _room(self) -> bool:
        return len(self._book.in_flight) < GPU_MAX_TICKETS or self._book.poll() < GPU_MAX_TICKETS

    def _take_slot(self) -> DeviceSlot | None:
        if not self._room():
            return None
        if not self._ring.free_slots:
            self._book.poll()
        self._refuse_lost()
        return self._ring.try_acquire()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise GpuError("the mover is closed")

    def _refuse_lost(self) -> None:
        if self._book.lost is not None:
            raise GpuLost(f"the CUDA context is broken: {self._book.lost}")

    def _refuse_unusable(self) -> None:
        self._refuse_lost()
        if self._paused:
            raise GpuError("the mover is paused")

    def _group(self, group: int) -> DeviceGroup:
        self._refuse_unusable()
        if group not in self._groups:
            raise GpuError(f"group {group} is unknown; known are {sorted(self._groups)}")
        return self._groups[group]

    def _checked(
        self, group: int, block_ids: npt.ArrayLike, after_stream: int, *, distinct: bool
    ) -> tuple[DeviceGroup, Ids]:
        known = self._group(group)
        ids = check_ids(block_ids, known.layout.num_blocks, distinct=distinct)
        if self._driver.capturing(after_stream):
            raise GpuError(
                "the engine's stream is being captured into a CUDA graph: a copy in it would repeat today's block ids"
            )
        return known, ids

    def _check_host(self, payload_address: int, size_bytes: int) -> None:
        host = self._resources.host
        if host is None:
            raise GpuError("no host region was registered")
        if payload_address % ALIGN_BYTES or not host.holds(payload_address, size_bytes):
            raise GpuError(
                f"{size_bytes} B at {payload_address:#x} must start at a multiple of {ALIGN_BYTES} and lie in the "
                f"registered region at {host.address:#x} of {host.size_bytes} B"
            )

    def _check_fits(self, size_bytes: int) -> None:
        if size_bytes > self._ring.slot_bytes:
            raise GpuError(f"{size_bytes} B do not fit in a device slot of {self._ring.slot_bytes} B")

    def _check_slot(self, slot: DeviceSlot, offset_bytes: int, size_bytes: int) -> None:
        if slot.released or self._ring.slots[slot.index] is not slot:
            raise GpuError(f"device slot {slot.index} is not held by the caller")
        if offset_bytes % ALIGN_BYTES or offset_bytes < 0 or offset_bytes + size_bytes > slot.size_bytes:
            raise GpuError(
                f"{size_bytes} B at offset {offset_bytes} must start at a multiple of {ALIGN_BYTES} and fit in a "
                f"slot of {slot.size_bytes} B"
            )
