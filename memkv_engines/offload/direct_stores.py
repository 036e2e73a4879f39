"""Chunks of one engine step from pages on the GPU to the tier, through device memory only.

The engine's thread queues gather and digests of each chunk behind what its stream has been given; threads wait for the
device, make the header from the digests, and let the transport write the device's memory. A slot is taken until its
chunk is written, so that a step stores at most what the slots hold.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from memkv_engines.chunk.checksum import block_digest_of_leaves
from memkv_engines.chunk.codec import header_of_digests
from memkv_engines.errors import GpuError, IoServiceError
from memkv_engines.limits import TRANSFER_TIMEOUT_S
from memkv_engines.log import get_logger
from memkv_engines.offload.device_slots import DeviceSlots, DirectSlot
from memkv_engines.offload.groups import Group
from memkv_engines.offload.messages import Gathered, Store, StoreChunk, StoreDone
from memkv_engines.offload.moving import DigestTicket, SlotMover, Ticket
from memkv_engines.offload.outcomes import StoreTally
from memkv_engines.offload.store_jobs import YIELD_TO_LOADS_S
from memkv_engines.offload.storing import ChunkStore
from memkv_engines.offload.threads import JOB_ERRORS, ThreadGroup
from memkv_engines.tier.base import Tier

log = get_logger(__name__)


class DirectStore(ChunkStore):
    """Stores one chunk: ``submit`` on the engine's thread, ``write`` on another.

    Attributes:
        slot: its staging, given back by whoever took it.
        spoilt: its pages may have changed while they were read.
    """

    def __init__(self, chunk: StoreChunk, group: Group, slot: DirectSlot) -> None:
        super().__init__(chunk, group)
        self.slot, self.spoilt = slot, False
        self._gather: Ticket | None = None
        self._digests: DigestTicket | None = None
        if self.payload_bytes > slot.device.size_bytes:
            raise IoServiceError("a store larger than a staging slot")

    def submit(self, mover: SlotMover, stream: int) -> None:
        """Queue the gather behind what the stream has been given, and the digests behind the gather.

        Raises:
            GpuError: nothing was queued that reads pages.
        """
        chunk, g = self._chunk, self._geometry
        self._gather = mover.gather_to_device(
            chunk.group, chunk.block_ids, self.slot.device, 0, after_stream=stream, holes=chunk.holes
        )
        try:
            self._digests = mover.leaf_digests(
                chunk.group,
                self.slot.device,
                chunk.holes * g.block_stride_bytes,
                g.block_count - chunk.holes,
                loading=False,
            )
        except GpuError as error:
            log.warning("a chunk cannot be digested: %s", error)

    @property
    def is_gathered(self) -> bool:
        """Whether no page is read any more."""
        return self._gather is None or self._gather.done()

    def hold(self, stream: int) -> bool:
        """Let the engine's stream wait, on the device, until the pages were read; False if it cannot be made to."""
        try:
            if self._gather is not None:
                self._gather.hold(stream)
        except GpuError as error:
            log.warning("a gather must be waited for: %s", error)
            return False
        return True

    def write(self, tier: Tier) -> tuple[str, int]:
        """Wait for the device, make the header, publish. Blocking; returns and raises as ``publish``.

        Raises:
            GpuError: gather or digests failed, or are overdue.
        """
        if self._gather is None or self._digests is None:
            return "failed", 0
        # The digests come after the gather on its stream.
        self._digests.wait(TRANSFER_TIMEOUT_S)
        self._gather.wait(TRANSFER_TIMEOUT_S)
        if self.spoilt:
            return "failed", 0
        g, holes, digests = self._geometry, self._chunk.holes, self._digests

        def digest_of(index: int, chain_hash: bytes) -> bytes:
            return block_digest_of_leaves(digests.leaf_bytes(index - holes), g.block_bytes, chain_hash, index)

        header = header_of_digests(self._key, g, self._hashes, self._chunk.first_position, digest_of)
        view = self.slot.header[: g.header_bytes]
        view[:] = header.encode()
        return self.publish(tier, [view, self.slot.blocks(g.payload_bytes)])


@dataclass(eq=False)
class _Job:
    """A store of the engine; ``unordered``: how many of its chunks have pages that are not free yet."""

    message: Store
    tally: StoreTally
    unordered: int


@dataclass(frozen=True, eq=False)
class _Item:
    """One chunk of a job; ``store`` is there once its gather was queued."""

    job: _Job
    index: int
    store: DirectStore | None = None

    @property
    def chunk(self) -> StoreChunk:
        return self.job.message.chunks[self.index]


