"""What must agree for KV bytes of SGLang to be reusable: the namespace.

SGLang's page hash covers tokens, extra key and cache salt. Model, weights, dtype, layout, page size and ranks are ours.
The tensor-parallel size is in the namespace: another size misses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from memkv_engines.config import Config
from memkv_engines.doors.fingerprint import ParameterSums, config_digest, parameter_sums
from memkv_engines.doors.protection import protection_identity
from memkv_engines.errors import ConfigError, IdentityError
from memkv_engines.keys import JsonValue, Namespace
from memkv_engines.sglang import compat
from memkv_engines.sglang.pools import PagedPool


def refuse_unsupported(storage_config: Any, pass_prefix_keys: bool | None) -> None:
    """Refuse set-ups in which pages could not be found or told apart.

    Raises:
        ConfigError: names the key and what to do.
    """
    if not pass_prefix_keys:
        raise ConfigError(
            f"key {compat.PREFIX_KEYS!r} is {'missing' if pass_prefix_keys is None else 'false'} in "
            "--hicache-storage-backend-extra-config: set it to true; without the hashes of earlier pages a prefetch "
            "that starts inside a chunk cannot find it"
        )
    if storage_config.dcp_size != 1:
        raise ConfigError(f"dcp_size={storage_config.dcp_size}: decode context parallelism is not supported yet")
    if storage_config.should_split_heads:
        raise ConfigError("key 'tp_lcm_size': storing split heads is not supported; leave it out")


def build_namespace(
    storage_config: Any,
    config: Config,
    pools: Sequence[PagedPool],
    sums: ParameterSums | None,
    model_config: Any,
    row_layout: JsonValue = None,
) -> Namespace:
    """The namespace of this rank; the same on all ranks of one engine that may read each other's bytes.

    Args:
        storage_config: SGLang's.
        config: ours.
        pools: the host pools, in the order of their groups.
        sums: this rank's weights, or None where they are named or unknown.
        model_config: SGLang's configuration of the model, or None where it is unknown.
        row_layout: of the device's rows, where the pools do not tell it.

    Raises:
        IdentityError: the weights are unknown and have no name.
    """
    fields: dict[str, JsonValue] = {
        "engine": "sglang",
        "page_hash": "sha256 of the page before and tokens as uint32",
        "model": str(storage_config.model_name),
        "weights": _weights_id(config, sums, storage_config.tp_size),
        "model_config": config_digest(model_config.hf_config) if model_config is not None else "",
        "quantization": str(getattr(model_config, "quantization", None)),
        "tp_size": int(storage_config.tp_size),
        "pp": [int(storage_config.pp_rank), int(storage_config.pp_size)],
        "attention_cp": [int(storage_config.attn_cp_rank), int(storage_config.attn_cp_size)],
        "pools": [pool.identity() for pool in pools],
        "tenant": config.identity.tenant,
        **({"row_layout": row_layout} if row_layout is not None else {}),
        **protection_identity(config),
    }
    return Namespace(fields)


def weights_of(config: Config, runner: Any) -> ParameterSums | None:
    """This rank's weights, where nobody named them. Reads every weight once."""
    if config.identity.weights_id or runner is None:
        return None
    return parameter_sums(runner.model)


def _weights_id(config: Config, sums: ParameterSums | None, tp_size: int) -> str:
    if config.identity.weights_id:
        return f"named:{config.identity.weights_id}"
    if sums is None:
        raise IdentityError(
            "the weights cannot be fingerprinted in this version of SGLang: set weights_id in "
            "--hicache-storage-backend-extra-config to a name that no other weights on this tier have"
        )
    names = sorted(sums)
    totals = compat.sum_over_ranks([sums[name][2] % 2**62 for name in names], tp_size)
    body = [[name, sums[name][0], sums[name][1], total] for name, total in zip(names, totals, strict=True)]
    return f"sums:{hashlib.sha256(json.dumps(body).encode()).hexdigest()}"
