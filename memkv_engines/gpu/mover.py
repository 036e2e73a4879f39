"""Moves blocks between the engine's pages on a GPU and staging. The only class other parts use.

Process and threads: lives in the engine's worker process. Any thread may call; a lock makes calls one at a time. No
call waits for the device except those that say so, and nothing ever waits for all of the device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memkv_engines.chunk.layout import KVLayout, align_up
from memkv_engines.errors import GpuError, GpuLost, GpuOverdue
from memkv_engines.gpu.direct import copy_list, zero_between
from memkv_engines.gpu.driver import Driver
from memkv_engines.gpu.kernels import DeviceTiles, Ids, Kernels, check_ids, error_text, leaves_of
from memkv_engines.gpu.resources import Resources
from memkv_engines.gpu.routes import Medium, Route, choose_route
from memkv_engines.gpu.staging import DeviceSlot
from memkv_engines.gpu.tickets import DigestTicket, Ticket, TicketKind, Work
from memkv_engines.limits import (
    ALIGN_BYTES,
    GPU_COPY_CTAS,
    GPU_DEFAULT_SLOTS,
    GPU_DRAIN_TIMEOUT_S,
    GPU_MAX_TICKETS,
    GPU_POLL_MAX_S,
)
from memkv_engines.log import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True)
class DeviceGroup:
    """One KV group of this worker.

    Attributes:
        layout: its pages, by device addresses.
        stride_bytes: distance of blocks in a chunk, ``Geometry.block_stride_bytes``.
        route: the way its blocks go to and from host staging.
    """

    layout: KVLayout
    stride_bytes: int
    route: Route


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
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------- set-up

    def add_group(self, group: int, layout: KVLayout) -> DeviceGroup:
        """Make a KV group known: plans its tiles and uploads them (once per pool; blocks for the upload).

        The log gets its route and the reason.

        Raises:
            LayoutError: the layout cannot be moved.
            GpuError: known already, a block is larger than a slot, addresses that are no device memory, or the driver
                failed.
        """
        raise NotImplementedError

    def register_host(self, address: int, size_bytes: int) -> None:
        """Pin the staging region that this process shares with the I/O process. Blocking: about 0.3 s per GiB.

        It must stay mapped until ``pause`` or ``close`` has returned. One region at a time.

        Raises:
            GpuError: misaligned, there is one already, or it cannot be pinned.
        """
        raise NotImplementedError

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
        raise NotImplementedError

    def scatter(
        self, group: int, payload_address: int, block_ids: npt.ArrayLike, *, after_stream: int
    ) -> Ticket | None:
        """Copy verified blocks from a host slot into pages; the first lies at ``payload_address``.

        The pages must be allocated to the request already and not be used before ``done`` and ``check``, or before
        ``hold`` where the caller checks later. Arguments and errors as for ``gather``; ids must be distinct.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------- device staging

    def acquire_slot(self) -> DeviceSlot | None:
        """A device slot for a transport that reads and writes device memory itself, or None at once."""
        raise NotImplementedError

    def release_slot(self, slot: DeviceSlot) -> None:
        """Give it back; reused when the work of its tickets has ended. The transport must have finished with it."""
        raise NotImplementedError

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
        raise NotImplementedError

    def scatter_from_device(
        self, group: int, slot: DeviceSlot, offset_bytes: int, block_ids: npt.ArrayLike, *, after_stream: int
    ) -> Ticket:
        """As ``scatter``, from a device slot whose content the transport has reported as read."""
        raise NotImplementedError

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
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------------- life

    def poll(self) -> int:
        """Look at all tickets in flight, so that slots of dropped ones come free; returns how many remain."""
        raise NotImplementedError

    def stats(self) -> MoverStats:
        """What was done so far."""
        raise NotImplementedError

    def pause(self, timeout_s: float = GPU_DRAIN_TIMEOUT_S) -> None:
        """For an engine's sleep mode: drain, unpin the host region, free tile tables and device slots. Blocking.

        Groups and the host region stay known; slots handed out by ``acquire_slot`` must have been given back.

        Raises:
            GpuOverdue: work has not ended: nothing was freed, no new work is taken; call again.
            GpuError: a slot is held.
        """
        raise NotImplementedError

    def resume(self) -> None:
        """Allocate again what ``pause`` freed. The pages must be at their old addresses.

        Raises:
            GpuError: no memory: still paused.
        """
        raise NotImplementedError

    def close(self, timeout_s: float = GPU_DRAIN_TIMEOUT_S) -> None:
        """Drain and free everything; may be called again. Blocking.

        What does not drain is leaked on purpose and logged: memory that a late copy may still reach is not given back.
        Then the shared region must stay mapped until the process ends, and this returns all the same.
        """
        raise NotImplementedError
