"""Lets vLLM on a CPU play an engine on a GPU: its KV cache counts as device memory of the fake CUDA driver.

The connector then takes the device path as it is: kernels (built from their source as C++), copies, streams, events
and pinned staging of the fake driver. What the CPU computes stands for the work of the engine's stream: before each
step that stream is waited for, and with it whatever the connector made it wait for. The fake driver runs nothing by
itself, so that a copy which nobody waits for comes too late.
"""

from __future__ import annotations

from typing import Any

from memkv_engines.doors.io_client import DevicePages
from memkv_engines.gpu import routes
from memkv_engines.vllm import geometry
from memkv_engines.vllm.worker_side import WorkerSide
from tests.fake_cuda.control import LATE, FakeCuda, load
from tests.kernels.routes import build_route


class FakeGpu:
    """The fake driver in this process, under every connector that is made from now on.

    Args:
        kernels: whether blocks go through gather and scatter kernels, also where the copy engine would do.
    """

    def __init__(self, kernels: bool) -> None:
        self._fake: FakeCuda = load()
        self._fake.set_kernels(build_route("host"))
        self._fake.reset(0, LATE, allow_pageable=False)
        from cuda.bindings import driver

        self._api = driver
        self._ok("cuInit", 0)
        self._context = self._ok("cuDevicePrimaryCtxRetain", 0)
        self._ok("cuCtxPushCurrent", self._context)
        self._stream = int(self._ok("cuStreamCreate", 0))
        geometry.device_pages = self._adopt
        if kernels:
            routes.GPU_COPY_ENGINE_MIN_BYTES = routes.GPU_SINGLE_COPY_MIN_BYTES = 1 << 40
        fence = WorkerSide.before_forward

        def before_forward(worker: WorkerSide, meta: Any) -> None:
            fence(worker, meta)
            self._ok("cuStreamSynchronize", self._stream)

        WorkerSide.before_forward = before_forward  # type: ignore[method-assign]

    def _adopt(self, kv_caches: dict[str, Any]) -> DevicePages:
        for storage in {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors(kv_caches)}.values():
            self._fake.adopt(storage.data_ptr(), storage.nbytes())
        return DevicePages(0, lambda: self._stream)

    def _ok(self, name: str, *arguments: Any) -> Any:
        code, *results = getattr(self._api, name)(*arguments)
        assert int(code) == 0, (name, code)
        return results[0] if results else None

    def report(self) -> dict[str, Any]:
        """What the driver saw."""
        report = self._fake.report()
        return {"launches": report.launches, "violations": report.violations, "calls": report.calls}


def _tensors(kv_caches: dict[str, Any]) -> list[Any]:
    return [t for cache in kv_caches.values() for t in (cache if isinstance(cache, (list, tuple)) else [cache])]
