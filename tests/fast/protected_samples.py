"""A key, and chunks that are protected with it."""

from __future__ import annotations

import hashlib

from memkv_engines.chunk.codec import ChunkHeader, build_header
from memkv_engines.chunk.protection import Protection
from memkv_engines.keys import ChunkKey, Namespace
from tests.fast.samples import NAMESPACE, SHARD, chain, noise

KEY = hashlib.sha256(b"the key").digest()
OTHER_KEY = hashlib.sha256(b"another key").digest()
AUTH, ENCRYPT = Protection(KEY, encrypt=False), Protection(KEY, encrypt=True)
COUNT, BLOCK_BYTES, STRIDE = 4, 5000, 8192


def sealed(
    guardian: Protection,
    count: int = COUNT,
    block_bytes: int = BLOCK_BYTES,
    *,
    holes: int = 0,
    prompt: str = "a",
    namespace: Namespace = NAMESPACE,
    seed: int = 0,
) -> tuple[ChunkHeader, bytearray]:
    """A protected chunk; its payload as stored."""
    hashes = chain(count, prompt)
    key = ChunkKey(namespace.digest, hashes[0], hashes[-1], count, 0, SHARD, holes)
    stride = -(-block_bytes // 4096) * 4096
    payload = bytearray(noise(count * stride, seed))
    return build_header(key, 16, block_bytes, hashes, 7, memoryview(payload), guardian), payload
