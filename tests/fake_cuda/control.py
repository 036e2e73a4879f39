"""Steers the fake driver from the process that it is loaded into."""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fake_cuda.build import build

RANDOM, LATE, EAGER = 0, 1, 2
"""When queued work runs: now and then; only at waits and queries; at once."""


@dataclass(frozen=True)
class Report:
    """What the fake has seen since its last reset.

    Attributes:
        live: allocations, streams, events ... that exist now, by kind.
        pending: operations queued and not yet run.
        executed: operations run.
        launches: kernels launched.
        sticky: the error that broke the context, 0 for none.
        current: depth of this thread's context stack.
        calls: calls by plain function name.
        violations: what a real driver might forgive and must not be relied on.
    """

    live: dict[str, int]
    pending: int
    executed: int
    launches: int
    sticky: int
    current: int
    calls: dict[str, int]
    violations: list[str]


class FakeCuda:
    """The loaded fake.

    Args:
        path: the library; built when not given.
    """

    def __init__(self, path: Path | None = None) -> None:
        # Loaded for all: whoever asks for libcuda.so.1 later in this process gets this one by its SONAME.
        self.path = path or build()
        self.library = ctypes.CDLL(str(self.path), mode=ctypes.RTLD_GLOBAL)
        signatures: dict[str, list[Any]] = {
            "fake_cuda_reset": [ctypes.c_uint64, ctypes.c_int, ctypes.c_int],
            "fake_cuda_set_kernels": [ctypes.c_char_p],
            "fake_cuda_set_driver_version": [ctypes.c_int],
            "fake_cuda_set_attribute": [ctypes.c_int, ctypes.c_int],
            "fake_cuda_set_memory_bytes": [ctypes.c_uint64],
            "fake_cuda_set_lateness": [ctypes.c_int],
            "fake_cuda_fail": [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int],
            "fake_cuda_fail_operation": [ctypes.c_uint64, ctypes.c_int],
            "fake_cuda_stall": [ctypes.c_void_p, ctypes.c_int],
            "fake_cuda_run": [ctypes.c_uint64],
            "fake_cuda_clear_violations": [],
            "fake_cuda_report": [ctypes.c_char_p, ctypes.c_size_t],
        }
        for name, arguments in signatures.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, None
        self.library.fake_cuda_run.restype = ctypes.c_uint64
        self.library.fake_cuda_report.restype = ctypes.c_size_t

    def reset(self, seed: int = 0, lateness: int = RANDOM, *, allow_pageable: bool = True) -> None:
        """Forget everything. Without ``allow_pageable`` an asynchronous copy of unpinned memory is a violation."""
        self.library.fake_cuda_reset(seed, lateness, int(allow_pageable))

    def set_kernels(self, path: Path) -> None:
        """The shared library whose ``memkv_launch`` runs kernels of modules loaded from now on."""
        self.library.fake_cuda_set_kernels(str(path).encode())

    def set_driver_version(self, version: int) -> None:
        """As ``cuDriverGetVersion`` tells it, such as 12080."""
        self.library.fake_cuda_set_driver_version(version)

    def set_attribute(self, attribute: int, value: int) -> None:
        """A ``CUdevice_attribute``."""
        self.library.fake_cuda_set_attribute(attribute, value)

    def set_memory_bytes(self, size: int) -> None:
        """How much device memory there is."""
        self.library.fake_cuda_set_memory_bytes(size)

    def set_lateness(self, lateness: int) -> None:
        """``RANDOM``, ``LATE`` or ``EAGER``."""
        self.library.fake_cuda_set_lateness(lateness)

    def fail(self, name: str, error: int, *, nth: int = 1, forever: bool = False) -> None:
        """The nth call of a driver function from now on (and, if wanted, all after it) returns an error."""
        self.library.fake_cuda_fail(name.encode(), nth, error, int(forever))

    def unfail(self, name: str) -> None:
        """Take a failure back."""
        self.library.fake_cuda_fail(name.encode(), 0, 0, 0)

    def fail_operation(self, error: int, *, nth: int = 1) -> None:
        """The nth queued operation that runs from now on breaks the context."""
        self.library.fake_cuda_fail_operation(nth, error)

    def stall(self, stream: int) -> None:
        """Let a stream stand still."""
        self.library.fake_cuda_stall(stream, 1)

    def unstall(self, stream: int) -> None:
        """Let it go on."""
        self.library.fake_cuda_stall(stream, 0)

    def run(self, count: int = 1 << 40) -> int:
        """Run queued operations; returns how many."""
        return int(self.library.fake_cuda_run(count))

    def clear_violations(self) -> None:
        """Forget the violations seen so far."""
        self.library.fake_cuda_clear_violations()

    def report(self) -> Report:
        """What was seen."""
        size = self.library.fake_cuda_report(None, 0)
        text = ctypes.create_string_buffer(size + 4096)
        self.library.fake_cuda_report(text, len(text))
        return Report(**json.loads(text.value))


_loaded: FakeCuda | None = None


def load() -> FakeCuda:
    """The fake, loaded into this process once; call before anything imports a CUDA library."""
    global _loaded
    if _loaded is None:
        _loaded = FakeCuda()
    return _loaded
