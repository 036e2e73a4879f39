"""What is queued for each way of moving blocks, and on which stream. Not thread-safe: the mover's lock guards it.

====================  =============================================  ==========================================
                      kernels                                        copies
====================  =============================================  ==========================================
gather, staged        ``gather``: wait engine, zero gaps, gather     ``copy_out``: wait gather, device to host
scatter, staged       ``scatter``: wait copy, wait engine, scatter   ``copy_in``: host to device
gather, direct        -                                              ``gather``: wait engine, pages to host
scatter, direct       -                                              ``scatter``: wait engine, host to pages
digests               ``gather`` (stores) or ``scatter`` (loads)     -
====================  =============================================  ==========================================

A device slot is reused only after the host has seen its ticket's last event, so nothing else orders slots. The streams
are apart so that a copy of one chunk runs beside the kernel of the next, and a load never stands behind a store.
"""

from __future__ import annotations

from collections.abc import Callable

from memkv_engines.chunk.layout import KVLayout
from memkv_engines.gpu.book import TicketBook
from memkv_engines.gpu.direct import copy_list, zero_between
from memkv_engines.gpu.driver import Addresses
from memkv_engines.gpu.kernels import DeviceTiles, Ids, leaves_of
from memkv_engines.gpu.resources import Resources
from memkv_engines.gpu.staging import DeviceSlot
from memkv_engines.gpu.tickets import DigestTicket, Ticket, TicketKind, Work

Advance = Callable[[Ticket], bool]
Hold = Callable[[Ticket, int], None]


