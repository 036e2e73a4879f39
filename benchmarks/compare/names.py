"""What contestants and workloads are called in the results."""

from __future__ import annotations

NO_CACHE, PREFIX_CACHE, NATIVE = "vllm, no cache", "vllm, prefix cache", "vllm, native fs"
LMCACHE_FS, LMCACHE_MEMKV = "lmcache, fs", "lmcache, memkv"
MEMKV, MEMKV_MEMORY, THROTTLED = "memkv", "memkv, memory", "memkv, slow tier"
VLLM_SIDES = (NO_CACHE, PREFIX_CACHE, NATIVE, LMCACHE_FS, LMCACHE_MEMKV, MEMKV, MEMKV_MEMORY, THROTTLED)

NO_STORAGE, FILE = "sglang, no storage", "sglang, file"
HICACHE, LINKER = "memkv hicache", "memkv linker"
SGLANG_SIDES = (NO_STORAGE, FILE, HICACHE, LINKER)

DOCUMENTS, CONVERSATIONS, RESUMED = "documents", "conversations", "conversations resumed from the disk"
RAG, REPETITION = "passages behind a shared system prompt", "prefix repetition"
# What a profile can leave out; resumed are the conversations that were held.
WORKLOADS = (DOCUMENTS, CONVERSATIONS, RAG, REPETITION)
FIRST, AGAIN, LOCAL = "first visit", "second visit", "local hit"
