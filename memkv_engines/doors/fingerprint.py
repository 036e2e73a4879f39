"""Fingerprint of the weights a worker holds, the same for every tensor-parallel size.

Per parameter: name, dtype, number of elements and the sum of its bit patterns modulo 2**64. Sums of shards add up to
the sum of the whole, so ranks combine; a parameter without a shard dimension is taken from the first rank.

Limits, stated: a sum does not see elements that trade places inside one parameter, and a change is missed with a
chance of about 2**-32. It tells checkpoints apart; it is no defence against someone who crafts weights.
Cost: one pass over the weights, about 0.1 s per GB on one core.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch

_INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Fields of a model's configuration that do not change what it computes.
_IRRELEVANT = frozenset({"_name_or_path", "transformers_version", "architectures_hash", "_commit_hash"})

ParameterSums = dict[str, tuple[str, int, int, bool]]
"""name -> (dtype, elements, sum of bit patterns modulo 2**64, whether it is sharded over tensor-parallel ranks)"""


def parameter_sums(model: Any) -> ParameterSums:
    """One worker's sums. Blocking; runs on the device the weights are on."""
    sums: ParameterSums = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = parameter.detach()
            width = tensor.element_size()
            bits = tensor.contiguous().view(_INTEGER_OF_WIDTH[width]) if width in _INTEGER_OF_WIDTH else tensor
            total = int(torch.sum(bits, dtype=torch.int64).item()) % 2**64
            sharded = getattr(parameter, "output_dim", None) is not None or (
                getattr(parameter, "input_dim", None) is not None
            )
            sums[name] = (str(tensor.dtype), tensor.numel(), total, sharded)
    return sums


def config_digest(hf_config: Any) -> str:
    """Digest of a model's resolved configuration, which carries overrides and rope scaling; hexadecimal."""
    body = {k: v for k, v in hf_config.to_dict().items() if k not in _IRRELEVANT}
    return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()


def combine(ranks: Iterable[ParameterSums]) -> str:
    """Fingerprint of the whole model from the sums of all ranks, in rank order; hexadecimal."""
    whole: dict[str, tuple[str, int, int]] = {}
    for sums in ranks:
        for name, (dtype, elements, total, sharded) in sums.items():
            if name not in whole:
                whole[name] = (dtype, elements, total)
            elif sharded:
                _, old_elements, old_total = whole[name]
                whole[name] = (dtype, old_elements + elements, (old_total + total) % 2**64)
    text = json.dumps(sorted(whole.items()), separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
