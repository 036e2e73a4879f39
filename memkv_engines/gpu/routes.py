"""A KV group on a device, and which way its blocks go: a pure function of layout and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memkv_engines.chunk.layout import KVLayout
from memkv_engines.limits import GPU_COPY_ENGINE_MIN_BYTES, GPU_SINGLE_COPY_MIN_BYTES, KIB

Kind = Literal["kernel", "copy_engine", "contiguous"]
Medium = Literal["host", "gpu"]


@dataclass(frozen=True)
class Route:
    """How blocks move.

    Attributes:
        kind: ``kernel``: gather or scatter kernel and a device slot; ``copy_engine``: every tile of every block is a
            copy of its own, straight between page and host slot; ``contiguous``: the same where a block is one tile.
        reason: one line for the log.
    """

    kind: Kind
    reason: str

    @property
    def direct(self) -> bool:
        """Whether no device slot and no kernel take part."""
        return self.kind != "kernel"


@dataclass(frozen=True)
class DeviceGroup:
    """One KV group of this worker.

    Attributes:
        layout: its pages, by device addresses.
        stride_bytes: distance of blocks in a chunk, ``Geometry.block_stride_bytes``.
        route: the way its blocks go to and from host staging.
    """

    layout: KVLayout
    stride_bytes: int
    route: Route


def choose_route(layout: KVLayout, medium: Medium = "host", *, batch_copies: bool) -> Route:
    """Choose the way of one group.

    Args:
        layout: the pool.
        medium: where staging lies. A device-local copy is never one for the copy engine: the kernel is faster.
        batch_copies: whether the driver takes many copies in one call.
    """
    shortest = min(tile.length_bytes for tile in layout.tiles)
    least = GPU_COPY_ENGINE_MIN_BYTES if batch_copies else GPU_SINGLE_COPY_MIN_BYTES
    pieces = f"{len(layout.tiles)} tile(s) a block, the shortest {shortest / KIB:.1f} KiB"
    if medium == "gpu":
        return Route("kernel", f"staging lies on the device; {pieces}")
    if shortest < least:
        return Route("kernel", f"{pieces}, below the {least // KIB} KiB from which single copies fill the link")
    if len(layout.tiles) == 1:
        return Route("contiguous", f"{pieces}: blocks are copied without a kernel")
    return Route("copy_engine", f"{pieces}: each is copied without a kernel")
