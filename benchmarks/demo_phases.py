"""The demo's measurements: one function for each engine process it starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import harness
from benchmarks.demo_workload import Workload
from benchmarks.engine_run import Answer, Engine, EngineSpec, tail_of
from benchmarks.tier_files import RawReader, TierContents, contents_of, wait_for_blocks

MAX_TOKENS = 16

Say = Callable[[str], None]


class DemoFailed(Exception):
    """There is nothing to measure; the message says why."""


@dataclass(frozen=True)
class Settings:
    """How the engine runs on this machine.

    Attributes:
        threads: `VLLM_CPU_OMP_THREADS_BIND`.
        batch_tokens: `max_num_batched_tokens`.
    """

    threads: str
    batch_tokens: int

    def applied_to(self, spec: EngineSpec) -> EngineSpec:
        """Returns `spec` with these settings."""
        arguments = {**spec.arguments, "max_num_batched_tokens": self.batch_tokens}
        return replace(spec, threads=self.threads, arguments=arguments)


@dataclass(frozen=True)
class Recompute:
    """What the engine does without a connector.

    Attributes:
        cold: The answer to each prompt, computed.
        local: Answers to the same prompts from the engine's own prefix cache, one list per prompt.
        diverging_cold: The diverging prompt, computed.
        diverging_local: The diverging prompt while the engine still holds what it shares with the first one.
        start_s: From the start of the process to readiness.
    """

    cold: list[Answer]
    local: list[list[Answer]]
    diverging_cold: Answer
    diverging_local: Answer
    start_s: float


@dataclass(frozen=True)
class FirstVisit:
    """What the engine does with the connector and an empty tier.

    Attributes:
        answers: One per prompt.
        files: The chunks that each prompt left in the tier.
        start_s: From the start of the process to readiness.
    """

    answers: list[Answer]
    files: list[TierContents]
    start_s: float


@dataclass(frozen=True)
class Restored:
    """One prompt answered from the tier, and the same files read without an engine just before.

    Attributes:
        answer: What the engine said.
        external_tokens: Prompt tokens that came from the tier.
        raw_read_s: Time to read the same files by direct I/O into huge pages.
        load_s: Time from the load's submission until every page is in place, by the connector's own timer.
    """

    answer: Answer
    external_tokens: int
    raw_read_s: float
    load_s: float


@dataclass(frozen=True)
class Restart:
    """What a fresh engine does with a tier that another process filled.

    Attributes:
        restored: One list per prompt.
        diverging: The diverging prompt, restored as far as it goes along with the first.
        raw_threads: Threads of the raw reads: the best of those tried.
        start_s: From the start of the process to readiness.
    """

    restored: list[list[Restored]]
    diverging: Restored
    raw_threads: int
    start_s: float


def candidate_settings(prompt_tokens: int) -> list[Settings]:
    """Returns the settings worth trying: vLLM's own, every core, and a batch that takes a whole prompt."""
    cores = sorted(os.sched_getaffinity(0))
    bound = ",".join(map(str, cores))
    whole_prompt = 1 << (prompt_tokens - 1).bit_length()
    return [Settings("auto", 4096), Settings(bound, 4096), Settings(bound, whole_prompt)]


def measure_settings(spec: EngineSpec, settings: Settings, workload: Workload, log: Path) -> float:
    """Returns the time to the first token of a computed prompt under these settings."""
    with Engine(settings.applied_to(spec), log) as engine:
        engine.ask(workload.warm_ups[0], 1)
        return engine.ask(workload.prompts[-1], 1)[0].ttft_s


