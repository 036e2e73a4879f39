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
from memkv_engines.limits import GPU_DRAIN_TIMEOUT_S, GPU_POLL_MAX_S
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
            self.driver.free_pinned(staged)
            raise
        try:
            ctypes.memmove(staged, table.ctypes.data, table.nbytes)
            event = self.driver.create_event()
            try:
                self.driver.copy_to_device(address, staged, table.nbytes, self.streams["copy_in"])
                self.driver.record(event, self.streams["copy_in"])
                self._await(event)
            finally:
                self.driver.destroy_event(event)
        except GpuOverdue:
            raise  # A late copy may still read and write both: they are leaked.
        except GpuError:
            self._give_up_upload(address, staged)
            raise
        self.driver.free_pinned(staged)
        self.tiles[group] = DeviceTiles.of(table, address, layout.num_blocks, layout.block_bytes, stride_bytes)

    def pin(self, address: int, size_bytes: int) -> None:
        """Pin the shared region."""
        self.host = HostRegion(self.driver, address, size_bytes)

    def free_memory(self) -> None:
        """Unpin the host region, then free tile tables and slots. Nothing may be under way.

        Raises:
            GpuError: a slot is held (nothing was freed), or the driver failed; call again for the rest.
        """
        if self.ring is not None and self.ring.free_slots != len(self.ring.slots):
            raise GpuError(f"{len(self.ring.slots) - self.ring.free_slots} device slots are held")
        if self.host is not None:
            self.host.close()
            self.host = None
        for group in list(self.tiles):
            self.driver.free(self.tiles[group].address)
            del self.tiles[group]
        if self.ring is not None:
            self.ring.free()
            self.ring = None

    def free_all(self) -> None:
        """Give everything back but the driver; what cannot be freed is logged and left."""
        steps: list[Callable[[], None]] = [self.free_memory]
        if self._kernels is not None:
            steps.append(self._kernels.close)
            self._kernels = None
        steps += [partial(self.driver.destroy_stream, stream) for stream in self.streams.values()]
        self.streams = {}
        for step in steps:
            try:
                step()
            except GpuError as error:
                _log.warning("left on the device: %s", error)

    def _give_up_upload(self, address: int, staged: int) -> None:
        """Free an upload that failed, if it is sure that nothing of it is under way."""
        try:
            event = self.driver.create_event()
            self.driver.record(event, self.streams["copy_in"])
            self._await(event)
            self.driver.destroy_event(event)
            self.driver.free(address)
            self.driver.free_pinned(staged)
        except GpuError as error:
            _log.warning("a tile table is left on the device: %s", error)

    def _await(self, event: int) -> None:
        deadline = time.monotonic() + GPU_DRAIN_TIMEOUT_S
        while not self.driver.reached(event):
            if time.monotonic() > deadline:
                raise GpuOverdue("the upload of a tile table has not ended")
            time.sleep(GPU_POLL_MAX_S)
