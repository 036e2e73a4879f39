"""Encode and decode chunk headers (format version 1, see ``FORMAT.md``). Pure; trusts nothing it decodes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from memkv_engines.chunk.checksum import HASH_ID_XXH3_TREE, block_digest, header_digest
from memkv_engines.chunk.layout import align_up
from memkv_engines.chunk.protection import (
    CIPHER_ID_AES_GCM,
    CIPHER_ID_NONE,
    HEADER_MAC_BYTES,
    MAC_ID_AES_GCM,
    MAC_ID_NONE,
    TAG_BYTES,
    ChunkGuard,
    Protection,
    block_nonce,
    new_salt,
)
from memkv_engines.errors import (
    ChunkDamaged,
    ChunkForeign,
    ChunkForged,
    ChunkOtherKey,
    ChunkTruncated,
    ChunkUnauthenticated,
    ChunkVersion,
    IdentityError,
)
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
_MAC_OFFSET = _DIGEST_OFFSET - HEADER_MAC_BYTES
_SEAL = struct.Struct("<16s32s")
_SEAL_END = _FIXED.size + _SEAL.size
_IDENTITY_BYTES = 200
_ENTRY = struct.Struct("<32s16sI12s16s12s4s")
_NO_TAG, _NO_NONCE = bytes(TAG_BYTES), bytes(len(block_nonce(0)))
# What may stand in `mac_id` and `cipher_id`, without and with a MAC.
_PLAIN = (MAC_ID_NONE, CIPHER_ID_NONE)
_SEALED = ((MAC_ID_AES_GCM, CIPHER_ID_NONE), (MAC_ID_AES_GCM, CIPHER_ID_AES_GCM))

assert _FIXED.size + 16 == _IDENTITY_BYTES, "what keys are derived from ends with the key id"
assert _SEAL_END <= _MAC_OFFSET
assert _ENTRY.size == 96


@dataclass(frozen=True)
class BlockEntry:
    """One row of the block table: the block's chain hash and digest; an absent block has no digest, and no tag."""

    chain_hash: bytes
    digest: bytes
    present: bool
    tag: bytes = _NO_TAG


@dataclass(frozen=True)
class Seal:
    """What a header says about its protection; to be believed once the MAC was verified."""

    cipher_id: int
    key_id: bytes
    salt: bytes
    mac: bytes = bytes(HEADER_MAC_BYTES)


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
        seal: what protects the chunk, if anything does.
        guard: its keys, where it was authenticated.
    """

    key: ChunkKey
    geometry: Geometry
    first_position: int
    blocks: tuple[BlockEntry, ...]
    seal: Seal | None = None
    guard: ChunkGuard | None = field(default=None, compare=False, repr=False)

    def encode(self) -> bytes:
        """The header as stored, padded to a multiple of 4 KiB."""
        fixed, table = self._fixed(), self._table()
        return fixed + header_digest([fixed, table]) + table

    def sealed_by(self, guard: ChunkGuard) -> ChunkHeader:
        """The same with a MAC over it."""
        assert self.seal is not None
        mac = guard.header_mac([self._fixed()[:_MAC_OFFSET], self._table()])
        return replace(self, seal=replace(self.seal, mac=mac), guard=guard)

    def new_guard(self, protection: Protection) -> ChunkGuard:
        """The keys of this chunk, which follow from all that is before the table."""
        assert self.seal is not None
        seal = self.seal
        return protection.guard(self._fixed()[:_IDENTITY_BYTES], self.key.namespace_digest, seal.salt, seal.cipher_id)

    def _fixed(self) -> bytes:
        """All before the header's digest."""
        g, k, seal = self.geometry, self.key, self.seal
        mac_id, cipher_id = (MAC_ID_AES_GCM, seal.cipher_id) if seal else _PLAIN
        fixed = _FIXED.pack(
            MAGIC,
            FORMAT_VERSION,
            HASH_BYTES,
            g.header_bytes,
            HASH_ID_XXH3_TREE,
            mac_id,
            cipher_id,
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
        )
        if seal is None:
            return fixed.ljust(_DIGEST_OFFSET, b"\0")
        return (fixed + _SEAL.pack(seal.key_id, seal.salt)).ljust(_MAC_OFFSET, b"\0") + seal.mac

    def _table(self) -> bytes:
        sealed = self.seal is not None
        rows = (
            _ENTRY.pack(
                block.chain_hash,
                block.digest,
                FLAG_PRESENT if block.present else 0,
                b"",
                block.tag,
                block_nonce(index) if sealed and block.present else b"",
                b"",
            )
            for index, block in enumerate(self.blocks)
        )
        return b"".join(rows).ljust(self.geometry.header_bytes - _FIXED_BYTES, b"\0")


