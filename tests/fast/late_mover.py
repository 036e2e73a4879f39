"""A mover over host memory that copies as late as it may, for tests of what orders the copies."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from memkv_engines.chunk.layout import KVLayout, Tile, align_up
from memkv_engines.errors import GpuError, GpuOverdue
from memkv_engines.gpu.kernels import check_ids
from memkv_engines.offload.messages import GroupSpec
from memkv_engines.offload.pinned import PinnedStaging

STREAM = 77


class LateTicket:
    """Work that runs when something waits for it, or after some looks at it."""

    def __init__(self, work: Callable[[], None], looks: int, error: str = "") -> None:
        self._work, self._looks, self._error = work, looks, error
        self.ended = False

    def run(self) -> None:
        if not self.ended:
            self._work()
            self.ended = True

    def done(self) -> bool:
        self._looks -= 1
        if self._looks <= 0:
            self.run()
        return self.ended

    def check(self) -> None:
        if self._error:
            raise GpuError(self._error)

    def hold(self, stream: int) -> None:
        assert stream == STREAM
        if self._error:
            raise GpuError(self._error)
        self.run()

    def wait(self, timeout_s: float) -> None:
        if self._looks > 1_000:
            raise GpuOverdue("hangs")
        self.run()
        self.check()


class LateMover:
    """Copies between pools and staging, late.

    Attributes:
        slots: copies that may be under way at a time; more are refused with None.
        looks: how often a ticket is looked at before its work runs.
        refuse: a message makes every call raise it.
        no_memory: a message makes ``resume`` raise it.
        fail: a message makes every ticket fail with it, after its work.
    """

    def __init__(self, groups: Sequence[GroupSpec], staging: PinnedStaging | None) -> None:
        self._layouts = {
            g.group: KVLayout.plan(g.num_blocks, [Tile(t.base, t.block_stride_bytes, t.length_bytes) for t in g.tiles])
            for g in groups
        }
        self._region = range(staging.address, staging.address + staging.size_bytes) if staging else range(0)
        self._tickets: list[LateTicket] = []
        self.slots, self.looks = 3, 3
        self.refuse = self.fail = self.no_memory = ""
        self.closed = False

    def gather(
        self, group: int, block_ids: npt.ArrayLike, payload_address: int, *, after_stream: int
    ) -> LateTicket | None:
        return self._queue(group, block_ids, payload_address, after_stream, to_staging=True)

    def scatter(
        self, group: int, payload_address: int, block_ids: npt.ArrayLike, *, after_stream: int
    ) -> LateTicket | None:
        return self._queue(group, block_ids, payload_address, after_stream, to_staging=False)

    def pause(self, timeout_s: float) -> None:
        self.refuse = "the mover is paused"
        for ticket in self._tickets:
            try:
                ticket.wait(timeout_s)
            except GpuOverdue:
                raise
            except GpuError:
                assert ticket.ended

    def resume(self) -> None:
        if self.no_memory:
            raise GpuError(self.no_memory)
        self.refuse = ""

    def close(self) -> bool:
        for ticket in self._tickets:
            ticket.run()
        self.closed = True
        return True

    def copy(
        self, group: int, block_ids: npt.ArrayLike, address: int, *, to_staging: bool, holes: int = 0
    ) -> Callable[[], None]:
        """What moves blocks between pages and staging at an address, holes and padding zeroed as on a device."""
        layout, ids = self._layouts[group], np.array(block_ids, dtype=np.int32)
        stride = align_up(layout.block_bytes)

        def copy() -> None:
            if to_staging:
                ctypes.memset(address, 0, (holes + len(ids)) * stride)
            for index, pieces in enumerate(layout.iovecs(ids).reshape(len(ids), -1, 2).tolist(), start=holes):
                cursor = address + index * stride
                for page, length in pieces:
                    ctypes.memmove(*((cursor, page) if to_staging else (page, cursor)), length)
                    cursor += length

        return copy

    def _queue(
        self, group: int, block_ids: npt.ArrayLike, address: int, stream: int, *, to_staging: bool
    ) -> LateTicket | None:
        assert not self.closed and stream == STREAM
        if self.refuse:
            raise GpuError(self.refuse)
        self._tickets = [ticket for ticket in self._tickets if not ticket.ended]
        if len(self._tickets) >= self.slots:
            # A device goes on by itself: the oldest work ends, for whoever comes next.
            self._tickets[0].run()
            return None
        layout, blocks = self._layouts[group], len(np.asarray(block_ids))
        ids = check_ids(block_ids, layout.num_blocks, distinct=not to_staging)
        end = address + (blocks - 1) * align_up(layout.block_bytes) + layout.block_bytes
        assert address in self._region and end <= self._region.stop
        work = self.copy(group, ids, address, to_staging=to_staging)
        self._tickets.append(LateTicket(work, self.looks, self.fail))
        return self._tickets[-1]
