"""The oldest storage interface (v0): SGLang hands pages over as flat tensors of its own, without ``interface_v1``.

They are copied through a bounce buffer: one copy more per page than v1, and everything else as there. v0 passes no
hashes of earlier pages; what ``PageStore`` remembers of the chain stands in for them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from memkv_engines.limits import MAX_CHUNK_TARGET_BYTES
from memkv_engines.sglang.pages import PageStore


class BouncePool:
    """Pages as SGLang's flat tensors hold them; looks like one of SGLang's pools to ``PagedPool``.

    Args:
        pool: the host pool whose pages pass through.
    """

    def __init__(self, pool: Any) -> None:
        flat = pool.get_dummy_flat_data_page()
        self.page_bytes = int(flat.numel() * flat.element_size())
        # Loads and stores run on two threads: a half for each, of a few chunks.
        self.pages_per_half = max(4, 4 * MAX_CHUNK_TARGET_BYTES // self.page_bytes)
        self.page_size = int(pool.page_size)
        self.size = 2 * self.pages_per_half * self.page_size
        self.layout = f"flat pages of {type(pool).__name__} {getattr(pool, 'layout', '')}"
        self.dtype = getattr(pool, "dtype", "")
        self.storage_format_tag = getattr(pool, "storage_format_tag", None)
        self.layer_num, self.head_num = getattr(pool, "layer_num", 1), getattr(pool, "head_num", 1)
        self.buffer = torch.zeros((2 * self.pages_per_half, self.page_bytes), dtype=torch.uint8)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Addresses and lengths, as SGLang's host pools give them."""
        pages = (indices[:: self.page_size] // self.page_size).tolist()
        base = self.buffer.data_ptr()
        return [base + page * self.page_bytes for page in pages], [self.page_bytes] * len(pages)

    def slots(self, first: int, count: int) -> torch.Tensor:
        """The slots of some pages."""
        return torch.arange(first * self.page_size, (first + count) * self.page_size)


class FlatPages:
    """Loads into and stores from tensors of SGLang's. Blocking; one load and one store at a time.

    Args:
        store: the pages of the bounce pool.
        pool: the bounce pool.
    """

    def __init__(self, store: PageStore, pool: BouncePool) -> None:
        self._store, self._pool = store, pool
        self._loading, self._storing = threading.Lock(), threading.Lock()

    def load(self, keys: Sequence[str], targets: Sequence[torch.Tensor]) -> list[bool]:
        """Fill the tensors; per page whether it was there and right. Ends at the first that was not."""
        pool, good = self._pool, list[bool]()
        with self._loading:
            for start in range(0, len(keys), pool.pages_per_half):
                part = keys[start : start + pool.pages_per_half]
                found = self._store.load(part, keys[:start], pool.slots(0, len(part))) or []
                for page, (target, ok) in enumerate(zip(targets[start : start + len(part)], found, strict=False)):
                    if ok:
                        target.view(torch.uint8).view(-1).copy_(pool.buffer[page])
                good += found
                if not all(found):
                    break
        return good + [False] * (len(keys) - len(good))

    def store(self, keys: Sequence[str], values: Sequence[torch.Tensor]) -> bool:
        """Store the tensors; whether the tier holds all of them now."""
        pool, half = self._pool, self._pool.pages_per_half
        with self._storing:
            for start in range(0, len(keys), half):
                part = keys[start : start + half]
                for page, value in enumerate(values[start : start + half]):
                    pool.buffer[half + page].copy_(value.contiguous().view(torch.uint8).view(-1))
                stored = self._store.store(part, keys[:start], pool.slots(half, len(part)))
                if stored is None or not all(stored):
                    return False
        return True
