"""What depends on a version of SGLang, and what it does not hand to storage backends. Written against 0.5.23."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from memkv_engines.doors.stack import locals_up_the_stack
from memkv_engines.errors import IdentityError
from memkv_engines.keys import JsonValue

PREFIX_KEYS = "hicache_storage_pass_prefix_keys"


def passes_prefix_keys(depth: int = 2) -> bool | None:
    """Whether the controller will pass the hashes of the pages before a batch.

    SGLang takes the key out of the extra config before a backend sees it; whoever read the configuration is up the
    stack while the backend is made, and holds the value in a variable of that name.

    Returns:
        None where nobody up the stack knows.
    """
    for found in locals_up_the_stack(depth):
        if PREFIX_KEYS in found:
            return bool(found[PREFIX_KEYS])
    return None


def scheduler(depth: int = 2) -> Any | None:
    """This process's scheduler: backends are handed neither it nor a model, but it is up the stack that makes them."""
    for found in locals_up_the_stack(depth):
        for name in ("self", "scheduler"):
            worker = getattr(found.get(name), "tp_worker", None)
            if worker is not None and getattr(worker, "model_runner", None) is not None:
                return found[name]
    return None


def wrap_method(
    owner: Any | None, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[[], None]:
    """Replace a method of one object, if it has it.

    Args:
        owner: whose; None: nobody's.
        name: the method.
        around: makes the new method from the old one.

    Returns:
        What undoes it; idempotent, and leaves alone what somebody else has put there since.
    """
    if not hasattr(owner, name):
        return lambda: None
    call = getattr(owner, name)
    wrapped = functools.wraps(call)(around(call))
    setattr(owner, name, wrapped)

    def undo() -> None:
        if vars(owner).get(name) is wrapped:
            delattr(owner, name)

    return undo


def device_pool(depth: int = 2) -> Any | None:
    """The KV cache whose host pools a backend is made for: the controller that makes it has it."""
    for found in locals_up_the_stack(depth):
        pool = getattr(found.get("self"), "mem_pool_device", None)
        if pool is not None:
            return pool
    return None


def row_layout(kvcache: Any) -> JsonValue:
    """How a DeepSeek V4 cache lays out its rows: they reach us as bytes, and different layouts can be equally long.

    Raises:
        IdentityError: this version of SGLang does not say.
    """
    try:
        return {
            "class": type(kvcache).__name__,
            "rows": str(kvcache.pd_kv_layout()),
            "unified": [bool(kvcache._unified_kv), bool(kvcache._unified_kv_fp8)],
            "states": {str(ratio): str(c.state_dtype) for ratio, c in kvcache.compressed_pool_configs.items()},
        }
    except AttributeError as error:
        raise IdentityError(
            f"{type(kvcache).__name__} does not tell the layout of its rows ({error}): this version of SGLang is not "
            "supported with DeepSeek V4; use 0.5.23 or start without this storage backend"
        ) from error


def model_runner(depth: int = 2) -> Any | None:
    """The model runner of this scheduler process."""
    found = scheduler(depth + 1)
    return found.tp_worker.model_runner if found is not None else None


def prefetch_threshold(default: int, depth: int = 2) -> int:
    """Tokens below which the controller loads nothing: taken out of the extra config like the prefix keys' switch."""
    for found in locals_up_the_stack(depth):
        for name in ("prefetch_threshold", "storage_prefetch_threshold"):
            value = found.get(name)
            if isinstance(value, int):
                return value
    return default


def sum_over_ranks(values: list[int], tp_size: int) -> list[int]:
    """Add up 63-bit values over the tensor-parallel ranks, modulo 2**62; every rank must call it."""
    if tp_size == 1:
        return values
    from sglang.srt.runtime_context import get_parallel

    # 31 bits at a time, so that no sum over ranks overflows.
    parts = torch.tensor([[v % 2**31, (v >> 31) % 2**31] for v in values], dtype=torch.int64)
    torch.distributed.all_reduce(parts, group=get_parallel().tp_group.cpu_group)
    return [int(low + (high << 31)) % 2**62 for low, high in parts.tolist()]


def dcp_size() -> int:
    """Ranks of decode context parallelism."""
    from sglang.srt.runtime_context import get_parallel

    return int(getattr(get_parallel(), "attn_dcp_size", 1) or 1)


def model_path() -> str:
    """The model's name, as SGLang was given it."""
    from sglang.srt.runtime_context import get_model

    return str(get_model().model_path)


class RankGroup:
    """The ranks whose radix caches must take the same decisions.

    Args:
        params: SGLang's ``CacheInitParams``.
    """

    def __init__(self, params: Any) -> None:
        groups = [g for g in (params.attn_cp_cache_group, params.attn_tp_cache_group) if _size(g) > 1]
        self._groups = groups or [g for g in (params.tp_cache_group,) if _size(g) > 1]
        heads = params.attn_tp_cache_group or params.tp_cache_group
        self.size = _size(heads)
        self.rank = torch.distributed.get_rank(group=heads) if self.size > 1 else 0

    def all_agree(self, verdict: bool) -> bool:
        """Whether every rank says yes. All ranks must call it; blocks until they have."""
        votes = torch.tensor([int(verdict)], dtype=torch.int)
        for group in self._groups:
            torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN, group=group)
        return bool(votes.item())


def _size(group: Any) -> int:
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size(group=group) if group is not None and initialized else 1
