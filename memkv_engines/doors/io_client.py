"""The I/O client of a worker, from our configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memkv_engines.chunk.layout import KVLayout, Tile, align_up
from memkv_engines.config import Config
from memkv_engines.limits import GPU_DEFAULT_SLOTS, GPU_MAX_SLOTS, GPU_STAGING_BYTES
from memkv_engines.metrics import Counters
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.device_client import DeviceIoClient
from memkv_engines.offload.huge_pages import advise_huge_pages
from memkv_engines.offload.messages import GroupSpec, Setup
from memkv_engines.offload.moving import Mover
from memkv_engines.offload.pinned import PinnedStaging


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
) -> IoClient | DeviceIoClient:
    """A client that is not started yet.

    Args:
        config: ours.
        groups: the KV groups of this worker.
        stores: whether it may write to the tier.
        counters: where to count; its own if None.
        pages: where the groups' tiles are in device memory; None: in host memory.

    Raises:
        ConfigError: too little staging for this model.
        GpuUnavailable: no driver, device or kernels.
    """

    def make_client(groups: Sequence[GroupSpec]) -> IoClient:
        return IoClient(
            _setup(config, groups, stores=stores),
            io_process=config.io.io_process,
            load_timeout_ms=config.io.load_timeout_ms,
            fence_timeout_ms=config.io.fence_timeout_ms,
            counters=counters,
        )

    if pages is None:
        advise_huge_pages(groups)
        return make_client(groups)
    return DeviceIoClient(
        make_client,
        lambda staging: _device_mover(pages.device, groups, staging),
        groups,
        staging_bytes=config.io.staging_bytes,
        stream=pages.stream,
        load_timeout_ms=config.io.load_timeout_ms,
        fence_timeout_ms=config.io.fence_timeout_ms,
    )


def _setup(config: Config, groups: Sequence[GroupSpec], *, stores: bool) -> Setup:
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
        gds=config.transport.gds,
        nixl_plugin=config.transport.nixl_plugin,
        staging_medium=config.transport.staging_medium,
    )


def _device_mover(device: int, groups: Sequence[GroupSpec], staging: PinnedStaging) -> Mover:
    # Only here, so that an engine without a GPU needs nothing of it.
    from memkv_engines.gpu.mover import DeviceMover

    slot_bytes = max(g.blocks_per_chunk * align_up(g.block_bytes) for g in groups)
    slots = min(max(GPU_STAGING_BYTES // slot_bytes, GPU_DEFAULT_SLOTS), GPU_MAX_SLOTS)
    mover = DeviceMover(device, slot_bytes=slot_bytes, slots=slots)
    try:
        for group in groups:
            tiles = [Tile(t.base, t.block_stride_bytes, t.length_bytes) for t in group.tiles]
            mover.add_group(group.group, KVLayout.plan(group.num_blocks, tiles))
        mover.register_host(staging.address, staging.size_bytes)
    except BaseException:
        mover.close()
        raise
    return mover
