"""Paged KV blocks in CUDA memory to and from staging; see ``README.md``. Nothing here imports torch or an engine."""
