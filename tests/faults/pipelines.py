"""The I/O service in its child process under faults: pages to chunks and back, answers counted, bytes compared."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from memkv_engines.chunk.layout import align_up
from memkv_engines.offload import client as client_module
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.groups import Group
from memkv_engines.offload.messages import LoadRun, StoreChunk
from memkv_engines.offload.results import LoadResult, StoreResult
from memkv_engines.offload.service import staging_slots
from tests.fast.io_samples import (
    BLOCKS_PER_CHUNK,
    Result,
    block_outermost,
    make_run,
    make_store,
    quick_folder,
    setup_for,
    started,
)
from tests.fast.samples import chain
from tests.faults.control import FAULTS, Fault, Injector
from tests.faults.rows import CONTROL, Row

N = BLOCKS_PER_CHUNK
CHUNKS = 3
PROMPTS = 4
SPAN = N * CHUNKS
LOAD_TIMEOUT_S, STORE_SILENCE_S, FENCE_TIMEOUT_S = 1.5, 1.0, 1.0
# Given up, killed and reaped; the rest is for a busy machine.
DEADLINE_S = LOAD_TIMEOUT_S + STORE_SILENCE_S + 5.0
PATIENCE_S = 30.0
STAGING_BYTES, IO_THREADS = 8 << 20, 2


@contextmanager
def variables(values: dict[str, str]) -> Iterator[None]:
    """Variables for the processes started meanwhile; the I/O process copies ours."""
    with mock.patch.dict(os.environ, values):
        yield


@dataclass
class _Seen:
    results: dict[int, Result] = field(default_factory=dict)
    longest_wait_s: float = 0.0


class Pipelines:
    """One client whose service suffers, and pages that show what it did.

    Args:
        root: the tier's directory.
        injector: its faults.
        verified: false for the control.
    """

    def __init__(self, root: Path, injector: Injector, *, verified: bool = True) -> None:
        # A page of every chunk's own, and as many to load into.
        self.pool = block_outermost(0, 2 * PROMPTS * SPAN, 16 * 1024)
        self.injector = injector
        self._serial = 0
        self._jobs = 0
        # The child copies the environment when it starts, also when it is started again.
        self._variables = variables(injector.environment(verified=verified))
        self._variables.__enter__()
        self.client: IoClient = started(
            setup_for(root, [self.pool], staging_bytes=STAGING_BYTES, io_threads=IO_THREADS),
            "on",
            load_timeout_ms=int(LOAD_TIMEOUT_S * 1000),
            fence_timeout_ms=int(FENCE_TIMEOUT_S * 1000),
            store_silence_s=STORE_SILENCE_S,  # type: ignore[arg-type]
        )

    def close(self) -> None:
        self.injector.disarm()
        self.client.close()
        self._variables.__exit__(None, None, None)

    # --- one round -----------------------------------------------------------

    def round(self, fault: Fault, seed: int, per_1024: int, row: Row) -> None:
        """Store and load under a fault, then without it, and count what came of it into the row."""
        self._serial += 1
        before = self._lost()
        prompts = [chain(SPAN, f"{fault.name}{self._serial}.{number}") for number in range(PROMPTS)]
        half = PROMPTS // 2
        self._wait(self._store(prompts[:half], 0))
        self.injector.arm(fault, seed=seed, per_1024=per_1024)
        jobs = self._load(prompts[:half], 0)
        jobs += self._store(prompts[half:], half)
        seen = self._wait(jobs)
        row.longest_wait_s = max(row.longest_wait_s, seen.longest_wait_s)
        row.wrong_tokens += self._wrong(seen, prompts[:half], jobs)
        row.injected += self.injector.disarm()
        row.detected += self._lost() - before
        self._await_service()
        before = self._lost()
        # What was stored meanwhile, and what was there before, is right or missing; and every slot is free again.
        jobs = self._load(prompts, 0)
        seen = self._wait(jobs)
        row.wrong_tokens += self._wrong(seen, prompts, jobs)
        row.detected += self._lost() - before
        row.rounds += 1
        self._check_slots()

    def outage(self, fault: Fault, seconds: float) -> list[float]:
        """What each of many loads in a row waits while a fault lasts; afterwards all is as before."""
        self._serial += 1
        hashes = chain(SPAN, f"outage{self._serial}")
        self._wait(self._store([hashes], 0))
        self.injector.arm(fault)
        waits, deadline = [], time.monotonic() + seconds
        while time.monotonic() < deadline:
            waits.append(self._wait(self._load([hashes], 0)).longest_wait_s)
            time.sleep(0.02)
        assert self.injector.disarm()
        self._await_service()
        jobs = self._load([hashes], 0)
        seen = self._wait(jobs)
        result = seen.results[jobs[0]]
        assert isinstance(result, LoadResult) and result.kinds == ("",), "a hit again, as before"
        assert self._wrong(seen, [hashes], jobs) == 0
        return waits

    def _lost(self) -> int:
        """Misses, stores that failed and chunks that had to be read twice, as counted."""
        names = ("store_failed", "store_full", "store_shed", "load_rereads")
        return sum(n for k, n in self.client.counters.as_dict().items() if k.startswith("miss_") or k in names)

    def _store(self, prompts: Sequence[list[bytes]], first: int) -> list[int]:
        return [self._submit(self._chunks(hashes, first + i)) for i, hashes in enumerate(prompts)]

    def _chunks(self, hashes: list[bytes], number: int) -> tuple[StoreChunk, ...]:
        return tuple(
            make_store(self.pool, hashes[i : i + N], range(number * SPAN + i, number * SPAN + i + N))
            for i in range(0, SPAN, N)
        )

    def _load(self, prompts: Sequence[list[bytes]], first: int) -> list[int]:
        jobs = []
        for i, hashes in enumerate(prompts):
            pages = range((PROMPTS + first + i) * SPAN, (PROMPTS + first + i + 1) * SPAN)
            for page in pages:
                self.pool.memory[self._at(page) : self._at(page) + 64] = 0xEE
            jobs.append(self._submit((make_run(self.pool, hashes, pages, chunk_count=CHUNKS),)))
        return jobs

    def _submit(self, parts: tuple[StoreChunk, ...] | tuple[LoadRun, ...]) -> int:
        self._jobs += 1
        if isinstance(parts[0], StoreChunk):
            self.client.submit_store(self._jobs, parts)  # type: ignore[arg-type]
            self.client.fence()
        else:
            self.client.submit_load(self._jobs, parts)  # type: ignore[arg-type]
        return self._jobs

    def _wait(self, jobs: list[int]) -> _Seen:
        """Every job's answer, exactly one each."""
        seen, start = _Seen(), time.monotonic()
        while len(seen.results) < len(jobs):
            assert time.monotonic() - start < PATIENCE_S, f"{len(seen.results)} of {len(jobs)} answers"
            self.client.wait(0.02)
            for result in self.client.poll():
                assert isinstance(result, (LoadResult, StoreResult))
                assert result.job_id in jobs and result.job_id not in seen.results, "an answer too many"
                seen.results[result.job_id] = result
                seen.longest_wait_s = time.monotonic() - start
        assert (self.client.pending_loads, self.client.pending_stores) == (0, 0)
        return seen

    def _wrong(self, seen: _Seen, prompts: Sequence[list[bytes]], jobs: list[int]) -> int:
        """How many prompts have a page that was called good and is not what was stored."""
        wrong = 0
        for number, job in enumerate(jobs[: len(prompts)]):
            result = seen.results[job]
            assert isinstance(result, LoadResult)
            good = result.good_blocks[0]
            assert result.kinds[0] or good == SPAN, "blocks are missing, and nobody says why"
            target = (PROMPTS + number) * SPAN
            wrong += any(self.pool.block(target + i) != self.pool.block(number * SPAN + i) for i in range(good))
        return wrong

    def _await_service(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.client.mode != "process":
            assert time.monotonic() < deadline, "the I/O service does not come back"
            assert self.client.poll() == []
            time.sleep(0.01)
        # The trial of a service that came back: a load of what was never stored.
        self._wait([self._submit((make_run(self.pool, chain(N, "never"), range(N)),))])

    def _check_slots(self) -> None:
        """As many chunks as there are store slots find one each: what a fault interrupted has not kept its own."""
        slot_bytes = Group.from_spec(self.pool.spec()).slot_bytes
        _, slots = staging_slots(STAGING_BYTES, align_up(slot_bytes), IO_THREADS)
        hashes = [chain(N, f"slots{self._serial}.{number}") for number in range(slots)]
        job = self._submit(tuple(make_store(self.pool, own, range(N)) for own in hashes))
        result = self._wait([job]).results[job]
        assert isinstance(result, StoreResult)
        assert "shed" not in result.outcomes, f"a slot is lost: {result.outcomes}"

    def _at(self, page: int) -> int:
        return 4096 + page * self.pool.block_bytes


def play(fault_names: Sequence[str], rounds: int, seed: int) -> Iterator[Row]:
    """Some rounds of each fault; a row for each, and the control's at the end."""
    hurry = mock.patch.object(client_module, "SERVICE_RESTART_BACKOFF_S", 0.05)
    with hurry, quick_folder() as folder, Injector(folder / "kv") as injector:
        bench = Pipelines(folder / "kv", injector)
        try:
            for name in fault_names:
                row = Row(name, "pipelines", deadline_s=DEADLINE_S)
                for number in range(rounds):
                    # Now everything goes wrong, now some.
                    bench.round(FAULTS[name], seed + number, 1024 if number % 2 == 0 else 300, row)
                    if FAULTS[name].looks_full:
                        # A fresh process has not heard of it, and stores at once.
                        bench.close()
                        bench = Pipelines(folder / "kv", injector)
                yield row
        finally:
            bench.close()
        control = Pipelines(folder / "kv", injector, verified=False)
        row = Row(CONTROL, "pipelines", deadline_s=DEADLINE_S)
        try:
            for number in range(rounds):
                control.round(FAULTS["misdirected read"], seed + number, 1024, row)
            yield row
        finally:
            control.close()
