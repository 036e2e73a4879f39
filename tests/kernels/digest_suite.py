"""What the digest kernel must do, as plain functions over a route. The oracle is the `xxhash` package.

Each raises `AssertionError`. Only the bytes of the blocks may be read, and only leaves written, each once.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable

import numpy as np
import xxhash

from tests.kernels.abi import CHUNK_OVERFLOW, DIGEST_ARGS, LEAF_BYTES, UNFIT, address
from tests.kernels.layouts import Bytes
from tests.kernels.routes import Route

KERNEL = "memkv_leaf_digests"
UNWRITTEN = 0x5EED5EED5EED5EED
SHORT_PATHS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 97, 127, 128, 129, 143, 144)
LONG_EDGES = (145, 239, 240, 241, 255, 256, 257, 511, 512, 513, 575, 576, 1023, 1024, 1025, 1087, 1088, 1089)
LEAF_EDGES = (2047, 2048, 2049, 3072, 3073, 4096, 10240, 15360, 15361, 16320, 16321, 16383, 16384)
EDGES = (*SHORT_PATHS, *LONG_EDGES, *LEAF_EDGES)


def leaves_of(block: Bytes) -> list[int]:
    """Digests of a block's leaves by the `xxhash` package."""
    data = block.tobytes()
    return [xxhash.xxh3_64_intdigest(data[at : at + LEAF_BYTES]) for at in range(0, len(data), LEAF_BYTES)]


