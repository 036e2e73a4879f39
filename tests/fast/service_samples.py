"""A running I/O service over paged memory of several layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from memkv_engines.chunk.checksum import header_digest
from memkv_engines.chunk.codec import Geometry
from memkv_engines.offload.messages import LoadRun
from tests.fast.io_samples import (
    BLOCKS_PER_CHUNK,
    JobClient,
    Pool,
    block_outermost,
    layer_outermost,
    load,
    make_run,
    make_store,
    store,
)
from tests.fast.samples import chain

N = BLOCKS_PER_CHUNK
PAGES = 24
POOLS = {
    "layers outermost": layer_outermost(0, PAGES, 12, 768),
    "block outermost": block_outermost(1, PAGES, 8192),
    "unaligned, padded": layer_outermost(2, PAGES, 5, 1001, gap_bytes=23),
    "more pieces than one call takes": layer_outermost(3, PAGES, 1100, 24, gap_bytes=8),
}
POOL = POOLS["unaligned, padded"]


class Service:
    """A running service, its directory and an endless supply of prompts."""

    def __init__(self, client: JobClient, root: Path, mode: str) -> None:
        self.client, self.root, self.mode = client, root, mode
        self._prompts = iter(range(1 << 30))

    def prompt(self, blocks: int = N) -> list[bytes]:
        return chain(blocks, f"{self.mode}{next(self._prompts)}")

    def check_alive(self, pid: int | None) -> None:
        assert (self.client.mode, self.client.child_pid) == (
            {"on": "process", "off": "thread", "device": "process", "direct": "process"}[self.mode],
            pid,
        )
        hashes = self.prompt()
        assert store(self.client, make_store(POOL, hashes, range(N))) == ("stored",)
        check_load(
            self.client, POOL, make_run(POOL, hashes, range(8, 8 + N)), dict(zip(range(8, 12), range(4), strict=True))
        )


def check_load(
    client: JobClient, pool: Pool, run: LoadRun, copies: dict[int, int], kind: str = "", good: int | None = None
) -> None:
    """Load, and compare every byte of every pool: pages (keys) now hold what others (values) do, and nothing else."""
    others = [(p, p.memory.copy()) for p in POOLS.values() if p is not pool]
    expected = pool.with_copies(pool.memory, copies)
    result = load(client, run)
    assert (result.kinds, result.good_blocks) == ((kind,), (len(copies) if good is None else good,))
    assert (pool.memory == expected).all()
    assert all((p.memory == before).all() for p, before in others)


GEOMETRY = Geometry(N, POOL.block_bytes, 16)


def rewrite(path: Path, change: Callable[[bytearray], bytearray | None]) -> None:
    data = bytearray(path.read_bytes())
    data = change(data) or data
    path.write_bytes(data)


def signed(data: bytearray) -> bytearray:
    """The header's digest, made to match what the header says now."""
    data[496:512] = header_digest([bytes(data[:496]), bytes(data[512 : GEOMETRY.header_bytes])])
    return data


def flip(offset: int) -> Callable[[Path], None]:
    def change(data: bytearray) -> bytearray:
        data[offset] ^= 1
        return data

    return lambda path: rewrite(path, change)
