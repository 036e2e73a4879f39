"""Where a worker's KV cache lies, which devices are refused, and what happens when the engine unmaps it."""

from __future__ import annotations

import inspect
import logging
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memkv_engines.config import Config
from memkv_engines.errors import ConfigError, GpuOverdue, LayoutError
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.device_client import DeviceIoClient
from memkv_engines.offload.direct_client import DirectIoClient
from memkv_engines.offload.messages import Ready
from memkv_engines.offload.results import LoadResult, StoreResult

with warnings.catch_warnings():  # vLLM's own.
    warnings.simplefilter("ignore")
    from memkv_engines.vllm import compat, geometry, worker_side
    from memkv_engines.vllm.metadata import StepMetadata

# -------------------------------------------------------------------------------------------------------------- devices


def on(*devices: str) -> dict[str, Any]:
    """KV caches of as many layers; only their devices are looked at."""
    return {f"layer {n}": SimpleNamespace(device=torch.device(name)) for n, name in enumerate(devices)}


def test_host_memory_has_no_device() -> None:
    assert geometry.device_pages(on("cpu", "cpu")) is None


def test_one_cuda_device_is_that_device_and_its_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {0: 7, 1: 11}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=streams[device]))
    pages = geometry.device_pages(on("cuda:1", "cuda:1"))
    assert pages is not None and (pages.device, pages.stream()) == (1, 11)
    streams[1] = 12
    assert pages.stream() == 12, "asked anew each time"
    pages = geometry.device_pages(on("cuda"))
    assert pages is not None and (pages.device, pages.stream()) == (0, 7)


