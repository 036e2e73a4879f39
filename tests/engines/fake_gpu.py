"""Lets an engine on a CPU play one on a GPU: its KV cache counts as device memory of the fake CUDA driver.

The door then takes the device path as it is: kernels (built from their source as C++), copies, streams, events and
pinned staging of the fake driver. The driver runs nothing by itself, so that a copy which nobody waits for comes too
late.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from memkv_engines.doors.io_client import DevicePages
from memkv_engines.gpu import routes
from tests.fake_cuda.control import LATE, load
from tests.kernels.routes import build_route


class FakeGpu:
    """The fake driver in this process, with a stream for what the engine computes.

    Args:
        kernels: whether blocks go through gather and scatter kernels, also where the copy engine would do.
    """

    def __init__(self, kernels: bool) -> None:
        self._fake = load()
        self._fake.set_kernels(build_route("host"))
        self._fake.reset(0, LATE, allow_pageable=False)
        from cuda.bindings import driver

        self._api = driver
        self._ok("cuInit", 0)
        self._context = self._ok("cuDevicePrimaryCtxRetain", 0)
        self._ok("cuCtxPushCurrent", self._context)
        self._stream = int(self._ok("cuStreamCreate", 0))
        if kernels:
            routes.GPU_COPY_ENGINE_MIN_BYTES = routes.GPU_SINGLE_COPY_MIN_BYTES = 1 << 40

    def adopt(self, tensors: Iterable[torch.Tensor]) -> DevicePages:
        """Let tensors count as device memory."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        for address, storage in storages.items():
            self._fake.adopt(address, storage.nbytes())
        return DevicePages(0, lambda: self._stream)

    def compute(self) -> None:
        """Wait for the engine's stream, and so for all that it was made to wait for: now the engine may compute."""
        self._ok("cuStreamSynchronize", self._stream)

    def report(self) -> dict[str, Any]:
        """What the driver saw."""
        report = self._fake.report()
        return {"launches": report.launches, "violations": report.violations, "calls": report.calls}

    def _ok(self, name: str, *arguments: Any) -> Any:
        code, *results = getattr(self._api, name)(*arguments)
        assert int(code) == 0, (name, code)
        return results[0] if results else None


def under_vllm(gpu: FakeGpu) -> None:
    """Put it under every connector that is made in this process from now on.

    What the CPU computes stands for the work of the engine's stream: before each step that stream is waited for.
    """
    from memkv_engines.vllm import geometry
    from memkv_engines.vllm.worker_side import WorkerSide

    def tensors(kv_caches: dict[str, Any]) -> list[torch.Tensor]:
        return [t for cache in kv_caches.values() for t in (cache if isinstance(cache, (list, tuple)) else [cache])]

    fence = WorkerSide.before_forward

    def before_forward(worker: WorkerSide, meta: Any) -> None:
        fence(worker, meta)
        gpu.compute()

    geometry.device_pages = lambda kv_caches: gpu.adopt(tensors(kv_caches))
    WorkerSide.before_forward = before_forward  # type: ignore[method-assign]
