"""The cost gate as SGLang's doors need it: pages instead of tokens, and where prefill is seen.

A storage backend or a linker is told nothing of prefills. But it lives in the scheduler's process, and the scheduler
hands every batch with its result to ``process_batch_result``: from the launch of a batch (or the result before, where
SGLang launches ahead) to the end of that call is what a request waits for. Without a scheduler to watch (another
version, a test) no prefill is ever measured, and the gate goes by what it assumes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from memkv_engines.limits import MIN_TRIAL_TOKENS
from memkv_engines.metrics import Counters
from memkv_engines.offload.boundary import guarded
from memkv_engines.offload.cost_gate import Candidate, CostGate, LoadTicket
from memkv_engines.offload.estimates import StepClock
from memkv_engines.offload.messages import STOPPED
from memkv_engines.offload.results import LoadResult
from memkv_engines.sglang.compat import wrap_method


@dataclass(frozen=True)
class PagesInMemory:
    """Of some pages: how many from the first on lie in memory without a gap, and how many in all."""

    leading: int = 0
    total: int = 0


NO_PAGES = PagesInMemory()


class PageGate:
    """Judges and measures pages of the pool of full attention. Thread-safe.

    Args:
        enabled: as for ``CostGate``.
        page_tokens: tokens of a page.
        page_bytes: bytes of a page, by pool; the pool whose loads are measured is the first.
        chunk_pages: pages of a full chunk.
        least_tokens: SGLang loads no fewer.
    """

    def __init__(
        self,
        *,
        enabled: bool,
        page_tokens: int,
        page_bytes: Mapping[str, int],
        chunk_pages: int,
        least_tokens: int = MIN_TRIAL_TOKENS,
    ) -> None:
        self.gate = CostGate(enabled=enabled)
        self._page_tokens, self._page_bytes = page_tokens, dict(page_bytes)
        self._least_tokens = max(least_tokens, chunk_pages * page_tokens)

    def worth_loading(
        self, before: int, pages: int, others: Mapping[str, int] | None = None, in_memory: PagesInMemory = NO_PAGES
    ) -> int:
        """How many of some leading pages to load.

        Args:
            before: pages before them, as far as known; what is unknown makes recomputing look cheaper than it is.
            pages: how many are stored.
            others: pages that other pools would load beside them.
            in_memory: what of them lies in the I/O service's memory; of other pools that is not known.
        """
        if not pages:
            return 0
        candidate = self._candidate(before, pages, in_memory)
        beside = sum(self._page_bytes.get(pool, 0) * count for pool, count in (others or {}).items())
        if beside:
            candidate = replace(candidate, size_bytes=candidate.size_bytes + beside, memory_tokens=0)
        verdict = self.gate.judge(candidate, self._page_tokens, self._least_tokens)
        return verdict.tokens // self._page_tokens

    def load_began(self, before: int, pages: int, in_memory: PagesInMemory = NO_PAGES) -> LoadTicket:
        """A load of some pages begins; ``load_ended`` must follow."""
        return self.gate.load_began(self._candidate(before, pages, in_memory))

    def load_ended(self, ticket: LoadTicket, result: LoadResult | None) -> None:
        """It ended so; None: no answer."""
        if result is not None and result.measures:
            self.gate.load_ended(
                ticket,
                result.read_bytes,
                result.seconds,
                memory_bytes=result.memory_bytes,
                stopped=STOPPED in result.kinds,
            )
        else:
            self.gate.load_ended(ticket)

    def _candidate(self, before: int, pages: int, in_memory: PagesInMemory) -> Candidate:
        size, page_bytes = self._page_tokens, next(iter(self._page_bytes.values()))
        leading, total = min(in_memory.leading, pages), min(in_memory.total, pages)
        start, stop = before * size, (before + pages) * size
        return Candidate(start, stop, pages * page_bytes, leading * size, total * page_bytes)


class PrefillWatch:
    """Tells a gate how long the batches of a scheduler take. Its methods run on the scheduler's thread.

    Args:
        scheduler: SGLang's; None: there is nothing to watch.
        gate: who is told.
        counters: for ``guarded``.
    """

    def __init__(self, scheduler: Any | None, gate: CostGate, counters: Counters) -> None:
        self.counters = counters
        self._gate = gate
        self._clock = StepClock()
        self._watching = gate.enabled
        self._undo = wrap_method(scheduler if gate.enabled else None, "process_batch_result", self._watched)

    def stop(self) -> None:
        """The scheduler goes on unwatched; idempotent."""
        self._undo()
        self._watching = False

    def _watched(self, process: Callable[..., Any]) -> Callable[..., Any]:
        def watched(batch: Any, *args: Any, **kwargs: Any) -> Any:
            answer = process(batch, *args, **kwargs)
            self._ended(batch)
            return answer

        return watched

    @guarded(refusals=False)
    def _ended(self, batch: Any) -> None:
        launched = getattr(batch, "launch_ts", None)
        if not self._watching or launched is None:
            return
        seconds = self._clock.ended(launched)
        if batch.forward_mode.is_extend() and batch.prefix_lens and batch.extend_lens:
            spans = [
                (before, before + count) for before, count in zip(batch.prefix_lens, batch.extend_lens, strict=True)
            ]
            self._gate.observe_prefill(spans, seconds)