def test_parts_of_a_layer_count_each(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = [SimpleNamespace(device=torch.device(name)) for name in ("cuda:0", "cuda:1")]
    with pytest.raises(LayoutError, match="cuda:0, cuda:1"):
        geometry.device_pages({"layer": cache})


@pytest.mark.parametrize(
    ("devices", "named"),
    [
        (("cuda:0", "cuda:1"), "cuda:0, cuda:1"),
        (("cpu", "cuda:0"), "cpu, cuda:0"),
        (("xpu:0",), "xpu:0"),
        (("meta",), "meta"),
        (("cpu", "meta"), "cpu, meta"),
    ],
)
def test_other_devices_are_refused_with_their_names(devices: tuple[str, ...], named: str) -> None:
    with pytest.raises(LayoutError, match=f"the KV cache lies on {named}: one CUDA device.*--kv-transfer-config"):
        geometry.device_pages(on(*devices))


# ---------------------------------------------------------------------------------------------------------------- sleep


class Allocator:
    """Stands for `CuMemAllocator`, which needs a GPU; notes what is called."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def sleep(self, offload_tags: tuple[str, ...] | str | None = None) -> None:
        self.calls.append(f"sleep {offload_tags}")

    def discard(self, tags: tuple[str, ...] | str) -> None:
        self.calls.append(f"discard {tags}")

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(f"wake up {tags}")


@pytest.fixture
def watched() -> Allocator:
    calls: list[str] = []
    allocator = Allocator(calls)
    compat.watch_sleep(allocator, lambda: calls.append("suspend"), lambda: calls.append("wake"))
    return allocator


def test_the_stand_in_is_like_vllms_own() -> None:
    from vllm.device_allocator.cumem import CuMemAllocator

    for name in ("sleep", "discard", "wake_up"):
        ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (Allocator, CuMemAllocator))
        assert [*ours.parameters] == [*theirs.parameters]


def test_vllm_tells_no_connector_of_its_sleep() -> None:
    """What `watch_sleep` is for. Where this fails there may be a hook, and the watch is to be replaced by it."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.v1.worker.gpu_worker import Worker

    assert not [name for name in dir(KVConnectorBase_V1) if "sleep" in name or "wake" in name]
    for method in (Worker.sleep, Worker.wake_up):
        assert "kv_transfer" not in inspect.getsource(method)


def test_pages_are_let_go_before_they_are_unmapped_and_taken_after_they_are_mapped(watched: Allocator) -> None:
    watched.sleep(offload_tags=("weights",))
    watched.wake_up(["weights"])
    watched.wake_up(["kv_cache"])
    watched.sleep(("runtime",))
    watched.wake_up()
    watched.discard(("kv_cache",))
    watched.discard("weights")
    watched.wake_up(tags=["kv_cache"])
    assert watched.calls == [
        "suspend",
        "sleep ('weights',)",
        "wake up ['weights']",
        "wake up ['kv_cache']",
        "wake",
        "suspend",
        "sleep ('runtime',)",
        "wake up None",
        "wake",
        "suspend",
        "discard ('kv_cache',)",
        "discard weights",
        "wake up ['kv_cache']",
        "wake",
    ]


def test_pages_that_are_still_touched_stay_mapped() -> None:
    calls: list[str] = []
    allocator = Allocator(calls)

    def overdue() -> None:
        raise GpuOverdue("a copy has not ended")

    compat.watch_sleep(allocator, overdue, lambda: None)
    for unmap in (allocator.sleep, lambda: allocator.discard("kv_cache")):
        with pytest.raises(GpuOverdue):
            unmap()
    assert calls == []


def config(**keys: object) -> Any:
    return SimpleNamespace(model_config=SimpleNamespace(**keys))


def test_who_sleeps() -> None:
    assert not compat.sleeps(config())
    assert not compat.sleeps(config(enable_sleep_mode=False, enable_cumem_allocator=False))
    assert compat.sleeps(config(enable_sleep_mode=True, sleep_mode_backend="cumem"))
    assert compat.sleeps(config(enable_sleep_mode=False, enable_cumem_allocator=True))
    with pytest.raises(ConfigError, match=r"sleep_mode_backend='criu' is not supported.*'cumem'"):
        compat.sleeps(config(enable_sleep_mode=True, sleep_mode_backend="criu"))
    with pytest.raises(ConfigError, match=r"SimpleNamespace of vLLM .* is not known"):
        compat.watch_sleep(SimpleNamespace(sleep=print), lambda: None, lambda: None)


@pytest.mark.parametrize("kind", [DeviceIoClient, DirectIoClient, IoClient])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_worker_watches_where_its_pages_may_be_unmapped(
    kind: type, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    allocator = Allocator(calls)
    client = object.__new__(kind)
    ready = Ready(tier_name="a tier", mode_reason="a test")
    for name, value in (("start", lambda _: None), ("mode", "thread"), ("ready", ready)):
        monkeypatch.setattr(kind, name, value, raising=False)
    if kind is not IoClient:
        monkeypatch.setattr(kind, "suspend", lambda _: calls.append("suspend"))
        monkeypatch.setattr(kind, "wake", lambda _: calls.append("wake"))
    on_gpu = kind is not IoClient
    monkeypatch.setattr(compat, "page_allocator", lambda: allocator)
    monkeypatch.setattr(geometry, "device_pages", lambda _: object() if on_gpu else None)
    monkeypatch.setattr(geometry, "describe_groups", lambda *_: ([], []))
    monkeypatch.setattr(worker_side, "worker_client", lambda *_, **__: client)
    parallel = SimpleNamespace(
        pipeline_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1
    )
    vllm_config = SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace(enable_sleep_mode=enabled))
    ours: Any = SimpleNamespace(chunk=SimpleNamespace(chunk_target_bytes=1))
    worker_side.WorkerSide(vllm_config, None, ours, stores=True).register({})
    allocator.sleep()
    allocator.wake_up()
    expected = ["suspend", "sleep None", "wake up None", "wake"]
    assert calls == (expected if enabled and on_gpu else expected[1:3])


def side_with(client: Any, monkeypatch: pytest.MonkeyPatch) -> worker_side.WorkerSide:
    parallel = SimpleNamespace(
        pipeline_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1
    )
    config = SimpleNamespace(parallel_config=parallel)
    side = worker_side.WorkerSide(config, SimpleNamespace(kv_cache_groups=[None]), Config(), stores=True)
    monkeypatch.setattr(side, "_client", client)
    return side


@pytest.mark.parametrize(("idle", "loads", "waits"), [(True, 1, 1), (False, 1, 0), (True, 0, 0)])
def test_a_step_waits_for_a_load_only_where_it_computes_nothing(
    idle: bool, loads: int, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results: list[LoadResult] = []
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        results.append(LoadResult(7, (), ()))

    def poll() -> list[LoadResult]:
        found, results[:] = list(results), []
        return found

    side = side_with(SimpleNamespace(poll=poll, wait=wait, submit_load=lambda *_: None), monkeypatch)
    side.start_loads(StepMetadata(loads=[("request", 7, (), 0.0)] * loads, idle=idle))
    side.poll()
    assert len(waited) == waits and sum(waited) <= 0.005 * waits
    assert side.take_finished()[0] == ({"request"} if waits else set())


def test_chunks_that_were_not_stored_are_told_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = iter([("stored", "present"), ("stored", "full", "shed"), ("failed",)])
    side = side_with(SimpleNamespace(poll=lambda: [StoreResult(1, next(outcomes))]), monkeypatch)
    monkeypatch.setattr(logging.getLogger("memkv_engines"), "propagate", True)
    side.poll()
    assert not caplog.records
    side.poll()
    side.poll()
    (line,) = caplog.messages
    assert line.startswith("2 of 3 chunks were not stored") and "full (free the device" in line and "shed (" in line
    report = side.take_report()
    assert report is not None and report.stored == {1: (1, ("failed",))}
