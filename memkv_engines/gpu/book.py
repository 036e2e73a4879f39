"""Tickets in flight and the events behind them. Not thread-safe: the mover's lock guards it."""

from __future__ import annotations

from collections.abc import Callable

from memkv_engines.errors import GpuError, GpuLost
from memkv_engines.gpu.driver import Driver
from memkv_engines.gpu.kernels import error_text
from memkv_engines.gpu.staging import DeviceSlot
from memkv_engines.gpu.tickets import Ticket, Work
from memkv_engines.log import Throttle, get_logger

_log = get_logger(__name__)


class TicketBook:
    """Knows when the work of each ticket has ended.

    Args:
        driver: with its context current in every call.
        slot_ended: told the slot of work that has ended, and whether the mover owns it.

    Attributes:
        in_flight: tickets whose work has not been seen to end.
        lost: the error that broke the context, None while it is whole.
        failed: tickets that ended with an error.
    """

    def __init__(self, driver: Driver, slot_ended: Callable[[DeviceSlot, bool], None]) -> None:
        self._driver, self._slot_ended = driver, slot_ended
        self._spare: list[int] = []
        self._throttle = Throttle()
        self.in_flight: list[Ticket] = []
        self.lost: GpuLost | None = None
        self.failed = 0

    def take_event(self, work: Work) -> int:
        """An event that the work holds until its end.

        Raises:
            GpuError: the driver made none.
        """
        event = self._spare.pop() if self._spare else self._driver.create_event()
        work.events.append(event)
        return event

    def give_events_back(self, work: Work) -> None:
        """Of work that was never queued, or has ended."""
        self._spare += work.events
        work.events = []

    def queue(self, ticket: Ticket, streams: list[int], submit: Callable[[], None]) -> None:
        """Run a submission; whatever it queued before it failed becomes the ticket's to see the end of.

        Args:
            ticket: not in flight yet.
            streams: all streams that ``submit`` may queue on.
            submit: queues, then records the ticket's fences and clears ``unfenced``.
        """
        work = ticket.work
        work.unfenced = streams
        self.in_flight.append(ticket)
        try:
            submit()
        except GpuLost as error:
            work.error = error
            self.lose(error)
        except GpuError as error:
            work.error = error

    def advance(self, ticket: Ticket) -> bool:
        """Whether the work of a ticket has ended; never raises."""
        work = ticket.work
        if work.complete:
            return True
        try:
            self._fence(work)
            if not all(self._driver.reached(event) for event in work.fences):
                return False
        except GpuLost as error:
            self.lose(error)
            return True
        except GpuError as error:
            # Unknown is not ended: the slot stays out of use, and the next poll asks again.
            if self._throttle.admit("query") is not None:
                _log.warning("cannot tell whether a %s has ended: %s", ticket.kind, error)
            return False
        self._end(ticket)
        return True

    def poll(self) -> int:
        """Look at every ticket; returns how many are still in flight."""
        for ticket in list(self.in_flight):
            self.advance(ticket)
        return len(self.in_flight)

    def lose(self, error: GpuLost) -> None:
        """The context is broken: nothing runs any more, so every ticket ends, with this error."""
        if self.lost is None:
            self.lost = error
            _log.error("the CUDA context is broken, offload over the GPU ends: %s", error)
        for ticket in list(self.in_flight):
            ticket.work.error = ticket.work.error or self.lost
            self._end(ticket)

    def destroy_events(self) -> None:
        """Destroy what is spare; an event that cannot be destroyed is left."""
        while self._spare:
            try:
                self._driver.destroy_event(self._spare.pop())
            except GpuError as error:
                _log.warning("an event is left: %s", error)

    def _fence(self, work: Work) -> None:
        """Put an event behind what a failed submission left on its streams."""
        while work.unfenced:
            event = self.take_event(work)
            self._driver.record(event, work.unfenced[-1])
            work.fences.append(event)
            work.unfenced.pop()

    def _end(self, ticket: Ticket) -> None:
        work = ticket.work
        if work.slot is not None:
            word = work.slot.read_error()
            if word and work.error is None:
                work.error = GpuError(f"the kernel of a {ticket.kind} reports {error_text(word)}; its bytes are void")
            if work.leaves is not None and work.error is None:
                work.digests = work.slot.read_leaves(*work.leaves)
            self._slot_ended(work.slot, work.owns_slot)
        self.give_events_back(work)
        work.complete = True
        self.failed += work.error is not None
        self.in_flight.remove(ticket)
