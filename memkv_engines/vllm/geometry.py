"""From vLLM's KV cache tensors to layouts, shards and chunk sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm.v1.kv_cache_interface import group_kernel_blocks

from memkv_engines.chunk.layout import KVLayout, Tile, choose_blocks_per_chunk
from memkv_engines.doors.devices import cuda_ordinal
from memkv_engines.doors.io_client import DevicePages
from memkv_engines.errors import LayoutError
from memkv_engines.keys import Shard
from memkv_engines.limits import HASH_BYTES
from memkv_engines.offload.messages import GroupSpec, TileSpec
from memkv_engines.vllm import compat
from memkv_engines.vllm.metadata import GroupFacts

assert HASH_BYTES == 32, "vLLM's sha256 block hashes"


def reject_unsupported(vllm_config: Any) -> None:
    """Refuse parallel set-ups whose shards we cannot name yet.

    Raises:
        LayoutError: pipeline or context parallelism.
    """
    parallel = vllm_config.parallel_config
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name, 1)
        if size != 1:
            raise LayoutError(
                f"{name}={size} is not supported by MemKVConnector yet; set it to 1 or start without "
                "--kv-transfer-config"
            )


def describe_groups(
    vllm_config: Any, kv_cache_config: Any, kv_caches: dict[str, Any], chunk_target_bytes: int
) -> tuple[list[GroupFacts], list[GroupSpec]]:
    """Facts for the scheduler and specifications for the I/O service, one per transferable KV group.

    Args:
        vllm_config: the engine's configuration.
        kv_cache_config: groups and sizes.
        kv_caches: layer name -> tensor, as registered by the worker.
        chunk_target_bytes: wanted chunk size.

    Raises:
        LayoutError: a layout we cannot move.
    """
    facts, specs = [], []
    for number in kv_cache_config.prefix_cacheable_group_ids:
        group = kv_cache_config.kv_cache_groups[number]
        layers = list(group.layer_names)
        tiles: list[Tile] = []
        for name in layers:
            tiles += _layer_tiles(name, kv_caches[name], kv_cache_config.num_blocks)
        layout = KVLayout.plan(kv_cache_config.num_blocks, tiles)
        spec = group.kv_cache_spec
        blocks_per_chunk = choose_blocks_per_chunk(layout.block_bytes, chunk_target_bytes)
        shard, writes = _shard(vllm_config, spec, len(layers))
        interior = compat.attention_identity(vllm_config, layers)
        interior["kv_cache_layout"] = str(kv_cache_config.kv_cache_layout)
        interior["dtype"] = str(_tensors(kv_caches[layers[0]])[0].dtype)
        facts.append(
            GroupFacts(
                number,
                shard.as_tuple(),
                int(spec.block_size),
                layout.block_bytes,
                blocks_per_chunk,
                compat.window_tokens(spec, layers[0]),
                writes,
                interior,
            )
        )
        specs.append(
            GroupSpec(
                number,
                shard.as_tuple(),
                int(spec.block_size),
                layout.block_bytes,
                blocks_per_chunk,
                layout.num_blocks,
                tuple(TileSpec(t.base, t.block_stride_bytes, t.length_bytes) for t in layout.tiles),
            )
        )
    return facts, specs


def _shard(vllm_config: Any, spec: Any, layers: int) -> tuple[Shard, bool]:
    """This rank's share, and whether this rank is the one that writes it (replicas of a share do not)."""
    rank = vllm_config.parallel_config.rank % vllm_config.parallel_config.tensor_parallel_size
    size = vllm_config.parallel_config.tensor_parallel_size
    if compat.is_mla(spec):
        return Shard(0, 1, 1, 0, layers, layers), rank == 0
    heads_total = int(vllm_config.model_config.get_total_num_kv_heads())
    count = int(spec.num_kv_heads)
    if size > heads_total:
        replicas = size // heads_total
        return Shard(rank // replicas, 1, heads_total, 0, layers, layers), rank % replicas == 0
    if count * size != heads_total:
        # Groups with head counts of their own: name the share by ranks, which no other size will read.
        return Shard(rank * count, count, count * size, 0, layers, layers), True
    return Shard(rank * count, count, heads_total, 0, layers, layers), True


def _tensors(cache: Any) -> Sequence[torch.Tensor]:
    return list(cache) if isinstance(cache, (list, tuple)) else [cache]


def device_pages(kv_caches: dict[str, Any]) -> DevicePages | None:
    """The device that holds the KV cache; None for host memory.

    Raises:
        LayoutError: several devices, or one that is neither the host nor a CUDA device.
    """
    ordinal = cuda_ordinal(
        (tensor.device for cache in kv_caches.values() for tensor in _tensors(cache)),
        lambda names: LayoutError(
            f"the KV cache lies on {names}: one CUDA device, or host memory, can be moved; start without "
            "--kv-transfer-config"
        ),
    )
    if ordinal is None:
        return None
    return DevicePages(ordinal, lambda: int(torch.cuda.current_stream(ordinal).cuda_stream))


def _layer_tiles(name: str, cache: Any, num_blocks: int) -> Iterator[Tile]:
    for tensor in _tensors(cache):
        blocks = group_kernel_blocks(tensor, num_blocks)
        yield from block_tiles(name, blocks)


def block_tiles(name: str, blocks: torch.Tensor) -> Iterator[Tile]:
    """Contiguous pieces of a block of ``blocks`` (shape ``[num_blocks, ...]``), in address order.

    Raises:
        LayoutError: the pieces are smaller than one element row, or strides are negative or zero.
    """
    size = blocks.element_size()
    base = blocks.data_ptr()
    block_stride = blocks.stride(0) * size
    dims = sorted(
        ((s, n) for s, n in zip(blocks.stride()[1:], blocks.shape[1:], strict=True) if n > 1), key=lambda d: d[0]
    )
    run = 1
    while dims and dims[0][0] == run:
        run *= dims.pop(0)[1]
    if any(stride <= 0 for stride, _ in dims):
        raise LayoutError(f"layer {name} has overlapping strides {blocks.stride()}")
    offsets = [0]
    for stride, count in reversed(dims):
        offsets = [o + i * stride for o in offsets for i in range(count)]
    for offset in sorted(offsets):
        yield Tile(base + offset * size, block_stride, run * size)
