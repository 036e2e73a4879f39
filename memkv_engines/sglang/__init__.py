"""The SGLang door: a storage backend for the hierarchical cache."""
