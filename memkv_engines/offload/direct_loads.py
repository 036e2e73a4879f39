"""One chunk from the tier through device memory into pages on the GPU, and the gate before those pages.

The header is read into host memory and checked there; the blocks go straight to the device, which digests them. What is
good is scattered: copies are queued behind what the engine's stream has been given.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from memkv_engines.chunk.checksum import block_digest_of_leaves
from memkv_engines.chunk.codec import ChunkHeader, first_bad_block
from memkv_engines.errors import GpuError, GpuOverdue, IoServiceError, TransportError
from memkv_engines.limits import GPU_POLL_MAX_S, TRANSFER_TIMEOUT_S
from memkv_engines.log import get_logger
from memkv_engines.offload.device_slots import DeviceSlots, DirectSlot
from memkv_engines.offload.groups import Group
from memkv_engines.offload.loading import ChunkLoad, LoadChunk
from memkv_engines.offload.moving import SlotMover, Ticket
from memkv_engines.tier.base import Tier
from memkv_engines.transports.base import View

log = get_logger(__name__)


class ScatterGate:
    """Copies into pages that can be stopped for good, as ``pages.GatedPages`` does for host memory.

    A thread that hangs in I/O may come back long after its job was given up: by then its pages belong to another
    request, so its scatter must not be queued.

    Args:
        timeout_s: longest wait for a copy that the engine's stream cannot be made to wait for.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._under_way: set[Ticket] = set()
        self.closed = False

    def check(self) -> None:
        """Raise if the gate is closed.

        Raises:
            IoServiceError: it is.
        """
        if self.closed:
            raise IoServiceError("the job was given up")

    def pass_through(self, submit: Callable[[], Ticket], stream: int) -> None:
        """Queue a copy and wait for its end. Errors of the copy are raised once the pages are quiet.

        Raises:
            IoServiceError: the gate is closed; nothing was queued.
            GpuError: the copy failed, or is overdue; then ``stream`` waits for it on the device.
        """
        with self._lock:
            self.check()
            ticket = submit()
            self._under_way.add(ticket)
        try:
            ticket.wait(TRANSFER_TIMEOUT_S)
        except GpuOverdue:
            self._order(ticket, stream)
            raise
        finally:
            if ticket.done():
                with self._lock:
                    self._under_way.discard(ticket)

    def _order(self, ticket: Ticket, stream: int) -> None:
        """The job is about to be answered as failed, and its pages are about to be computed."""
        try:
            ticket.hold(stream)
        except GpuError as error:
            log.error("a scatter is overdue and cannot be ordered: %s", error)
            while not ticket.done() and not self.closed:
                time.sleep(GPU_POLL_MAX_S)

    def close(self, stream: int) -> None:
        """Let nothing through any more; from here on the engine's stream comes after what was let through."""
        with self._lock:
            self.closed = True
            under_way, self._under_way = self._under_way, set()
        deadline = time.monotonic() + self._timeout_s
        for ticket in under_way:
            try:
                ticket.hold(stream)
            except GpuError as error:
                log.warning("a scatter must be waited for: %s", error)
                _wait_quietly(ticket, deadline - time.monotonic())


def _wait_quietly(ticket: Ticket, timeout_s: float) -> None:
    try:
        ticket.wait(max(0.0, timeout_s))
    except GpuOverdue as error:
        log.error("pages may still be written: %s", error)
    except GpuError:
        pass  # It has ended; that it failed was known.


class LoadSlots:
    """The slots of loads, as ``LoadJobs`` takes them.

    Args:
        slots: where they come from.
        gate: once it is closed nobody waits for a slot.
    """

    def __init__(self, slots: DeviceSlots, gate: ScatterGate) -> None:
        self._slots, self._gate = slots, gate

    def acquire(self) -> DirectSlot:
        """A slot; waits where transfers or copies of given-up loads still hold them.

        Raises:
            IoServiceError: the gate was closed.
            TransportError: the device is lost.
        """
        while True:
            self._gate.check()
            try:
                slot = self._slots.try_acquire(for_loads=True)
            except GpuError as error:
                raise TransportError(f"no device memory: {error}") from error
            if slot is not None:
                return slot
            time.sleep(GPU_POLL_MAX_S)

    def release(self, slot: DirectSlot, why: BaseException | None = None) -> None:
        """As ``DeviceSlots.release``."""
        self._slots.release(slot, why)


class DirectLoad(ChunkLoad):
    """Loads one chunk through a device slot.

    Args:
        chunk, group, tier: as for ``ChunkLoad``; the tier moves device memory.
        slot: the slot.
        mover: between slot and pages.
        gate: before the pages.
        stream: the engine's compute stream, after whose work the pages are written.
    """

    def __init__(
        self,
        chunk: LoadChunk,
        group: Group,
        tier: Tier,
        slot: DirectSlot,
        mover: SlotMover,
        gate: ScatterGate,
        stream: int,
    ) -> None:
        super().__init__(chunk, group, tier, slot)
        self._staged, self._mover, self._gate, self._stream = slot, mover, gate, stream

    def _room_bytes(self) -> int:
        return self._staged.device.size_bytes

    def _header_view(self) -> memoryview:
        return self._staged.header[: self._geometry.header_bytes]

    def _views(self, blocks: int, *, header: bool) -> list[View]:
        views: list[View] = [self._header_view()] if header else []
        if blocks:
            views.append(self._staged.blocks(blocks * self._geometry.block_stride_bytes))
        return views

    def _first_bad(self, header: ChunkHeader, first: int, stop: int) -> int | None:
        try:
            ticket = self._mover.leaf_digests(self._group.group, self._staged.device, 0, stop - first, loading=True)
            ticket.wait(TRANSFER_TIMEOUT_S)
        except GpuError as error:
            raise TransportError(f"blocks cannot be verified: {error}") from error

        def digest_of(index: int, chain_hash: bytes) -> bytes:
            return block_digest_of_leaves(
                ticket.leaf_bytes(index - first), self._geometry.block_bytes, chain_hash, index
            )

        return first_bad_block(header, first, stop, digest_of)

    def _scatter(self, block_ids: npt.NDArray[np.int32]) -> None:
        group, slot = self._group.group, self._staged.device
        try:
            self._gate.pass_through(
                lambda: self._mover.scatter_from_device(group, slot, 0, block_ids, after_stream=self._stream),
                self._stream,
            )
        except GpuError as error:
            raise TransportError(f"blocks cannot be placed: {error}") from error
