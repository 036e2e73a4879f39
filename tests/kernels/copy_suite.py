"""What gather and scatter must do, as plain functions over a route.

pytest, the sanitizer run and the mutants call them; each raises `AssertionError`. Everything a launch may touch is
declared to the checker; guard bytes and the error word are compared too.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tests.kernels import layouts, oracle
from tests.kernels.abi import CHUNK_OVERFLOW, ID_OUT_OF_RANGE, TILE, UNFIT, CopyCall, address
from tests.kernels.layouts import GUARD_BYTES, Bytes, Paged, Placement
from tests.kernels.routes import Route, Span
from tests.kernels.tile_plan import plan_tiles


@dataclass(frozen=True)
class Variant:
    """The kernels under test: the ordinary pair, or the bulk pair in one of its two modes."""

    route: Route
    bulk: bool = False
    lazy: bool = False

    def kernel(self, direction: str) -> str:
        """Name of the kernel for `gather` or `scatter`."""
        return f"memkv_{direction}{'_bulk' if self.bulk else ''}"

    def block(self, threads: int) -> int:
        """Threads per CTA: the bulk pair has 32."""
        return 32 if self.bulk else threads

    def run(
        self,
        direction: str,
        call: CopyCall,
        read: Sequence[Span],
        write: Sequence[Span],
        grid: int,
        block: int,
        seed: int,
    ) -> None:
        """Launches; any violation is a failure. The bulk pair's shape is fixed."""
        found = self.route.launch(
            self.kernel(direction),
            call.arguments,
            grid=grid,
            block=self.block(block),
            seed=seed,
            read=[*read, *call.tables],
            write=[*write, (address(call.error), 4)],
            lazy=self.lazy,
        )
        assert not found, f"{self.kernel(direction)} on {self.route.name}: {found[0]}"


def aligned(size: int, misalign: int = 0, fill: int = 0xA5) -> tuple[Bytes, Bytes]:
    """An allocation with guard bytes, and the `size` bytes in it that start `misalign` past a multiple of 64."""
    raw = np.full(size + 2 * GUARD_BYTES + 64 + misalign, fill, dtype=np.uint8)
    start = GUARD_BYTES + (-(address(raw) + GUARD_BYTES)) % 64 + misalign
    return raw, raw[start : start + size]


def spans(paged: Paged) -> list[Span]:
    """What of a pool may be touched: its caches, not the guard bytes around them."""
    return [(address(cache), cache.nbytes) for cache in paged.caches]


def check_both(
    variant: Variant,
    paged: Paged,
    placement: Placement,
    ids: Sequence[int],
    *,
    first_index: int = 0,
    external: bool = False,
    grid: int = 2,
    block: int = 64,
    seed: int = 0,
    misalign: int = 0,
    error: int = 0,
    tile_bytes: int = 4096,
) -> None:
    """Gathers a chunk, then scatters another one, each against the oracle."""
    count = first_index + len(ids)
    size = placement.bytes(paged, count)
    raw, chunk = aligned(size, misalign)
    tiles = plan_tiles(paged, placement, count, address(chunk), tile_bytes)

    def call() -> CopyCall:
        return CopyCall(
            tiles,
            ids,
            chunk=address(chunk),
            chunk_bytes=size,
            num_blocks=paged.num_blocks,
            first_index=first_index,
            external=external,
        )

    expected, expected_raw = oracle.gather(paged, placement, ids, chunk, first_index), raw.copy()
    start = address(chunk) - address(raw)
    expected_raw[start : start + size] = expected
    before = [allocation.copy() for allocation in paged.raw]
    gather = call()
    variant.run("gather", gather, spans(paged), [(address(chunk), size)], grid, block, seed)
    assert int(gather.error[0]) == error, f"error word {gather.error[0]}"
    assert np.array_equal(raw, expected_raw), f"gather: byte {int(np.argmax(raw != expected_raw)) - start} of the chunk"
    assert all(map(np.array_equal, paged.raw, before)), "gather changed a page"

    chunk[:] = np.random.default_rng(seed + 1).integers(0, 256, size, dtype=np.uint8)
    pages, snapshot = oracle.scatter(paged, placement, ids, chunk, first_index), raw.copy()
    scatter = call()
    variant.run("scatter", scatter, [(address(chunk), size)], spans(paged), grid, block, seed)
    assert int(scatter.error[0]) == error, f"error word {scatter.error[0]}"
    assert np.array_equal(raw, snapshot), "scatter changed the chunk"
    for number, (cache, wanted) in enumerate(zip(paged.caches, pages, strict=True)):
        assert np.array_equal(cache, wanted), f"scatter: cache {number}"
    for allocation, old, cache in zip(paged.raw, before, paged.caches, strict=True):
        at = address(cache) - address(allocation)
        assert np.array_equal(allocation[:at], old[:at]), "scatter wrote before a cache"
        assert np.array_equal(allocation[at + cache.nbytes :], old[at + cache.nbytes :]), "scatter wrote behind a cache"


