"""The vLLM door: ``MemKVConnector``, an out-of-tree KV connector."""