def build_header(
    key: ChunkKey,
    block_tokens: int,
    block_bytes: int,
    chain_hashes: Sequence[bytes],
    first_position: int,
    payload: memoryview,
    protection: Protection | None = None,
) -> ChunkHeader:
    """Compute the digests of a staged payload and the header that describes it; encrypts the payload if that is wanted.

    Args:
        key: identity; ``key.holes`` leading blocks are absent.
        block_tokens: tokens per block.
        block_bytes: payload bytes per block.
        chain_hashes: chain hashes of all blocks, ``key.block_count`` of them.
        first_position: index of the first block in its prefix.
        payload: the staged payload: ``block_count`` slots of ``block_stride_bytes``. With a cipher its blocks are
            encrypted in place.
        protection: the key and what is done with it; None for neither MAC nor cipher.

    Raises:
        IdentityError: the chain hashes are not the key's, or the payload has another size.
    """
    geometry = Geometry(key.block_count, block_bytes, block_tokens)
    if payload.nbytes != geometry.payload_bytes:
        raise IdentityError(f"payload of {payload.nbytes} B instead of {geometry.payload_bytes} B")
    stride = geometry.block_stride_bytes

    def block(index: int) -> memoryview:
        return payload[index * stride : index * stride + block_bytes]

    tags: dict[int, bytes] = {}
    seal, guard = None, None
    if protection is not None:
        seal = Seal(protection.cipher_id, protection.key_id, new_salt())
        guard = ChunkHeader(key, geometry, first_position, (), seal).new_guard(protection)
        tags = {i: guard.seal_block(block(i), chain_hashes[i], i) for i in range(key.holes, len(chain_hashes))}
    plain = header_of_digests(
        key, geometry, chain_hashes, first_position, lambda index, chain: block_digest(block(index), chain, index)
    )
    if guard is None:
        return plain
    blocks = tuple(replace(entry, tag=tags.get(i, _NO_TAG)) for i, entry in enumerate(plain.blocks))
    return replace(plain, blocks=blocks, seal=seal).sealed_by(guard)


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


def decode_header(data: bytes | memoryview, protection: Protection | None = None) -> ChunkHeader:
    """Decode a header of unknown origin, and authenticate it where there is a key.

    Args:
        data: at least the header; longer input is fine, what follows the header is ignored.
        protection: the reader's; only what is protected so is taken. None: only what is not protected.

    Raises:
        ChunkTruncated: too short.
        ChunkVersion: a format version, flag or algorithm we do not know.
        ChunkDamaged: the header digest does not match.
        ChunkForeign: not a chunk, or fields that contradict each other.
        ChunkUnauthenticated: there is a key, and no MAC.
        ChunkOtherKey: protected with another key, or in another way.
        ChunkForged: the MAC is wrong.
    """
    header = read_header(data)
    if protection is None:
        if header.seal is not None:
            raise ChunkOtherKey("a protected chunk, and there is no key")
        return header
    if header.seal is None:
        raise ChunkUnauthenticated("a chunk without a MAC, and there is a key")
    if header.seal.cipher_id != protection.cipher_id:
        raise ChunkOtherKey(f"protected in another way: cipher {header.seal.cipher_id}")
    return authenticated(header, protection)


def authenticated(header: ChunkHeader, protection: Protection) -> ChunkHeader:
    """A header that ``read_header`` took apart, with its keys; encrypted or not.

    Raises:
        ChunkOtherKey: it has no MAC, or one of another key.
        ChunkForged: the MAC is wrong.
    """
    if header.seal is None or header.seal.key_id != protection.key_id:
        raise ChunkOtherKey("protected with another key")
    guard = header.new_guard(protection)
    if not guard.authenticates([header._fixed()[:_MAC_OFFSET], header._table()], header.seal.mac):
        raise ChunkForged("the header's MAC does not match")
    return replace(header, guard=guard)


