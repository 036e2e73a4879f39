"""What the offload layer needs of a mover, and a copy of its own that is under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from memkv_engines.errors import GpuError, GpuOverdue
from memkv_engines.log import get_logger
from memkv_engines.offload.pinned import PinnedSlot

log = get_logger(__name__)


class Ticket(Protocol):
    """Work that a mover has queued; see ``gpu.tickets.Ticket``."""

    def done(self) -> bool:
        """Whether it has ended."""

    def check(self) -> None:
        """Raise what went wrong."""

    def hold(self, stream: int) -> None:
        """Let a stream wait for it."""

    def wait(self, timeout_s: float) -> None:
        """Wait for its end, then check."""


class Mover(Protocol):
    """Moves blocks between pages and pinned slots; see ``gpu.mover.DeviceMover``."""

    def gather(self, group: int, block_ids: npt.ArrayLike, payload_address: int, *, after_stream: int) -> Ticket | None:
        """Pages to slot; None where nothing is free."""

    def scatter(
        self, group: int, payload_address: int, block_ids: npt.ArrayLike, *, after_stream: int
    ) -> Ticket | None:
        """Slot to pages; None where nothing is free."""

    def pause(self, timeout_s: float) -> None:
        """Take no new work, drain, free memory; see ``gpu.mover.DeviceMover.pause``."""

    def resume(self) -> None:
        """Take work again."""

    def close(self) -> bool:
        """Drain and end; False where work is left that may still touch the staging."""


class DigestTicket(Ticket, Protocol):
    """Digests of blocks in a device slot; see ``gpu.tickets.DigestTicket``."""

    def leaf_bytes(self, block: int) -> bytes:
        """The leaves of one block, once done."""


class DeviceSlot(Protocol):
    """A slot of device memory; see ``gpu.staging.DeviceSlot``."""

    @property
    def address(self) -> int:
        """Device address, a multiple of 4 KiB."""

    @property
    def size_bytes(self) -> int:
        """How much it holds."""


class SlotMover(Protocol):
    """Moves blocks between pages and device slots; see ``gpu.mover.DeviceMover``."""

    def acquire_slot(self) -> Any:
        """A device slot that no work touches, or None."""

    def release_slot(self, slot: Any) -> None:
        """Give it back; reused when the work of its tickets has ended."""

    def gather_to_device(
        self,
        group: int,
        block_ids: npt.ArrayLike,
        slot: Any,
        offset_bytes: int,
        *,
        after_stream: int,
        holes: int = 0,
    ) -> Ticket:
        """Pages to slot."""

    def scatter_from_device(
        self, group: int, slot: Any, offset_bytes: int, block_ids: npt.ArrayLike, *, after_stream: int
    ) -> Ticket:
        """Slot to pages."""

    def leaf_digests(
        self, group: int, slot: Any, offset_bytes: int, block_count: int, *, loading: bool
    ) -> DigestTicket:
        """Digest blocks in a slot."""

    def pause(self, timeout_s: float) -> None:
        """Take no new work, drain, free memory; see ``gpu.mover.DeviceMover.pause``."""

    def resume(self) -> None:
        """Take work again."""

    def close(self) -> bool:
        """Drain and end; device memory of slots that are held is left allocated: False then."""


def pause_quietly(mover: Mover | SlotMover, timeout_s: float) -> None:
    """Pause a mover: on return no page is touched, though memory of ours may be left allocated (the log says why).

    Raises:
        GpuOverdue: pages may still be touched.
    """
    try:
        mover.pause(timeout_s)
    except GpuOverdue:
        raise
    except GpuError as error:
        log.warning("the engine sleeps, and memory of ours stays allocated: %s", error)


def wake_quietly(mover: Mover | SlotMover) -> bool:
    """Let a mover work again; False where it cannot (the log says why): it refuses everything then."""
    try:
        mover.resume()
    except GpuError as error:
        log.error("the engine is awake, and nothing is stored or loaded any more: %s", error)
        return False
    return True


@dataclass(frozen=True)
class Moving:
    """A ticket, the slot it touches, and the first of the chunk's blocks that it moves."""

    ticket: Ticket
    slot: PinnedSlot
    start: int = 0

    def succeeded(self) -> bool:
        """Whether it ended well; to be asked once it is done."""
        try:
            self.ticket.check()
        except GpuError as error:
            log.warning("a copy of the device failed: %s", error)
            return False
        return True

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; False where it is overdue."""
        try:
            self.ticket.wait(timeout_s)
        except GpuError:
            return self.ticket.done()
        return True
