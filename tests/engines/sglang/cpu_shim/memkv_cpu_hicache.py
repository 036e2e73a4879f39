"""SGLang plugin: lets HiCache run with `device="cpu"`, where host pool and device pool are the same kind of memory.

SGLang calls `activate` in each of its processes. It supplies

1. bodies for the copies between the two pools, which are CUDA kernels of `sgl_kernel` that SGLang imports only there;
2. host pools that are not pinned, since there is no driver to register them with;
3. a way for MLA models to run on the attention backend `torch_native`, which has none of its own;
4. right reads of sliding-window layers in `torch_native`, which writes their KV to slots of the window's pool and
   looks for it in slots of the full pool.

Names and arguments of the copies are SGLang's. Indices are token slots. The "direct" ones take tensors, the others
addresses and strides: `layer_first` pools have one buffer for each layer (lf), `page_first` ones a single buffer in
which a token's layers are neighbours (pf).
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

POOLS = "sglang.srt.mem_cache.pool_host"
V4_POOLS = "sglang.srt.mem_cache.memory_pool_host"
POOL_MODULES = (f"{POOLS}.mha", f"{POOLS}.mla", f"{POOLS}.mamba", V4_POOLS)
# The later classes initialise themselves without the first.
HOST_POOLS = (
    f"{POOLS}.base.HostKVCache",
    f"{POOLS}.mamba.MambaPoolHost",
    f"{V4_POOLS}.DeepSeekV4PagedHostPool",
    f"{V4_POOLS}.DeepSeekV4StateHostPool",
)
TORCH_NATIVE = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"

Tensor = torch.Tensor


# ------------------------------------------------------------------------------- copies by tensor (io backend `direct`)


def transfer_kv_direct(
    src_layers: Sequence[Tensor],
    dst_layers: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
) -> None:
    """Copies tokens of every layer between pools that both have one buffer for each layer."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Sequence[Tensor], dst_ptrs: Sequence[Tensor], src_indices: Tensor, dst_indices: Tensor, page_size: int
) -> None:
    """Copies every layer's tokens into host buffers `[page, layer, token, ...]`; `src_ptrs` names K's layers first."""
    layers = len(src_ptrs) // len(dst_ptrs)
    runs = runs_of_pages(dst_indices, src_indices, page_size)
    for number, source in enumerate(src_ptrs):
        for page, token, count in runs:
            rows = source[token : token + count * page_size]
            target = dst_ptrs[number // layers][page : page + count, number % layers]
            target.copy_(rows.view(count, page_size, *rows.shape[1:]))


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Sequence[Tensor],
    dst_ptrs: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """Copies one layer's tokens out of host buffers `[page, layer, token, ...]`."""
    runs = runs_of_pages(src_indices, dst_indices, page_size)
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        for page, token, count in runs:
            rows = target[token : token + count * page_size]
            rows.view(count, page_size, *rows.shape[1:]).copy_(source[page : page + count, layer_id])


def runs_of_pages(host: Tensor, device: Tensor, page_size: int) -> list[tuple[int, int, int]]:
    """Returns runs of pages that follow each other in both pools: first host page, first device slot, pages.

    The slots of a page follow each other, as SGLang's allocators with pages give them and its kernels rely on.
    """
    pages, tokens = (host[::page_size] // page_size).numpy(), device[::page_size].numpy()
    breaks = np.flatnonzero((np.diff(pages) != 1) | (np.diff(tokens) != page_size)) + 1
    starts = [0, *breaks.tolist()]
    stops = [*breaks.tolist(), len(pages)]
    return [
        (int(pages[start]), int(tokens[start]), stop - start)
        for start, stop in zip(starts, stops, strict=True)
        if stop > start
    ]


# ----------------------------------------------------------------------------- copies by address (io backend `kernel`)


def rows_at(address: int, stride: int, count: int, width: int) -> np.ndarray:
    """Returns memory as `count` rows of `width` bytes whose starts are `stride` bytes apart."""
    extent = (ctypes.c_uint8 * ((count - 1) * stride + width)).from_address(int(address))
    return np.lib.stride_tricks.as_strided(np.frombuffer(extent, np.uint8), (count, width), (stride, 1))


def copy_rows(
    source: int, source_stride: int, sources: Tensor, target: int, target_stride: int, targets: Tensor, width: int
) -> None:
    """Copies rows of `width` bytes from the given places of one memory to the given places of another."""
    if len(sources) == 0:
        return
    from_rows = rows_at(source, source_stride, int(sources.max()) + 1, width)
    to_rows = rows_at(target, target_stride, int(targets.max()) + 1, width)
    to_rows[targets.numpy()] = from_rows[sources.numpy()]


def transfer_kv_per_layer_mla(
    src: Tensor, dst: Tensor, src_indices: Tensor, dst_indices: Tensor, item_size: int
) -> None:
    """Copies one layer's tokens from host to device, both layer first."""
    copy_rows(src.data_ptr(), item_size, src_indices, dst.data_ptr(), item_size, dst_indices, item_size)


def transfer_kv_per_layer_mla_pf_lf(
    src: Tensor,
    dst: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
) -> None:
    """Copies one layer's tokens out of a page-first host buffer."""
    source = src.data_ptr() + layer_id * item_size
    copy_rows(source, src_layout_dim, src_indices, dst.data_ptr(), item_size, dst_indices, item_size)


def transfer_kv_all_layer_mla(
    src_layers: Tensor, dst_layers: Tensor, src_indices: Tensor, dst_indices: Tensor, item_size: int, num_layers: int
) -> None:
    """Copies every layer's tokens from device to host, both layer first, given the addresses of the layers."""
    for source, target in zip(src_layers.tolist()[:num_layers], dst_layers.tolist()[:num_layers], strict=True):
        copy_rows(source, item_size, src_indices, target, item_size, dst_indices, item_size)


def transfer_kv_all_layer_mla_lf_pf(
    src_layers: Tensor,
    dst: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
) -> None:
    """Copies every layer's tokens into a page-first host buffer, given the addresses of the layers."""
    for layer, source in enumerate(src_layers.tolist()[:num_layers]):
        target = dst.data_ptr() + layer * item_size
        copy_rows(source, item_size, src_indices, target, dst_layout_dim, dst_indices, item_size)


def transfer_kv_per_layer(src_k: Tensor, dst_k: Tensor, src_v: Tensor, dst_v: Tensor, **where: Any) -> None:
    """`transfer_kv_per_layer_mla` for K and for V."""
    transfer_kv_per_layer_mla(src_k, dst_k, **where)
    transfer_kv_per_layer_mla(src_v, dst_v, **where)


def transfer_kv_per_layer_pf_lf(src_k: Tensor, dst_k: Tensor, src_v: Tensor, dst_v: Tensor, **where: Any) -> None:
    """`transfer_kv_per_layer_mla_pf_lf` for K and for V."""
    transfer_kv_per_layer_mla_pf_lf(src_k, dst_k, **where)
    transfer_kv_per_layer_mla_pf_lf(src_v, dst_v, **where)


def transfer_kv_all_layer(
    src_k_layers: Tensor, dst_k_layers: Tensor, src_v_layers: Tensor, dst_v_layers: Tensor, **where: Any
) -> None:
    """`transfer_kv_all_layer_mla` for K and for V."""
    transfer_kv_all_layer_mla(src_k_layers, dst_k_layers, **where)
    transfer_kv_all_layer_mla(src_v_layers, dst_v_layers, **where)


def transfer_kv_all_layer_lf_pf(
    src_k_layers: Tensor, dst_k: Tensor, src_v_layers: Tensor, dst_v: Tensor, **where: Any
) -> None:
    """`transfer_kv_all_layer_mla_lf_pf` for K and for V."""
    transfer_kv_all_layer_mla_lf_pf(src_k_layers, dst_k, **where)
    transfer_kv_all_layer_mla_lf_pf(src_v_layers, dst_v, **where)


# A state-space layer's state is one row for each layer, like a latent vector.
transfer_kv_mamba_pf_lf = transfer_kv_per_layer_mla_pf_lf


def transfer_kv_mamba_lf_pf(src_ptrs: Tensor, dst: Tensor, **where: Any) -> None:
    """`transfer_kv_all_layer_mla_lf_pf` under the name of its first argument for state-space layers."""
    transfer_kv_all_layer_mla_lf_pf(src_ptrs, dst, **where)


# ------------------------------------------------------------------------------------------------------------- hooks


def without_pinning(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Changes the arguments of a host pool: its memory is not pinned."""
    return args, {**kwargs, "pin_memory": False}


def with_window_slots(
    attend: Callable[..., Tensor],
    backend: Any,
    query: Tensor,
    output: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Attends in a sliding-window layer with the slots of the window's pool, into which its KV was written."""
    if backend.use_sliding_window_kv_pool and kwargs.get("sliding_window_size") is not None:
        req_to_token = backend.token_to_kv_pool.translate_loc_from_full_to_swa(req_to_token[req_pool_indices])
        req_pool_indices = torch.arange(len(req_pool_indices))
    return attend(backend, query, output, k_cache, v_cache, req_to_token, req_pool_indices, *args, **kwargs)


def activate() -> None:
    """Puts everything in its place; the entry point of the plugin."""
    from sglang.srt.models.deepseek_common import attention_backend_handler as mla

    copies = {name: body for name, body in globals().items() if name.startswith("transfer_kv_")}
    for module in map(importlib.import_module, POOL_MODULES):
        vars(module).update(copies)
    # The latent KV is attended to as it is, in prefill too: `torch_native` cannot expand what is cached.
    mla.AttentionBackendRegistry.register("torch_native", lambda attn, forward_batch: mla.AttnForwardMethod.MLA)
    for pool in HOST_POOLS:
        HookRegistry.register(f"{pool}.__init__", without_pinning, HookType.BEFORE)
    for phase in ("extend", "decode"):
        HookRegistry.register(f"{TORCH_NATIVE}._run_sdpa_forward_{phase}", with_window_slots, HookType.AROUND)
