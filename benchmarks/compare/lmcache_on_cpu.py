"""LMCache's connector where vLLM runs on a CPU; imported by vLLM inside the engine's process.

LMCache imports numba, and with it llvmlite, whose library wrapper answers `hasattr(x, "__dict__")` with a function.
vLLM 0.32 looks through all modules in its CPU start-up and trips over that. The wrapper is told to have no such
attribute; nothing of LMCache itself is changed.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding.ffi as ffi

_answer = ffi._lib_wrapper.__getattr__


def _answer_but_for_dunders(self: Any, name: str) -> Any:
    if name.startswith("__") and name.endswith("__"):
        raise AttributeError(name)
    return _answer(self, name)


ffi._lib_wrapper.__getattr__ = _answer_but_for_dunders

from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector  # noqa: E402

__all__ = ["LMCacheMPConnector"]
