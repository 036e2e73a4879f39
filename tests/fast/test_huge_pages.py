"""Advice about huge pages: it names the pool's whole huge pages, and the kernel really gives them on first touch."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from memkv_engines.limits import HUGE_PAGE_BYTES, MIB
from memkv_engines.offload.huge_pages import advise_huge_pages
from memkv_engines.offload.messages import GroupSpec, TileSpec

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LENGTH = 8 * MIB


@pytest.fixture
def address() -> Iterator[int]:
    """Memory that begins in the middle of a huge page and was never touched."""
    mapped = mmap.mmap(-1, LENGTH + 2 * HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE)
    here = ctypes.c_char.from_buffer(mapped)
    start = -(-ctypes.addressof(here) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    yield start + 64 * 1024
    del here
    mapped.close()


def group(*tiles: TileSpec, blocks: int) -> GroupSpec:
    return GroupSpec(0, (0, 1, 1, 0, 1, 1), 16, sum(t.length_bytes for t in tiles), 1, blocks, tiles)


def test_layers_side_by_side_are_one_region(address: int) -> None:
    half = LENGTH // 2
    layers = [TileSpec(address + layer * half, half // 4, half // 4) for layer in (1, 0)]
    # 8 MiB from the middle of a huge page on: three whole ones.
    assert advise_huge_pages([group(*layers, blocks=4)]) == 3 * HUGE_PAGE_BYTES


def test_regions_of_their_own_stay_apart(address: int) -> None:
    ours = [TileSpec(address, MIB, MIB), TileSpec(address + 5 * MIB, MIB, MIB)]
    assert advise_huge_pages([group(*ours, blocks=4)]) == 2 * HUGE_PAGE_BYTES


def test_a_pool_below_a_huge_page_is_left_alone(address: int) -> None:
    assert advise_huge_pages([group(TileSpec(address, 4096, 4096), blocks=8)]) == 0


def test_memory_that_is_not_there_is_no_error() -> None:
    assert advise_huge_pages([group(TileSpec(1 << 46, MIB, MIB), blocks=8)]) == 0


def test_first_touches_get_huge_pages(address: int) -> None:
    if "never" in ENABLED.read_text().split("[")[1].split("]")[0]:
        pytest.skip("this kernel gives no transparent huge pages")
    advise_huge_pages([group(TileSpec(address, MIB, MIB), blocks=8)])
    ctypes.memset(address, 1, LENGTH)
    assert huge_bytes_at(address) >= 2 * HUGE_PAGE_BYTES


def huge_bytes_at(address: int) -> int:
    """Bytes on huge pages in all mappings that hold a part of the memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, stop = (int(part, 16) for part in head.split("-"))
            inside = start < address + LENGTH and address < stop
        elif inside and head == "AnonHugePages:":
            total += int(line.split()[1]) * 1024
    return total
