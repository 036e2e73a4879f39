"""SGLang's device pools: which a model has, and how ``PagedPool`` wants a pool to look.

SGLang assembles the pools of some hybrid models for linkers (0.5.23: DSA, MLA + Mamba, sliding window + Mamba); those
of plain models are assembled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler import (
    DevicePoolEntry,
    DevicePoolGroup,
    resolve_hybrid_device_pool_group,
)
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from memkv_engines.doors.devices import cuda_ordinal
from memkv_engines.doors.io_client import DevicePages
from memkv_engines.errors import ConfigError

_OTHERWISE = "use the hierarchical cache instead (--enable-hierarchical-cache --hicache-storage-backend dynamic)"


def pool_group(params: Any, components: set[Any]) -> DevicePoolGroup:
    """Every pool of the model.

    Args:
        params: SGLang's ``CacheInitParams``.
        components: kinds of cache that the model has.

    Raises:
        ConfigError: pools that neither SGLang nor we can assemble.
    """
    kvcache, page_size = params.token_to_kv_pool_allocator.get_kvcache(), int(params.page_size)
    has_draft = bool(params.mtp_draft_device_pools or params.sidecar_draft_device_pools)
    if type(kvcache) in (MHATokenToKVPool, MLATokenToKVPool, SWAKVPool) and has_draft:
        raise ConfigError(f"the linker does not store the KV of a draft model yet: {_OTHERWISE}")
    # Exactly these: their subclasses hold more than keys and values.
    if type(kvcache) is MHATokenToKVPool:
        layers = {layer: layer for layer in range(kvcache.layer_num)}
        return DevicePoolGroup([_mha_entry(PoolName.KV, kvcache, layers, page_size)], kvcache.layer_num, page_size)
    if type(kvcache) is MLATokenToKVPool:
        layers = {layer: layer for layer in range(kvcache.layer_num)}
        entry = _entry(PoolName.KV, kvcache, [kvcache.kv_buffer], layers, page_size)
        return DevicePoolGroup([entry], kvcache.layer_num, page_size, rank_replicated=True)
    names = {str(getattr(component, "name", component)) for component in components}
    if type(kvcache) is SWAKVPool and names == {"FULL", "SWA"}:
        return _window_group(kvcache, page_size)
    try:
        return resolve_hybrid_device_pool_group(
            kvcache=kvcache, page_size=page_size, params=params, components=components
        )
    except ValueError as error:
        raise ConfigError(f"the linker cannot serve {type(kvcache).__name__} ({error}): {_OTHERWISE}") from error


def _window_group(kvcache: Any, page_size: int) -> DevicePoolGroup:
    first = kvcache.start_layer
    layers = {is_window: dict[int, int]() for is_window in (False, True)}
    for layer, (index, is_window) in kvcache.layers_mapping.items():
        layers[bool(is_window)][layer - first] = index
    entries = [
        _mha_entry(PoolName.KV, kvcache.full_kv_pool, layers[False], page_size),
        _mha_entry(PoolName.SWA, kvcache.swa_kv_pool, layers[True], page_size),
    ]
    return DevicePoolGroup(entries, len(kvcache.layers_mapping), page_size)


def _mha_entry(name: PoolName, pool: Any, layers: dict[int, int], page_size: int) -> DevicePoolEntry:
    if type(pool) is not MHATokenToKVPool or any(
        getattr(pool, scales, None) is not None for scales in ("k_scale_buffer", "native_k_scale_buffer")
    ):
        raise ConfigError(f"the linker cannot serve {type(pool).__name__} or scaled KV: {_OTHERWISE}")
    count = len(pool.k_buffer)
    both = {layer: (index, count + index) for layer, index in layers.items()}
    return _entry(name, pool, [[*pool.k_buffer, *pool.v_buffer]], both, page_size)


def _entry(
    name: PoolName, pool: Any, components: Sequence[Sequence[torch.Tensor]], layers: Any, page_size: int
) -> DevicePoolEntry:
    return DevicePoolEntry(
        name=name,
        indices_from_pool=name,
        device_pool=pool,
        components=components,
        layer_mapping=layers,
        page_size=page_size,
        rows_are_pages=False,
    )


def device_pages(pools: Sequence[DevicePool], forward_stream: Any) -> DevicePages | None:
    """The device that holds the pools; None for host memory.

    Args:
        pools: every pool.
        forward_stream: the stream of the forward; the current one of this thread if None.

    Raises:
        ConfigError: several devices, or one that is neither the host nor a CUDA device.
    """
    ordinal = cuda_ordinal(
        (device for pool in pools for device in pool.devices),
        lambda names: ConfigError(
            f"the KV cache lies on {names}; the linker moves pages of one CUDA device or of host memory: {_OTHERWISE}"
        ),
    )
    if ordinal is None:
        return None
    # A number, since offloads go on in a thread of ours, where another stream is the current one. What the forward has
    # been given since then is waited for too: that costs time, nothing else.
    stream = int((forward_stream or torch.cuda.current_stream(ordinal)).cuda_stream)
    return DevicePages(ordinal, lambda: stream)


class DevicePool:
    """One physical device pool.

    Args:
        entry: SGLang's ``DevicePoolEntry``.

    Attributes:
        devices: where its buffers lie.
        buffers: its tensors.
    """

    def __init__(self, entry: Any) -> None:
        self._entry = entry
        buffers: Sequence[torch.Tensor] = entry.kv_buffer
        self.devices = {buffer.device for buffer in buffers}
        self.buffers = buffers
        self.page_size = int(entry.page_size)
        # A row is a token in some pools and a page in others.
        _, lengths = entry.get_page_buffer_meta(torch.arange(self.page_size))
        rows_per_page = lengths[0] // (buffers[0].nbytes // buffers[0].shape[0])
        pages = min(buffer.shape[0] for buffer in buffers) // rows_per_page
        self.size = int(pages * self.page_size)
        pool = entry.device_pool
        self.layout = f"device {type(pool).__name__}"
        self.dtype = getattr(pool, "dtype", buffers[0].dtype)
        self.layer_num = len(entry.layer_mapping)
        self.head_num = getattr(pool, "head_num", 1)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Addresses and lengths of the pieces of whole pages, as SGLang's host pools give them."""
        addresses, lengths = self._entry.get_page_buffer_meta(indices)
        return list(addresses), list(lengths)
