"""Encode and decode chunk headers (format version 1, see ``FORMAT.md``). Pure; trusts nothing it decodes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memkv_engines.chunk.checksum import HASH_ID_XXH3_TREE, block_digest, header_digest
from memkv_engines.chunk.layout import align_up
from memkv_engines.errors import ChunkDamaged, ChunkForeign, ChunkTruncated, ChunkVersion, IdentityError
from memkv_engines.keys import FORMAT_VERSION, ChunkKey, ChunkName, Shard
from memkv_engines.limits import (
    ALIGN_BYTES,
    DIGEST_BYTES,
    HASH_BYTES,
    MAX_BLOCK_BYTES,
    MAX_BLOCKS_PER_CHUNK,
    MAX_CHUNK_BYTES,
)

MAGIC = b"MEMKVCH1"
PAYLOAD_ORDER_BLOCK_MAJOR = 1
FLAG_PRESENT = 1

_FIXED = struct.Struct("<8sHHIHHHH32sI6H32s32sQIIQQQQ")
_FIXED_BYTES = 512
_DIGEST_OFFSET = _FIXED_BYTES - DIGEST_BYTES
_ENTRY = struct.Struct("<32s16sI12s16s12s4s")

assert _FIXED.size <= _DIGEST_OFFSET
assert _ENTRY.size == 96


@dataclass(frozen=True)
class BlockEntry:
    """One row of the block table: the block's chain hash and digest; an absent block has no digest."""

    chain_hash: bytes
    digest: bytes
    present: bool


@dataclass(frozen=True)
class Geometry:
    """What fixes every offset in a chunk: known to the reader before it reads a byte.

    Attributes:
        block_count: rows of the block table.
        block_bytes: payload bytes of one block.
        block_tokens: tokens per block (informative, but must agree).
    """

    block_count: int
    block_bytes: int
    block_tokens: int

    def __post_init__(self) -> None:
        if not 1 <= self.block_count <= MAX_BLOCKS_PER_CHUNK or not 1 <= self.block_bytes <= MAX_BLOCK_BYTES:
            raise ChunkForeign(f"impossible geometry: {self.block_count} blocks of {self.block_bytes} B")
        if self.object_bytes > MAX_CHUNK_BYTES:
            raise ChunkForeign(f"a chunk of {self.object_bytes} B exceeds the bound of {MAX_CHUNK_BYTES} B")

    @property
    def block_stride_bytes(self) -> int:
        """Distance between blocks in the payload, padded for direct I/O."""
        return align_up(self.block_bytes)

    @property
    def header_bytes(self) -> int:
        """Length of the header, and so the payload's offset."""
        return align_up(_FIXED_BYTES + self.block_count * _ENTRY.size)

    @property
    def payload_bytes(self) -> int:
        """Length of the payload, padding and holes included."""
        return self.block_count * self.block_stride_bytes

    @property
    def object_bytes(self) -> int:
        """Length of the whole object."""
        return self.header_bytes + self.payload_bytes

    def block_offset(self, index: int) -> int:
        """Offset of a block in the object."""
        return self.header_bytes + index * self.block_stride_bytes


@dataclass(frozen=True)
class ChunkHeader:
    """A decoded header.

    Attributes:
        key: the chunk's full identity.
        geometry: sizes.
        first_position: index of the first block in its prefix (informative).
        blocks: the block table.
    """

    key: ChunkKey
    geometry: Geometry
    first_position: int
    blocks: tuple[BlockEntry, ...]

    def encode(self) -> bytes:
        """The header as stored, padded to a multiple of 4 KiB."""
        g, k = self.geometry, self.key
        fixed = _FIXED.pack(
            MAGIC,
            FORMAT_VERSION,
            HASH_BYTES,
            g.header_bytes,
            HASH_ID_XXH3_TREE,
            0,  # MAC: none
            0,  # cipher: none
            PAYLOAD_ORDER_BLOCK_MAJOR,
            k.namespace_digest,
            k.group,
            *k.shard.as_tuple(),
            k.first_hash,
            k.last_hash,
            0,  # flags
            g.block_count,
            g.block_tokens,
            g.block_bytes,
            g.block_stride_bytes,
            g.payload_bytes,
            self.first_position,
        ).ljust(_DIGEST_OFFSET, b"\0")
        table = b"".join(
            _ENTRY.pack(b.chain_hash, b.digest, FLAG_PRESENT if b.present else 0, b"", b"", b"", b"")
            for b in self.blocks
        ).ljust(g.header_bytes - _FIXED_BYTES, b"\0")
        return fixed + header_digest([fixed, table]) + table