# ------------------------------------------------------------------------------------------------------- the checks


def check_layouts(variant: Variant) -> None:
    """Every layout, page size and placement, with holes, in changing shapes and orders."""
    number = 0
    for maker in layouts.MAKERS:
        for page in layouts.PAGE_BYTES:
            if variant.bulk and (maker in ("hybrid", "odd") or page % 64):
                continue
            paged = layouts.build(maker, seed=number, page=page)
            padded = -(-paged.block_bytes // 512) * 512
            for placement in (Placement(4096, padded), Placement(0, paged.block_bytes), Placement(0, 0)):
                number += 1
                ids = [int(block) for block in np.random.default_rng(number).permutation(paged.num_blocks)[:4]]
                if number % 3 == 0:
                    ids[1] = -1
                check_both(
                    variant,
                    paged,
                    placement,
                    ids,
                    external=number % 2 == 1,
                    grid=1 + number % 5,
                    block=32 * (1 + number % 4),
                    seed=number,
                    tile_bytes=(4096, 512, 1024)[number % 3],
                )


def check_ids(variant: Variant) -> None:
    """Ids outside the pool are noted and move nothing; negative ones are holes."""
    paged = layouts.build("split", seed=1, layers=1, num_blocks=6)
    placement = Placement(64, 4096)
    for external in (False, True):
        check_both(variant, paged, placement, [0, 6, 2], external=external, error=ID_OUT_OF_RANGE)
        check_both(variant, paged, placement, [0, 2**31 - 1, 2], external=external, error=ID_OUT_OF_RANGE)
        check_both(variant, paged, placement, [0, -1, 5, -7, -(2**31)], external=external)
        check_both(variant, paged, placement, [-1, -1], external=external)
        check_both(variant, paged, placement, [5], external=external)
    check_both(variant, paged, placement, [0, 2**40, 2**32, 3], external=True, error=ID_OUT_OF_RANGE)
    check_both(variant, paged, placement, [0, -(2**40), 3], external=True)


def check_counts(variant: Variant) -> None:
    """No blocks, and around the number of ids that fit inside the arguments."""
    paged = layouts.build("split", seed=2, layers=1, num_blocks=620, page=16)
    order = [int(block) for block in np.random.default_rng(3).permutation(620)]
    for count in (447, 448, 449, 600):
        check_both(variant, paged, Placement(0, 32), order[:count], grid=3, block=96, seed=count)
    check_both(variant, paged, Placement(64, 32), [])
    empty = CopyCall(np.zeros(0, TILE), [1, 2], chunk=64, chunk_bytes=0, num_blocks=620)
    variant.run("gather", empty, [], [], 2, 64, 0)
    assert int(empty.error[0]) == 0


def check_shapes(variant: Variant) -> None:
    """More workers than work, fewer workers than tiles, and strides that do not divide the number of tiles."""
    for layers, blocks, grid, threads in ((1, 1, 7, 512), (5, 6, 1, 32), (5, 6, 3, 96), (4, 6, 5, 32), (3, 5, 2, 160)):
        paged = layouts.build("split", seed=grid, layers=layers, num_blocks=6, page=528)
        ids = list(range(blocks))
        check_both(variant, paged, Placement(0, paged.block_bytes), ids, grid=grid, block=threads, seed=7 * grid)


def check_first_index(variant: Variant) -> None:
    """The chunk index of the first id counts, also where index or offset leave 32 bits."""
    paged = layouts.build("fused", seed=4, layers=2, num_blocks=6)
    check_both(variant, paged, Placement(128, 4608), [4, 5], first_index=3)
    # Index 2^32 - 1 and the one after it, in a chunk that begins there: offsets are sums modulo 2^64.
    first, stride = 2**32 - 1, paged.block_bytes
    raw, chunk = aligned(2 * stride)
    tiles = plan_tiles(paged, Placement(0, stride), 2, address(chunk))
    tiles["chunk_offset_bytes"] -= np.uint64(first * stride)
    call = CopyCall(tiles, [4, 1], chunk=address(chunk), chunk_bytes=chunk.nbytes, num_blocks=6, first_index=first)
    expected = oracle.gather(paged, Placement(0, stride), [4, 1], chunk)
    variant.run("gather", call, spans(paged), [(address(chunk), chunk.nbytes)], 2, 64, 1)
    assert int(call.error[0]) == 0 and np.array_equal(chunk, expected), "index beyond 32 bits"
    assert (raw[: address(chunk) - address(raw)] == 0xA5).all()


def check_capacity(variant: Variant) -> None:
    """A tile that would not fit writes nothing, others still move; exactly enough is enough."""
    paged = layouts.build("split", seed=5, layers=1, num_blocks=6)
    placement = Placement(0, paged.block_bytes)
    ids = [3, 0, 5]
    need = placement.bytes(paged, 3)
    for missing in (0, 1, 16, 1024, need - 1, need):
        raw, chunk = aligned(need)
        tiles = plan_tiles(paged, placement, 3, address(chunk), 512)
        call = CopyCall(tiles, ids, chunk=address(chunk), chunk_bytes=need - missing, num_blocks=6)
        expected = oracle.gather(paged, placement, ids, chunk)
        fits = (need - missing) // 512 * 512
        expected[fits:] = 0xA5
        variant.run("gather", call, spans(paged), [(address(chunk), need - missing)], 2, 64, missing)
        assert int(call.error[0]) == (CHUNK_OVERFLOW if missing else 0), f"{missing} bytes short: {call.error[0]}"
        assert np.array_equal(chunk, expected), f"{missing} bytes short"
        assert (raw[: address(chunk) - address(raw)] == 0xA5).all()
    # An offset far outside, and one whose sum with the length would wrap, also where any offset would do.
    for offset, capacity in ((2**63, need), (2**64 - 512, need), (2**64 - 512, 2**64 - 1)):
        raw, chunk = aligned(need)
        tiles = plan_tiles(paged, placement, 3, address(chunk), 512)
        tiles["chunk_offset_bytes"][1] = offset
        call = CopyCall(tiles, [2], chunk=address(chunk), chunk_bytes=capacity, num_blocks=6)
        variant.run("gather", call, spans(paged), [(address(chunk), need)], 1, 32, 0)
        assert int(call.error[0]) == CHUNK_OVERFLOW
        assert (raw[: address(chunk) - address(raw)] == 0xA5).all()


def check_far(variant: Variant) -> None:
    """Offsets beyond 2^31 and 2^32 in pages and in the chunk; memory is reserved, only touched pages exist."""
    reserve = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = np.frombuffer(mmap.mmap(-1, 12 << 30, flags=reserve), np.uint8)
    base, length, stride, chunk_stride = address(memory), 4096, 3 << 20, 1 << 30
    ids = [1, 700, 1400, 1365, 2047]  # 700 and 1400 times 3 MiB lie beyond 2^31 and 2^32
    chunk_at = 7 << 30
    random = np.random.default_rng(6)
    pages = [slice(block * stride, block * stride + length) for block in ids]
    places = [slice(chunk_at + i * chunk_stride, chunk_at + i * chunk_stride + length) for i in range(5)]
    tiles = np.array([(base, stride, 0, chunk_stride, length, 4, 0)], dtype=TILE)
    for direction, sources, targets in (("gather", pages, places), ("scatter", places, pages)):
        for external in (False, True):
            for source, target in zip(sources, targets, strict=True):
                memory[source] = random.integers(0, 256, length, dtype=np.uint8)
                memory[target] = 0
            call = CopyCall(tiles, ids, chunk=base + chunk_at, chunk_bytes=5 << 30, num_blocks=2048, external=external)
            read = [(base + part.start, length) for part in sources]
            write = [(base + part.start, length) for part in targets]
            variant.run(direction, call, read, write, 1, 32, 0)
            assert int(call.error[0]) == 0
            for source, target in zip(sources, targets, strict=True):
                assert np.array_equal(memory[source], memory[target]), f"{direction} at {source.start:#x}"


def check_widths(variant: Variant) -> None:
    """The width follows from alignment alone; nothing may fall to a narrower path unnoticed."""
    cases = ((4096, 0, 16), (4096, 8, 8), (4096, 4, 4), (4096, 2, 2), (4096, 1, 1), (4104, 0, 8), (100, 0, 4))
    for length, misalign, width in cases:
        paged = layouts.single(seed=length + misalign, stride=length, length=length, misalign=misalign)
        check_both(variant, paged, Placement(0, length), [3, 0, 4], tile_bytes=8192)
        _, stores = variant.route.counts()
        assert stores[width] * width == 3 * length, f"{length} bytes at +{misalign}: stores {stores}"
    # A tail: 4095 bytes are 255 accesses of 16 and 15 of 1.
    paged = layouts.single(seed=7, stride=4096, length=4095)
    check_both(variant, paged, Placement(0, 4096), [1])
    _, stores = variant.route.counts()
    assert (stores[16], stores[1]) == (255, 15), f"a tail: {stores}"


def check_planned_width(variant: Variant) -> None:
    """The planned width is an upper bound: what the addresses do not allow is moved more narrowly, never faults."""
    length = 256
    pages = ((0, 4, 16), (0, 3, 8), (0, 0, 1), (4, 4, 4), (1, 4, 1), (0, 5, 16), (0, 32, 1))
    chunks = ((8, 4, 8), (2, 4, 2), (1, 3, 1))
    for misalign, planned, width, chunk_misalign in (
        *((misalign, planned, width, 0) for misalign, planned, width in pages),
        *((0, planned, width, misalign) for misalign, planned, width in chunks),
    ):
        paged = layouts.single(seed=misalign + planned, stride=length, length=length, misalign=misalign)
        raw, chunk = aligned(2 * length, chunk_misalign)
        tiles = plan_tiles(paged, Placement(0, length), 2, address(chunk))
        tiles["log2_access"] = planned
        call = CopyCall(tiles, [2, 0], chunk=address(chunk), chunk_bytes=chunk.nbytes, num_blocks=5)
        expected = oracle.gather(paged, Placement(0, length), [2, 0], chunk)
        variant.run("gather", call, spans(paged), [(address(chunk), chunk.nbytes)], 1, 64, 0)
        _, stores = variant.route.counts()
        assert np.array_equal(chunk, expected) and int(call.error[0]) == 0
        assert stores[width] * width == 2 * length, f"planned {planned} at +{misalign}: {stores}"
        assert (raw[: address(chunk) - address(raw)] == 0xA5).all()


def check_repeated_ids(variant: Variant) -> None:
    """A gather may read a block twice."""
    paged = layouts.build("split", seed=8, layers=1)
    placement = Placement(0, paged.block_bytes)
    raw, chunk = aligned(placement.bytes(paged, 3))
    tiles = plan_tiles(paged, placement, 3, address(chunk))
    call = CopyCall(tiles, [2, 5, 2], chunk=address(chunk), chunk_bytes=chunk.nbytes, num_blocks=7)
    expected = oracle.gather(paged, placement, [2, 5, 2], chunk)
    variant.run("gather", call, spans(paged), [(address(chunk), chunk.nbytes)], 2, 64, 3)
    assert np.array_equal(chunk, expected) and int(call.error[0]) == 0
    assert (raw[: address(chunk) - address(raw)] == 0xA5).all()


def check_bulk_refusals(variant: Variant) -> None:
    """What the copy engine cannot move is refused with its own bit, writes nothing, and does not stop the others."""
    for length, misalign, chunk_misalign in ((100, 0, 0), (24, 0, 0), (64, 4, 0), (64, 0, 8), (64, 8, 8), (0, 0, 0)):
        stride = max(length, 16)
        paged = layouts.single(seed=length, stride=stride, length=length, misalign=misalign)
        check_refused(variant, paged, length, chunk_misalign, 4096)
    check_refused(variant, layouts.single(seed=9, stride=4112, length=4112), 4112, 0, 8192)
    # A good tile beside a bad one.
    builder = layouts.Builder(10, 5)
    builder.piece(builder.cache(64), 0, 64)
    builder.piece(builder.cache(64), 0, 40)
    builder.piece(builder.cache(64), 0, 64)
    paged = builder.build()
    _, chunk = aligned(168 + 8)
    tiles = plan_tiles(paged, Placement(0, 176), 1, address(chunk))
    tiles["chunk_offset_bytes"] = (0, 64, 112)
    call = CopyCall(tiles, [3], chunk=address(chunk), chunk_bytes=chunk.nbytes, num_blocks=5)
    variant.run("gather", call, spans(paged), [(address(chunk), chunk.nbytes)], 1, 32, 0)
    assert int(call.error[0]) == UNFIT
    assert np.array_equal(chunk[:64], paged.caches[0][3]) and np.array_equal(chunk[112:], paged.caches[2][3])
    assert (chunk[64:112] == 0xA5).all()


def check_refused(variant: Variant, paged: Paged, length: int, chunk_misalign: int, tile_bytes: int) -> None:
    """One tile per block that the bulk pair must refuse."""
    raw, chunk = aligned(2 * max(length, 16), chunk_misalign)
    tiles = plan_tiles(paged, Placement(0, max(length, 16)), 2, address(chunk), tile_bytes)
    if length == 0:
        tiles = np.array([(address(paged.caches[0]), 16, 0, 16, 0, 4, 0)], dtype=TILE)
    call = CopyCall(tiles, [1, 2], chunk=address(chunk), chunk_bytes=chunk.nbytes, num_blocks=5)
    variant.run("gather", call, spans(paged), [(address(chunk), chunk.nbytes)], 1, 32, 0)
    assert int(call.error[0]) == UNFIT, f"{length} bytes at +{chunk_misalign}: {call.error[0]}"
    assert (raw == 0xA5).all(), "a refused tile was written"


def check_bulk_ring(variant: Variant) -> None:
    """Rings that are just filled, just refilled and gone around often; tiles of all lengths."""
    for blocks in (1, 12, 15, 16, 17, 20, 21, 31, 33, 64, 100):
        paged = layouts.build("fused", seed=blocks, layers=1, num_blocks=100, page=2048)
        ids = [int(block) for block in np.random.default_rng(blocks).permutation(100)[:blocks]]
        check_both(variant, paged, Placement(0, 4096), ids, grid=1, seed=blocks)
        check_both(variant, paged, Placement(0, 4096), ids, grid=3, seed=blocks, tile_bytes=1040)


Check = Callable[[Variant], None]
COMMON: tuple[Check, ...] = (
    check_ids,
    check_shapes,
    check_first_index,
    check_capacity,
    check_counts,
    check_repeated_ids,
    check_far,
    check_layouts,
)
ORDINARY: tuple[Check, ...] = (check_widths, check_planned_width, *COMMON)
BULK: tuple[Check, ...] = (check_bulk_refusals, check_bulk_ring, *COMMON)
