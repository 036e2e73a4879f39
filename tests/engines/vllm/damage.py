"""What happens to stored chunks behind the engine's back: rotten bits, torn files, strangers under the right name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from memkv_engines.chunk.checksum import header_digest
from memkv_engines.chunk.codec import ChunkHeader, build_header, read_header

_VERSION_OFFSET = 8
_DIGEST_FIRST, _DIGEST_STOP = 496, 512
_NOBODY = 65_534


def chunk_files(folder: Path) -> list[Path]:
    """Returns the chunk files below a tier's or a namespace's folder."""
    return sorted(folder.rglob("*.kv"))


def header_of(file: Path) -> ChunkHeader:
    """Returns the header of a chunk file that is not damaged, protected or not."""
    return read_header(file.read_bytes()[: 64 << 10])


def chunks_of_group(files: list[Path], group: int) -> list[Path]:
    """Returns the undamaged chunks of one KV group in the order of their place in the prompt."""
    headers = [(header_of(file), file) for file in files]
    ours = [(header.first_position, str(file)) for header, file in headers if header.key.group == group]
    return [Path(name) for _, name in sorted(ours)]


def flip_bit(file: Path, offset: int) -> None:
    """Flips one bit."""
    with file.open("r+b") as handle:
        handle.seek(offset)
        byte = handle.read(1)[0]
        handle.seek(offset)
        handle.write(bytes([byte ^ 0x10]))


def _flip_payload(file: Path, tier: Path) -> None:
    geometry = header_of(file).geometry
    flip_bit(file, geometry.block_offset(geometry.block_count // 2) + geometry.block_bytes // 3)


def _flip_header(file: Path, tier: Path) -> None:
    flip_bit(file, 100)


def _flip_block_table(file: Path, tier: Path) -> None:
    flip_bit(file, 512 + 40)


def _truncate(file: Path, tier: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _empty(file: Path, tier: Path) -> None:
    os.truncate(file, 0)


def _grow(file: Path, tier: Path) -> None:
    os.truncate(file, file.stat().st_size + 4096)


def _delete(file: Path, tier: Path) -> None:
    file.unlink()


def _put_other(file: Path, others: list[Path]) -> None:
    # Of the same size, which alone would give the stranger away.
    size = file.stat().st_size
    shutil.copyfile(next(other for other in others if other != file and other.stat().st_size == size), file)


def _other_namespace(file: Path, tier: Path) -> None:
    own = file.relative_to(tier).parts[0]
    _put_other(file, [other for other in chunk_files(tier) if other.relative_to(tier).parts[0] != own])


def _other_prefix(file: Path, tier: Path) -> None:
    _put_other(file, chunk_files(tier / file.relative_to(tier).parts[0]))


def _version(file: Path, tier: Path) -> None:
    header_bytes = header_of(file).geometry.header_bytes
    data = bytearray(file.read_bytes())
    data[_VERSION_OFFSET] += 1
    digest = header_digest([bytes(data[:_DIGEST_FIRST]), bytes(data[_DIGEST_STOP:header_bytes])])
    data[_DIGEST_FIRST:_DIGEST_STOP] = digest
    file.write_bytes(data)


def _link(file: Path, tier: Path) -> None:
    aside = file.with_suffix(".aside")
    file.rename(aside)
    file.symlink_to(aside)


def _pipe(file: Path, tier: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _folder(file: Path, tier: Path) -> None:
    file.unlink()
    file.mkdir()


def _owner(file: Path, tier: Path) -> None:
    os.chown(file, _NOBODY, -1)


def _scramble(file: Path, tier: Path) -> None:
    geometry = header_of(file).geometry
    with file.open("r+b") as handle:
        handle.seek(geometry.header_bytes)
        # Halves of ones: finite numbers of moderate size, so that wrong KV gives wrong tokens and not an error.
        handle.write(b"\x3f" * geometry.payload_bytes)


def _plant(file: Path, tier: Path) -> None:
    """As `_scramble`, by somebody who knows the format and makes every digest fit; but has no key."""
    header = header_of(file)
    payload = memoryview(bytearray(b"\x3f" * header.geometry.payload_bytes))
    hashes = [block.chain_hash for block in header.blocks]
    tokens, size = header.geometry.block_tokens, header.geometry.block_bytes
    planted = build_header(header.key, tokens, size, hashes, header.first_position, payload)
    file.write_bytes(planted.encode() + payload)


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "flip_payload": _flip_payload,
    "flip_header": _flip_header,
    "flip_block_table": _flip_block_table,
    "truncate": _truncate,
    "empty": _empty,
    "grow": _grow,
    "delete": _delete,
    "other_namespace": _other_namespace,
    "other_prefix": _other_prefix,
    "version": _version,
    "link": _link,
    "pipe": _pipe,
    "folder": _folder,
    "owner": _owner,
    "scramble": _scramble,
    "plant": _plant,
}
"""By name: what to do to a chunk file, given the directory of its tier as well."""
