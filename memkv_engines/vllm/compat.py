"""Everything that depends on vLLM's version. Run with 0.32; 0.33 checked against its sources, not run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import vllm
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MLAAttentionSpec, SlidingWindowSpec

from memkv_engines.doors.stack import locals_up_the_stack
from memkv_engines.errors import ConfigError, IdentityError, LayoutError

TESTED_VERSIONS = ("0.32",)
READ_VERSIONS = ("0.33",)
_FIRST_FIXED_NONE_HASH = (0, 29)
_SLEEP_BACKEND, _KV_TAG = "cumem", "kv_cache"
_SAFE_HASHES = ("sha256", "sha256_cbor")


def engine_version() -> tuple[int, int]:
    """Major and minor version of the running vLLM."""
    parts = vllm.__version__.split("+")[0].split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (IndexError, ValueError) as error:
        raise IdentityError(f"cannot read vLLM's version {vllm.__version__!r}") from error


def version_note() -> str:
    """Empty for a tested version, else what to expect."""
    text = "{}.{}".format(*engine_version())
    if text in TESTED_VERSIONS:
        return ""
    if text in READ_VERSIONS:
        return f"vLLM {text}: checked against its sources, not run"
    return f"vLLM {text} is untested with this connector (tested: {', '.join(TESTED_VERSIONS)})"


def wanted_kv_cache_layout(vllm_config: Any) -> str | None:
    """The layout in which a block of all layers is one piece, so that moving it needs no gather kernel.

    Only a wish: ``VLLM_KV_CACHE_LAYOUT`` goes before it, and a backend that has no such layout keeps its own. None on a
    CPU, whose backend has a single layout.
    """
    return "BLHNC" if vllm_config.device_config.device_type == "cuda" else None


def hash_identity(vllm_config: Any) -> dict[str, str | int | None]:
    """Identity of the engine's block hashes, for the namespace.

    Raises:
        IdentityError: hashes differ between processes or are not collision-resistant; nothing may be persisted.
    """
    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    if algorithm not in _SAFE_HASHES:
        raise IdentityError(
            f"prefix_caching_hash_algo={algorithm!r} is not collision-resistant: a persistent cache could return "
            "another prompt's KV. Use --prefix-caching-hash-algo sha256_cbor (recommended) or sha256"
        )
    seed = os.environ.get("PYTHONHASHSEED")
    if seed is None and engine_version() < _FIRST_FIXED_NONE_HASH:
        raise IdentityError(
            f"vLLM {vllm.__version__} seeds its block hashes at random: set PYTHONHASHSEED to the same value "
            "in every process that shares the tier"
        )
    identity: dict[str, str | int | None] = {
        "hash_algorithm": algorithm,
        "hash_seed": seed,
        # The format of what is hashed changed in 0.31 and may change with any minor version.
        "hash_format": "vllm-{}.{}".format(*engine_version()),
    }
    if algorithm == "sha256":
        # It hashes pickles, whose bytes depend on the interpreter.
        identity["python_minor"] = f"{sys.version_info.major}.{sys.version_info.minor}"
    return identity


def window_tokens(spec: KVCacheSpec, layers: str) -> int:
    """Sliding window of a KV group in tokens, 0 for full attention.

    Raises:
        LayoutError: a kind of KV group we do not move.
    """
    if isinstance(spec, SlidingWindowSpec):
        return int(spec.sliding_window)
    if isinstance(spec, FullAttentionSpec):
        return 0
    raise LayoutError(
        f"KV group {layers} is of kind {type(spec).__name__}, which MemKVConnector does not support yet "
        "(supported: full attention, MLA, sliding window). Start without --kv-transfer-config"
    )


def is_mla(spec: KVCacheSpec) -> bool:
    """Whether every rank holds the same latent, which is stored once."""
    return isinstance(spec, MLAAttentionSpec)


def worker_model(depth: int = 1) -> Any | None:
    """The model of the worker that called the connector's handshake hook.

    vLLM hands connectors no model. The hook is called by the worker's method of the same name, so the worker is the
    nearest ``self`` up the stack that has ``get_model``.
    """
    for found in locals_up_the_stack(depth):
        owner = found.get("self")
        if owner is not None and callable(getattr(owner, "get_model", None)):
            return owner.get_model()
    return None


def deciding_transfer_config(vllm_config: Any, depth: int = 1) -> Any:
    """The configuration whose ``kv_load_failure_policy`` the scheduler goes by.

    ``MultiConnector`` gives each connector below it a copy; its own is in its constructor, up the stack while they are
    made.
    """
    for found in locals_up_the_stack(depth):
        outer = found.get("vllm_config")
        if outer is not None and type(found.get("self")).__name__ == "MultiConnector":
            return outer.kv_transfer_config
    return vllm_config.kv_transfer_config


def sleeps(vllm_config: Any) -> bool:
    """Whether the engine may unmap its KV cache (sleep mode, and discarding the cache alone).

    Raises:
        ConfigError: by a mechanism that is not known here.
    """
    model = vllm_config.model_config
    if not (getattr(model, "enable_sleep_mode", False) or getattr(model, "enable_cumem_allocator", False)):
        return False
    backend = getattr(model, "sleep_mode_backend", _SLEEP_BACKEND)
    if backend != _SLEEP_BACKEND:
        raise ConfigError(
            f"sleep_mode_backend={backend!r} is not supported by MemKVConnector: use {_SLEEP_BACKEND!r}, or start "
            "without --enable-sleep-mode"
        )
    return True


def watch_sleep(allocator: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Learn of the engine's sleep, which connectors are not told of (0.32), from the allocator of its pages.

    Args:
        allocator: the process's own, see ``page_allocator``.
        before: called before pages are unmapped, on the worker's thread; where it raises they stay mapped, and vLLM
            reports the error to whoever asked for the sleep.
        after: called when the KV cache is mapped again.

    Raises:
        ConfigError: the allocator is not the one that is known here.
    """
    names = ("sleep", "discard", "wake_up")
    if not all(callable(getattr(allocator, name, None)) for name in names):
        raise ConfigError(
            f"{type(allocator).__name__} of vLLM {vllm.__version__} is not known to MemKVConnector: start without "
            "--enable-sleep-mode"
        )
    sleep, discard, wake_up = (getattr(allocator, name) for name in names)

    def sleep_after_us(*args: Any, **kwargs: Any) -> Any:
        before()
        return sleep(*args, **kwargs)

    def discard_after_us(tags: Any) -> Any:
        if _KV_TAG in ((tags,) if isinstance(tags, str) else tags):
            before()
        return discard(tags)

    def wake_up_before_us(tags: Any = None) -> Any:
        result = wake_up(tags)
        if tags is None or _KV_TAG in tags:
            after()
        return result

    allocator.sleep, allocator.discard, allocator.wake_up = sleep_after_us, discard_after_us, wake_up_before_us


