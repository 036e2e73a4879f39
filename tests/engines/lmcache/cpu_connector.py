"""LMCache's own connector, made to load beside vLLM on a CPU; what `kv_connector_module_path` names in these tests.

LMCache imports numba before vLLM's CPU worker starts, and an object in llvmlite answers a question for `__dict__` with
a function, at which vLLM 0.32 without triton stumbles. Nothing of this is needed on a GPU.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding.ffi as ffi

_answer = ffi._lib_wrapper.__getattr__


def _without_special_names(self: Any, name: str) -> Any:
    if name.startswith("__") and name.endswith("__"):
        raise AttributeError(name)
    return _answer(self, name)


ffi._lib_wrapper.__getattr__ = _without_special_names

from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector  # noqa: E402

__all__ = ["LMCacheMPConnector"]