class DirectStores:
    """Executes store jobs. ``submit``, ``fence``, ``look`` and ``end`` belong to the engine's thread and do not block.

    Args:
        groups: the KV groups by number.
        tier: where chunks go; it moves device memory.
        mover: between pages and slots.
        slots: staging; a chunk that finds none until the fence is shed.
        stream: the engine's compute stream of the calling thread, as a number.
        writers: threads that write.
        yield_to_loads: blocks, for at most the given seconds, while loads are pending.
        reply: called from any thread with each answer; must be thread-safe.
    """

    def __init__(
        self,
        groups: dict[int, Group],
        tier: Tier,
        mover: SlotMover,
        slots: DeviceSlots,
        stream: Callable[[], int],
        *,
        writers: int,
        yield_to_loads: Callable[[float], None],
        reply: Callable[[Gathered | StoreDone], None],
    ) -> None:
        self._groups, self._tier, self._mover, self._slots, self._stream = groups, tier, mover, slots, stream
        self._yield_to_loads, self._reply = yield_to_loads, reply
        self._unstarted: deque[_Item] = deque()
        self._unordered: list[_Item] = []
        self._ended = False
        self._gathering: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._writers: ThreadGroup[_Item] = ThreadGroup("write", writers, self._gathering, self._write)

    def start(self) -> None:
        """Start the threads."""
        self._writers.start()

    def submit(self, message: Store) -> None:
        """Queue the gathers that there is room for."""
        count = len(message.chunks)
        if not count:
            self._reply(Gathered(message.job_id))
            self._reply(StoreDone(message.job_id, (), 0, 0))
        else:
            job = _Job(message, StoreTally(message.job_id, count), count)
            self._unstarted += [_Item(job, index) for index in range(count)]
        self._start()

    def fence(self) -> None:
        """From here on the engine's stream comes after the gathers; what has found no slot until now is shed."""
        self._start()
        self._shed()
        self._order(lambda store: store.hold(self._stream()))

    def look(self) -> None:
        """Queue what has found room meanwhile; notice gathers that have ended."""
        self._start()
        self._order(lambda store: store.is_gathered)

    @property
    def waits_for_device(self) -> bool:
        """Whether looking again soon is worth while: what the device does tells nobody."""
        return bool(self._unordered or self._unstarted)

    def end(self, deadline: float) -> None:
        """Queue no more, finish what was gathered, end the threads; waits until the deadline (monotonic clock).

        A gather that neither has ended nor can be ordered before the engine's later work is never written.
        """
        self._shed()
        for item in self._unordered:
            store = item.store
            if store is not None and not store.hold(self._stream()) and not store.is_gathered:
                store.spoilt = True
        self._unordered.clear()
        if not self._ended:
            self._ended = True
            self._writers.stop(deadline)

    @property
    def ended(self) -> bool:
        """Whether every thread has ended."""
        return self._writers.ended

    # --- inside --------------------------------------------------------------

    def _start(self) -> None:
        while self._unstarted and not self._ended:
            item = self._unstarted[0]
            slot = None
            try:
                slot = self._slots.try_acquire(for_loads=False)
                if slot is None:
                    return
                store = DirectStore(item.chunk, self._groups[item.chunk.group], slot)
                store.submit(self._mover, self._stream())
            except JOB_ERRORS as error:
                log.warning("gather failed: %s", error)
                if slot is not None:
                    self._slots.release(slot)
                self._drop(self._unstarted.popleft(), "failed")
                continue
            self._unstarted.popleft()
            started = _Item(item.job, item.index, store)
            self._unordered.append(started)
            self._gathering.put(started)

    def _shed(self) -> None:
        while self._unstarted:
            self._drop(self._unstarted.popleft(), "shed")

    def _drop(self, item: _Item, outcome: str) -> None:
        self._freed([item])
        self._settle(item, outcome)

    def _order(self, is_free: Callable[[DirectStore], bool]) -> None:
        """Take the chunks off whose pages the engine may overwrite."""
        free = {item for item in self._unordered if item.store is None or is_free(item.store)}
        self._unordered = [item for item in self._unordered if item not in free]
        self._freed(free)

    def _freed(self, items: Iterator[_Item] | list[_Item] | set[_Item]) -> None:
        for item in items:
            item.job.unordered -= 1
            if not item.job.unordered:
                self._reply(Gathered(item.job.message.job_id))

    def _write(self, item: _Item) -> None:
        store, written, failure = item.store, 0, None
        assert store is not None, "only what was started is written"
        try:
            if store.is_needed(self._tier):
                self._yield_to_loads(YIELD_TO_LOADS_S)
                outcome, written = store.write(self._tier)
            else:
                outcome = "present"
        except JOB_ERRORS as error:
            log.warning("store failed: %s", error)
            failure, outcome = error, "failed"
        self._slots.release(store.slot, failure)
        self._settle(item, outcome, written, store.payload_bytes if written else 0)

    def _settle(self, item: _Item, outcome: str, written_bytes: int = 0, payload_bytes: int = 0) -> None:
        answer = item.job.tally.settle(item.index, outcome, written_bytes, payload_bytes)
        if answer is not None:
            self._reply(answer)