def build_header(
    key: ChunkKey,
    block_tokens: int,
    block_bytes: int,
    chain_hashes: Sequence[bytes],
    first_position: int,
    payload: memoryview,
) -> ChunkHeader:
    """Compute the digests of a staged payload and the header that describes it.

    Args:
        key: identity; ``key.holes`` leading blocks are absent.
        block_tokens: tokens per block.
        block_bytes: payload bytes per block.
        chain_hashes: chain hashes of all blocks, ``key.block_count`` of them.
        first_position: index of the first block in its prefix.
        payload: the staged payload: ``block_count`` slots of ``block_stride_bytes``.

    Raises:
        IdentityError: the chain hashes are not the key's, or the payload has another size.
    """
    geometry = Geometry(key.block_count, block_bytes, block_tokens)
    if payload.nbytes != geometry.payload_bytes:
        raise IdentityError(f"payload of {payload.nbytes} B instead of {geometry.payload_bytes} B")
    stride = geometry.block_stride_bytes

    def digest_of(index: int, chain_hash: bytes) -> bytes:
        return block_digest(payload[index * stride : index * stride + block_bytes], chain_hash, index)

    return header_of_digests(key, geometry, chain_hashes, first_position, digest_of)


def header_of_digests(
    key: ChunkKey,
    geometry: Geometry,
    chain_hashes: Sequence[bytes],
    first_position: int,
    digest_of: Callable[[int, bytes], bytes],
) -> ChunkHeader:
    """The header of a payload whose digests are made elsewhere, such as on a GPU; else as ``build_header``.

    Args:
        key: identity; ``key.holes`` leading blocks are absent.
        geometry: sizes.
        chain_hashes: chain hashes of all blocks.
        first_position: index of the first block in its prefix.
        digest_of: digest of a present block, by its index in the chunk and its chain hash.

    Raises:
        IdentityError: the chain hashes are not the key's.
    """
    if len(chain_hashes) != key.block_count or (chain_hashes[0], chain_hashes[-1]) != (key.first_hash, key.last_hash):
        raise IdentityError(f"{len(chain_hashes)} chain hashes are not those of the key of {key.block_count} blocks")
    blocks = tuple(
        BlockEntry(chain, digest_of(i, chain), True)
        if i >= key.holes
        else BlockEntry(chain, bytes(DIGEST_BYTES), False)
        for i, chain in enumerate(chain_hashes)
    )
    return ChunkHeader(key, geometry, first_position, blocks)


def decode_header(data: bytes | memoryview) -> ChunkHeader:
    """Decode a header of unknown origin.

    Args:
        data: at least the header; longer input is fine, what follows the header is ignored.

    Raises:
        ChunkTruncated: too short.
        ChunkVersion: a format version, flag or algorithm we do not know.
        ChunkDamaged: the header digest does not match.
        ChunkForeign: not a chunk, or fields that contradict each other.
    """
    view = memoryview(data)
    if view.nbytes < _FIXED_BYTES:
        raise ChunkTruncated(f"header of {view.nbytes} B is shorter than {_FIXED_BYTES} B")
    (
        magic, version, hash_bytes, header_bytes, hash_id, mac_id, cipher_id, order, ns, group,
        h_first, h_count, h_total, l_first, l_count, l_total,
        first_hash, last_hash, flags, count, tokens, block_bytes, stride, payload_bytes, first_position,
    ) = _FIXED.unpack_from(view, 0)  # fmt: skip
    if magic != MAGIC:
        raise ChunkForeign("not a chunk: wrong magic")
    if version != FORMAT_VERSION:
        raise ChunkVersion(f"format version {version}; this build reads {FORMAT_VERSION}")
    # Bounds before anything derived from them is used, the digest before anything else is believed.
    if not ALIGN_BYTES <= header_bytes <= align_up(_FIXED_BYTES + MAX_BLOCKS_PER_CHUNK * _ENTRY.size):
        raise ChunkForeign(f"impossible header_bytes={header_bytes}")
    if view.nbytes < header_bytes:
        raise ChunkTruncated(f"header of {view.nbytes} B is shorter than its own {header_bytes} B")
    stored = bytes(view[_DIGEST_OFFSET:_FIXED_BYTES])
    if header_digest([bytes(view[:_DIGEST_OFFSET]), bytes(view[_FIXED_BYTES:header_bytes])]) != stored:
        raise ChunkDamaged("header digest does not match")
    if (hash_bytes, hash_id, mac_id, cipher_id, order, flags) != (
        HASH_BYTES, HASH_ID_XXH3_TREE, 0, 0, PAYLOAD_ORDER_BLOCK_MAJOR, 0,
    ):  # fmt: skip
        raise ChunkVersion(f"unknown hash={hash_id} mac={mac_id} cipher={cipher_id} order={order} flags={flags:#x}")
    if bytes(view[_FIXED.size : _DIGEST_OFFSET]).strip(b"\0"):
        raise ChunkVersion("reserved bytes of the header are in use")
    geometry = Geometry(count, block_bytes, tokens)
    if (geometry.header_bytes, geometry.block_stride_bytes, geometry.payload_bytes) != (
        header_bytes, stride, payload_bytes,
    ):  # fmt: skip
        raise ChunkForeign("sizes in the header contradict its geometry")
    blocks = _decode_table(view, count)
    holes = next((i for i, b in enumerate(blocks) if b.present), count)
    if holes == count or blocks[0].chain_hash != first_hash or blocks[-1].chain_hash != last_hash:
        raise ChunkForeign("block table contradicts the key")
    try:
        shard = Shard(h_first, h_count, h_total, l_first, l_count, l_total)
        key = ChunkKey(ns, first_hash, last_hash, count, group, shard, holes)
    except IdentityError as error:
        raise ChunkForeign(f"impossible key in header: {error}") from error
    return ChunkHeader(key, geometry, first_position, blocks)


