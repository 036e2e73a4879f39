"""The GPUDirect path over host memory: device slots, a transport that takes their addresses, a client."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt
from xxhash import xxh3_64_digest

from memkv_engines.chunk.layout import align_up
from memkv_engines.errors import GpuError, GpuOverdue
from memkv_engines.gpu.kernels import check_ids
from memkv_engines.limits import LEAF_BYTES
from memkv_engines.offload.direct_client import DirectIoClient, slots_needed
from memkv_engines.offload.messages import GroupSpec, Setup
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.transports.base import DeviceView, View
from memkv_engines.transports.posix import PosixTransport
from tests.fast.late_mover import STREAM, LateMover, LateTicket

KINDS = ("gather", "scatter", "load digests", "store digests")


class Slot:
    """A "device" slot in host memory; poisoned when it is taken."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.address, self.size_bytes = address, size_bytes
        self.held = False
        self.tickets: list[LateTicket] = []


class SlotTicket(LateTicket):
    """Work that also runs late for who waits, while its kind lags; and never for who waits while it hangs."""

    kind: str
    mover: LateSlotMover

    def wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.kind in self.mover.lagging and not self.ended:
            if time.monotonic() > deadline:
                raise GpuOverdue("lags")
            time.sleep(0.001)
        if self.kind == self.mover.hang and not self.ended:
            raise GpuOverdue("hangs")
        self.run()
        self.check()

    def done(self) -> bool:
        return self.ended if self.kind in (*self.mover.lagging, self.mover.hang) else super().done()


class LeafTicket(SlotTicket):
    """Digests, computed late."""

    leaves: list[bytes]

    def leaf_bytes(self, block: int) -> bytes:
        self.check()
        assert self.ended
        return self.leaves[block]


class LateSlotMover(LateMover):
    """Copies between pools and device slots, late; may be called from any thread, as the real one.

    Attributes:
        failing: by kind of ticket, a message makes it fail with that, after its work.
        hang: a kind that is overdue for whoever waits, until it is held.
        lagging: kinds that run only when they are held, or taken off this set.
        scatters: queued so far.
    """

    def __init__(self, groups: Sequence[GroupSpec], slots: int) -> None:
        super().__init__(groups, None)
        size = max(g.blocks_per_chunk * align_up(g.block_bytes) for g in groups)
        self._map = mmap.mmap(-1, slots * size)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.all_slots = [Slot(base + i * size, size) for i in range(slots)]
        self.failing = dict.fromkeys(KINDS, "")
        self.hang = ""
        self.lagging: set[str] = set()
        self.scatters = 0
        self.order: list[LateTicket] = []
        self._lock = threading.RLock()

    @property
    def free(self) -> int:
        with self._lock:
            return sum(self._is_free(slot) for slot in self.all_slots)

    @staticmethod
    def _is_free(slot: Slot) -> bool:
        slot.tickets = [ticket for ticket in slot.tickets if not ticket.ended]
        return not slot.held and not slot.tickets

    def acquire_slot(self) -> Slot | None:
        with self._lock:
            if self.refuse:
                raise GpuError(self.refuse)
            for slot in self.all_slots:
                if self._is_free(slot):
                    slot.held = True
                    ctypes.memset(slot.address, 0xA5, slot.size_bytes)
                    return slot
            return None

    def release_slot(self, slot: Slot) -> None:
        with self._lock:
            assert slot.held, "released twice"
            slot.held = False

    def gather_to_device(
        self,
        group: int,
        block_ids: npt.ArrayLike,
        slot: Slot,
        offset_bytes: int,
        *,
        after_stream: int,
        holes: int = 0,
    ) -> LateTicket:
        ids = check_ids(block_ids, self._layouts[group].num_blocks, distinct=False)
        self._check(slot, offset_bytes, group, holes + len(ids), after_stream)
        work = self.copy(group, ids, slot.address + offset_bytes, to_staging=True, holes=holes)
        return self._add("gather", slot, SlotTicket, work)

    def scatter_from_device(
        self, group: int, slot: Slot, offset_bytes: int, block_ids: npt.ArrayLike, *, after_stream: int
    ) -> LateTicket:
        ids = check_ids(block_ids, self._layouts[group].num_blocks, distinct=True)
        self._check(slot, offset_bytes, group, len(ids), after_stream)
        self.scatters += 1
        work = self.copy(group, ids, slot.address + offset_bytes, to_staging=False)
        return self._add("scatter", slot, SlotTicket, work)

    def leaf_digests(self, group: int, slot: Slot, offset_bytes: int, block_count: int, *, loading: bool) -> LeafTicket:
        self._check(slot, offset_bytes, group, block_count, STREAM)
        length = self._layouts[group].block_bytes
        before = [] if loading else [ticket for ticket in slot.tickets if not ticket.ended]

        def digest() -> None:
            for gather in before:  # one stream
                gather.run()
            ticket.leaves = []
            for block in range(block_count):
                start = slot.address + offset_bytes + block * align_up(length)
                data = ctypes.string_at(start, length)
                leaves = [xxh3_64_digest(data[at : at + LEAF_BYTES]) for at in range(0, length, LEAF_BYTES)]
                ticket.leaves.append(b"".join(leaves))

        ticket = self._add("load digests" if loading else "store digests", slot, LeafTicket, digest)
        return ticket

    def _check(self, slot: Slot, offset_bytes: int, group: int, blocks: int, stream: int) -> None:
        assert not self.closed and slot.held and stream == STREAM
        assert offset_bytes % 4096 == 0
        assert offset_bytes + blocks * align_up(self._layouts[group].block_bytes) <= slot.size_bytes
        if self.refuse:
            raise GpuError(self.refuse)

    def _add(self, kind: str, slot: Slot, make: Any, work: Callable[[], None]) -> Any:
        with self._lock:
            ticket = make(self._locked(work), self.looks, self.failing[kind])
            ticket.kind, ticket.mover = kind, self
            slot.tickets.append(ticket)
            self.order.append(ticket)
            return ticket

    def _locked(self, work: Callable[[], None]) -> Callable[[], None]:
        done = []

        def once() -> None:
            with self._lock:
                if not done:
                    done.append(True)
                    work()

        return once

    def pause(self, timeout_s: float) -> None:
        self.refuse = "the mover is paused"
        for ticket in list(self.order):
            try:
                ticket.wait(timeout_s)
            except GpuOverdue:
                raise
            except GpuError:
                assert ticket.ended
        if any(slot.held for slot in self.all_slots):
            raise GpuError("slots are held")

    def close(self) -> None:
        if not any(slot.held for slot in self.all_slots):
            for ticket in self.order:
                ticket.run()
        self.closed = True


