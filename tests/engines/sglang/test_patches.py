"""Our patches for SGLang: they fit the release to the byte, come off again, and change what they say they change."""

from __future__ import annotations

import threading
from pathlib import Path
from queue import Queue
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from memkv_engines.sglang.chain import ChainMemory
from tests.engines.patched import apply_and_take_back, stock_and_patched
from tests.engines.sglang.radix_caches import PAGE_TOKENS, Bench, memkv_config, sequence

WINDOW_LAYER, FULL_LAYER = 0, 1
HEADS, WIDTH, WINDOW, TOKENS = 2, 8, 5, 24


def test_every_patch_applies_and_comes_off_to_the_byte(tmp_path: Path) -> None:
    apply_and_take_back("sglang", "0.5.23", tmp_path)


# -------------------------------------------------------------------------- 0001: sliding windows in torch_native


class WindowPool:
    """A layer's KV in slots of its own: what `SWAKVPool` does for a layer with a window."""

    def __init__(self) -> None:
        self.slot_of = torch.randperm(100, generator=torch.Generator().manual_seed(3))
        noise = torch.Generator().manual_seed(4)
        self.keys = [torch.randn(100, HEADS, WIDTH, generator=noise) for _ in range(2)]
        self.values = [torch.randn(100, HEADS, WIDTH, generator=noise) for _ in range(2)]

    def translate_loc_from_full_to_swa(self, slots: torch.Tensor) -> torch.Tensor:
        return self.slot_of[slots]

    def set_kv_buffer(self, layer: Any, where: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        slots = where.swa_loc if layer.layer_id == WINDOW_LAYER else where.loc
        self.keys[layer.layer_id][slots] = keys
        self.values[layer.layer_id][slots] = values

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.keys[layer_id]

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.values[layer_id]


def attention_error(module: ModuleType, layer_id: int, phase: str) -> float:
    """Largest difference to attention over the same keys and values in one piece."""
    pool = WindowPool()
    backend = module.TorchNativeAttnBackend.__new__(module.TorchNativeAttnBackend)
    backend.token_to_kv_pool, backend.use_sliding_window_kv_pool = pool, True
    backend.req_to_token_pool = SimpleNamespace(req_to_token=torch.zeros(4, 64, dtype=torch.int32))
    slots = torch.arange(60, 60 + TOKENS)
    backend.req_to_token_pool.req_to_token[2, :TOKENS] = slots.to(torch.int32)
    random = torch.Generator().manual_seed(5)
    query, keys, values = (torch.randn(TOKENS, HEADS, WIDTH, generator=random) for _ in range(3))
    layer = SimpleNamespace(
        layer_id=layer_id,
        qk_head_dim=WIDTH,
        v_head_dim=WIDTH,
        tp_q_head_num=HEADS,
        tp_k_head_num=HEADS,
        is_cross_attention=False,
        attn_type=None,
        scaling=WIDTH**-0.5,
        sliding_window_size=WINDOW if layer_id == WINDOW_LAYER else -1,
    )
    made = torch.empty(0)
    # The first tokens, then the rest: a second prefill over a cached prefix, or one token at a time.
    step = 1 if phase == "decode" else TOKENS // 2
    for start in [0, *range(TOKENS // 2, TOKENS, step)]:
        stop = TOKENS // 2 if start == 0 else start + step
        new = slice(start, stop)
        batch = SimpleNamespace(
            out_cache_loc=slots[new],
            req_pool_indices=torch.tensor([2]),
            seq_lens=torch.tensor([stop]),
            extend_prefix_lens=torch.tensor([start]),
            extend_seq_lens=torch.tensor([stop - start]),
            encoder_lens=None,
        )
        backend.init_forward_metadata(batch)
        run = backend.forward_decode if phase == "decode" and start else backend.forward_extend
        flat = [tensor[new].reshape(stop - start, -1) for tensor in (query, keys, values)]
        made = torch.cat([made, run(flat[0], keys[new], values[new], layer, batch).reshape(stop - start, -1)])
    at = torch.arange(TOKENS)
    mask = at[None, :] <= at[:, None]
    if layer_id == WINDOW_LAYER:
        mask &= at[None, :] >= at[:, None] - WINDOW
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.movedim(0, 1) for tensor in (query, keys, values)), attn_mask=mask
    )
    return float((made - wanted.movedim(1, 0).reshape(TOKENS, -1)).abs().max())


@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_window_layers_are_read_where_they_were_written(tmp_path: Path, phase: str) -> None:
    with stock_and_patched("sglang", "0001-torch-native-window-slots", tmp_path) as (stock, patched):
        assert attention_error(stock, WINDOW_LAYER, phase) > 0.5
        assert attention_error(patched, WINDOW_LAYER, phase) < 1e-5
        assert attention_error(stock, FULL_LAYER, phase) < 1e-5
        assert attention_error(patched, FULL_LAYER, phase) < 1e-5


# ------------------------------------------------------------------------------- 0002: what comes before a prefetch


def test_the_prefix_of_a_prefetch_has_no_gap(tmp_path: Path) -> None:
    tokens = sequence(9)
    with (
        Bench() as bench,
        stock_and_patched("sglang", "0002-prefix-keys-of-matched-node", tmp_path) as (stock, patched),
    ):
        side = bench.side(memkv_config(tmp_path / "tier"), 1)
        side.store(tokens[: 4 * PAGE_TOKENS])
        side.store(tokens)
        from tests.engines.sglang.radix_caches import fixtures

        node = fixtures.match_prefix(side.cache, list(tokens)).last_host_node
        without = stock.UnifiedRadixCache.get_prefix_hash_values(side.cache, node)
        full = patched.UnifiedRadixCache.get_prefix_hash_values(side.cache, node)
        assert (len(without), len(full)) == (4, 9)
        assert full[:4] == without
        assert without[-1] != side.cache.get_last_hash_value(node), "the gap"
        assert full[-1] == side.cache.get_last_hash_value(node), "what the first wanted page is chained to"
        root = fixtures.match_prefix(side.cache, list(reversed(tokens))).last_host_node
        assert side.cache.is_root(root)
        assert patched.UnifiedRadixCache.get_prefix_hash_values(side.cache, root) == []


def prefetched_pages(module: ModuleType, tier: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Pages known after a prefetch of the first four of a chunk's nine, and after one of all; no memory of chains."""
    tokens = sequence(9)
    monkeypatch.setattr(ChainMemory, "before", lambda memory, page, count: [])
    with Bench() as bench:
        bench.side(memkv_config(tier), 1).store(tokens)
        assert len(list(tier.rglob("*.kv"))) == 1
        other = bench.side(memkv_config(tier), 2)
        monkeypatch.setattr(
            type(other.cache), "get_prefix_hash_values", module.UnifiedRadixCache.get_prefix_hash_values
        )
        first = other.prefetch(tokens[: 4 * PAGE_TOKENS])
        return first // PAGE_TOKENS, other.prefetch(tokens) // PAGE_TOKENS


def test_a_prefetch_that_starts_inside_a_chunk_hits_without_our_memory_of_chains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stock_and_patched("sglang", "0002-prefix-keys-of-matched-node", tmp_path) as (stock, patched):
        assert prefetched_pages(stock, tmp_path / "one", monkeypatch) == (4, 4)
        assert prefetched_pages(patched, tmp_path / "two", monkeypatch) == (4, 9)


# --------------------------------------------------------------------------------- 0003: the thread that prefetches


def prefetched(module: ModuleType) -> list[str]:
    """Requests that are reported as completed when the first of two raises in the reading thread."""
    read: list[str] = []

    def page_transfer(operation: Any) -> None:
        read.append(operation.request_id)
        if operation.request_id == "first":
            raise RuntimeError("made up")
        controller.storage_stop_event.set()

    controller = SimpleNamespace(
        storage_stop_event=threading.Event(),
        prefetch_buffer=Queue(),
        prefetch_sync_queue=Queue(),
        _page_transfer=page_transfer,
    )
    for name in ("first", "second"):
        controller.prefetch_buffer.put(SimpleNamespace(request_id=name))
    try:
        # In this thread: what it raises would end SGLang's.
        module.HiCacheController.prefetch_io_aux_func(controller)
    except RuntimeError as error:
        assert str(error) == "made up"
    acknowledged = [controller.prefetch_sync_queue.get_nowait() for _ in range(controller.prefetch_sync_queue.qsize())]
    assert [ack.rid for ack in acknowledged if ack.completed_req] == read
    return read


def test_an_exception_does_not_end_the_reading_thread(tmp_path: Path) -> None:
    with stock_and_patched("sglang", "0003-prefetch-thread-survives", tmp_path) as (stock, patched):
        assert prefetched(stock) == ["first"]
        assert prefetched(patched) == ["first", "second"]
