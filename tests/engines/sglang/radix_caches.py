"""SGLang's real hierarchical cache without a model: radix cache, controller threads, host pools, storage factory.

SGLang ships the fixtures for this in its wheel (``sglang.test.kits``). A *side* is one cache with device and host pools
of its own; two sides over one tier are two processes' view of it, without the processes.
"""

from __future__ import annotations

import json
import time
import unittest
import warnings
from array import array
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch

with warnings.catch_warnings():
    # Importing SGLang warns of what a CPU lacks, before any test's own filter applies.
    warnings.simplefilter("ignore")
    from sglang.srt.plugins import load_plugins

    load_plugins()
    import sglang.test.kits.unified_radix_cache.fixtures as fixtures
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool
    from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
    from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
    from sglang.srt.runtime_context import get_parallel
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
    from sglang.test.kits.unified_radix_cache.config import CacheConfig
    from sglang.test.kits.unified_radix_cache.storage import UnifiedRadixCacheStorageFixtures

from tests.engines.sglang.engines import memkv_extra

__all__ = [
    "Bench",
    "LinkerSide",
    "PoolHitPolicy",
    "PoolName",
    "PoolTransfer",
    "Side",
    "memkv_config",
    "same",
    "sequence",
]

PAGE_TOKENS = 16
V4_PAGE_TOKENS = 256
_COMMON = {"page_size": PAGE_TOKENS, "num_layers": 4, "kv_size": 1024, "max_context_len": 1024}
CONFIGS = {
    "full": CacheConfig(components=(ComponentType.FULL,), **_COMMON),
    "mla": CacheConfig(components=(ComponentType.FULL,), **_COMMON),
    "swa": CacheConfig(
        components=(ComponentType.FULL, ComponentType.SWA),
        sliding_window_size=32,
        full_attention_layer_ids=(1, 3),
        **_COMMON,
    ),
    "mamba": CacheConfig(
        components=(ComponentType.FULL, ComponentType.MAMBA),
        enable_mamba_extra_buffer=True,
        mamba_cache_size=60,
        full_attention_layer_ids=(1, 3),
        **_COMMON,
    ),
    # DeepSeek V4: its anchor pool holds no bytes; KV is compressed 4 and 128 times beside a window.
    "v4": CacheConfig(
        components=(ComponentType.FULL, ComponentType.SWA),
        sliding_window_size=128,
        page_size=V4_PAGE_TOKENS,
        num_layers=4,
        kv_size=40 * V4_PAGE_TOKENS,
        max_context_len=16 * V4_PAGE_TOKENS,
    ),
}
LAYOUTS = (
    ("direct", "layer_first"),
    ("direct", "page_first_direct"),
    ("kernel", "layer_first"),
    ("kernel", "page_first"),
)


def memkv_config(tier: Any, **keys: Any) -> dict[str, Any]:
    """The extra config of our backend."""
    quick = {"weights_id": "fixture", "direct_io": "off", "probe_timeout_ms": 20_000, "prefetch_threshold": 1}
    return memkv_extra(tier, **{**quick, **keys})


