"""From SGLang's pools, host or device, to layouts: where the bytes of a page lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from memkv_engines.chunk.layout import choose_blocks_per_chunk
from memkv_engines.errors import LayoutError
from memkv_engines.keys import JsonValue, Shard
from memkv_engines.offload.batches import largest_chunk_blocks
from memkv_engines.offload.messages import GroupSpec, TileSpec

# Numbers of KV groups in chunk names. Append only: a number that changes its meaning would be another format.
GROUPS = {
    name: number
    for number, name in enumerate(
        (
            *("kv", "mamba", "swa", "auxiliary_swa", "indexer", "draft", "draft_indexer", "draft_swa"),
            *("deepseek_v4_c1", "deepseek_v4_c1_indexer", "deepseek_v4_c1_indexer_scale"),
            *("deepseek_v4_c2", "deepseek_v4_c2_indexer", "deepseek_v4_c2_indexer_scale"),
            *("deepseek_v4_c4", "deepseek_v4_c4_indexer", "deepseek_v4_c4_indexer_scale", "deepseek_v4_c4_rope"),
            *("deepseek_v4_c128", "deepseek_v4_c128_rope"),
            *("deepseek_v4_c4_state", "deepseek_v4_c4_indexer_state", "deepseek_v4_c128_state"),
        )
    )
}


class PagedPool:
    """One pool as a KV group. Keeps the pool alive.

    Args:
        name: SGLang's name of the pool.
        pool: the pool.
        storage_config: SGLang's; for the shard.
        chunk_target_bytes: wanted chunk size.

    Raises:
        LayoutError: a pool we have no group for, or whose pages are not at regular addresses.
    """

    def __init__(self, name: str, pool: Any, storage_config: Any, chunk_target_bytes: int) -> None:
        if name not in GROUPS:
            raise LayoutError(f"pool {name!r} is not known; known pools: {sorted(GROUPS)}")
        self.name, self.pool = name, pool
        self.group = GROUPS[name]
        self.page_tokens = int(getattr(pool, "page_size", 1) or 1)
        self.tiles = _tiles(name, pool, self.page_tokens)
        self.block_bytes = sum(tile.length_bytes for tile in self.tiles)
        self.blocks_per_chunk = choose_blocks_per_chunk(self.block_bytes, chunk_target_bytes)
        self.shard = _shard(pool, storage_config)

    @property
    def largest_chunk(self) -> int:
        """Blocks of the largest chunk we store."""
        return largest_chunk_blocks(self.blocks_per_chunk, self.block_bytes)

    def spec(self) -> GroupSpec:
        """For the I/O service; its staging slots hold the largest chunk."""
        pages = int(self.pool.size) // self.page_tokens
        return GroupSpec(
            self.group,
            self.shard.as_tuple(),
            self.page_tokens,
            self.block_bytes,
            self.largest_chunk,
            pages,
            tuple(self.tiles),
        )

    def identity(self) -> JsonValue:
        """What decides the meaning of a page's bytes."""
        return {
            "name": self.name,
            "class": type(self.pool).__name__,
            "format": str(getattr(self.pool, "storage_format_tag", None)),
            "layout": str(getattr(self.pool, "layout", "")),
            "dtype": str(getattr(self.pool, "dtype", "")),
            "page_tokens": self.page_tokens,
            "pieces": [tile.length_bytes for tile in self.tiles],
        }

    def pages_of(self, keys: int, indices: torch.Tensor | None) -> list[int] | None:
        """Page numbers of a call's slots; None if there are not as many as the keys need, or they are not whole pages.

        Args:
            keys: pages the call is about.
            indices: slots, ``page_tokens`` for each page.
        """
        size = self.page_tokens
        if indices is None or indices.numel() != keys * size:
            return None
        slots = indices.reshape(keys, size)
        steps = torch.arange(size, dtype=slots.dtype, device=slots.device)
        if not bool(((slots[:, :1] + steps) == slots).all()) or bool((slots[:, 0] % size).any()):
            return None
        pages: list[int] = (slots[:, 0] // size).tolist()
        return pages


def is_logical(pool: Any) -> bool:
    """Whether a pool only numbers pages: the anchor of DeepSeek V4, whose bytes lie in pools derived from it."""
    return getattr(pool, "kv_buffer", pool) is None


def measured_pool(pools: Sequence[PagedPool]) -> PagedPool:
    """The pool by which the cost of a hit is told: full attention's, or the largest of those derived from it.

    Raises:
        LayoutError: neither is there, so that nothing could be a hit.
    """
    own = [pool for pool in pools if pool.name == "kv"]
    derived = [p for p in pools if p.name.startswith("deepseek_v4_") and not p.name.endswith("_state")]
    if not own and not derived:
        raise LayoutError(f"none of the pools {[pool.name for pool in pools]} holds the KV of full attention")
    return own[0] if own else max(derived, key=lambda pool: pool.block_bytes)


def _tiles(name: str, pool: Any, page_tokens: int) -> list[TileSpec]:
    """The pieces of a page, from the addresses that the pool gives for its first two and its last page."""
    pages = int(pool.size) // page_tokens
    if pages < 1:
        raise LayoutError(f"pool {name!r} holds no page")

    def pieces(page: int) -> tuple[list[int], list[int]]:
        try:
            return pool.get_page_buffer_meta(torch.arange(page * page_tokens, (page + 1) * page_tokens))
        except (ValueError, NotImplementedError) as error:
            raise LayoutError(
                f"pool {name!r} does not say where its pages lie ({error}): "
                "try --hicache-mem-layout page_first or page_first_direct"
            ) from error

    bases, lengths = pieces(0)
    last, last_lengths = pieces(pages - 1)
    strides = lengths
    if pages > 1:
        second, _ = pieces(1)
        strides = [b - a for a, b in zip(bases, second, strict=True)]
    regular = [base + (pages - 1) * stride for base, stride in zip(bases, strides, strict=True)]
    if regular != list(last) or list(lengths) != list(last_lengths):
        raise LayoutError(f"pool {name!r} does not hold its pages at regular addresses")
    return [TileSpec(int(b), int(s), int(n)) for b, s, n in zip(bases, strides, lengths, strict=True)]


def _shard(pool: Any, storage_config: Any) -> Shard:
    """This rank's share. MLA is the same on every rank and stored once; other pools are named by ranks."""
    layers = int(getattr(pool, "layer_num", 1) or 1)
    if storage_config.is_mla_model and not hasattr(pool, "temporal_buffer"):
        return Shard(0, 1, 1, 0, layers, layers)
    rank, size = int(storage_config.tp_rank), int(storage_config.tp_size)
    heads = max(1, int(getattr(pool, "head_num", 1) or 1))
    return Shard(rank * heads, heads, size * heads, 0, layers, layers)