def host_view(view: View) -> memoryview:
    """What lies at a "device" address."""
    if isinstance(view, DeviceView):
        return memoryview((ctypes.c_uint8 * view.nbytes).from_address(view.address)).cast("B")
    return view


class AddressTransport(PosixTransport):
    """posix that takes device memory by its address. Reads and writes can be held, or made to fail.

    Attributes:
        gate: transfers of device memory wait for it.
        error: raised by them instead of moving anything.
        waiting: how many wait now.
    """

    moves_device_memory = True

    def __init__(self, mode: str) -> None:
        super().__init__(mode)
        self.name = "test/by-address"
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.waiting = 0

    def read(self, handle: Any, views: Sequence[View], offset: int) -> None:  # type: ignore[override]
        self._admit(views)
        super().read(handle, [host_view(view) for view in views], offset)

    def write(self, handle: Any, views: Sequence[View], offset: int) -> int:  # type: ignore[override]
        self._admit(views)
        return super().write(handle, [host_view(view) for view in views], offset)

    def _admit(self, views: Sequence[View]) -> None:
        for view in views:
            if isinstance(view, DeviceView):
                assert view.address % 4096 == 0 and view.nbytes % 4096 == 0
        if any(isinstance(view, DeviceView) for view in views):
            self.waiting += 1
            assert self.gate.wait(30)
            self.waiting -= 1
            if self.error is not None:
                raise self.error


class AddressPlan:
    """Stands for ``select.TransportPlan``."""

    reason = "a test"
    transport: AddressTransport

    def open(self, mode: str, dir_fd: int | None) -> AddressTransport:
        self.transport = AddressTransport(mode)
        return self.transport


def started_direct(
    setup: Setup, slots: int = 0, **options: int
) -> tuple[DirectIoClient, LateSlotMover, AddressTransport]:
    """A client whose sides run, its mover and its transport."""
    slots = slots or slots_needed(setup.io_threads) + 4
    plan = AddressPlan()
    tier = DirectoryTier(
        setup.tier_path,
        direct_io=setup.direct_io,
        capacity_bytes=setup.capacity_bytes,
        read_only=setup.read_only,
        eviction=setup.eviction,
        transport=plan,  # type: ignore[arg-type]
    )
    mover = LateSlotMover(setup.groups, slots)
    client = DirectIoClient(setup, tier, mover, slots, stream=lambda: STREAM, io_process="on", **options)
    client.start()
    assert client.ready.tier_name == "directory(test/by-address)"
    return client, mover, plan.transport
