"""Huge pages: for our staging, and asked for where the engine's KV cache in host memory has not been touched yet.

A copy by ``process_vm_*`` pins and walks every page it touches: 1,080 of them for a chunk on 4 KiB pages, 3 on 2 MiB
ones. Engines allocate their pools without touching them, and Linux gives huge pages only where they were asked for
(``madvise`` is the usual setting), so asking at start costs nothing and every later first touch is cheaper too.
"""

from __future__ import annotations

import ctypes
import mmap
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


def map_huge(size_bytes: int) -> tuple[mmap.mmap, int]:
    """New memory that begins on a huge page, and is on huge pages where the kernel has them; nothing is touched.

    Returns:
        The mapping, a huge page larger than asked for, and where in it the memory begins, in bytes.
    """
    region = mmap.mmap(-1, size_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE)
    try:
        region.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        pass  # A kernel without transparent huge pages: slower, not wrong.
    return region, -address_of(region) % HUGE_PAGE_BYTES


def address_of(region: mmap.mmap) -> int:
    """Where a mapping lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(region))


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
