"""Stands in for SGLang's kernel wheel, which needs CUDA.

On a CPU SGLang imports functions from it and, for the models of these tests, calls none: they serve speculative
decoding and moving KV within the device's pool. So every function is there, and says its name when called. As no
operator is registered under `torch.ops.sgl_kernel`, SGLang takes its layers' native forms, not those for Intel AMX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """Returns a function that cannot be called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"the stand-in for sgl_kernel has no {name}")

    return missing
