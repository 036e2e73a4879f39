"""A tier directory with chunks in it, and commands that are run on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memkv_engines.chunk.codec import build_header
from memkv_engines.chunk.protection import Protection
from memkv_engines.keys import ChunkKey, ChunkName, Namespace
from memkv_engines.limits import TEMPORARY_MAX_AGE_S
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.usage import read_count
from tests.fast.samples import SHARD, aligned, chain, noise

ONE, TWO = (Namespace({"model": model, "tenant": tenant}) for model, tenant in (("one", "t"), ("two", "u")))
BLOCKS, BLOCK_BYTES, BLOCK_TOKENS = 3, 5000, 16
CHUNK_BYTES = 4096 + BLOCKS * 8192
AGES_AGO = time.time() - 10 * TEMPORARY_MAX_AGE_S


def chunk(namespace: Namespace, prompt: str, guardian: Protection | None = None) -> tuple[ChunkName, bytes]:
    """A whole, right chunk; protected, where something protects it."""
    hashes = chain(BLOCKS, prompt)
    key = ChunkKey(namespace.digest, hashes[0], hashes[-1], BLOCKS, 0, SHARD, 0)
    payload = bytearray(noise(BLOCKS * 8192, len(prompt)))
    header = build_header(key, BLOCK_TOKENS, BLOCK_BYTES, hashes, 0, memoryview(payload), guardian)
    return key.name, header.encode() + bytes(payload)


@dataclass
class Directory:
    """A tier directory with five chunks in one namespace and three in another."""

    root: Path

    def path(self, number: int, namespace: Namespace = ONE) -> Path:
        name, _ = chunk(namespace, f"prompt {number}")
        return self.root / namespace.folder / name.bucket / name.text

    def files(self) -> set[str]:
        return {str(p.relative_to(self.root)) for p in self.root.rglob("*") if not p.is_dir()}

    def chunks(self, namespace: Namespace = ONE) -> int:
        return sum(1 for _ in (self.root / namespace.folder).rglob("*.kv"))

    def counted(self) -> int:
        fd = os.open(self.root, os.O_RDONLY)
        count = read_count(fd)
        os.close(fd)
        assert count is not None
        return count.used_bytes


def filled(root: Path) -> Directory:
    """Five chunks in one namespace, three in another, counted."""
    tier = DirectoryTier(root, direct_io="off", capacity_bytes=100 * CHUNK_BYTES)
    for namespace, count in ((ONE, 5), (TWO, 3)):
        tier.write_manifest(namespace)
        for number in range(count):
            name, data = chunk(namespace, f"prompt {number}")
            tier.put(namespace.folder, name, [aligned(data)])
            when = 10**18 + number * 10**9
            os.utime(tier.root / namespace.folder / name.bucket / name.text, ns=(when, when))
    tier.scan()
    tier.close()
    return Directory(root)


def flip(path: Path, offset: int) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


Run = Callable[..., tuple[int, Any]]
