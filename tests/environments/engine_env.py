"""The process environment in which engines run here: offline, no telemetry, caches inside the checkout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / "build" / "cache"


def engine_settings() -> dict[str, str]:
    """Returns the variables that every engine process started by tests, demo and benchmarks gets."""
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CACHE_ROOT": str(CACHE / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
    }


def engine_env(base: Mapping[str, str] | None = None, **overrides: str) -> dict[str, str]:
    """Returns a complete environment for an engine's process.

    Args:
        base: What to start from; this process's own environment by default.
        **overrides: Further variables, such as `VLLM_ENABLE_V1_MULTIPROCESSING="0"` for an engine in one process.

    Returns:
        A new dict, ready for `subprocess`.
    """
    return {**(os.environ if base is None else base), **engine_settings(), **overrides}


def apply_engine_env(**overrides: str) -> None:
    """Puts the settings into this process's own environment; call it before the engine is imported."""
    os.environ.update(engine_env({}, **overrides))
