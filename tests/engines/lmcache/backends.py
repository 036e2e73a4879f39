"""LMCache's storage manager of the in-process kind, with our plugin below: what an engine has, without the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.event_manager import EventManager
from lmcache.v1.memory_management import MemoryFormat, MemoryObj
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.storage_manager import StorageManager

from memkv_engines.lmcache.storage_plugin import KEY_PREFIX, MemKVStoragePlugin
from tests.engines.lmcache.levels import content, parameters

NAME = "memkv"
CHUNK_TOKENS = 256
KV_SHAPE = (4, 2, CHUNK_TOKENS, 2, 64)
CHUNK_BYTES = 4 * 2 * CHUNK_TOKENS * 2 * 64 * 2


def chunk_key(number: int, **other: Any) -> CacheEngineKey:
    """A chunk's key; equal numbers are equal tokens."""
    fields = {
        "model_name": "org/model",
        "world_size": 2,
        "worker_id": 1,
        "chunk_hash": number + 1,
        "dtype": torch.bfloat16,
        **other,
    }
    return CacheEngineKey(**fields)


def config_of(folder: Path, *, ours: dict[str, Any] | None = None, **theirs: Any) -> LMCacheEngineConfig:
    """LMCache's configuration, with our plugin and nothing kept in its own memory."""
    keys = parameters(folder) | (ours or {})
    extra = {
        f"storage_plugin.{NAME}.module_path": "memkv_engines.lmcache.storage_plugin",
        f"storage_plugin.{NAME}.class_name": "MemKVStoragePlugin",
        **{KEY_PREFIX + key: value for key, value in keys.items() if value is not None},
    }
    plain = {
        "chunk_size": CHUNK_TOKENS,
        "local_cpu": False,
        "max_local_cpu_size": 0.0625,
        "pre_caching_hash_algorithm": "sha256_cbor",
        "storage_plugins": [NAME],
        "extra_config": extra,
    }
    return LMCacheEngineConfig.from_defaults(**{**plain, **theirs})


def metadata_of(**other: Any) -> LMCacheMetadata:
    """What an engine says of itself."""
    fields = {
        "model_name": "org/model",
        "world_size": 2,
        "local_world_size": 2,
        "worker_id": 1,
        "local_worker_id": 1,
        "kv_dtype": torch.bfloat16,
        "kv_shape": KV_SHAPE,
        "chunk_size": CHUNK_TOKENS,
        "role": "worker",
        **other,
    }
    return LMCacheMetadata(**fields)


class Backends:
    """A storage manager with our plugin."""

    def __init__(self, config: LMCacheEngineConfig, metadata: LMCacheMetadata | None = None) -> None:
        self.metadata = metadata or metadata_of()
        self.manager = StorageManager(config, self.metadata, EventManager())

    @property
    def plugin(self) -> MemKVStoragePlugin:
        made = self.manager.storage_backends[NAME]
        assert isinstance(made, MemKVStoragePlugin)
        return made

    def memory(self, number: int, tokens: int = CHUNK_TOKENS) -> MemoryObj:
        """A buffer of LMCache's with a chunk's content."""
        shapes = self.metadata.get_shapes(tokens)
        made = self.manager.allocate(shapes, self.metadata.get_dtypes(), MemoryFormat.KV_2LTD)
        assert made is not None
        view = np.frombuffer(made.byte_array, dtype=np.uint8)
        view[:] = content(number, view.nbytes)
        return made

    def put(self, keys: Sequence[CacheEngineKey], numbers: Sequence[int]) -> None:
        """As LMCache's engine stores."""
        self.manager.batched_put(list(keys), [self.memory(number) for number in numbers])

    def get(self, keys: Sequence[CacheEngineKey]) -> list[bytes | None]:
        """As LMCache's engine loads; gives the memory back."""
        found: list[bytes | None] = []
        for memory in self.manager.batched_get(list(keys), NAME):
            found.append(None if memory is None else bytes(memory.byte_array))
            if memory is not None:
                memory.ref_count_down()
        return found


@contextmanager
def backends(folder: Path, **options: Any) -> Iterator[Backends]:
    metadata = options.pop("metadata", None)
    made = Backends(config_of(folder, **options), metadata)
    try:
        yield made
    finally:
        made.manager.close()
        # LMCache ends its loop's thread and leaves the loop open.
        made.manager.thread.join(10)
        made.manager.loop.close()