def read_header(data: bytes | memoryview) -> ChunkHeader:
    """As ``decode_header``, for tools: takes any chunk, protected or not, and authenticates nothing."""
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
    sealed = (mac_id, cipher_id) in _SEALED
    if (hash_bytes, hash_id, order, flags) != (HASH_BYTES, HASH_ID_XXH3_TREE, PAYLOAD_ORDER_BLOCK_MAJOR, 0) or not (
        sealed or (mac_id, cipher_id) == _PLAIN
    ):
        raise ChunkVersion(f"unknown hash={hash_id} mac={mac_id} cipher={cipher_id} order={order} flags={flags:#x}")
    start, stop = (_SEAL_END, _MAC_OFFSET) if sealed else (_FIXED.size, _DIGEST_OFFSET)
    if bytes(view[start:stop]).strip(b"\0"):
        raise ChunkVersion("reserved bytes of the header are in use")
    seal = None
    if sealed:
        key_id, salt = _SEAL.unpack_from(view, _FIXED.size)
        seal = Seal(cipher_id, key_id, salt, bytes(view[_MAC_OFFSET:_DIGEST_OFFSET]))
    geometry = Geometry(count, block_bytes, tokens)
    if (geometry.header_bytes, geometry.block_stride_bytes, geometry.payload_bytes) != (
        header_bytes, stride, payload_bytes,
    ):  # fmt: skip
        raise ChunkForeign("sizes in the header contradict its geometry")
    blocks = _decode_table(view, count, sealed=sealed)
    holes = next((i for i, b in enumerate(blocks) if b.present), count)
    if holes == count or blocks[0].chain_hash != first_hash or blocks[-1].chain_hash != last_hash:
        raise ChunkForeign("block table contradicts the key")
    try:
        shard = Shard(h_first, h_count, h_total, l_first, l_count, l_total)
        key = ChunkKey(ns, first_hash, last_hash, count, group, shard, holes)
    except IdentityError as error:
        raise ChunkForeign(f"impossible key in header: {error}") from error
    return ChunkHeader(key, geometry, first_position, blocks, seal)


def _decode_table(view: memoryview, count: int, *, sealed: bool) -> tuple[BlockEntry, ...]:
    rows = []
    for index in range(count):
        chain, digest, flags, reserved, tag, nonce, more = _ENTRY.unpack_from(view, _FIXED_BYTES + index * _ENTRY.size)
        if flags & ~FLAG_PRESENT or (reserved + more).strip(b"\0"):
            raise ChunkVersion(f"unknown flags, or reserved bytes in use, on block {index}")
        has_tag = sealed and flags & FLAG_PRESENT
        if nonce != (block_nonce(index) if has_tag else _NO_NONCE) or (not has_tag and tag != _NO_TAG):
            raise ChunkVersion(f"unknown authentication on block {index}")
        if not flags and digest.strip(b"\0"):
            raise ChunkForeign(f"absent block {index} has a digest")
        rows.append(BlockEntry(chain, digest, bool(flags & FLAG_PRESENT), tag))
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
    """Verify blocks [first, stop) of a chunk, by their tags where there are some, and decrypt them in place.

    Args:
        header: decoded and checked; where the chunk is protected, authenticated.
        first: first block.
        stop: one past the last block.
        payload: the bytes of exactly those blocks, ``block_stride_bytes`` each.

    Returns:
        None if every block is right, else the index of the first bad or absent one; those after it stay encrypted.
    """

    def digest_of(index: int, chain_hash: bytes) -> bytes:
        return block_digest(_block(header, index - first, payload), chain_hash, index)

    if header.seal is None:
        return first_bad_block(header, first, stop, digest_of)
    assert header.guard is not None, "a protected chunk must be authenticated before its blocks are"
    for index in range(first, stop):
        entry, block = header.blocks[index], _block(header, index - first, payload)
        whole = entry.present and block.nbytes == header.geometry.block_bytes
        if not whole or not header.guard.open_block(block, entry.chain_hash, index, entry.tag):
            return index
    return None


def kind_of_bad_block(header: ChunkHeader, index: int, first: int, payload: memoryview) -> str:
    """What is wrong with the block that ``verify_blocks`` stopped at, as a kind of miss.

    Args:
        header: as there.
        index: what it returned.
        first: as there.
        payload: as there, not touched since.
    """
    entry, block = header.blocks[index], _block(header, index - first, payload)
    if header.guard is None or not entry.present or block.nbytes != header.geometry.block_bytes:
        return ChunkDamaged.kind
    header.guard.unopen_block(block, index)
    intact = block_digest(block, entry.chain_hash, index) == entry.digest
    return ChunkForged.kind if intact else ChunkDamaged.kind


def _block(header: ChunkHeader, place: int, payload: memoryview) -> memoryview:
    start = place * header.geometry.block_stride_bytes
    return payload[start : start + header.geometry.block_bytes]


def first_bad_block(header: ChunkHeader, first: int, stop: int, digest_of: Callable[[int, bytes], bytes]) -> int | None:
    """As ``verify_blocks``, for digests made elsewhere: by the block's index in the chunk and its chain hash."""
    assert header.seal is None, "digests do not verify a protected chunk"
    for index in range(first, stop):
        entry = header.blocks[index]
        if not entry.present or digest_of(index, entry.chain_hash) != entry.digest:
            return index
    return None
