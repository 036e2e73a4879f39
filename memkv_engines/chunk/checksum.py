"""Digests of blocks and headers: a two-level tree of XXH3, fixed by ``FORMAT.md``.

Leaves of 16 KiB are hashed with XXH3-64 (seed 0); the block digest is XXH3-128 over the block's chain hash, its
index in the chunk, its length and the leaves. So a swapped, misdirected or foreign block fails although its own
bytes are intact, a GPU can hash all leaves at once, and any run of blocks can be verified alone.
"""

from __future__ import annotations

import struct

from xxhash import xxh3_64_digest, xxh3_128_digest

from memkv_engines.limits import LEAF_BYTES

HASH_ID_XXH3_TREE = 1
_PREFIX = struct.Struct("<32sIQ")
_LEAF_DIGEST_BYTES = 8


def block_digest(block: memoryview, chain_hash: bytes, index: int) -> bytes:
    """Digest of one block.

    Args:
        block: the block's payload without padding, a contiguous view of bytes.
        chain_hash: the engine's 32-byte chain hash of the block.
        index: position of the block inside its chunk.

    Returns:
        16 bytes. Holds the GIL for at most one leaf (16 KiB, under 1 us) at a time.
    """
    return digest_of_leaves(leaf_digests(block), chain_hash, index, block.nbytes)


def leaf_digests(piece: memoryview) -> list[bytes]:
    """Digests of the leaves of a block, or of a piece of it that is a whole number of leaves long or its last."""
    return [xxh3_64_digest(piece[offset : offset + LEAF_BYTES]) for offset in range(0, piece.nbytes, LEAF_BYTES)]


def digest_of_leaves(leaves: list[bytes], chain_hash: bytes, index: int, block_bytes: int) -> bytes:
    """Digest of a block whose leaves have these digests, see ``block_digest``."""
    return xxh3_128_digest(b"".join([_PREFIX.pack(chain_hash, index, block_bytes), *leaves]))


def block_digest_of_leaves(leaves: bytes, length_bytes: int, chain_hash: bytes, index: int) -> bytes:
    """The same digest from leaves that were hashed elsewhere, such as on a GPU.

    Args:
        leaves: XXH3-64 of every leaf in order, big-endian (canonical), 8 bytes each.
        length_bytes: length of the block's payload.
        chain_hash: as for ``block_digest``.
        index: as for ``block_digest``.

    Raises:
        ValueError: not one leaf for each 16 KiB of the block.
    """
    wanted = -(-length_bytes // LEAF_BYTES) * _LEAF_DIGEST_BYTES
    if len(leaves) != wanted:
        raise ValueError(f"{len(leaves)} B of leaves instead of {wanted} for a block of {length_bytes} B")
    return xxh3_128_digest(_PREFIX.pack(chain_hash, index, length_bytes) + leaves)


def header_digest(parts: list[bytes]) -> bytes:
    """Digest over the pieces of a header, 16 bytes."""
    return xxh3_128_digest(b"".join(parts))
