"""What must agree for KV bytes of vLLM to be reusable: the namespace."""

from __future__ import annotations

from typing import Any

from memkv_engines.config import Config
from memkv_engines.doors.fingerprint import combine, config_digest
from memkv_engines.doors.protection import protection_identity
from memkv_engines.errors import IdentityError
from memkv_engines.keys import JsonValue, Namespace
from memkv_engines.vllm import compat
from memkv_engines.vllm.metadata import Handshake


def build_namespace(vllm_config: Any, config: Config, handshakes: list[Handshake]) -> Namespace:
    """The namespace of this engine.

    Args:
        vllm_config: the engine's configuration.
        config: ours.
        handshakes: what the workers reported, in rank order.

    Raises:
        IdentityError: the weights are unknown or the ranks disagree.
    """
    groups = [h.groups for h in handshakes]
    for other in groups[1:]:
        if [g.agreed() for g in other] != [g.agreed() for g in groups[0]]:
            raise IdentityError("ranks of one engine report different KV layouts; nothing is stored or loaded")
    fields: dict[str, JsonValue] = {
        "engine": "vllm",
        "weights": _weights_id(config, handshakes),
        "model_config": config_digest(vllm_config.model_config.hf_config),
        "quantization": str(vllm_config.model_config.quantization),
        "kv_cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "dtype": str(vllm_config.model_config.dtype),
        "groups": [g.agreed() for g in groups[0]],
        "tenant": config.identity.tenant,
        **protection_identity(config),
        **compat.hash_identity(vllm_config),
    }
    return Namespace(fields)


def _weights_id(config: Config, handshakes: list[Handshake]) -> str:
    if config.identity.weights_id:
        return f"named:{config.identity.weights_id}"
    if any(h.weights is None for h in handshakes):
        raise IdentityError(
            "the weights cannot be fingerprinted in this version of vLLM: set weights_id to a name that no other "
            "weights on this tier have"
        )
    return f"sums:{combine(h.weights for h in handshakes if h.weights is not None)}"
