"""vLLM's native offloading on a CPU: the one piece that stock vLLM 0.32 has for GPUs only.

`OffloadingConnector` with `TieringOffloadingSpec` and its `fs` tier is vLLM's own; the worker that copies blocks
between the KV cache and the primary tier refuses any platform but a GPU. `CpuTieringSpec` puts plain copies in its
place, by a thread, where a GPU has its copy engine. Scheduling, look-ups, the primary tier, its eviction, the `fs` tier
and its thread pool are stock.

Imported by vLLM inside the engine's process: `{"spec_name": "CpuTieringSpec", "spec_module_path": <this module>}`.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.gpu_worker import compute_sub_block_ptrs
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

END_TIMEOUT_S = 10.0


class CopyingWorker(OffloadingWorker):
    """Copies blocks between the KV cache and the shared region of the primary tier, job by job, in one thread.

    Args:
        kv_caches: the engine's pages.
        blocks_per_chunk: blocks in one unit of the primary tier.
        region: the primary tier's memory; closed with the worker.
    """

    def __init__(self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion) -> None:
        self._blocks_per_chunk = blocks_per_chunk
        self._region = region
        self._references = kv_caches.group_data_refs
        self._pages, self._chunks = [], []
        for tensor in kv_caches.tensors:
            self._pages.append(tensor.tensor.view(torch.int8).view((-1, tensor.page_size_bytes)))
            self._chunks.append(region.create_next_worker_view(tensor.page_size_bytes * blocks_per_chunk))
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._pending: set[Any] = set()
        self._finished: list[TransferResult] = []
        self._thread = threading.Thread(target=self._run, name="cpu-offload-copies", daemon=True)
        self._thread.start()

    def submit_store(self, job_id: Any, src_spec: Any, dst_spec: Any) -> bool:
        """Pages to chunks."""
        return self._submit(job_id, src_spec, dst_spec, True)

    def submit_load(self, job_id: Any, src_spec: Any, dst_spec: Any) -> bool:
        """Chunks to pages."""
        return self._submit(job_id, dst_spec, src_spec, False)

    def get_finished(self) -> list[TransferResult]:
        """Returns what has ended since the last call."""
        with self._changed:
            finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: Iterable[Any]) -> None:
        """Waits for jobs."""
        wanted = set(job_ids)
        with self._changed:
            self._changed.wait_for(lambda: not self._pending & wanted)

    def shutdown(self) -> None:
        """Ends the thread and closes the region."""
        self._jobs.put(None)
        self._thread.join(END_TIMEOUT_S)
        self._pages.clear()
        self._chunks.clear()
        self._region.cleanup()

    def _submit(self, job_id: Any, pages: Any, chunks: Any, store: bool) -> bool:
        with self._changed:
            self._pending.add(job_id)
        self._jobs.put((job_id, pages, chunks, store))
        return True

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job_id, pages, chunks, store = job
            started, moved = time.perf_counter(), 0
            for page, chunk, size in self._copies(pages, chunks):
                ctypes.memmove(*((chunk, page) if store else (page, chunk)), size)
                moved += size
            result = TransferResult(
                job_id=job_id, success=True, transfer_size=moved, transfer_time=time.perf_counter() - started
            )
            with self._changed:
                self._finished.append(result)
                self._pending.discard(job_id)
                self._changed.notify_all()

    def _copies(self, pages: Any, chunks: Any) -> Iterator[tuple[int, int, int]]:
        """Yields page's address, its place in a chunk, and bytes."""
        first_page = first_chunk = 0
        for group, (count, index) in enumerate(zip(pages.group_sizes, pages.block_indices, strict=True)):
            if not count:
                continue
            skip = index % self._blocks_per_chunk
            chunk_count = cdiv(count + skip, self._blocks_per_chunk)
            page_ids = pages.block_ids[first_page : first_page + count]
            chunk_ids = chunks.block_ids[first_chunk : first_chunk + chunk_count]
            first_page, first_chunk = first_page + count, first_chunk + chunk_count
            for reference in self._references[group]:
                page_at, chunk_at = np.empty(count, np.int64), np.empty(count, np.int64)
                compute_sub_block_ptrs(page_ids, 1, page_at, self._pages[reference.tensor_idx])
                compute_sub_block_ptrs(
                    chunk_ids, self._blocks_per_chunk, chunk_at, self._chunks[reference.tensor_idx], skip_count=skip
                )
                for page, chunk in zip(page_at.tolist(), chunk_at.tolist(), strict=True):
                    yield page, chunk, reference.page_size_bytes


class CpuTieringSpec(TieringOffloadingSpec):
    """Stock tiering, with `CopyingWorker` in place of the copies by a GPU."""

    def _uses_shared_region(self) -> bool:
        return True

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """Returns the worker, made at the first call."""
        if not self._worker:
            region = SharedOffloadRegion(
                engine_id=self.config.engine_id,
                num_chunks=self.num_chunks,
                rank=0 if self.replicated_layout else self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = CopyingWorker(kv_caches, self.blocks_per_chunk, region)
        return self._worker
