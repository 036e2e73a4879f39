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
        # Each of an engine's processes would take up to a minute to compile what it imports, every time.
        "PYTHONDONTWRITEBYTECODE": "",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CACHE_ROOT": str(CACHE / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
    }


def sglang_settings() -> dict[str, str]:
    """Returns the variables that every process which imports SGLang gets, in addition to `engine_settings`."""
    return {
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_CACHE_DIR": str(CACHE / "sglang"),
        "TORCH_EXTENSIONS_DIR": str(CACHE / "torch-extensions"),
        # SGLang loads an extension through torch, which wants ninja on the path even where it is built already.
        "PATH": os.pathsep.join([str(ROOT / ".venvs" / "sglang" / "bin"), os.environ.get("PATH", os.defpath)]),
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
