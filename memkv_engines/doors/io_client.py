"""The I/O client of a worker, from our configuration."""

from __future__ import annotations

from collections.abc import Sequence

from memkv_engines.config import Config
from memkv_engines.metrics import Counters
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.messages import GroupSpec, Setup


def worker_client(
    config: Config, groups: Sequence[GroupSpec], *, stores: bool, counters: Counters | None = None
) -> IoClient:
    """A client that is not started yet.

    Args:
        config: ours.
        groups: the KV groups of this worker.
        stores: whether it may write to the tier.
        counters: where to count; its own if None.
    """
    setup = Setup(
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
    return IoClient(
        setup,
        io_process=config.io.io_process,
        load_timeout_ms=config.io.load_timeout_ms,
        fence_timeout_ms=config.io.fence_timeout_ms,
        counters=counters,
    )