def _decode_table(view: memoryview, count: int) -> tuple[BlockEntry, ...]:
    rows = []
    for index in range(count):
        chain, digest, flags, *later = _ENTRY.unpack_from(view, _FIXED_BYTES + index * _ENTRY.size)
        if flags & ~FLAG_PRESENT or any(field.strip(b"\0") for field in later):
            raise ChunkVersion(f"unknown flags or authentication on block {index}")
        if not flags and digest.strip(b"\0"):
            raise ChunkForeign(f"absent block {index} has a digest")
        rows.append(BlockEntry(chain, digest, bool(flags & FLAG_PRESENT)))
    end = _FIXED_BYTES + count * _ENTRY.size
    if bytes(view[end : align_up(end)]).strip(b"\0"):
        raise ChunkVersion("reserved bytes after the block table are in use")
    return tuple(rows)


def check_header(
    header: ChunkHeader, namespace_digest: bytes, name: ChunkName, geometry: Geometry, chain_hashes: Sequence[bytes]
) -> None:
    """Confirm that a decoded header is the one that was asked for.

    Args:
        header: what the object says.
        namespace_digest: the reader's namespace, all 32 bytes.
        name: the name it was opened under; first and last hash, counts, group and shard must agree.
        geometry: what the reader's memory needs.
        chain_hashes: the reader's own hashes of the chunk's leading blocks, all 32 bytes; all must agree.

    Raises:
        ChunkForeign: any difference.
    """
    if header.key.namespace_digest != namespace_digest:
        raise ChunkForeign("chunk of another namespace")
    if header.key.name != name:
        raise ChunkForeign(f"chunk {header.key.name.text} stored under the name {name.text}")
    if header.geometry != geometry:
        raise ChunkForeign(f"chunk of another geometry: {header.geometry} instead of {geometry}")
    if len(chain_hashes) > len(header.blocks) or any(
        block.chain_hash != own for block, own in zip(header.blocks, chain_hashes, strict=False)
    ):
        raise ChunkForeign("chunk of another prefix")


def verify_blocks(header: ChunkHeader, first: int, stop: int, payload: memoryview) -> int | None:
    """Verify blocks [first, stop) of a chunk.

    Args:
        header: decoded and checked.
        first: first block.
        stop: one past the last block.
        payload: the bytes of exactly those blocks, ``block_stride_bytes`` each.

    Returns:
        None if every block is right, else the index of the first bad or absent one.
    """
    stride, length = header.geometry.block_stride_bytes, header.geometry.block_bytes

    def digest_of(index: int, chain_hash: bytes) -> bytes:
        start = (index - first) * stride
        return block_digest(payload[start : start + length], chain_hash, index)

    return first_bad_block(header, first, stop, digest_of)


def first_bad_block(header: ChunkHeader, first: int, stop: int, digest_of: Callable[[int, bytes], bytes]) -> int | None:
    """As ``verify_blocks``, for digests made elsewhere: by the block's index in the chunk and its chain hash."""
    for index in range(first, stop):
        entry = header.blocks[index]
        if not entry.present or digest_of(index, entry.chain_hash) != entry.digest:
            return index
    return None
