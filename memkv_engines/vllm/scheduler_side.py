"""Scheduler side of the connector: look-ups, load plans, store plans. Nothing here blocks a busy engine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from memkv_engines.config import Config
from memkv_engines.doors.protection import protection_spec
from memkv_engines.keys import Namespace, Shard
from memkv_engines.log import get_logger
from memkv_engines.metrics import Counters
from memkv_engines.offload.boundary import guarded
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.leftovers import Holds
from memkv_engines.offload.lookup import GroupView, Hit, PrefixLookup
from memkv_engines.offload.messages import Manifest, ProbeDone, Setup
from memkv_engines.offload.planning import StorePlanner
from memkv_engines.offload.residents import NOTHING, MemoryShare, RankResidents, memory_share
from memkv_engines.offload.service import staging_slots
from memkv_engines.vllm import compat
from memkv_engines.vllm.gating import HitGate, Judged
from memkv_engines.vllm.identity import build_namespace
from memkv_engines.vllm.idle_wait import IdleWait
from memkv_engines.vllm.load_runs import LoadPlan, plan_load
from memkv_engines.vllm.lora import AdapterNamespaces
from memkv_engines.vllm.metadata import Handshake, StepMetadata, WorkerReport

log = get_logger(__name__)


@dataclass
class _Tracked:
    """What is remembered of a request from its arrival to its end."""

    request: Any
    group_hashes: list[Sequence[bytes]] = field(default_factory=list)
    hit: Hit | None = None
    computed_tokens: int = 0
    judged: Judged | None = None
    # A load failed once: no further external hits, or a bad chunk could be tried for ever.
    barred: bool = False


class SchedulerSide:
    """Lives in the scheduler's process.

    Args:
        vllm_config: the engine's configuration.
        kv_cache_config: groups and sizes.
        config: ours.
        role_stores: the engine's ``kv_role`` lets it store.
        role_loads: the engine's ``kv_role`` lets it load.
    """

    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, config: Config, *, role_stores: bool, role_loads: bool
    ) -> None:
        self._vllm_config, self._kv_cache_config, self._config = vllm_config, kv_cache_config, config
        self._stores = role_stores and config.policy.store
        self._loads = role_loads and config.policy.load
        self.counters = Counters()
        self._set_failure_policy()
        self._deciding_transfer = compat.deciding_transfer_config(vllm_config)
        compat.hash_identity(vllm_config)  # refuses unsafe hashes before anything is started
        self._hash_tokens = kv_cache_config.hash_block_size or vllm_config.cache_config.block_size
        self._requests: dict[str, _Tracked] = {}
        self._meta = StepMetadata()
        self._load_plans: dict[int, LoadPlan] = {}
        self._next_load = 0
        self._world_size = 1
        self._namespace: Namespace | None = None
        self._adapters: AdapterNamespaces | None = None
        self._lookup: PrefixLookup | None = None
        self._planner: StorePlanner | None = None
        # Until the engine's page pool is known.
        self._holds: Holds = lambda group, hashes, block_ids: False
        self._gate: HitGate | None = None
        self._residents = RankResidents(1)
        self._client = IoClient(
            Setup(
                config.tier.path,
                config.tier.direct_io,
                0,
                read_only=not self._stores,
                io_threads=1,
                staging_bytes=0,
                protection=protection_spec(config),
            ),
            io_process=config.io.io_process,
            counters=self.counters,
        )
        self._client.start()
        self._idle = IdleWait(self._client.wait)

    def _set_failure_policy(self) -> None:
        transfer = self._vllm_config.kv_transfer_config
        wanted = self._config.policy.on_load_failure
        if transfer.kv_load_failure_policy != wanted:
            # vLLM reads the policy after it has built the connector; its default kills the request.
            log.info(
                "kv_load_failure_policy set to %r (was %r); set on_load_failure to change this",
                wanted,
                transfer.kv_load_failure_policy,
            )
            transfer.kv_load_failure_policy = wanted

    # --- start-up ------------------------------------------------------------

    def take_handshakes(self, handshakes: list[Handshake]) -> None:
        """Geometry and weights have come from the workers: from now on there can be hits.

        Raises:
            IdentityError: the identity of the bytes is unknown.
        """
        namespace = build_namespace(self._vllm_config, self._config, handshakes)
        views = _group_views(handshakes)
        self._world_size = len(handshakes)
        self._residents = RankResidents(self._world_size)
        lookup = self._config.lookup
        align = self._kv_cache_config.cache_hit_alignment_tokens or max(v.block_tokens for v in views)
        chunk_bytes = [v.blocks_per_chunk * f.block_bytes for v, f in zip(views, handshakes[0].groups, strict=True)]
        self._lookup = PrefixLookup(
            views,
            align_tokens=align,
            index_entries=lookup.index_entries,
            hit_ttl_s=lookup.hit_ttl_s,
            miss_ttl_s=lookup.miss_ttl_s,
            probe_timeout_s=lookup.probe_timeout_ms / 1000,
            send=self._client.submit_probe,
            counters=self.counters,
        )
        self._planner = StorePlanner(views, self._lookup, room_chunks=self._room_chunks(chunk_bytes))
        enabled = self._config.policy.cost_gate == "on"
        self._gate = HitGate(enabled=enabled, counters=self.counters, handshakes=handshakes, align_tokens=align)
        self._views = views
        self._groups = [v.group for v in views]
        self._ratios = [v.block_tokens // self._hash_tokens for v in views]
        self._adopt(namespace)
        for view, nbytes in zip(views, chunk_bytes, strict=True):
            log.info(
                "group %d: chunk = %d blocks of %d tokens = %.2f MiB per rank%s",
                view.group,
                view.blocks_per_chunk,
                view.block_tokens,
                nbytes / 2**20,
                f", sliding window of {view.window_tokens} tokens" if view.window_tokens else "",
            )

    def _room_chunks(self, chunk_bytes: Sequence[int]) -> int:
        """About how many chunks of the largest kind a worker's staging for stores holds."""
        io = self._config.io
        return staging_slots(io.staging_bytes, max(chunk_bytes), io.io_threads)[1]

    def bind_block_pool(self, block_pool: Any) -> None:
        """The engine's page pool: it knows which pages still hold what a request left behind."""
        self._holds = compat.cached_pages(block_pool)

    def _adopt(self, namespace: Namespace) -> None:
        self._namespace = namespace
        if self._adapters is not None:
            self._adapters.close()
        self._adapters = AdapterNamespaces(namespace)
        self._recorded: set[bytes] = set()
        self._record(namespace)
        log.info("namespace %s in %s via %s", namespace.folder, self._config.tier.path, self._client.ready.tier_name)

    def _record(self, namespace: Namespace) -> None:
        """Have the manifest written, once: quotas find a namespace's tenant in it, an adapter's too."""
        if self._stores and namespace.digest not in self._recorded:
            self._recorded.add(namespace.digest)
            self._client.submit_manifest(Manifest(json.dumps(dict(namespace.fields)).encode()))

    @property
    def namespace(self) -> Namespace | None:
        """The namespace in use, once the workers have reported."""
        return self._namespace

    # --- look-ups ------------------------------------------------------------

    @guarded()
    def on_new_request(self, request: Any) -> None:
        """A request has arrived: start looking it up, so that the answer is there when it is scheduled."""
        self._requests[request.request_id] = _Tracked(request)
        if self._loads and self._lookup is not None:
            self._ask(request, 0)

    @guarded(default=lambda: (0, False))
    def matched_tokens(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """``get_num_new_matched_tokens``: how many tokens beyond ``computed_tokens`` are stored."""
        tracked = self._tracked(request)
        tracked.hit, tracked.computed_tokens = None, computed_tokens
        if not self._loads or self._lookup is None or tracked.barred:
            return 0, False
        self._take_probes()
        hit = self._ask(request, computed_tokens)
        while hit is None and self._idle.wait():
            self._take_probes()
            hit = self._ask(request, computed_tokens)
        if hit is not None and hit.tokens > computed_tokens:
            hit = self._gated(tracked, hit)
        if hit is None:
            return None, False
        gained = hit.tokens - computed_tokens
        if gained <= 0:
            return 0, False
        tracked.hit = hit
        return gained, True

    def _ask(self, request: Any, computed_tokens: int, limit_tokens: int | None = None) -> Hit | None:
        """What is stored of a prompt, or of its first ``limit_tokens``; None: ask again."""
        assert self._lookup is not None
        tracked = self._tracked(request)
        if tracked.barred:
            return Hit(0, {})
        namespace = self._namespace_of(request)
        if namespace is None:
            return None
        hashes = self._hashes(tracked)
        if limit_tokens is not None:
            hashes = [own[: limit_tokens // v.block_tokens] for own, v in zip(hashes, self._views, strict=True)]
        return self._lookup.ask(request.request_id, hashes, computed_tokens, namespace.digest)

    def _gated(self, tracked: _Tracked, hit: Hit) -> Hit | None:
        """As much of a hit as is faster than recomputing; None: ask again."""
        assert self._gate is not None
        start = tracked.computed_tokens
        judged = tracked.judged = self._gate.judge(
            tracked.judged, start, hit.tokens, lambda: self._in_memory(tracked, hit)
        )
        if judged is None:
            return None
        if judged.tokens in (0, hit.tokens - start):
            return hit if judged.tokens else Hit(start, {})
        if any(view.window_tokens for view in self._views):
            # What a window needs depends on where the hit ends.
            return self._ask(tracked.request, start, start + judged.tokens)
        return Hit(start + judged.tokens, hit.runs)

    def _in_memory(self, tracked: _Tracked, hit: Hit) -> MemoryShare:
        if not len(self._residents):
            return NOTHING
        return memory_share(hit, tracked.computed_tokens, self._views, self._hashes(tracked), self._residents)

    def _namespace_of(self, request: Any) -> Namespace | None:
        assert self._namespace is not None and self._adapters is not None
        namespace = self._adapters.of(request.lora_request)
        if namespace is not None:
            self._record(namespace)
        return namespace

    def _take_probes(self) -> None:
        assert self._lookup is not None
        for result in self._client.poll():
            if isinstance(result, ProbeDone):
                self._lookup.take_probe(result)
        if self._client.mode == "down":
            self._lookup.lose_service()

    def _tracked(self, request: Any) -> _Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            tracked = self._requests[request.request_id] = _Tracked(request)
        return tracked

    def _hashes(self, tracked: _Tracked) -> list[Sequence[bytes]]:
        """Chain hashes per group at the group's block size; the engine's own list where sizes agree (no copy)."""
        own = tracked.request.block_hashes
        if all(ratio == 1 for ratio in self._ratios):
            return [own] * len(self._ratios)
        if not tracked.group_hashes:
            tracked.group_hashes = [[] for _ in self._ratios]
        for ratio, known in zip(self._ratios, tracked.group_hashes, strict=True):
            assert isinstance(known, list)
            if known and (len(known) * ratio > len(own) or known[-1] != own[len(known) * ratio - 1]):
                known.clear()  # a streaming session dropped or replaced its last tokens
            known.extend(own[(len(known) + 1) * ratio - 1 :: ratio])
        return tracked.group_hashes

    # --- loads ---------------------------------------------------------------

    @guarded(recover="_plan_failed")
    def after_alloc(self, request: Any, block_ids: Sequence[Sequence[int]], external_tokens: int) -> None:
        """``update_state_after_alloc``: pages for the external tokens exist; plan the load."""
        self._idle.got_pages(request.request_id)
        if not external_tokens:
            return
        tracked = self._tracked(request)
        hit = tracked.hit
        assert hit is not None and self._gate is not None, "the engine loads what was never advertised"
        tracked.hit = None
        total = tracked.computed_tokens + external_tokens
        self._next_load += 1
        namespace = self._namespace_of(request)
        assert namespace is not None, "a hit has a namespace"
        plan = self._load_plans[self._next_load] = plan_load(
            request.request_id,
            namespace.digest,
            hit,
            self._views,
            self._hashes(tracked),
            block_ids,
            tracked.computed_tokens,
            total,
        )
        stop_s = self._gate.load_began(self._next_load, tracked.judged, tracked.computed_tokens, total)
        if self._deciding_transfer.kv_load_failure_policy != "recompute":
            stop_s = 0.0  # vLLM would take a load that was stopped for one that failed, and end the request
        self._meta.loads.append((request.request_id, self._next_load, plan.messages, stop_s))
        self.counters.add("lookup_hit_tokens", external_tokens)

    def _plan_failed(self, request: Any, block_ids: Sequence[Sequence[int]], external_tokens: int) -> None:
        """The engine now waits for a load that was not planned: have it reported as failed."""
        tracked = self._tracked(request)
        tracked.barred = True
        # With one KV group the engine goes by pages: those before the external tokens are its own and good.
        first = tracked.computed_tokens // self._views[0].block_tokens
        self._meta.failed.append((request.request_id, tuple(i for i in block_ids[self._groups[0]][first:] if i)))

    def _take_failure(self, job_id: int, runs: tuple[tuple[int, str], ...]) -> None:
        """A load failed: forget the bad chunk and bar the request from further external hits."""
        plan = self._load_plans.pop(job_id, None)
        if plan is None or self._lookup is None or self._gate is None:
            return
        self._gate.load_ended(job_id)
        tracked = self._requests.get(plan.request_id)
        if tracked is not None:
            tracked.barred = True
        for bad in plan.bad_chunks(runs):
            text = "request %s: load failed (%s) after %d good blocks; recomputing"
            log.warning(text, plan.request_id, bad.kind, bad.good_blocks)
            self._lookup.forget_chunk(bad.group, bad.first, bad.last, bad.block_count)

    # --- stores --------------------------------------------------------------

    def build_meta(self, scheduler_output: Any) -> StepMetadata:
        """``build_connector_meta``: what the workers are to do in this step."""
        # Not guarded as a whole: the engine waits for the loads in here, they must not get lost.
        meta, self._meta = self._meta, StepMetadata()
        self._idle.step_planned()
        meta.idle = not scheduler_output.total_num_scheduled_tokens
        self._time_step(scheduler_output, meta)
        self._plan_stores(scheduler_output, meta)
        return meta

    @guarded()
    def _time_step(self, scheduler_output: Any, meta: StepMetadata) -> None:
        if self._gate is not None:
            meta.step = self._gate.step_began(scheduler_output, self._computed_tokens_of)

    def _computed_tokens_of(self, request_id: str) -> int | None:
        tracked = self._requests.get(request_id)
        return int(tracked.request.num_computed_tokens) if tracked is not None else None

    @guarded()
    def _plan_stores(self, scheduler_output: Any, meta: StepMetadata) -> None:
        if self._lookup is None or self._planner is None:
            return
        self._take_probes()
        self._lookup.index.sweep()
        if not self._stores:
            return
        tables = scheduler_output.kv_connector_block_state
        for request_id, scheduled in scheduler_output.num_scheduled_tokens.items():
            tracked = self._requests.get(request_id)
            if tracked is None or tables is None:
                continue
            # Before the step; draft tokens of a speculative step have no hash yet and so are never stored.
            computed = tracked.request.num_computed_tokens + scheduled
            if not self._planner.may_plan(request_id, computed):
                continue
            ids = tables.get_block_ids(request_id)
            namespace = self._namespace_of(tracked.request)
            if ids is None or namespace is None:
                continue
            plan = self._planner.plan_step(
                request_id,
                self._hashes(tracked),
                [ids[g] for g in self._groups],
                computed,
                namespace.digest,
            )
            if plan is not None:
                meta.stores.append(plan)
        self._plan_leftovers(self._planner, meta)

    def _plan_leftovers(self, planner: StorePlanner, meta: StepMetadata) -> None:
        leftovers = planner.plan_leftovers(self._holds)
        if leftovers is not None:
            meta.stores.append(leftovers)
            self.counters.add("store_leftovers", len(leftovers[1]))
        if lost := planner.take_lost():
            self.counters.add("store_leftovers_lost", lost)
        meta.awaits_stores = meta.idle and planner.awaits_results

    @guarded(default=lambda: (False, None))
    def request_finished(self, request: Any, block_ids: Sequence[Sequence[int]]) -> tuple[bool, None]:
        """A request has ended: its tail is gathered at the start of the next step, before its pages are reused."""
        tracked = self._requests.pop(request.request_id, None)
        self._idle.ended(request.request_id)
        if tracked is None or self._lookup is None or self._planner is None:
            return False, None
        self._lookup.forget_request(request.request_id)
        namespace = self._namespace_of(request)
        if not self._stores or namespace is None:
            self._planner.forget_request(request.request_id)
            return False, None
        # An aborted load leaves pages behind whose content nobody vouches for.
        valid = 0 if _is_loading(request, self._load_plans) else request.num_computed_tokens
        plan = self._planner.plan_tail(
            request.request_id,
            self._hashes(tracked),
            [block_ids[g] for g in self._groups],
            valid,
            namespace.digest,
        )
        if plan is not None:
            self._meta.tails.append(plan)
        return False, None

    @property
    def has_work(self) -> bool:
        """Whether the engine must step for us: tails wait to be handed to the workers, or others for room."""
        if self._meta.tails:
            return True
        return self._planner is not None and self._planner.awaits_results

    # --- results -------------------------------------------------------------

    @guarded()
    def take_output(self, output: Any) -> None:
        """``update_connector_output``: what the workers report."""
        report = output.kv_connector_worker_meta
        if self._gate is None or self._planner is None:
            return
        self._gate.step_ended(report.step if isinstance(report, WorkerReport) else 0)
        if isinstance(report, WorkerReport):
            for job_id, measured in report.measured.items():
                self._gate.load_measured(job_id, measured)
        for request_id in output.finished_recving or ():
            for job_id in [j for j, p in self._load_plans.items() if p.request_id == request_id]:
                if not isinstance(report, WorkerReport) or job_id not in report.failed:
                    del self._load_plans[job_id]
                    self._gate.load_ended(job_id)
        if not isinstance(report, WorkerReport):
            return
        self._residents.take_changes(report.residents)
        for job_id, (ranks, outcomes) in report.stored.items():
            self._planner.take_rank_results(job_id, ranks, self._world_size, outcomes)
        for job_id, runs in report.failed.items():
            self._take_failure(job_id, runs)

    @guarded(default=lambda: False)
    def reset_cache(self) -> bool:
        """Ignore everything stored so far: go on in a private namespace. Shared deletion is ``tier evict``'s."""
        if self._namespace is None or self._lookup is None or self._planner is None:
            return True
        self._lookup.clear()
        self._planner.clear()
        fields = {k: v for k, v in self._namespace.fields.items() if k != "reset"}
        self._adopt(Namespace({**fields, "reset": f"{time.time_ns()}-{os.urandom(8).hex()}"}))
        return True

    def shutdown(self) -> None:
        """End the prober."""
        if self._adapters is not None:
            self._adapters.close()
        self._client.close()


def _is_loading(request: Any, plans: dict[int, LoadPlan]) -> bool:
    return any(p.request_id == request.request_id for p in plans.values())


def _group_views(handshakes: list[Handshake]) -> list[GroupView]:
    """Groups as the scheduler sees them: all shards, and a chunk length every rank has staging for."""
    views = []
    for facts in zip(*(h.groups for h in handshakes), strict=True):
        views.append(
            GroupView(
                facts[0].group,
                facts[0].block_tokens,
                min(f.blocks_per_chunk for f in facts),
                tuple(sorted({Shard(*f.shard) for f in facts})),
                facts[0].window_tokens,
            )
        )
    return views