def page_allocator() -> Any:
    """The allocator that unmaps this process's pages."""
    from vllm.device_allocator import get_mem_allocator_instance

    return get_mem_allocator_instance()


def cached_pages(block_pool: Any) -> Callable[[int, Sequence[bytes], Sequence[int]], bool]:
    """Tells whether pages are in vLLM's prefix cache, free or not, as blocks of a group with these chain hashes.

    What the cache says after a step was scheduled is what the pages hold after that step: blocks are entered when the
    step that completes them is scheduled, and taken out when they are handed out again.
    """
    blocks = getattr(block_pool, "blocks", ())

    def holds(group: int, hashes: Sequence[bytes], block_ids: Sequence[int]) -> bool:
        keys = (make_block_hash_with_group_id(BlockHash(own), group) for own in hashes)
        # Pages of a group with a pool of its own are not in this one.
        return all(i < len(blocks) and blocks[i].block_hash == key for i, key in zip(block_ids, keys, strict=True))

    return holds


def attention_identity(vllm_config: Any, layer_names: list[str]) -> dict[str, str]:
    """Backend and instruction set that decide how a block's interior is packed, for one KV group."""
    context = vllm_config.compilation_config.static_forward_context
    found: dict[str, str] = {}
    for name in layer_names:
        layer = context.get(name)
        backend = getattr(layer, "attn_backend", None)
        if backend is not None:
            found["backend"] = backend.get_name()
            implementation = getattr(layer, "impl", None)
            isa = getattr(implementation, "isa", None) or getattr(layer, "isa", None)
            found["isa"] = str(isa or _cpu_isa(vllm_config))
            break
    return found


def _cpu_isa(vllm_config: Any) -> str:
    if vllm_config.device_config.device_type != "cpu":
        return ""
    from vllm.v1.attention.backends import cpu_attn

    try:
        return str(
            cpu_attn._get_attn_isa(
                vllm_config.model_config.dtype,
                vllm_config.cache_config.block_size,
                vllm_config.model_config.get_head_size(),
            )
        )
    except Exception as error:  # private function: any change of it must stop us, with a reason
        raise IdentityError(f"cannot tell which instruction set packs the CPU KV cache: {error}") from error
