"""Engine-side KV-cache offload for vLLM and SGLang: paged blocks out to chunks, chunks back into pages.

See ``memkv_engines/README.md`` for the map. Importing the package imports nothing heavy.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
