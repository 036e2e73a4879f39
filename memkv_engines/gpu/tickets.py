"""What a mover hands out for work that it queued: polled, never called back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from memkv_engines.errors import GpuError, GpuOverdue
from memkv_engines.gpu.staging import DeviceSlot
from memkv_engines.limits import GPU_POLL_MAX_S, GPU_POLL_MIN_S

TicketKind = Literal["gather", "scatter", "digests"]


@dataclass(eq=False)
class Work:
    """The mover's own record of a ticket; guarded by the mover's lock.

    Attributes:
        fences: events behind everything that was queued; the work has ended when all are reached.
        unfenced: streams that got work which no event stands behind yet, since the driver failed in between.
        pages_event: reached when pages may be written again (gather) or read (scatter); None until it is recorded.
        events: all events the ticket holds.
        slot: device slot that the work touches, if any.
        owns_slot: whether the slot is the mover's to release when the work has ended.
        leaves: blocks and leaves per block, of a digest ticket.
    """

    events: list[int] = field(default_factory=list)
    fences: list[int] = field(default_factory=list)
    unfenced: list[int] = field(default_factory=list)
    pages_event: int | None = None
    slot: DeviceSlot | None = None
    owns_slot: bool = False
    leaves: tuple[int, int] | None = None
    digests: npt.NDArray[np.uint64] | None = None
    error: GpuError | None = None
    complete: bool = False


class Ticket:
    """Work that was queued. Poll ``done``; then ``check``. May be dropped: the mover sees to its end.

    Attributes:
        kind: what it is.
        size_bytes: payload that moves.
        submitted_s: ``time.monotonic`` of the submission.
    """

    def __init__(
        self,
        kind: TicketKind,
        size_bytes: int,
        work: Work,
        advance: Callable[[Ticket], bool],
        hold: Callable[[Ticket, int], None],
    ) -> None:
        self.kind, self.size_bytes, self.work = kind, size_bytes, work
        self.submitted_s = time.monotonic()
        self.overdue = False
        self._advance, self._hold = advance, hold

    def done(self) -> bool:
        """Whether the work has ended: host slot, device slot and pages are quiet. Never blocks, never raises.

        True says nothing of success, see ``check``. After a failed submission it becomes True only once whatever had
        been queued before the failure has run.
        """
        return self._advance(self)

    def check(self) -> None:
        """Raise what went wrong, if anything is known to.

        Raises:
            GpuError: the driver refused, or a kernel set its error word (the message names the bits): the bytes moved
                are not to be used.
            GpuLost: the context broke.
        """
        if self.work.error is not None:
            raise self.work.error

    def wait(self, timeout_s: float) -> None:
        """Wait for the end, then ``check``. Sleeps in between; does not hold the GIL or any lock.

        Raises:
            GpuOverdue: not ended in time. The memory stays in use: wait on, or leave it to the mover.
            GpuError: as ``check``.
        """
        deadline, pause_s = time.monotonic() + timeout_s, GPU_POLL_MIN_S
        while not self.done():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                self.overdue = True
                raise GpuOverdue(f"a {self.kind} of {self.size_bytes} B has not ended after {timeout_s} s")
            time.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 2, GPU_POLL_MAX_S)
        self.check()

    def hold(self, stream: int) -> None:
        """Let the engine's stream wait, on the device, until the pages are its own again. Does not block.

        After a gather: later work of ``stream`` may overwrite the pages. After a scatter: it may read them, but whether
        they are right is known only when ``done`` and ``check`` have said so.

        Raises:
            GpuError: the submission had failed; wait for ``done`` instead.
        """
        self._hold(self, stream)


class DigestTicket(Ticket):
    """Digests of the leaves of blocks in a device slot."""

    def leaf_bytes(self, block: int) -> bytes:
        """The leaves of one block as ``checksum.block_digest_of_leaves`` takes them.

        Raises:
            GpuError: not done, or failed.
        """
        self.check()
        if self.work.digests is None:
            raise GpuError("the digests are not there yet")
        return bytes(self.work.digests[block].astype(">u8").tobytes())