class Bench(UnifiedRadixCacheStorageFixtures, unittest.TestCase):
    """SGLang's fixtures, used outside of unittest.

    Args:
        kind: a key of ``CONFIGS``.
        io: ``--hicache-io-backend``.
        layout: ``--hicache-mem-layout``.
    """

    __test__ = False

    def __init__(self, kind: str = "full", io: str = "kernel", layout: str = "page_first") -> None:
        super().__init__()
        self.kind, self.cfg, self._io, self._layout = kind, CONFIGS[kind], io, layout

    def runTest(self) -> None:
        """Required by unittest."""

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.doCleanups()

    def side(self, extra: dict[str, Any], seed: int) -> Side:
        """A cache whose device pool holds noise."""
        return Side(self, extra, seed)

    def linked(self, tier: Any, seed: int, **keys: Any) -> LinkerSide:
        """A cache without a host pool, linked to a tier."""
        quick = {"path": str(tier), "weights_id": "fixture", "direct_io": "off", "probe_timeout_ms": 20_000}
        return LinkerSide(self, {**quick, **keys}, seed)

    def build(self) -> tuple[Any, Any, Any]:
        """Cache, allocator and request pool."""
        if self.kind == "v4":
            with mock.patch.object(fixtures, "SWAKVPool", v4_pool):
                return fixtures.build_fixture(self.cfg, tree_core_backend="python")
        if self.kind != "mla":
            return fixtures.build_fixture(self.cfg, tree_core_backend="python")

        def latent_pool(*, head_num: int, head_dim: int, **arguments: Any) -> MLATokenToKVPool:
            return MLATokenToKVPool(kv_lora_rank=64, qk_rope_head_dim=32, **arguments)

        with mock.patch.object(fixtures, "MHATokenToKVPool", latent_pool):
            return fixtures.build_fixture(self.cfg, tree_core_backend="python")

    def attach(self, cache: Any, extra: dict[str, Any], *, tp: tuple[int, int] = (0, 1)) -> None:
        """Start the hierarchical cache with a storage backend."""
        parallel = get_parallel().override(tp_rank=tp[0], tp_size=tp[1], pp_rank=0, pp_size=1)
        parallel.__enter__()
        self.addCleanup(parallel.__exit__, None, None, None)
        arguments = ServerArgs(
            model_path="dummy",
            page_size=self.cfg.page_size,
            hicache_io_backend=self._io,
            hicache_mem_layout=self._layout,
            hicache_storage_backend="dynamic",
            hicache_storage_backend_extra_config=json.dumps(extra),
            hicache_storage_prefetch_policy="wait_complete",
        )
        arguments._mamba_cache_chunk_size = 64
        set_global_server_args_for_scheduler(arguments)
        cache.init_hicache(arguments, cache.cache_init_params)
        self.addCleanup(fixtures.drop_hicache_atexit_pin, cache)
        self.addCleanup(cache.release_host_resources)
        cache.write_through_threshold = 1 << 30
        cache.load_back_threshold = 0
        controller = cache.cache_controller
        controller.prefetch_capacity_limit = max(controller.prefetch_capacity_limit, controller.mem_pool_host.size)
        self.addCleanup(controller.storage_backend.close)
        self.addCleanup(controller._stop_storage_threads)


class Side:
    """One cache.

    Args:
        bench: the fixtures.
        extra: the backend's extra config.
        seed: of the noise in the device pool.
    """

    def __init__(self, bench: Bench, extra: dict[str, Any], seed: int) -> None:
        self._bench = bench
        self.cache, self._allocator, self._requests = bench.build()
        bench.attach(self.cache, extra)
        self._requests_made = 0
        self._device = device_memory(bench, self._allocator, self._requests, seed)

    @property
    def backend(self) -> Any:
        """The storage backend."""
        return self.cache.cache_controller.storage_backend

    @property
    def threads(self) -> list[Any]:
        """The controller's threads."""
        controller = self.cache.cache_controller
        return [controller.prefetch_thread, controller.prefetch_io_aux_thread, controller.backup_thread]

    def free_host_tokens(self) -> int:
        """Slots of the anchor host pool that are not in use."""
        return int(self.cache.cache_controller.mem_pool_host.entries[0].host_pool.available_size())

    def store(self, tokens: Sequence[int]) -> list[torch.Tensor]:
        """Insert a sequence, back it up to the host pool and on to storage; what the device holds of it."""
        bench = self._bench
        bench._insert(self.cache, self._allocator, self._requests, list(tokens))
        leaf = fixtures.match_prefix(self.cache, list(tokens)).last_device_node
        bench._backup_node(self.cache, leaf)
        bench._write_path_to_l3(self.cache, leaf)
        bench._flush_l3_backups(self.cache)
        return self.held(tokens)

    def prefetch(self, tokens: Sequence[int]) -> int:
        """Prefetch a sequence from storage into the host pool; tokens that the cache knows of afterwards."""
        self._requests_made += 1
        request = CacheRequestHandle(f"request-{self._requests_made}", 0)
        before = fixtures.match_prefix(self.cache, list(tokens))
        known, last = int(before.host_hit_length) + int(before.device_prefix_len), before.last_host_node
        # As the scheduler does it.
        self.cache.prefetch_from_storage(
            request,
            last,
            array("q", list(tokens)[known:]),
            self.cache.get_last_hash_value(last),
            self.cache.get_prefix_hash_values(last),
            matched_prefix_tokens=list(tokens)[:known],
        )
        deadline = time.monotonic() + 20
        while not self.cache.check_prefetch_progress(request):
            assert time.monotonic() < deadline, "the prefetch does not end"
            self.cache.check_hicache_events()
            time.sleep(0.005)
        for _ in range(10):
            self.cache.check_hicache_events()
            time.sleep(0.005)
        after = fixtures.match_prefix(self.cache, list(tokens))
        return int(after.host_hit_length) + int(after.device_prefix_len)

    def load_back(self, tokens: Sequence[int]) -> list[torch.Tensor]:
        """Load a prefetched sequence into the device pool, as the scheduler would; what it holds then."""
        self._bench._load_back_through_admission(self.cache, self._requests, list(tokens))
        self._bench._finish_pending_loads(self.cache)
        return self.held(tokens)

    def held(self, tokens: Sequence[int]) -> list[torch.Tensor]:
        """Every byte of every layer that the device pool holds of a sequence."""
        return self._device.held_by(self.cache, tokens)


