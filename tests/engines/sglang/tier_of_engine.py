"""The tier beside an engine: what is in it, and what tests do to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memkv_engines.chunk.codec import build_header, read_header
from memkv_engines.keys import ChunkName
from tests.engines.sglang.engines import PAGE_TOKENS


def stored_tokens(tier: Path) -> int:
    """Tokens of full attention in the tier, by the names of the chunks."""
    names = (ChunkName.parse(path.name) for path in tier.rglob("*.kv"))
    return PAGE_TOKENS * sum(name.block_count for name in names if name.group == 0)


def damage_file(path: Path) -> None:
    """Flip a bit in the middle block of a chunk."""
    data = bytearray(path.read_bytes())
    geometry = read_header(data).geometry
    data[geometry.block_offset(geometry.block_count // 2) + geometry.block_bytes // 2] ^= 4
    path.write_bytes(data)


def damage(tier: Path) -> int:
    """Flip a bit in the payload of every chunk; how many there were."""
    paths = list(tier.rglob("*.kv"))
    for path in paths:
        damage_file(path)
    return len(paths)


def plant(tier: Path) -> None:
    """Other values in every chunk, with digests that fit, as somebody without a key can write them."""
    for path in tier.rglob("*.kv"):
        header = read_header(path.read_bytes())
        payload = memoryview(bytearray(b"\x3f" * header.geometry.payload_bytes))
        hashes = [block.chain_hash for block in header.blocks]
        tokens, size = header.geometry.block_tokens, header.geometry.block_bytes
        planted = build_header(header.key, tokens, size, hashes, header.first_position, payload)
        path.write_bytes(planted.encode() + payload)


@contextmanager
def chunks_aside(tier: Path) -> Iterator[None]:
    """Nothing is stored meanwhile; what is stored meanwhile is removed in the end."""
    aside = {path: path.read_bytes() for path in tier.rglob("*.kv")}
    for path in aside:
        path.unlink()
    yield
    for path in tier.rglob("*.kv"):
        path.unlink()
    for path, data in aside.items():
        path.write_bytes(data)
