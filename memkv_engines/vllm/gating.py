"""The cost gate as vLLM's scheduler needs it: bytes of a hit, times of steps, one verdict for a request.

A step's time is taken in the scheduler, from the schedule (or the result before, where vLLM schedules ahead) to its
result: all that a request waits for. The worker sends the number of a step that holds enough prefill back with its
result, since not every result comes with a report.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memkv_engines.limits import MAX_STEPS_TIMED, MIN_PREFILL_SAMPLE_TOKENS
from memkv_engines.metrics import Counters
from memkv_engines.offload.cost_gate import Candidate, CostGate, LoadTicket
from memkv_engines.offload.estimates import StepClock
from memkv_engines.offload.residents import NOTHING, MemoryShare
from memkv_engines.vllm.metadata import Handshake, Measured, slowest


@dataclass(frozen=True)
class Judged:
    """What was decided for a request: of the hit so many tokens."""

    hit: Candidate
    tokens: int

    def part(self, start: int, stop: int) -> Candidate | None:
        """The part of the hit that is loaded; None where it is no part of it."""
        if start != self.hit.start or not start < stop <= self.hit.stop:
            return None
        return self.hit.leading(stop - start)


class HitGate:
    """Nothing blocks; the scheduler's thread only.

    Args:
        enabled: as for ``CostGate``.
        counters: where to count.
        handshakes: of all workers.
        align_tokens: hits end on multiples of this.
    """

    def __init__(
        self, *, enabled: bool, counters: Counters, handshakes: Sequence[Handshake], align_tokens: int
    ) -> None:
        self._gate = CostGate(enabled=enabled, counters=counters)
        self._facts = [h.groups for h in handshakes]
        self._align_tokens = align_tokens
        self._least_tokens = max(f.blocks_per_chunk * f.block_tokens for facts in self._facts for f in facts)
        self._tickets: dict[int, LoadTicket] = {}
        self._measured: dict[int, Measured] = {}
        self._clock = StepClock()
        self._steps: OrderedDict[int, tuple[float, list[tuple[int, int]]]] = OrderedDict()
        self._next_step = 0

    # --- hits ------------------------------------------------------------------

    def judge(self, known: Judged | None, start: int, stop: int, in_memory: Callable[[], MemoryShare]) -> Judged | None:
        """How much of the hit [start, stop) to load; None: ask again.

        Args:
            known: what the request was told before.
            start, stop: the hit, in tokens.
            in_memory: what of it lies in the workers' memory; called at most once for a hit.
        """
        if known is not None and (known.hit.start, known.hit.stop) == (start, stop):
            return known
        if self._gate.undecided:
            return None
        hit = self._candidate(start, stop, in_memory())
        return Judged(hit, self._gate.judge(hit, self._align_tokens, self._least_tokens).tokens)

    def load_began(self, job_id: int, judged: Judged | None, start: int, stop: int) -> float:
        """A load was planned; when it is to be stopped, in seconds (0: never)."""
        part = judged.part(start, stop) if judged is not None else None
        ticket = self._tickets[job_id] = self._gate.load_began(part or self._candidate(start, stop, NOTHING))
        return ticket.stop_s

    def load_measured(self, job_id: int, measured: Measured) -> None:
        """A rank has read its part; the slowest counts."""
        if job_id in self._tickets:
            self._measured[job_id] = slowest(self._measured.get(job_id, measured), measured)

    def load_ended(self, job_id: int) -> None:
        """Every rank is done with a load, or it failed."""
        ticket = self._tickets.pop(job_id, None)
        read_bytes, memory_bytes, elapsed_us, stopped = self._measured.pop(job_id, (0, 0, 0, False))
        if ticket is not None:
            self._gate.load_ended(ticket, read_bytes, elapsed_us / 1e6, memory_bytes=memory_bytes, stopped=stopped)

    def _candidate(self, start: int, stop: int, in_memory: MemoryShare) -> Candidate:
        size_bytes = max(_bytes(facts, stop - start) for facts in self._facts)
        tokens = in_memory.leading_tokens
        tokens -= tokens % self._align_tokens if tokens < stop - start else 0
        if tokens == stop - start:
            return Candidate(start, stop, size_bytes, tokens, size_bytes)
        memory_bytes = max(
            sum(f.block_bytes * in_memory.blocks.get(f.group, 0) for f in facts) for facts in self._facts
        )
        return Candidate(start, stop, size_bytes, tokens, min(memory_bytes, size_bytes))

    # --- steps -----------------------------------------------------------------

    def step_began(self, scheduler_output: Any, computed_of: Callable[[str], int | None]) -> int:
        """The engine is about to run a step; its number if it is worth timing, else 0.

        Args:
            scheduler_output: vLLM's.
            computed_of: tokens of a request that are computed already; None: unknown.
        """
        if not self._gate.enabled or scheduler_output.total_num_scheduled_tokens < MIN_PREFILL_SAMPLE_TOKENS:
            return 0
        spans = []
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            start = computed_of(request_id)
            if start is None:
                return 0
            spans.append((start, start + count))
        self._next_step += 1
        self._steps[self._next_step] = (self._clock.now(), spans)
        if len(self._steps) > MAX_STEPS_TIMED:
            self._steps.popitem(last=False)
        return self._next_step

    def step_ended(self, step: int) -> None:
        """The result of a step is here; 0: of one that is not timed."""
        began, spans = self._steps.pop(step, (0.0, []))
        seconds = self._clock.ended(began)
        if spans:
            self._gate.observe_prefill(spans, seconds)


def _bytes(facts: Sequence[Any], tokens: int) -> int:
    """What one rank reads for so many tokens."""
    return sum(
        f.block_bytes * min(tokens, f.window_tokens + f.block_tokens if f.window_tokens else tokens) // f.block_tokens
        for f in facts
    )
