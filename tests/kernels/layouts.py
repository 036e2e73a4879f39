"""Paged KV caches as byte arrays in the shapes that engines use, and where a chunk wants each piece.

Nothing here knows tiles. The oracle (`oracle.py`) indexes these arrays; the tests' own planner (`tile_plan.py`) reads
their addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
GUARD_BYTES = 64


@dataclass(frozen=True)
class Piece:
    """Contiguous bytes of every block: `length` bytes at `offset` of each row of a cache."""

    cache: int
    offset: int
    length: int


@dataclass(frozen=True)
class Paged:
    """The paged memory of one KV group.

    Attributes:
        raw: Allocations with guard bytes around each cache.
        caches: Views of them, shape [num_blocks, bytes from block to block], dtype uint8.
        pieces: What a block is made of, in payload order.
    """

    raw: list[Bytes]
    caches: list[Bytes]
    pieces: list[Piece]

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return int(self.caches[0].shape[0])

    @property
    def block_bytes(self) -> int:
        """Payload bytes of a block."""
        return sum(piece.length for piece in self.pieces)


@dataclass(frozen=True)
class Placement:
    """Where in the chunk a piece of a block goes.

    Attributes:
        header_bytes: What precedes the payload.
        block_stride_bytes: From block to block; 0 means layer-major, each piece of all blocks together.
    """

    header_bytes: int = 0
    block_stride_bytes: int = 0

    def offset(self, paged: Paged, piece: int, index: int, count: int) -> int:
        """Offset of a piece of the block at `index` in a chunk of `count` blocks."""
        before = sum(p.length for p in paged.pieces[:piece])
        if self.block_stride_bytes:
            return self.header_bytes + index * self.block_stride_bytes + before
        return self.header_bytes + before * count + index * paged.pieces[piece].length

    def bytes(self, paged: Paged, count: int) -> int:
        """Size of a chunk of `count` blocks, without padding behind the last one."""
        if not self.block_stride_bytes or count == 0:
            return self.header_bytes + paged.block_bytes * count
        return self.header_bytes + (count - 1) * self.block_stride_bytes + paged.block_bytes


class Builder:
    """Allocates caches with guard bytes and random content."""

    def __init__(self, seed: int, num_blocks: int) -> None:
        self.random = np.random.default_rng(seed)
        self.num_blocks = num_blocks
        self.raw: list[Bytes] = []
        self.caches: list[Bytes] = []
        self.pieces: list[Piece] = []

    def cache(self, stride_bytes: int, misalign: int = 0) -> int:
        """Adds a cache whose first byte is `misalign` past a multiple of 64; returns its number."""
        size = stride_bytes * self.num_blocks
        raw = self.random.integers(0, 256, size + 2 * GUARD_BYTES + 64 + misalign, dtype=np.uint8)
        start = GUARD_BYTES + (-(raw.ctypes.data + GUARD_BYTES)) % 64 + misalign
        self.raw.append(raw)
        self.caches.append(raw[start : start + size].reshape(self.num_blocks, stride_bytes))
        return len(self.caches) - 1

    def piece(self, cache: int, offset: int, length: int) -> None:
        """Adds a piece."""
        self.pieces.append(Piece(cache, offset, length))

    def build(self) -> Paged:
        """The pool."""
        return Paged(self.raw, self.caches, self.pieces)


Maker = Callable[[Builder, int, int], None]
"""Adds caches and pieces for a number of layers and bytes of one K or V page."""


def split(b: Builder, layers: int, page: int) -> None:
    """`[2, blocks, ...]` per layer: K and V apart."""
    for _ in range(2 * layers):
        b.piece(b.cache(page), 0, page)


def fused(b: Builder, layers: int, page: int) -> None:
    """`[blocks, 2, ...]` per layer."""
    for _ in range(layers):
        b.piece(b.cache(2 * page), 0, 2 * page)


def cross_layer(b: Builder, layers: int, page: int) -> None:
    """`[blocks, layers, 2, ...]`: a block is one piece."""
    b.piece(b.cache(2 * layers * page), 0, 2 * layers * page)


def cross_layer_pieces(b: Builder, layers: int, page: int) -> None:
    """The same with a range of layers, last layer first."""
    cache = b.cache(2 * layers * page)
    for number in reversed(range(2 * layers)):
        b.piece(cache, number * page, page)


def head_slice(b: Builder, layers: int, page: int) -> None:
    """`[2, blocks, tokens, heads, bytes]`, the middle one of three head groups: a piece per token."""
    tokens, row = 4, max(page // 4, 1)
    for _ in range(layers):
        cache = b.cache(tokens * 3 * row)
        for token in range(tokens):
            b.piece(cache, token * 3 * row + row, row)


def hybrid(b: Builder, layers: int, page: int) -> None:
    """Layers of different page sizes with padding behind each page."""
    for layer in range(layers):
        length = max(1, page // (1 + layer % 3) + layer % 2 * 8)
        b.piece(b.cache(length + layer % 4 * 16), 0, length)


def odd(b: Builder, layers: int, page: int) -> None:
    """No alignment at all: packed scales, odd rows, odd bases."""
    for layer in range(layers):
        length = page + 3 * layer + 1
        b.piece(b.cache(length + layer, misalign=layer % 16), min(layer % 2, layer), length - layer % 2)


MAKERS: dict[str, Maker] = {
    "split": split,
    "fused": fused,
    "cross_layer": cross_layer,
    "cross_layer_pieces": cross_layer_pieces,
    "head_slice": head_slice,
    "hybrid": hybrid,
    "odd": odd,
}

PAGE_BYTES = (16, 100, 132, 576, 584, 656, 1024, 4096, 8448)
"""Bytes of a page: MLA rows of 576, 584 and 656 bytes, an indexer's row of 132, whole pages, a page of odd tiles."""


def build(maker: str, *, seed: int, layers: int = 3, num_blocks: int = 7, page: int = 1024) -> Paged:
    """A pool of a named layout."""
    builder = Builder(seed, num_blocks)
    MAKERS[maker](builder, layers, page)
    return builder.build()


def single(*, seed: int, stride: int, length: int, misalign: int = 0, offset: int = 0, num_blocks: int = 5) -> Paged:
    """A pool of one cache and one piece."""
    builder = Builder(seed, num_blocks)
    builder.piece(builder.cache(stride, misalign), offset, length)
    return builder.build()
