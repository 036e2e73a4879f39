"""The engine's side of the GPUDirect path: a KV cache in device memory whose chunks never pass the host.

Same calls and promises as ``IoClient``; made of two of them:

    loads, stores      threads of this process (``direct_backend``): pages <-> device slot <-> file
    look-ups, keeping  an I/O process without pages, as everywhere

The engine's thread never waits for the device: gathers are ordered by events against its stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from memkv_engines.errors import ConfigError, IoServiceError, TransportError
from memkv_engines.limits import MIN_STAGING_SLOTS
from memkv_engines.log import get_logger
from memkv_engines.metrics import Counters
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.device_slots import DeviceSlots
from memkv_engines.offload.direct_backend import DirectBackend
from memkv_engines.offload.keeping import start_keepers
from memkv_engines.offload.messages import LoadRun, Manifest, Probe, ProbeDone, Ready, Setup, StoreChunk
from memkv_engines.offload.moving import SlotMover, pause_quietly, wake_quietly
from memkv_engines.offload.residents import Residents
from memkv_engines.offload.results import LoadResult, StoreResult
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.striped import StripedTier

log = get_logger(__name__)

_SLICE_S = 0.002
"""Answers come from two sides, of which one can be waited for at a time."""


def slots_needed(io_threads: int) -> int:
    """Device slots below which a client cannot start: one for each loading thread, and some for stores."""
    return io_threads + MIN_STAGING_SLOTS


class DirectIoClient:
    """All methods are called from one engine thread, but for ``wait``.

    Args:
        setup: as for ``IoClient``, with the groups' tiles in device memory.
        tier: where chunks live; its transport moves device memory. Closed here.
        mover: between pages and device slots; it knows the groups. Closed here.
        slots: how many slots the mover has.
        stream: the engine's compute stream of the calling thread, as a number.
        device: ordinal of the CUDA device.
        io_process: of the process for look-ups: ``auto``, ``on`` or ``off``.
        load_timeout_ms: age at which a load is given up.
        fence_timeout_ms: longest wait for what cannot be ordered on the device.
        counters: where to count.

    Raises:
        ConfigError: the tier does not move device memory, or there are too few slots. Tier and mover are left open.
    """

    def __init__(
        self,
        setup: Setup,
        tier: DirectoryTier | StripedTier,
        mover: SlotMover,
        slots: int,
        *,
        stream: Callable[[], int],
        device: int = 0,
        io_process: str = "auto",
        load_timeout_ms: int = 30_000,
        fence_timeout_ms: int = 2_000,
        counters: Counters | None = None,
    ) -> None:
        if not tier.moves_device_memory:
            raise ConfigError(f"{tier.name} does not move device memory: set staging_medium=host")
        self.counters = counters or Counters()
        self._tier, self._mover, self._stream = tier, mover, stream
        self._fence_timeout_s = fence_timeout_ms / 1000
        self._slots = DeviceSlots(mover, slots, setup.io_threads, device)
        self._slots.prepare(tier)
        self._service: DirectBackend | None = None
        self._jobs = IoClient(
            setup,
            load_timeout_ms=load_timeout_ms,
            fence_timeout_ms=fence_timeout_ms,
            counters=self.counters,
            make_backend=self._make_service,
        )
        self._finder = IoClient(
            msgspec.structs.replace(setup, groups=(), transport="posix", gds="auto"),
            io_process=io_process,
            counters=self.counters,
        )
        # Whoever reserves room is told of pressure: that is this process.
        self._keepers = [] if setup.read_only else start_keepers(tier)
        self._closed = self._asleep = False

    def _make_service(self, setup: Setup) -> DirectBackend:
        if self._asleep:
            raise IoServiceError("the engine sleeps")
        if self._service is not None and not self._service.ended:
            raise IoServiceError("a thread still hangs in a transfer")
        self._service = DirectBackend(setup, self._tier, self._mover, self._slots, self._stream, self._fence_timeout_s)
        return self._service

    # --- life ----------------------------------------------------------------

    def start(self) -> None:
        """Start both sides; errors as in ``IoClient.start``."""
        self._finder.start()
        self._jobs.start()

    @property
    def mode(self) -> str:
        """``process`` or ``thread``, whichever looks up; ``down`` while either side does not work."""
        return "down" if self._jobs.mode == "down" else self._finder.mode

    @property
    def ready(self) -> Ready:
        """The greeting of what loads and stores."""
        return self._jobs.ready

    @property
    def residents(self) -> Residents:
        """As ``IoClient.residents``."""
        return self._jobs.residents

    @property
    def child_pid(self) -> int | None:
        """Process id of the child that looks up, if there is one."""
        return self._finder.child_pid

    def close(self) -> None:
        """Let gathered stores finish, bounded; then end both sides and free the device's staging. Idempotent.

        What a hung transfer may still touch is left open and allocated.
        """
        if self._closed:
            return
        self._closed = True
        for keeper in self._keepers:
            keeper.stop()
        self._jobs.close()
        self._finder.close()
        self._await_threads()
        if (self._service is None or self._service.ended) and not self._slots.withheld:
            self._tier.close()
        else:
            log.error("a transfer has not ended: %s and its memory stay open", self._tier.name)
        self._mover.close()

    def _await_threads(self) -> None:
        deadline = time.monotonic() + self._fence_timeout_s
        while self._service is not None and not self._service.ended and time.monotonic() < deadline:
            time.sleep(_SLICE_S)

    def suspend(self) -> None:
        """Before the engine unmaps its pages: on return nothing touches them, until ``wake``. Blocking, bounded.

        Loads are given up and chunks that are not yet written are lost. Device memory is given back, but where a
        transfer hangs: that touches our memory only.

        Raises:
            GpuOverdue: copies have not ended: the pages must stay mapped. No new copy is started until ``wake``.
        """
        self._asleep = True
        self._jobs.abandon("the engine sleeps")
        self._await_threads()
        try:
            if self._slots.all_free:
                self._slots.leave(self._tier)
        except TransportError as error:
            log.warning("%s keeps our memory: %s", self._tier.name, error)
        pause_quietly(self._mover, self._fence_timeout_s)

    def wake(self) -> None:
        """The pages are mapped again, at their old addresses. Where something is not to be had, all stays a miss."""
        if not wake_quietly(self._mover):
            return
        try:
            if not self._slots.is_prepared:
                self._slots.prepare(self._tier)
        except ConfigError as error:
            log.error("the engine is awake, and nothing is stored or loaded any more: %s", error)
            return
        self._asleep = False

    # --- jobs ----------------------------------------------------------------

    def submit_load(self, job_id: int, runs: tuple[LoadRun, ...], stop_s: float = 0.0) -> None:
        """As ``IoClient.submit_load``."""
        self._jobs.submit_load(job_id, runs, stop_s)

    def submit_store(self, job_id: int, chunks: tuple[StoreChunk, ...]) -> None:
        """Start a store behind what the engine's stream has been given; ``fence`` orders what comes after."""
        self._jobs.submit_store(job_id, chunks)

    def submit_probe(self, probe: Probe) -> None:
        """As ``IoClient.submit_probe``."""
        self._finder.submit_probe(probe)

    def submit_manifest(self, manifest: Manifest) -> None:
        """As ``IoClient.submit_manifest``."""
        self._finder.submit_manifest(manifest)

    def fence(self) -> bool:
        """What the engine's stream is given from now on may overwrite the pages. Does not wait for the device.

        Returns:
            False if the driver failed and a gather is overdue: then every job was given up.
        """
        return self._jobs.fence()

    def abandon(self, why: str) -> None:
        """Give up every job; on return the engine's stream comes after all that still touches pages."""
        self._jobs.abandon(why)

    def poll(self) -> list[LoadResult | StoreResult | ProbeDone]:
        """Results that have come in; never blocks but to give up overdue loads."""
        return self._jobs.poll() + self._finder.poll()

    @property
    def pending_loads(self) -> int:
        """Loads without an answer."""
        return self._jobs.pending_loads

    @property
    def pending_stores(self) -> int:
        """Stores without an answer."""
        return self._jobs.pending_stores

    def wait(self, timeout_s: float) -> None:
        """Block until something may have come in. May run beside the other methods, on another thread."""
        busy = self._jobs.pending_loads or self._jobs.pending_stores
        (self._jobs if busy else self._finder).wait(min(timeout_s, _SLICE_S))
