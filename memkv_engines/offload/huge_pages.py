"""Asks for the engine's KV cache in host memory to lie on huge pages, where it has not been touched yet.

A copy by ``process_vm_*`` pins and walks every page it touches: 1,080 of them for a chunk on 4 KiB pages, 3 on 2 MiB
ones. Engines allocate their pools without touching them, and Linux gives huge pages only where they were asked for
(``madvise`` is the usual setting), so asking at start costs nothing and every later first touch is cheaper too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from memkv_engines.limits import HUGE_PAGE_BYTES
from memkv_engines.offload.messages import GroupSpec

_MADV_HUGEPAGE = 14


def advise_huge_pages(groups: Iterable[GroupSpec]) -> int:
    """Advise the kernel about every page that the groups name; nothing is touched or moved now.

    Args:
        groups: KV groups of this process, in host memory.

    Returns:
        Bytes that were advised; a kernel that refuses (no transparent huge pages) only makes it fewer.
    """
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    advised = 0
    for start, stop in _regions(groups):
        first = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        length = stop // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES - first
        if length > 0 and madvise(first, length, _MADV_HUGEPAGE) == 0:
            advised += length
    return advised


def _regions(groups: Iterable[GroupSpec]) -> list[tuple[int, int]]:
    """The address ranges of all pools, ascending; those that overlap or touch are one."""
    ranges = sorted(
        (tile.base, tile.base + (group.num_blocks - 1) * tile.block_stride_bytes + tile.length_bytes)
        for group in groups
        for tile in group.tiles
    )
    regions: list[tuple[int, int]] = []
    for start, stop in ranges:
        if regions and start <= regions[-1][1]:
            regions[-1] = regions[-1][0], max(stop, regions[-1][1])
        else:
            regions.append((start, stop))
    return regions