def recompute(spec: EngineSpec, workload: Workload, repeats: int, log: Path, say: Say) -> Recompute:
    """Measures the engine alone: computed prompts and full hits in its own prefix cache."""
    cold: list[Answer] = []
    local: list[list[Answer]] = []
    with Engine(spec, log) as engine:
        engine.ask(workload.warm_ups[0], MAX_TOKENS)
        for number, prompt in enumerate(workload.prompts):
            cold.append(engine.ask(prompt, MAX_TOKENS)[0])
            local.append([engine.ask(prompt, MAX_TOKENS)[0] for _ in range(repeats)])
            say(f"prompt {number + 1}: computed {cold[-1].ttft_s:.2f} s, local hit {_median_ttft(local[-1]):.2f} s")
            if number == 0:
                diverging_local = engine.ask(workload.diverging, MAX_TOKENS)[0]
        engine.reset_prefix_cache()
        diverging_cold = engine.ask(workload.diverging, MAX_TOKENS)[0]
        say(f"diverging prompt: computed {diverging_cold.ttft_s:.2f} s, partly local {diverging_local.ttft_s:.2f} s")
        return Recompute(cold, local, diverging_cold, diverging_local, engine.start_s)


def first_visit(spec: EngineSpec, workload: Workload, tier: Path, block_size: int, log: Path, say: Say) -> FirstVisit:
    """Measures prompts that the tier has never seen, and what they leave there."""
    answers: list[Answer] = []
    files: list[TierContents] = []
    with Engine(spec, log) as engine:
        engine.ask(workload.warm_ups[1], MAX_TOKENS)
        wait_for_blocks(tier, TierContents(()), len(workload.warm_ups[1]) // block_size)
        for number, prompt in enumerate(workload.prompts):
            earlier = contents_of(tier)
            answers.append(engine.ask(prompt, MAX_TOKENS)[0])
            files.append(wait_for_blocks(tier, earlier, len(prompt) // block_size))
            if not files[-1].chunks:
                raise DemoFailed(f"prompt {number + 1} left nothing in the tier\n{tail_of(log)}")
            say(
                f"prompt {number + 1}: computed {answers[-1].ttft_s:.2f} s, stored {files[-1].blocks} blocks "
                f"in {len(files[-1].chunks)} chunks"
            )
        return FirstVisit(answers, files, engine.start_s)


def restart(
    spec: EngineSpec, workload: Workload, files: Sequence[TierContents], repeats: int, log: Path, say: Say
) -> Restart:
    """Measures prompts that a fresh process finds in the tier; the page cache holds none of it."""
    restored: list[list[Restored]] = [[] for _ in workload.prompts]
    raw = RawReader(files)
    with Engine(spec, log) as engine:
        engine.ask(workload.warm_ups[2], MAX_TOKENS)
        for _ in range(repeats):
            for number, prompt in enumerate(workload.prompts):
                one = _restore(engine, prompt, files[number], raw)
                restored[number].append(one)
                say(
                    f"prompt {number + 1}: restored {one.external_tokens} tokens in {one.answer.ttft_s:.3f} s "
                    f"(load {one.load_s:.3f} s, raw read {one.raw_read_s:.3f} s)"
                )
        diverging = _restore(engine, workload.diverging, files[0], raw)
        say(f"diverging prompt: restored {diverging.external_tokens} tokens, {diverging.answer.ttft_s:.2f} s")
        return Restart(restored, diverging, raw.threads, engine.start_s)


def _restore(engine: Engine, prompt: Sequence[int], files: TierContents, raw: RawReader) -> Restored:
    engine.reset_prefix_cache()
    raw_read_s = raw.read_s(files)
    harness.drop_from_page_cache(files.paths)
    before_us = _load_us(engine)
    answer, external_tokens = engine.ask(prompt, MAX_TOKENS)
    return Restored(answer, external_tokens, raw_read_s, (_load_us(engine) - before_us) / 1e6)


def _load_us(engine: Engine) -> float:
    # Not `get`: a counter of another name must not be a load that takes no time.
    return engine.metrics()["vllm:memkv_engines_load_microseconds"]


def _median_ttft(answers: Sequence[Answer]) -> float:
    return harness.median([answer.ttft_s for answer in answers])
