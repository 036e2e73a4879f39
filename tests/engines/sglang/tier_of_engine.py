"""The tier beside an engine: what is in it, and what tests do to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.engines.sglang.engines import PAGE_TOKENS


def stored_tokens(tier: Path) -> int:
    """Tokens of full attention in the tier, by the names of the chunks."""
    return PAGE_TOKENS * sum(int(p.name.split("-b")[1].split("-")[0]) for p in tier.rglob("*-g0-*.kv"))


def damage(tier: Path) -> int:
    """Flip a bit in the payload of every chunk; how many there were."""
    paths = list(tier.rglob("*.kv"))
    for path in paths:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    return len(paths)


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