class LinkerSide:
    """One cache whose device pools are linked straight to the tier.

    Args:
        bench: the fixtures.
        keys: the linker's extra config.
        seed: of the noise in the device pool.
    """

    def __init__(self, bench: Bench, keys: dict[str, Any], seed: int) -> None:
        from sglang.srt.mem_cache.unified_cache.linker_factory import create_unified_cache_linker

        self._bench = bench
        # The fixtures' plain allocator gives slots that are no pages; an engine with pages has this one.
        with mock.patch.object(
            fixtures, "TokenToKVPoolAllocator", partial(PagedTokenToKVPoolAllocator, page_size=bench.cfg.page_size)
        ):
            self.cache, self._allocator, self._requests = bench.build()
        config = {
            "linker": "MemKVCacheLinker",
            "linker_module_path": "memkv_engines.sglang.linker",
            "linker_extra_config": keys,
        }
        self.linker = create_unified_cache_linker(
            ServerArgs(model_path="dummy", page_size=bench.cfg.page_size),
            self.cache.cache_init_params,
            backend="dynamic",
            config=config,
            components=set(self.cache.components),
        )
        bench.addCleanup(self.linker.close)
        self.cache.init_cache_linker(self.linker)
        self._device = device_memory(bench, self._allocator, self._requests, seed)

    def free_tokens(self) -> int:
        """Slots of the device pool of full attention that are not in use."""
        allocator = self._allocator
        return int(getattr(allocator, "full_attn_allocator", allocator).available_size())

    def store(self, tokens: Sequence[int]) -> list[torch.Tensor]:
        """Insert a sequence, which offloads it; what the device holds of it."""
        self._bench._insert(self.cache, self._allocator, self._requests, list(tokens))
        self.settle()
        return self._device.held_by(self.cache, tokens)

    def settle(self) -> None:
        """Wait for offloads, as the scheduler does between steps."""
        deadline = time.monotonic() + 20
        while self.cache.linker.pending_offloads:
            assert time.monotonic() < deadline, "the offload does not end"
            self.cache.check_hicache_events()
            time.sleep(0.005)

    def load(self, tokens: Sequence[int]) -> list[torch.Tensor] | None:
        """Load a sequence as a new request would; what the device holds then, None if it is to be computed."""
        request = self._bench._load_back_through_admission(self.cache, self._requests, list(tokens))
        slots = self.cache.linker.private_load_indices.get(request.rid)
        self.cache.ready_to_load_host_cache()
        assert self.cache.linker.finish_loads() == [], "a request is aborted"
        if slots is None:
            return None
        return self._device.read(slots, request.kv.mamba_pool_idx.unsqueeze(0) if self._bench.cfg.has_mamba else None)


class DeviceMemory:
    """What lies in a cache's device pools: noise at first.

    Args:
        bench: the fixtures.
        allocator: of the pool of full attention.
        requests: the request pool, which holds the states.
        seed: of the noise.
    """

    def __init__(self, bench: Bench, allocator: Any, requests: Any, seed: int) -> None:
        self._bench, self._allocator, self._requests = bench, allocator, requests
        pool = allocator.get_kvcache()
        pools = [getattr(pool, "full_kv_pool", pool), *([pool.swa_kv_pool] if hasattr(pool, "swa_kv_pool") else [])]
        noise = torch.Generator().manual_seed(seed)
        for buffer in [buffer for p in pools for buffer in _pool_buffers(p)] + self._states():
            buffer.copy_(torch.randn(buffer.shape, generator=noise).to(buffer.dtype))

    def held_by(self, cache: Any, tokens: Sequence[int]) -> list[torch.Tensor]:
        """Every byte of every layer that a cache holds here of a sequence."""
        node = fixtures.match_prefix(cache, list(tokens)).last_device_node
        slots = cache.path_device_indices(node)
        assert len(slots) == len(tokens)
        has_state = self._bench.cfg.has_mamba
        state = cache.tree_core.get_component_device_value(node, ComponentType.MAMBA) if has_state else None
        return self.read(slots, state)

    def read(self, slots: torch.Tensor, state: torch.Tensor | None) -> list[torch.Tensor]:
        """Every byte of every layer in some slots, and of a state where there are states."""
        pool = self._allocator.get_kvcache()
        held = [buffer[slots].clone() for buffer in _pool_buffers(getattr(pool, "full_kv_pool", pool))]
        if self._bench.cfg.has_swa:
            inside = pool.translate_loc_from_full_to_swa(slots[-self._bench.cfg.sliding_window_size :])
            held += [buffer[inside].clone() for buffer in _pool_buffers(pool.swa_kv_pool)]
        if state is not None:
            held += [part[:, state].clone() for part in self._states()]
        return held

    def _states(self) -> list[torch.Tensor]:
        if not self._bench.cfg.has_mamba:
            return []
        cache = self._requests.mamba_pool.mamba_cache
        return [*cache.conv, cache.temporal]


