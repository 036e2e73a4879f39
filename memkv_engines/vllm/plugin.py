"""Entry point ``vllm.general_plugins``: makes ``kv_connector: MemKVConnector`` known without a module path."""

from __future__ import annotations


def register() -> None:
    """Register the connector with vLLM's factory; called by vLLM in every process, so idempotent."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "MemKVConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector("MemKVConnector", "memkv_engines.vllm.connector", "MemKVConnector")
