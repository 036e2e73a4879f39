"""The rig's engine on a real device. Not run on a GPU yet."""

from __future__ import annotations

import mmap

import numpy as np

from tests.kernels.driver.rig import Bytes, Engine


class DeviceEngine(Engine):
    """Pools in real device memory; copies of its own wait for their own stream only."""

    def __init__(self, seed: int = 0) -> None:
        from cuda.bindings import driver

        self.api = driver
        self.random = np.random.default_rng(seed)
        self.ok("cuInit", 0)
        self.context = self.ok("cuDevicePrimaryCtxRetain", 0)
        self.ok("cuCtxPushCurrent", self.context)
        self.stream = int(self.ok("cuStreamCreate", 0))
        self.abandoned = False
        self._allocations: list[int] = []
        self._pinned: list[int] = []
        self._map_region(64 * mmap.PAGESIZE * 16)

    def put(self, address: int, data: Bytes) -> None:
        flat = np.ascontiguousarray(data)
        self.ok("cuMemcpyHtoDAsync", address, flat.ctypes.data, flat.size, self.stream)
        self.ok("cuStreamSynchronize", self.stream)

    def get(self, address: int, size: int) -> Bytes:
        out = np.empty(size, dtype=np.uint8)
        self.ok("cuMemcpyDtoHAsync", out.ctypes.data, address, size, self.stream)
        self.ok("cuStreamSynchronize", self.stream)
        return out

    def settle(self) -> None:
        self.ok("cuStreamSynchronize", self.stream)

    def busy(self, size: int = 1 << 30, rounds: int = 20) -> None:
        """Keep the compute stream busy for milliseconds, so that what does not wait for it shows."""
        if not hasattr(self, "_ballast"):
            self._ballast = self.alloc(size)
        for value in range(rounds):
            self.ok("cuMemsetD8Async", self._ballast, value, size, self.stream)