class V4Memory:
    """What lies in the device pools of a DeepSeek V4 cache: noise at first.

    Args:
        allocator: of the pool that numbers the pages.
        seed: of the noise.
    """

    def __init__(self, allocator: Any, seed: int) -> None:
        pool = self._pool = allocator.get_kvcache()
        # Rows are pages: of the tree in these ...
        self._full = [*pool.c4_kv_pool.kv_buffer, *pool.c128_kv_pool.kv_buffer]
        self._full += pool.c4_indexer_kv_pool.index_k_with_scale_buffer
        # ... and of the window in those.
        self._window = [*pool.swa_kv_pool.kv_buffer]
        for states in (pool.compress_state_pools, pool.indexer_compress_state_pools):
            for state in [state for state in states if state is not None and state.ratio == 4]:
                rows = state.kv_score_buffer.kv_score.view(torch.uint8)
                self._window.append(
                    rows[: len(rows) // state.ring_size * state.ring_size].view(-1, state.ring_size, rows.shape[1])
                )
        noise = torch.Generator().manual_seed(seed)
        for buffer in self._full + self._window:
            buffer.copy_(torch.randint(0, 256, buffer.shape, generator=noise, dtype=torch.uint8))

    def held_by(self, cache: Any, tokens: Sequence[int]) -> list[torch.Tensor]:
        """Every byte of every layer that a cache holds here of a sequence."""
        slots = cache.path_device_indices(fixtures.match_prefix(cache, list(tokens)).last_device_node)
        assert len(slots) == len(tokens)
        return self.read(slots, None)

    def read(self, slots: torch.Tensor, state: None) -> list[torch.Tensor]:
        """Every byte of every layer in some slots, and of the window at their end."""
        pages = slots[::V4_PAGE_TOKENS] // V4_PAGE_TOKENS
        window = self._pool.translate_loc_from_full_to_swa(slots[-1:]) // V4_PAGE_TOKENS
        return [part[pages].clone() for part in self._full] + [part[window].clone() for part in self._window]


def device_memory(bench: Bench, allocator: Any, requests: Any, seed: int) -> DeviceMemory | V4Memory:
    """What lies in a cache's device pools."""
    return V4Memory(allocator, seed) if bench.kind == "v4" else DeviceMemory(bench, allocator, requests, seed)


def v4_pool(*, size: int, page_size: int, device: str, **_: Any) -> DeepSeekV4TokenToKVPool:
    """A small one of SGLang's own, on the CPU, in place of a sliding window model's."""
    pages = size // page_size
    return DeepSeekV4TokenToKVPool(
        max_num_reqs=8,
        swa_size=size,
        c4_size=size // 4,
        c128_size=size // 128,
        c4_state_pool_size=8 * pages,
        c128_state_pool_size=128,
        page_size=page_size,
        swa_page_size=page_size,
        dtype=torch.float8_e4m3fn,
        c4_state_dtype=torch.float32,
        c128_state_dtype=torch.float32,
        qk_nope_head_dim=448,
        qk_rope_head_dim=64,
        indexer_head_dim=128,
        layer_num=4,
        device=device,
        enable_memory_saver=False,
        compression_ratios=[0, 4, 128, 4],
        start_layer=0,
        end_layer=4,
        full_size=size,
    )


def _pool_buffers(pool: Any) -> list[torch.Tensor]:
    return list(pool.kv_buffer) if hasattr(pool, "kv_lora_rank") else [*pool.k_buffer, *pool.v_buffer]


def sequence(pages: int, first: int = 1, page_tokens: int = PAGE_TOKENS) -> list[int]:
    """Tokens of so many pages."""
    return list(range(first, first + pages * page_tokens))


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    """Whether two readings of the device pool agree in every byte."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
