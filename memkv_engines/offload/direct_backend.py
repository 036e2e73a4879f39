"""The I/O service of the GPUDirect path: load and store jobs on threads of the engine's process.

Unlike the host path it cannot be a child process: cuFile needs the CUDA context that the pages belong to. What that
costs: each chunk takes the engine's interpreter lock a dozen times (open, stat, one read or write, two or three looks
at the device each for digests and copy), and every time may wait up to the 5 ms that a busy engine thread keeps it.
The bytes themselves move without it: kvikio on threads of its own, copies and digests on the device. And a transfer
that hangs cannot be killed: its job is given up, the gate before the pages closes for good, its thread keeps its slot,
and the service is not started again before the thread has come back. Not measured on a GPU yet.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from memkv_engines.errors import IoServiceError
from memkv_engines.limits import GPU_POLL_MAX_S, SHUTDOWN_DRAIN_TIMEOUT_S
from memkv_engines.offload.device_slots import DeviceSlots
from memkv_engines.offload.direct_loads import DirectLoad, LoadSlots, ScatterGate
from memkv_engines.offload.direct_stores import DirectStores
from memkv_engines.offload.groups import Group
from memkv_engines.offload.load_jobs import LoadJobs
from memkv_engines.offload.messages import Load, Ready, Reply, Request, Setup, Store
from memkv_engines.offload.moving import SlotMover
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.striped import StripedTier


class DirectBackend:
    """A backend of ``IoClient`` for loads and stores. Its methods belong to the engine's thread, but for ``wait``.

    Args:
        setup: groups, with their tiles in device memory, and ``io_threads``: chunks loaded, and chunks written, at a
            time; one thread each.
        tier: where chunks live; its transport moves device memory.
        mover: between pages and device slots; it knows the groups.
        slots: the mover's.
        stream: the engine's compute stream of the calling thread, as a number.
        fence_timeout_s: longest wait, when jobs are given up, for copies that the stream cannot be made to wait for.
    """

    name = "direct"

    def __init__(
        self,
        setup: Setup,
        tier: DirectoryTier | StripedTier,
        mover: SlotMover,
        slots: DeviceSlots,
        stream: Callable[[], int],
        fence_timeout_s: float,
    ) -> None:
        assert setup.protection is None, "transports.select stages protected chunks in host memory"
        self._stream, self._gate = stream, ScatterGate(fence_timeout_s)
        self._replies: deque[Reply] = deque([Ready(tier_name=tier.name, mode_reason=tier.mode_report.reason)])
        self._news = threading.Condition()
        self._now = 0
        groups = {g.group: Group.from_spec(g) for g in setup.groups}
        self._loads = LoadJobs(
            tier,
            LoadSlots(slots, self._gate),
            lambda chunk, slot: DirectLoad(chunk, groups[chunk.group], tier, slot, mover, self._gate, self._now),
            readers=setup.io_threads,
            placers=0,
            reply=self._reply,
        )
        self._stores = DirectStores(
            groups,
            tier,
            mover,
            slots,
            stream,
            writers=setup.io_threads,
            yield_to_loads=self._loads.wait_idle,
            reply=self._reply,
        )
        self._loads.start()
        self._stores.start()

    def send(self, message: Request) -> None:
        """Start a job, behind what the engine's stream has been given."""
        if isinstance(message, Load):
            # Known to the engine's thread only: a "current stream" belongs to a thread.
            self._now = self._stream()
            self._loads.submit(message)
        elif isinstance(message, Store):
            self._stores.submit(message)
        else:
            raise IoServiceError(f"unexpected message {type(message).__name__}")

    def fence(self) -> None:
        """Let the engine's stream wait for the gathers, on the device."""
        self._stores.fence()

    def receive(self) -> list[Reply]:
        """Replies that have come in."""
        self._stores.look()
        return [self._replies.popleft() for _ in range(len(self._replies))]

    def wait(self, timeout_s: float) -> None:
        """Block until a reply may have come in or the time is up."""
        if self._stores.waits_for_device:
            timeout_s = min(timeout_s, GPU_POLL_MAX_S)
        with self._news:
            self._news.wait_for(lambda: self._replies, timeout_s)

    def kill(self) -> None:
        """Give all jobs up. On return the engine's stream comes after all that still touches pages.

        Threads end by themselves, those in a transfer when it ends.
        """
        self._gate.close(self._stream())
        self._end(time.monotonic())

    def stop(self) -> None:
        """Give loads up, finish what was gathered, bounded."""
        self._gate.close(self._stream())
        self._end(time.monotonic() + SHUTDOWN_DRAIN_TIMEOUT_S)

    @property
    def ended(self) -> bool:
        """Whether every thread has ended."""
        return self._loads.ended and self._stores.ended

    def _end(self, deadline: float) -> None:
        self._stores.end(deadline)
        self._loads.stop(deadline)

    def _reply(self, reply: Reply) -> None:
        with self._news:
            self._replies.append(reply)
            self._news.notify_all()
