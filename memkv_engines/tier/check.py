"""Is a stored chunk what its name says? For commands: reads everything, in bounded memory, and changes nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import BinaryIO

from memkv_engines.chunk.checksum import digest_of_leaves, leaf_digests
from memkv_engines.chunk.codec import ChunkHeader, Geometry, authenticated, read_header
from memkv_engines.chunk.protection import Protection
from memkv_engines.errors import (
    ChunkDamaged,
    ChunkForeign,
    ChunkForged,
    ChunkMissing,
    ChunkOtherKey,
    ChunkTruncated,
    ChunkUnauthenticated,
    TransportError,
)
from memkv_engines.keys import namespace_folder
from memkv_engines.limits import LEAF_BYTES, MAX_CHUNK_BYTES
from memkv_engines.tier.listing import Entry
from memkv_engines.tier.records import READ_FLAGS

PIECE_BYTES = 256 * LEAF_BYTES


def check_chunk(
    entry: Entry,
    owners: frozenset[int],
    *,
    payload: bool = True,
    key_id: bytes = b"",
    protection: Protection | None = None,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> ChunkHeader:
    """Check a chunk's place, owner, size and header, and every digest if wanted; MACs where the key is there.

    Args:
        entry: of a listing, with a name.
        owners: users whose files are believed to be chunks.
        payload: read the blocks too.
        key_id: of the key that the chunk's namespace is protected with, by its manifest; empty for none.
        protection: a key; chunks of another are checked by their digests only.
        on_bytes: told of every piece that was read.

    Returns:
        The header, with a guard if MACs were checked.

    Raises:
        ChunkError: what is wrong with it; ``ChunkMissing`` if it is gone.
        TransportError: it cannot be read.
    """
    assert entry.name is not None
    try:
        fd = os.open(entry.text, READ_FLAGS, dir_fd=entry.dir_fd)
        with os.fdopen(fd, "rb", buffering=0) as file:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_uid not in owners:
                raise ChunkForeign(f"not a file of ours (user {info.st_uid})")
            try:
                header = _check_header(file, entry, info.st_size, on_bytes)
                header = _check_seal(header, key_id, protection)
                for index in range(header.key.holes, header.geometry.block_count) if payload else ():
                    _check_block(file, header, index, on_bytes)
            finally:
                # What was read only to be checked should not push out what others need.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except FileNotFoundError as error:
        raise ChunkMissing(f"no object {entry.text}") from error
    except OSError as error:
        raise TransportError(f"cannot be read: {error.strerror}") from error
    return header


def _check_header(file: BinaryIO, entry: Entry, size_bytes: int, on_bytes: Callable[[int], object]) -> ChunkHeader:
    assert entry.name is not None
    if size_bytes > MAX_CHUNK_BYTES:
        raise ChunkForeign(f"{size_bytes} B is larger than any chunk")
    data = file.read(Geometry(entry.name.block_count, 1, 1).header_bytes)
    on_bytes(len(data))
    header = read_header(data)
    if header.key.name != entry.name or namespace_folder(header.key.namespace_digest) != entry.folder:
        raise ChunkForeign("the header does not match the name")
    wanted = header.geometry.object_bytes
    if size_bytes != wanted:
        error = ChunkTruncated if size_bytes < wanted else ChunkForeign
        raise error(f"{size_bytes} B instead of {wanted} B")
    return header


def _check_seal(header: ChunkHeader, key_id: bytes, protection: Protection | None) -> ChunkHeader:
    seal = header.seal
    if key_id and seal is None:
        raise ChunkUnauthenticated("a chunk without a MAC in a namespace that has a key")
    if key_id and seal is not None and seal.key_id != key_id:
        raise ChunkOtherKey("protected with another key than its namespace")
    if protection is None or seal is None or seal.key_id != protection.key_id:
        return header
    return authenticated(header, protection)


def _check_block(file: BinaryIO, header: ChunkHeader, index: int, on_bytes: Callable[[int], object]) -> None:
    block, geometry = header.blocks[index], header.geometry
    file.seek(geometry.block_offset(index))
    left, leaves, check = geometry.block_bytes, list[bytes](), None
    if header.guard is not None and block.present:
        check = header.guard.check_of(geometry.block_bytes, block.chain_hash, index, block.tag)
    while block.present and left:
        piece = file.read(min(left, PIECE_BYTES))
        if len(piece) != min(left, PIECE_BYTES):
            raise ChunkTruncated(f"block {index} ends early")
        leaves += leaf_digests(memoryview(piece))
        if check is not None:
            check.update(piece)
        left -= len(piece)
        on_bytes(len(piece))
    if not block.present or digest_of_leaves(leaves, block.chain_hash, index, geometry.block_bytes) != block.digest:
        raise ChunkDamaged(f"block {index} does not match its digest")
    if check is not None and not check.is_right():
        raise ChunkForged(f"block {index} does not match its tag")
