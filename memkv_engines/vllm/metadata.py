"""What scheduler side and worker side of the connector send each other, in vLLM's envelopes.

These travel inside the engine (vLLM serialises them between its own processes).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from memkv_engines.keys import JsonValue
from memkv_engines.offload.messages import LoadRun, StoreChunk
from memkv_engines.offload.planning import OUTCOMES_WORST_FIRST
from memkv_engines.offload.residents import Changes

Measured = tuple[int, int, int, bool]
"""Of a load: bytes read, bytes taken from memory, microseconds it took, whether it was stopped."""


def slowest(one: Measured, other: Measured) -> Measured:
    """Two ranks' parts of one load."""
    return max(one[0], other[0]), max(one[1], other[1]), max(one[2], other[2]), one[3] or other[3]


@dataclass(frozen=True)
class GroupFacts:
    """A KV group as one worker sees it."""

    group: int
    shard: tuple[int, int, int, int, int, int]
    block_tokens: int
    block_bytes: int
    blocks_per_chunk: int
    window_tokens: int
    writes: bool
    layout: dict[str, str]

    def agreed(self) -> dict[str, JsonValue]:
        """What every rank must agree on, independent of its share of heads and layers."""
        shares = self.shard[1] * self.shard[4]
        return {
            "group": self.group,
            "block_tokens": self.block_tokens,
            "heads_total": self.shard[2],
            "layers_total": self.shard[5],
            "bytes_per_head_and_layer": self.block_bytes // shares,
            "window_tokens": self.window_tokens,
            "layout": dict(sorted(self.layout.items())),
        }


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """Worker to scheduler, once: geometry and weights."""

    groups: list[GroupFacts]
    weights: dict[str, tuple[str, int, int, bool]] | None


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Scheduler to worker, each step.

    Attributes:
        loads: request id, job id, runs, seconds after which to stop; to start in this step.
        failed: request id and pages of loads that could not even be planned; to report as failed.
        stores: job id, chunks; to gather after this step's forward.
        tails: job id, chunks; to gather before anything of this step touches the pages, since they are free already.
        step: number to send back with the step's result; 0 for none.
        idle: this step computes nothing.
        awaits_stores: an idle step runs only to learn what became of stores.
    """

    loads: list[tuple[str, int, tuple[LoadRun, ...], float]] = field(default_factory=list)
    failed: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    stores: list[tuple[int, tuple[StoreChunk, ...]]] = field(default_factory=list)
    tails: list[tuple[int, tuple[StoreChunk, ...]]] = field(default_factory=list)
    step: int = 0
    idle: bool = False
    awaits_stores: bool = False


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """Worker to scheduler, after a step, summed over ranks.

    Attributes:
        stored: job id -> (ranks that answered, worst outcome per chunk).
        failed: job id -> per run (good leading blocks, kind), the worst over ranks.
        measured: job id -> what tells how fast the tier is, the slowest over ranks.
        step: the step's number, if it has one.
        residents: chunks that came to a worker's memory or went from it, summed over ranks.
    """

    stored: dict[int, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    failed: dict[int, tuple[tuple[int, str], ...]] = field(default_factory=dict)
    measured: dict[int, Measured] = field(default_factory=dict)
    step: int = 0
    residents: Changes = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Merge another rank's report."""
        assert isinstance(other, WorkerReport)
        stored = dict(self.stored)
        for job_id, (ranks, outcomes) in other.stored.items():
            if job_id in stored:
                old_ranks, old = stored[job_id]
                worst = tuple(min(a, b, key=OUTCOMES_WORST_FIRST.index) for a, b in zip(old, outcomes, strict=True))
                stored[job_id] = (old_ranks + ranks, worst)
            else:
                stored[job_id] = (ranks, outcomes)
        failed = dict(self.failed)
        for job_id, runs in other.failed.items():
            old_runs = failed.get(job_id, runs)
            failed[job_id] = tuple(min(a, b) for a, b in zip(old_runs, runs, strict=True))
        measured = dict(self.measured)
        for job_id, most in other.measured.items():
            measured[job_id] = slowest(measured.get(job_id, most), most)
        residents = dict(self.residents)
        for key, change in other.residents.items():
            residents[key] = residents.get(key, 0) + change
        return WorkerReport(stored, failed, measured, max(self.step, other.step), residents)
