"""What must agree for an object of LMCache to be reusable, and how its keys become ours.

An object's key in LMCache names model, rank, tokens and salt. Dtype and shapes are in the namespace too, as LMCache
gives them with its buffers; weights are not known to it, so that they must be named. Tokens, salt and tags become one
SHA-256, which is the hash of the only block of the object's chunk.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.distributed.api import ObjectKey

from memkv_engines.config import Config
from memkv_engines.doors.protection import protection_identity
from memkv_engines.errors import IdentityError
from memkv_engines.keys import JsonValue, Namespace
from memkv_engines.limits import HASH_BYTES, MAX_REMEMBERED_LAYOUTS
from memkv_engines.lmcache import compat

Layout = tuple[tuple[tuple[int, ...], str], ...]
"""Shape and dtype of each part of an object."""


class Identity:
    """Makes namespaces; thread-safe.

    Args:
        config: ours.
        interface: which of LMCache's two interfaces, since their objects differ.

    Raises:
        IdentityError: nothing names the weights.
    """

    def __init__(self, config: Config, interface: str) -> None:
        if not config.identity.weights_id:
            raise IdentityError(
                "key 'weights_id' is missing: LMCache does not know the weights, so give them a name that no others "
                "on this tier have, as a checkpoint's name and revision. Change it with whatever else LMCache's keys "
                "leave out: quantisation, rope overrides, adapters, and on a CPU the engine's block size"
            )
        self._fields: dict[str, JsonValue] = {
            "engine": "lmcache",
            "interface": interface,
            "weights": f"named:{config.identity.weights_id}",
            "tenant": config.identity.tenant,
            "host": compat.host_identity(),
            **protection_identity(config),
        }
        self._cached = lru_cache(MAX_REMEMBERED_LAYOUTS)(self._make)

    def of_server(self, key: ObjectKey, layout: Layout) -> Namespace:
        """The namespace of an object of LMCache's server."""
        return self._cached(
            model=key.model_name, rank=f"{key.kv_rank:#010x}", object_group=key.object_group_id, layout=layout
        )

    def of_engine(self, key: CacheEngineKey, layout: Layout, memory_format: str, hash_name: str) -> Namespace:
        """The namespace of an object of LMCache inside an engine."""
        return self._cached(
            model=key.model_name,
            rank=f"{key.worker_id} of {key.world_size}",
            kv_dtype=str(key.dtype),
            format=memory_format,
            hash=hash_name,
            layout=layout,
        )

    def _make(self, layout: Layout, **own: JsonValue) -> Namespace:
        parts: list[JsonValue] = [{"shape": list(shape), "dtype": dtype} for shape, dtype in layout]
        return Namespace({**self._fields, **own, "parts": parts})


def layout_of(shapes: Sequence[Any], dtypes: Sequence[Any]) -> Layout:
    """A layout from LMCache's lists of shapes and dtypes.

    Raises:
        IdentityError: a part without a dtype or a shape.
    """
    if not shapes or len(shapes) != len(dtypes) or any(dtype is None for dtype in dtypes):
        raise IdentityError(f"an object without shape or dtype: {shapes} {dtypes}")
    return tuple((tuple(map(int, shape)), str(dtype)) for shape, dtype in zip(shapes, dtypes, strict=True))


def object_bytes(layout: Layout) -> int:
    """Size of an object."""
    return sum(math.prod(shape) * getattr(torch, dtype.removeprefix("torch.")).itemsize for shape, dtype in layout)


def server_hash(key: ObjectKey) -> bytes | None:
    """The hash of an object of LMCache's server; None where the key is not made of a cryptographic hash."""
    if len(key.chunk_hash) < HASH_BYTES:
        return None
    return _digest(key.chunk_hash, key.cache_salt.encode())


def engine_hash(key: CacheEngineKey) -> bytes:
    """The hash of an object of LMCache inside an engine. LMCache keeps 64 bits of the chunk's hash."""
    tags = [f"{name}={value}" for name, value in key.tags or ()]
    return _digest(key.chunk_hash_hex.encode(), *(tag.encode() for tag in tags))


def _digest(*parts: bytes) -> bytes:
    hasher = hashlib.sha256(b"memkv_engines lmcache 1")
    for part in parts:
        hasher.update(len(part).to_bytes(4, "little") + part)
    return hasher.digest()
