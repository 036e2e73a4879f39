"""What a mover owns on the device: streams, kernels, slots, tile tables, the pinned region; made, freed, made again."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import partial

from memkv_engines.chunk.layout import KVLayout
from memkv_engines.errors import GpuError, GpuOverdue
from memkv_engines.gpu.driver import Driver
from memkv_engines.gpu.kernels import DeviceTiles, Kernels
from memkv_engines.gpu.staging import DeviceRing, HostRegion
from memkv_engines.gpu.tiles import plan_tiles
from memkv_engines.limits import GPU_DRAIN_TIMEOUT_S, GPU_POLL_MIN_S
from memkv_engines.log import get_logger

_log = get_logger(__name__)

STREAMS = ("gather", "scatter", "copy_out", "copy_in")


class Resources:
    """Everything that must be given back. Not thread-safe; the context is current in every call but the first.

    Args:
        device: ordinal.
        slot_bytes: of a device slot.
        slots: how many.
        copy_ctas: see ``Kernels``.
        bulk: see ``Kernels``.

    Attributes:
        driver: the open driver.
        streams: our four streams by name: kernels and copies of stores and of loads, so that none waits for another.
        kernels: the loaded kernels.
        ring: device slots; None while paused.
        host: the pinned region; None while paused or before there is one.
        tiles: tile tables by group.

    Raises:
        GpuError: nothing is left behind.
    """

    def __init__(self, device: int, slot_bytes: int, slots: int, copy_ctas: int, *, bulk: bool) -> None:
        self.driver = Driver(device)
        self.streams: dict[str, int] = {}
        self.tiles: dict[int, DeviceTiles] = {}
        self.ring: DeviceRing | None = None
        self.host: HostRegion | None = None
        self._kernels: Kernels | None = None
        self._slot_bytes, self._slots = slot_bytes, slots
        try:
            with self.driver.current():
                try:
                    for name in STREAMS:
                        self.streams[name] = self.driver.create_stream()
                    self._kernels = Kernels(self.driver, copy_ctas, bulk=bulk)
                    self.make_ring()
                except GpuError:
                    self.free_all()
                    raise
        except GpuError:
            self.driver.close()
            raise

    @property
    def kernels(self) -> Kernels:
        """The loaded kernels."""
        assert self._kernels is not None, "used after free_all"
        return self._kernels

    def make_ring(self) -> None:
        """Allocate the device slots."""
        self.ring = DeviceRing(self.driver, self._slot_bytes, self._slots)

    def make_tiles(self, group: int, layout: KVLayout, stride_bytes: int) -> None:
        """Plan and upload a group's tile table; waits for the upload.

        Raises:
            GpuError: the pool is not device memory, or no memory.
        """
        for tile in layout.tiles:
            last = tile.base + (layout.num_blocks - 1) * tile.block_stride_bytes + tile.length_bytes - 1
            for address in (tile.base, last):
                if not self.driver.is_device_memory(address):
                    raise GpuError(f"group {group}: the pages at {address:#x} are not memory of a CUDA device")
        table = plan_tiles(layout, stride_bytes)
        staged = self.driver.alloc_pinned(table.nbytes)
        try:
            address = self.driver.alloc(table.nbytes)
        except GpuError:
            self._try(lambda: self.driver.free_pinned(staged))
            raise
        ctypes.memmove(staged, table.ctypes.data, table.nbytes)
        try:
            self.driver.copy_to_device(address, staged, table.nbytes, self.streams["copy_in"])
            self._await_copy_in()
        except GpuError:
            # Whether a copy is under way is not known: freed only if the stream is seen to be through with it.
            self._try(self._await_copy_in, lambda: self.driver.free(address), lambda: self.driver.free_pinned(staged))
            raise
        self.tiles[group] = DeviceTiles.of(table, address, layout.num_blocks, layout.block_bytes, stride_bytes)
        self._try(lambda: self.driver.free_pinned(staged))

    def pin(self, address: int, size_bytes: int) -> None:
        """Pin the shared region."""
        self.host = HostRegion(self.driver, address, size_bytes)

    def free_memory(self) -> None:
        """Unpin the host region, then free tile tables and slots. Nothing may be under way.

        Raises:
            GpuError: a slot is held (nothing was freed), or the driver failed: the rest is freed, call again for that.
        """
        if self.ring is not None and self.ring.free_slots != len(self.ring.slots):
            raise GpuError(f"{len(self.ring.slots) - self.ring.free_slots} device slots are held")
        steps: list[Callable[[], None]] = []
        if self.host is not None:
            steps.append(self._unpin)
        steps += [partial(self._free_tiles, group) for group in self.tiles]
        if self.ring is not None:
            steps += [self.ring.free_memory, self.ring.free_words, self._drop_ring]
        errors = []
        for step in steps:
            try:
                step()
            except GpuError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def free_all(self) -> None:
        """Give everything back but the driver; what cannot be freed is logged and left."""
        steps: list[Callable[[], None]] = [self.free_memory]
        if self._kernels is not None:
            steps.append(self._kernels.close)
            self._kernels = None
        steps += [partial(self.driver.destroy_stream, stream) for stream in self.streams.values()]
        self.streams = {}
        for step in steps:
            self._try(step)

    def _unpin(self) -> None:
        assert self.host is not None, "asked for by free_memory"
        self.host.close()
        self.host = None

    def _free_tiles(self, group: int) -> None:
        self.driver.free(self.tiles[group].address)
        del self.tiles[group]

    def _drop_ring(self) -> None:
        if self.ring is not None and self.ring.freed:
            self.ring = None

    def _await_copy_in(self) -> None:
        """Wait until what was queued on the stream of incoming copies has run."""
        event = self.driver.create_event()
        try:
            self.driver.record(event, self.streams["copy_in"])
            deadline = time.monotonic() + GPU_DRAIN_TIMEOUT_S
            while not self.driver.reached(event):
                if time.monotonic() > deadline:
                    raise GpuOverdue("the upload of a tile table has not ended")
                time.sleep(GPU_POLL_MIN_S)
        finally:
            self._try(lambda: self.driver.destroy_event(event))

    @staticmethod
    def _try(*steps: Callable[[], None]) -> None:
        """Run steps until one fails, which is logged: what it should have given back is left."""
        try:
            for step in steps:
                step()
        except GpuError as error:
            _log.warning("left on the device: %s", error)