def digests(
    route: Route,
    memory: Bytes,
    *,
    block_bytes: int,
    stride: int,
    count: int,
    chunk_bytes: int | None = None,
    readable: Iterable[int] | None = None,
    grid: int = 1,
    block: int = 32,
    seed: int = 0,
) -> tuple[list[list[int]], int]:
    """Runs the kernel over blocks in `memory`.

    Args:
        route: Where.
        memory: Begins with the first block.
        block_bytes: Bytes of each block.
        stride: From block to block.
        count: Blocks.
        chunk_bytes: What may be read from the first block on; by default all of `memory`.
        readable: Indices of the blocks that may be read; by default all.
        grid: CTAs.
        block: Threads per CTA.
        seed: Order of execution.

    Returns:
        The leaves of every block, and the error word.
    """
    leaves = -(-block_bytes // LEAF_BYTES)
    out = np.full((count, leaves), UNWRITTEN, np.uint64)
    error = np.zeros(1, np.uint32)
    arguments = np.zeros((), DIGEST_ARGS)
    arguments["first_block"], arguments["leaves"] = address(memory), address(out)
    arguments["chunk_bytes"] = memory.nbytes if chunk_bytes is None else chunk_bytes
    arguments["block_bytes"], arguments["block_stride_bytes"] = block_bytes, stride
    arguments["error"], arguments["block_count"] = address(error), count
    indices = range(count) if readable is None else readable
    read = [(address(memory) + index * stride, block_bytes) for index in indices]
    write = [(address(out), out.nbytes), (address(error), 4)]
    found = route.launch(KERNEL, arguments, grid=grid, block=block, seed=seed, read=read, write=write)
    assert not found, f"{KERNEL} on {route.name}: {found[0]}"
    return [[int(leaf) for leaf in row] for row in out], int(error[0])


def memory_of(size: int, seed: int, misalign: int = 0) -> Bytes:
    """Random bytes that start `misalign` past a multiple of 64."""
    raw = np.random.default_rng(seed).integers(0, 256, size + 64 + misalign, dtype=np.uint8)
    start = -address(raw) % 64 + misalign
    return raw[start : start + size]


def check_blocks(route: Route, block_bytes: int, count: int, padding: int, grid: int, block: int, seed: int) -> None:
    """Blocks of one size, each against the oracle."""
    stride = block_bytes + padding + -(block_bytes + padding) % 16
    memory = memory_of((count - 1) * stride + block_bytes, seed)
    out, error = digests(
        route, memory, block_bytes=block_bytes, stride=stride, count=count, grid=grid, block=block, seed=seed
    )
    for index, leaves in enumerate(out):
        expected = leaves_of(memory[index * stride : index * stride + block_bytes])
        assert leaves == expected, f"block {index} of {block_bytes} bytes on {route.name}"
    assert error == 0


# ------------------------------------------------------------------------------------------------------- the checks


def check_lengths(route: Route, lengths: Iterable[int]) -> None:
    """A single leaf of each length."""
    for length in lengths:
        check_blocks(route, length, 1, 0, 1, 32, length)


def check_edges(route: Route) -> None:
    """The lengths on both sides of every rule of XXH3."""
    check_lengths(route, EDGES)


def check_every_short_length(route: Route) -> None:
    """All lengths that have rules of their own, and the first with the long one."""
    check_lengths(route, range(1, 330))


def check_sampled_lengths(route: Route) -> None:
    """Random lengths up to a leaf."""
    check_lengths(route, (int(n) for n in np.random.default_rng(11).integers(241, LEAF_BYTES + 1, 60)))


def check_extreme_data(route: Route) -> None:
    """Bytes that carry everywhere, or nowhere."""
    for value in (0x00, 0xFF, 0x80):
        for length in (3, 8, 16, 128, 240, 1024, 4099, LEAF_BYTES):
            memory = memory_of(length, 0)
            memory[:] = value
            out, error = digests(route, memory, block_bytes=length, stride=length + -length % 16, count=1)
            assert out == [leaves_of(memory)] and error == 0, f"{length} bytes of {value:#x}"


def check_several_blocks(route: Route) -> None:
    """Blocks of several leaves with short last ones, padding between them, in changing shapes and orders."""
    sizes = (5, 100, 300, LEAF_BYTES, LEAF_BYTES + 1, 2 * LEAF_BYTES, 2 * LEAF_BYTES + 300, 3 * LEAF_BYTES + 10240)
    for number, size in enumerate(sizes):
        for count, grid, block in ((1, 1, 32), (3, 2, 64), (5, 1, 96), (2, 7, 512)):
            check_blocks(route, size, count, (0, 16, 4096)[number % 3], grid, block, number + count)


def check_capacity(route: Route) -> None:
    """A block that does not fit is not read, gets no leaves and is noted; the others are right."""
    block_bytes, stride, count = LEAF_BYTES + 100, LEAF_BYTES + 112, 3
    memory = memory_of((count - 1) * stride + block_bytes, 12)
    for missing, fitting in ((0, 3), (1, 2), (stride - 1, 2), (stride, 2), (stride + 1, 1), (memory.nbytes, 0)):
        capacity = memory.nbytes - missing
        out, error = digests(
            route,
            memory,
            block_bytes=block_bytes,
            stride=stride,
            count=count,
            chunk_bytes=capacity,
            readable=range(fitting),
            grid=2,
            block=64,
        )
        assert error == (CHUNK_OVERFLOW if fitting < count else 0), f"{missing} bytes short: error {error}"
        for index, leaves in enumerate(out):
            start = index * stride
            expected = leaves_of(memory[start : start + block_bytes]) if index < fitting else [UNWRITTEN] * 2
            assert leaves == expected, f"{missing} bytes short: block {index}"


def check_refusals(route: Route) -> None:
    """What is not aligned is refused whole; strides whose product wraps do not fit; nothing to do is fine."""
    memory = memory_of(4096, 13, misalign=8)
    out, error = digests(route, memory, block_bytes=256, stride=256, count=2, readable=())
    assert (out, error) == ([[UNWRITTEN]] * 2, UNFIT)
    memory = memory_of(4096, 13)
    out, error = digests(route, memory, block_bytes=256, stride=264, count=2, readable=(), grid=2, block=64)
    assert (out, error) == ([[UNWRITTEN]] * 2, UNFIT)
    for stride in (1 << 63, 1 << 62, (1 << 64) - 256, 1 << 32):
        out, error = digests(route, memory, block_bytes=256, stride=stride, count=5, readable=(0,))
        expected = [leaves_of(memory[:256]), *[[UNWRITTEN]] * 4]
        assert (out, error) == (expected, CHUNK_OVERFLOW), f"stride {stride:#x}"
    for block_bytes, count in ((0, 2), (256, 0)):
        assert digests(route, memory, block_bytes=block_bytes, stride=256, count=count, readable=())[1] == 0
    # Blocks so large that their leaves cannot be counted: the argument is taken at its word, and refused.
    out, error = digests_of_huge(route, memory)
    assert (out, error) == (UNWRITTEN, CHUNK_OVERFLOW)


def digests_of_huge(route: Route, memory: Bytes) -> tuple[int, int]:
    """The first leaf and the error word for a block of 2^63 bytes."""
    out, error = np.full(1, UNWRITTEN, np.uint64), np.zeros(1, np.uint32)
    arguments = np.zeros((), DIGEST_ARGS)
    arguments["first_block"], arguments["leaves"], arguments["error"] = address(memory), address(out), address(error)
    arguments["chunk_bytes"] = arguments["block_bytes"] = 1 << 63
    arguments["block_count"] = 1
    found = route.launch(KERNEL, arguments, grid=1, block=32, write=[(address(out), 8), (address(error), 4)])
    assert not found, f"{KERNEL} on {route.name}: {found[0]}"
    return int(out[0]), int(error[0])


def check_far(route: Route) -> None:
    """Blocks that lie beyond 2^31 and 2^32 bytes from the first."""
    reserve = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    stride, block_bytes, count = (1 << 31) + 4096, 300, 4
    memory = np.frombuffer(mmap.mmap(-1, 8 << 30, flags=reserve), np.uint8)
    for index in range(count):
        memory[index * stride : index * stride + block_bytes] = memory_of(block_bytes, 14 + index)
    out, error = digests(route, memory, block_bytes=block_bytes, stride=stride, count=count)
    assert error == 0
    for index, leaves in enumerate(out):
        assert leaves == leaves_of(memory[index * stride : index * stride + block_bytes]), f"block {index}"


def check_widths(route: Route) -> None:
    """A whole leaf is read once, 16 bytes at a time."""
    memory = memory_of(LEAF_BYTES, 15)
    digests(route, memory, block_bytes=LEAF_BYTES, stride=LEAF_BYTES, count=1)
    loads, stores = route.counts()
    # Keys are constants; plain reads of the arguments do not count.
    assert loads[16] == LEAF_BYTES // 16 and loads[1] == 0, loads
    assert stores[8] == 1, stores


Check = Callable[[Route], None]
CHECKS: tuple[Check, ...] = (
    check_edges,
    check_refusals,
    check_capacity,
    check_several_blocks,
    check_extreme_data,
    check_far,
    check_widths,
    check_sampled_lengths,
)
