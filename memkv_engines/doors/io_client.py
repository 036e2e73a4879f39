"""The I/O client of a worker, from our configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from memkv_engines.chunk.layout import KVLayout, Tile, align_up
from memkv_engines.config import Config, split_paths
from memkv_engines.doors.free_memory import require_memory
from memkv_engines.doors.protection import protection_spec
from memkv_engines.errors import ConfigError
from memkv_engines.limits import GPU_DEFAULT_SLOTS, GPU_MAX_SLOTS, GPU_STAGING_BYTES
from memkv_engines.log import get_logger
from memkv_engines.metrics import Counters
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.device_client import DeviceIoClient
from memkv_engines.offload.direct_client import DirectIoClient, slots_needed
from memkv_engines.offload.huge_pages import advise_huge_pages
from memkv_engines.offload.job_client import JobClient
from memkv_engines.offload.messages import GroupSpec, Setup
from memkv_engines.offload.pinned import PinnedStaging
from memkv_engines.tier.striped import open_directories
from memkv_engines.transports.select import GPU, Policy, TransportPlan, plan

if TYPE_CHECKING:
    from memkv_engines.gpu.mover import DeviceMover

log = get_logger(__name__)


@dataclass(frozen=True)
class DevicePages:
    """Where a KV cache in device memory lies.

    Attributes:
        device: ordinal among the visible CUDA devices.
        stream: the engine's compute stream of the calling thread, as a number.
    """

    device: int
    stream: Callable[[], int]


def worker_client(
    config: Config,
    groups: Sequence[GroupSpec],
    *,
    stores: bool,
    counters: Counters | None = None,
    pages: DevicePages | None = None,
) -> JobClient:
    """A client that is not started yet. With pages on a device: blocks for the choice of a transport, seconds at worst.

    Args:
        config: ours.
        groups: the KV groups of this worker.
        stores: whether it may write to the tier.
        counters: where to count; its own if None.
        pages: where the groups' tiles are in device memory; None: in host memory.

    Raises:
        ConfigError: too little staging for this model, more memory than is free, or GPUDirect was asked for and cannot
            be had.
        GpuUnavailable: no driver, device or kernels.
    """

    def make_client(groups: Sequence[GroupSpec]) -> IoClient:
        return IoClient(
            _setup(config, groups, stores=stores, on_gpu=pages is not None),
            io_process=config.io.io_process,
            load_timeout_ms=config.io.load_timeout_ms,
            fence_timeout_ms=config.io.fence_timeout_ms,
            counters=counters,
        )

    require_memory("memory_bytes", config.tier.memory_bytes)
    if pages is None:
        advise_huge_pages(groups)
        return make_client(groups)
    policy = _policy(config)
    chosen = plan(policy, *split_paths(config.tier.path), on_gpu=True, threads=config.io.io_threads)
    log.info(
        "KV cache on a GPU: %s, staged in %s memory (%s)", chosen.decision.kind, chosen.decision.medium, chosen.reason
    )
    if chosen.decision.medium == GPU:
        try:
            return _direct_client(config, groups, chosen, pages, stores=stores, counters=counters)
        except ConfigError as error:
            if policy.gds == "on" or policy.staging_medium == GPU:
                raise
            log.warning("%s: staging in host memory", error)
    return DeviceIoClient(
        make_client,
        lambda staging: _pinned_mover(pages.device, groups, staging),
        groups,
        staging_bytes=config.io.staging_bytes,
        stream=pages.stream,
        load_timeout_ms=config.io.load_timeout_ms,
        fence_timeout_ms=config.io.fence_timeout_ms,
    )


def _policy(config: Config) -> Policy:
    """What is asked for; chunks that pass by the host's memory cannot stay in it."""
    policy = Policy.of(config)
    if not config.tier.memory_bytes:
        return policy
    for key, value in (("staging_medium", policy.staging_medium), ("gds", policy.gds)):
        if value in (GPU, "on"):
            raise ConfigError(
                f"{key}={value} and memory_bytes={config.tier.memory_bytes}: chunks that go from the GPU to the drive "
                "never are in the host's memory; leave out one of the two"
            )
    log.info("memory_bytes: chunks are staged in host memory, in which they stay")
    return replace(policy, staging_medium="host")


def _direct_client(
    config: Config,
    groups: Sequence[GroupSpec],
    chosen: TransportPlan,
    pages: DevicePages,
    *,
    stores: bool,
    counters: Counters | None,
) -> DirectIoClient:
    slots = _device_slots(groups, slots_needed(config.io.io_threads))
    tier = open_directories(
        split_paths(config.tier.path),
        direct_io=config.tier.direct_io,
        capacity_bytes=config.tier.capacity_bytes,
        read_only=not stores,
        eviction=config.tier.eviction,
        transport=chosen,
    )
    mover: DeviceMover | None = None
    try:
        mover = _device_mover(pages.device, groups, slots, "gpu")
        return DirectIoClient(
            _setup(config, groups, stores=stores, on_gpu=True),
            tier,
            mover,
            slots,
            stream=pages.stream,
            device=pages.device,
            io_process=config.io.io_process,
            load_timeout_ms=config.io.load_timeout_ms,
            fence_timeout_ms=config.io.fence_timeout_ms,
            counters=counters,
        )
    except BaseException:
        tier.close()
        if mover is not None:
            mover.close()
        raise


def _setup(config: Config, groups: Sequence[GroupSpec], *, stores: bool, on_gpu: bool) -> Setup:
    return Setup(
        config.tier.path,
        config.tier.direct_io,
        config.tier.capacity_bytes,
        read_only=not stores,
        io_threads=config.io.io_threads,
        staging_bytes=config.io.staging_bytes,
        groups=tuple(groups),
        eviction=config.tier.eviction,
        transport=config.transport.transport,
        # Its I/O process moves host memory; what is asked for memory of a GPU was decided here.
        gds="auto" if on_gpu else config.transport.gds,
        nixl_plugin=config.transport.nixl_plugin,
        staging_medium="auto" if on_gpu else config.transport.staging_medium,
        protection=protection_spec(config),
        memory_bytes=config.tier.memory_bytes,
    )


def _pinned_mover(device: int, groups: Sequence[GroupSpec], staging: PinnedStaging) -> DeviceMover:
    mover = _device_mover(device, groups, _device_slots(groups, GPU_DEFAULT_SLOTS), "host")
    try:
        mover.register_host(staging.address, staging.size_bytes)
    except BaseException:
        mover.close()
        raise
    return mover


def _slot_bytes(groups: Sequence[GroupSpec]) -> int:
    return max(g.blocks_per_chunk * align_up(g.block_bytes) for g in groups)


def _device_slots(groups: Sequence[GroupSpec], least: int) -> int:
    """How many device slots: what the bound on device memory allows, but not fewer than the path needs."""
    return min(max(GPU_STAGING_BYTES // _slot_bytes(groups), least, GPU_DEFAULT_SLOTS), GPU_MAX_SLOTS)


def _device_mover(device: int, groups: Sequence[GroupSpec], slots: int, medium: Literal["host", "gpu"]) -> DeviceMover:
    # Only here, so that an engine without a GPU needs nothing of it.
    from memkv_engines.gpu.mover import DeviceMover

    mover = DeviceMover(device, slot_bytes=_slot_bytes(groups), slots=slots, medium=medium)
    try:
        for group in groups:
            tiles = [Tile(t.base, t.block_stride_bytes, t.length_bytes) for t in group.tiles]
            mover.add_group(group.group, KVLayout.plan(group.num_blocks, tiles))
    except BaseException:
        mover.close()
        raise
    return mover
