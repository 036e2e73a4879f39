"""What differs between versions of LMCache, and what it does not say: the only place that looks inside it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import torch
from lmcache import torch_device_type

from memkv_engines.errors import IdentityError, LayoutError
from memkv_engines.lmcache.objects import Arena

LOGGER = "lmcache.utils"
"""One whose handlers print LMCache's lines: it gives them to each module's logger, and none to what is above."""
_ALIGN_BYTES = 4096


def arena_of(local_cpu_backend: Any) -> Arena:
    """The memory out of which LMCache's CPU backend hands out buffers.

    Raises:
        LayoutError: its allocator does not say where its memory is.
    """
    allocator = local_cpu_backend.get_memory_allocator()
    buffer = getattr(allocator, "buffer", None)
    if not isinstance(buffer, torch.Tensor) or buffer.device.type != "cpu":
        raise LayoutError(
            f"LMCache's CPU memory is handed out by {type(allocator).__name__}, whose buffer is not known: "
            "leave out enable_p2p, and other options that choose an allocator"
        )
    # The plain allocator hands out multiples of its alignment, the paged one multiples of a page of any size.
    pages = getattr(allocator, "pin_allocator", allocator)
    align_bytes = _common_power_of_two(int(getattr(pages, "align_bytes", _ALIGN_BYTES)))
    return Arena(buffer.data_ptr(), buffer.numel() * buffer.element_size(), align_bytes)


def before_memory_goes(local_cpu_backend: Any, call: Callable[[], None]) -> None:
    """Have something done before LMCache frees the memory of its CPU backend.

    LMCache closes that backend first and the others after it: a transfer that is under way would go on in memory that
    is somebody else's by then.
    """
    allocator = local_cpu_backend.get_memory_allocator()
    close = allocator.close

    def close_after() -> None:
        call()
        close()

    allocator.close = close_after


def refuse_unsafe_hash(config: Any) -> None:
    """Refuse chunk hashes that differ between processes, or that anyone can make collide.

    Args:
        config: LMCache's, of the in-process engine.

    Raises:
        IdentityError: names key, value and remedy.
    """
    # Imported here: the server has no token database.
    from lmcache.v1.token_database import ChunkedTokenDatabase

    name = config.pre_caching_hash_algorithm
    remedy = "set pre_caching_hash_algorithm to sha256_cbor"
    # Not constructed: that would draw a new seed for the whole process.
    database = ChunkedTokenDatabase.__new__(ChunkedTokenDatabase)
    if name == "builtin" or database._get_vllm_hash_func(name) is hash:
        raise IdentityError(f"pre_caching_hash_algorithm={name!r} makes LMCache use Python's hash(): {remedy}")
    if os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise IdentityError(
            "PYTHONHASHSEED is not set, so that no other process makes the same keys: set PYTHONHASHSEED=0 for all"
        )


def host_identity() -> str:
    """What a CPU engine's blocks depend on: their interior is packed for the instruction set. Empty beside a GPU."""
    if torch_device_type != "cpu":
        return ""
    amx = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} amx={int(amx)}"


def _common_power_of_two(value: int) -> int:
    return min(value & -value, _ALIGN_BYTES) if value > 0 else _ALIGN_BYTES
