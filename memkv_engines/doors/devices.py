"""Which device a KV cache lies on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from memkv_engines.errors import MemKVError


def cuda_ordinal(devices: Iterable[torch.device], refusal: Callable[[str], MemKVError]) -> int | None:
    """The ordinal of the CUDA device among the visible ones; None for host memory.

    Args:
        devices: where the tensors of the cache lie.
        refusal: makes the door's error out of their names.

    Raises:
        MemKVError: the refusal, for several devices, or one that is neither the host nor a CUDA device.
    """
    found = set(devices)
    kinds = {device.type for device in found}
    if kinds <= {"cpu"}:
        return None
    if kinds != {"cuda"} or len(found) > 1:
        raise refusal(", ".join(sorted(map(str, found))))
    device = found.pop()
    return int(torch.cuda.current_device() if device.index is None else device.index)
