"""LMCache's own storage manager with our adapter below it: what its server does, without the server."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.config import EvictionConfig, L1ManagerConfig, L1MemoryManagerConfig, StorageManagerConfig
from lmcache.v1.distributed.l2_adapters.config import L2AdaptersConfig
from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import PluginL2AdapterConfig
from lmcache.v1.distributed.storage_manager import StorageManager

from memkv_engines.lmcache.l2_adapter import MemKVL2Adapter

L1_BYTES = 64 << 20
SHAPE = (2, 4, 256, 128)
LAYOUT = MemoryLayoutDesc([torch.Size(SHAPE)], [torch.bfloat16])
OBJECT_BYTES = 2 * 4 * 256 * 128 * 2
DEADLINE_S = 20.0


def key(number: int, **other: Any) -> ObjectKey:
    """An object's key; equal numbers are equal tokens."""
    hashed = number.to_bytes(32, "big")
    fields = {"model_name": "org/model", "kv_rank": ObjectKey.ComputeKVRank(2, 1, 2, 1), **other}
    return ObjectKey(chunk_hash=fields.pop("chunk_hash", hashed), **fields)


def content(number: int, size: int = OBJECT_BYTES) -> npt.NDArray[np.uint8]:
    """What the object with this number holds."""
    return np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)


def parameters(folder: Path, **other: Any) -> dict[str, Any]:
    """Our keys, small and quick."""
    return {"path": str(folder), "weights_id": "test", "direct_io": "off", "staging_bytes": 16 << 20, **other}


class Levels:
    """A storage manager of LMCache whose only second level is ours."""

    def __init__(self, folder: Path, l1_bytes: int = L1_BYTES, **keys: Any) -> None:
        adapter = PluginL2AdapterConfig(
            "memkv_engines.lmcache.l2_adapter", "MemKVL2Adapter", adapter_params=parameters(folder, **keys)
        )
        memory = L1MemoryManagerConfig(l1_bytes, use_lazy=False, shm_name="")
        config = StorageManagerConfig(
            L1ManagerConfig(memory), EvictionConfig("LRU"), L2AdaptersConfig([adapter]), prefetch_policy="retain"
        )
        self.manager = StorageManager(config)
        ((_, adapter_of_ours),) = self.manager.l2_adapters()
        assert isinstance(adapter_of_ours, MemKVL2Adapter)
        self.adapter = adapter_of_ours

    def counter(self, name: str) -> int:
        return int(self.adapter.report_status()["counters"].get(name, 0))

    def await_counter(self, name: str, value: int) -> None:
        """Wait until something was counted so often."""
        deadline = time.monotonic() + DEADLINE_S
        while self.counter(name) < value:
            assert time.monotonic() < deadline, self.adapter.report_status()
            time.sleep(0.01)

    def write(self, keys: Sequence[ObjectKey], numbers: Sequence[int], layout: MemoryLayoutDesc = LAYOUT) -> None:
        """As an engine stores: into the first level, from where LMCache stores to ours."""
        objects = self.manager.reserve_write(list(keys), layout)
        assert len(objects) == len(keys)
        for own, number in zip(keys, numbers, strict=True):
            view = np.frombuffer(objects[own].byte_array, dtype=np.uint8)
            view[:] = content(number, view.nbytes)
        self.manager.finish_write(list(keys))

    def read(self, keys: Sequence[ObjectKey], layout: MemoryLayoutDesc = LAYOUT) -> list[bytes]:
        """As an engine loads: the leading objects that there are."""
        row = GroupedObjectKeys(list(keys), keys[0].object_group_id, layout)
        handle = self.manager.submit_prefetch_task(PrefetchTaskSpec(key_groups=[row]))
        assert self.manager.wait_prefetch_status(handle, DEADLINE_S)
        result = self.manager.query_prefetch_status(handle)
        assert result is not None
        hits = list(keys[: result.hit_cells[0].count_leading_ones()])
        if not hits:
            return []
        with self.manager.read_prefetched_results(hits) as objects:
            assert objects is not None
            found = [bytes(memory.byte_array) for memory in objects]
        self.manager.finish_read_prefetched(hits)
        return found


@contextmanager
def levels(folder: Path, **options: Any) -> Iterator[Levels]:
    made = Levels(folder, **options)
    try:
        yield made
    finally:
        made.manager.close()
