"""Reference tier: a dictionary. For tests, and the oracle of every other tier."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from memkv_engines.errors import ChunkMissing, TierFull
from memkv_engines.keys import ChunkName, Namespace
from memkv_engines.limits import MAX_VARIANTS_EXAMINED
from memkv_engines.tier.base import ChunkReader, PutResult, Tier
from memkv_engines.transports.base import View
from memkv_engines.transports.memory import MemoryTransport


class _MemoryReader(ChunkReader):
    def __init__(self, transport: MemoryTransport, data: bytearray) -> None:
        self._transport, self._data = transport, data
        self.object_bytes = len(data)

    def read(self, views: Sequence[View], offset: int) -> None:
        self._transport.read(self._data, cast("Sequence[memoryview]", views), offset)

    def close(self) -> None:
        pass


class MemoryTier(Tier):
    """Keeps objects in process memory.

    Args:
        capacity_bytes: bound on the bytes held, 0 for none.
    """

    def __init__(self, capacity_bytes: int = 0) -> None:
        self._transport = MemoryTransport()
        self.name = f"memory({self._transport.name})"
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._objects: dict[tuple[str, ChunkName], bytearray] = {}
        self.manifests: dict[str, bytes] = {}

    def put(self, folder: str, name: ChunkName, views: Sequence[View], *, replace: bool = False) -> PutResult:
        with self._lock:
            if not replace and (folder, name) in self._objects:
                return PutResult(0, True)
            old = len(self._objects.get((folder, name), b""))
            held = sum(map(len, self._objects.values())) - old
            if self._capacity_bytes and held + sum(v.nbytes for v in views) > self._capacity_bytes:
                raise TierFull(f"capacity of {self._capacity_bytes} B reached")
            data = bytearray()
            written = self._transport.write(data, cast("Sequence[memoryview]", views), 0)
            # Insert last: dictionaries keep order, and newest must come first in variants().
            self._objects.pop((folder, name), None)
            self._objects[(folder, name)] = data
            return PutResult(written, False)

    def open(self, folder: str, name: ChunkName) -> ChunkReader:
        data = self._objects.get((folder, name))
        if data is None:
            raise ChunkMissing(f"no object {name.text}")
        return _MemoryReader(self._transport, data)

    def exists(self, folder: str, names: Iterable[ChunkName]) -> list[bool]:
        return [(folder, name) in self._objects for name in names]

    def variants(self, folder: str, first: bytes, group: int, shard_text: str) -> list[ChunkName]:
        with self._lock:
            found = [
                name
                for held, name in self._objects
                if held == folder and (name.first, name.group, name.shard_text) == (first, group, shard_text)
            ]
        return found[::-1][:MAX_VARIANTS_EXAMINED]

    def remove(self, folder: str, name: ChunkName) -> bool:
        with self._lock:
            return self._objects.pop((folder, name), None) is not None

    def names(self, folder: str) -> Iterator[ChunkName]:
        with self._lock:
            found = [name for held, name in self._objects if held == folder]
        yield from found

    def write_manifest(self, namespace: Namespace) -> None:
        self.manifests.setdefault(namespace.folder, namespace.canonical_json)

    def used_bytes(self) -> int:
        with self._lock:
            return sum(map(len, self._objects.values()))
