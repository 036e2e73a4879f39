"""Chunks, keys and buffers that several test modules need."""

from __future__ import annotations

import hashlib
import mmap

from memkv_engines.chunk.codec import ChunkHeader, Geometry, build_header
from memkv_engines.keys import ChunkKey, ChunkName, Namespace, Shard

NAMESPACE = Namespace({"model": "tiny", "dtype": "float32"})
SHARD = Shard(0, 3, 3, 0, 30, 30)


def chain_hash(index: int, prompt: str = "a") -> bytes:
    """Chain hash of a block of an imagined prompt."""
    return hashlib.sha256(f"{prompt}:{index}".encode()).digest()


def chain(count: int, prompt: str = "a") -> list[bytes]:
    """Chain hashes of the first blocks of an imagined prompt."""
    return [chain_hash(i, prompt) for i in range(count)]


def aligned(data: bytes) -> memoryview:
    """The bytes in page-aligned memory, as direct I/O needs them."""
    view = memoryview(mmap.mmap(-1, max(len(data), 1)))[: len(data)]
    view[:] = data
    return view


def noise(length: int, seed: int = 0) -> bytes:
    """Bytes in which every position differs from its neighbours in other blocks."""
    return hashlib.shake_128(seed.to_bytes(8, "little")).digest(length)


def make_key(block_count: int = 4, *, holes: int = 0, prompt: str = "a", shard: Shard = SHARD) -> ChunkKey:
    """The key of a chunk that begins an imagined prompt."""
    hashes = chain(block_count, prompt)
    return ChunkKey(NAMESPACE.digest, hashes[0], hashes[-1], block_count, 0, shard, holes)


def make_name(block_count: int = 4, prompt: str = "a") -> ChunkName:
    """The name of that chunk."""
    return make_key(block_count, prompt=prompt).name


def make_chunk(
    block_count: int, block_bytes: int, *, holes: int = 0, block_tokens: int = 16
) -> tuple[ChunkHeader, bytearray]:
    """A header and its payload, padding filled with bytes that no digest covers."""
    geometry = Geometry(block_count, block_bytes, block_tokens)
    payload = bytearray(noise(geometry.payload_bytes))
    header = build_header(
        make_key(block_count, holes=holes), block_tokens, block_bytes, chain(block_count), 7, memoryview(payload)
    )
    return header, payload