class Submissions:
    """Queues work and makes its tickets. Arguments have been checked; the context is current in every call.

    Args:
        resources: streams, kernels, slots.
        book: follows the tickets.
        advance: what a ticket asks whether it is done.
        hold: what a ticket asks to hold a stream.
    """

    def __init__(self, resources: Resources, book: TicketBook, advance: Advance, hold: Hold) -> None:
        self._resources, self._book, self._driver = resources, book, resources.driver
        self._advance, self._hold = advance, hold

    def gather_staged(
        self,
        group: int,
        ids: Ids,
        slot: DeviceSlot,
        offset_bytes: int,
        holes: int,
        after_stream: int,
        payload_address: int | None,
    ) -> Ticket:
        """Pages to a device slot, and on to a host slot where one is given."""
        tiles, streams = self._resources.tiles[group], self._resources.streams
        first = slot.address + offset_bytes
        size_bytes = (holes + ids.size) * tiles.stride_bytes
        work = Work(slot=slot, owns_slot=payload_address is not None)
        ticket = Ticket("gather", ids.size * tiles.block_bytes, work, self._advance, self._hold)

        def submit() -> None:
            self._wait_for_engine(work, streams["gather"], after_stream)
            self._zero_between(first, holes, ids.size, tiles, streams["gather"])
            self._resources.kernels.gather(
                tiles, ids, first, slot.size_bytes - offset_bytes, holes, slot.error, streams["gather"]
            )
            if payload_address is None:
                work.pages_event = self._fence(work, streams["gather"])
                return
            gathered = self._book.take_event(work)
            self._driver.record(gathered, streams["gather"])
            work.pages_event = gathered
            self._driver.wait(streams["copy_out"], gathered)
            self._driver.copy_to_host(payload_address, first, size_bytes, streams["copy_out"])
            self._fence(work, streams["copy_out"])

        used = [streams["gather"]] + ([streams["copy_out"]] if payload_address is not None else [])
        return self._begin(ticket, used, submit)

    def scatter_staged(
        self, group: int, ids: Ids, slot: DeviceSlot, offset_bytes: int, after_stream: int, host: tuple[int, int] | None
    ) -> Ticket:
        """A device slot, filled from a host slot where one is given, to pages."""
        tiles, streams = self._resources.tiles[group], self._resources.streams
        first = slot.address + offset_bytes
        work = Work(slot=slot, owns_slot=host is not None)
        ticket = Ticket("scatter", ids.size * tiles.block_bytes, work, self._advance, self._hold)

        def submit() -> None:
            if host is not None:
                self._driver.copy_to_device(first, *host, streams["copy_in"])
                filled = self._book.take_event(work)
                self._driver.record(filled, streams["copy_in"])
                self._driver.wait(streams["scatter"], filled)
            self._wait_for_engine(work, streams["scatter"], after_stream)
            self._resources.kernels.scatter(
                tiles, ids, first, slot.size_bytes - offset_bytes, 0, slot.error, streams["scatter"]
            )
            work.pages_event = self._fence(work, streams["scatter"])

        used = ([streams["copy_in"]] if host is not None else []) + [streams["scatter"]]
        return self._begin(ticket, used, submit)

    def gather_direct(
        self, layout: KVLayout, stride_bytes: int, ids: Ids, payload_address: int, holes: int, after_stream: int
    ) -> Ticket:
        """Pages straight to a host slot."""
        pages, slots, sizes = copy_list(layout, ids, stride_bytes, payload_address, holes)
        zero_between(payload_address, holes, ids.size, layout.block_bytes, stride_bytes)
        return self._copy_direct("gather", slots, pages, sizes, after_stream)

    def scatter_direct(
        self, layout: KVLayout, stride_bytes: int, ids: Ids, payload_address: int, after_stream: int
    ) -> Ticket:
        """A host slot straight to pages."""
        pages, slots, sizes = copy_list(layout, ids, stride_bytes, payload_address, 0)
        return self._copy_direct("scatter", pages, slots, sizes, after_stream)

    def leaf_digests(
        self, slot: DeviceSlot, offset_bytes: int, blocks: int, block_bytes: int, stride_bytes: int, stream: int
    ) -> DigestTicket:
        """Digests of blocks in a device slot, into the slot's pinned words."""
        work = Work(slot=slot, leaves=(blocks, leaves_of(block_bytes)))
        ticket = DigestTicket("digests", blocks * block_bytes, work, self._advance, self._hold)

        def submit() -> None:
            self._resources.kernels.leaf_digests(
                slot.address + offset_bytes, blocks, block_bytes, stride_bytes, slot.size_bytes - offset_bytes,
                slot.leaves, slot.error, stream,
            )  # fmt: skip
            self._fence(work, stream)

        self._begin(ticket, [stream], submit)
        return ticket

    def _copy_direct(
        self,
        kind: TicketKind,
        to: Addresses,
        source: Addresses,
        sizes: Addresses,
        after_stream: int,
    ) -> Ticket:
        stream = self._resources.streams[kind]
        work = Work()
        ticket = Ticket(kind, int(sizes.sum()), work, self._advance, self._hold)

        def submit() -> None:
            self._wait_for_engine(work, stream, after_stream)
            self._driver.copy_many(to, source, sizes, stream)
            work.pages_event = self._fence(work, stream)

        return self._begin(ticket, [stream], submit)

    def _zero_between(self, first: int, holes: int, blocks: int, tiles: DeviceTiles, stream: int) -> None:
        """Zero holes and padding in a device slot: what it held before never reaches the tier."""
        if holes:
            size_bytes = holes * tiles.stride_bytes
            self._driver.zero_columns(first, size_bytes, size_bytes, 1, stream)
        padding = tiles.stride_bytes - tiles.block_bytes
        if padding:
            start = first + holes * tiles.stride_bytes + tiles.block_bytes
            self._driver.zero_columns(start, tiles.stride_bytes, padding, blocks, stream)

    def _wait_for_engine(self, work: Work, stream: int, after_stream: int) -> None:
        """Let our stream wait for what the engine's stream was given so far."""
        ready = self._book.take_event(work)
        self._driver.record(ready, after_stream)
        self._driver.wait(stream, ready)

    def _fence(self, work: Work, stream: int) -> int:
        """Record the event behind all of a ticket's work: each of its streams is waited for by the last one."""
        event = self._book.take_event(work)
        self._driver.record(event, stream)
        work.fences, work.unfenced = [event], []
        return event

    def _begin(self, ticket: Ticket, streams: list[int], submit: Callable[[], None]) -> Ticket:
        slot = ticket.work.slot
        if slot is not None:
            if not slot.pending:
                slot.clear_error()
            assert self._resources.ring is not None, "used while paused"
            self._resources.ring.begin(slot)
        self._book.queue(ticket, streams, submit)
        return ticket
