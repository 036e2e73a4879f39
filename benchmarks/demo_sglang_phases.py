"""What SGLang's demo measures: first visits by each side, then restores by all of them in turns."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import harness, restore_timers
from benchmarks.harness import Progress
from benchmarks.sglang_backend import MEMKV, PAGE_TOKENS, Backend, ask
from benchmarks.tier_files import RawReader, TierContents, contents_of
from tests.engines.prompts import tokens_of
from tests.engines.sglang.engines import Answer, Engine, wait_until
from tests.engines.sglang.forked_engines import ForkedEngine


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        model: Its name.
        prompts, prompt_tokens: How many prompts, and how long.
        rounds: Restores of each prompt by each side.
        arguments: The engines' own.
        light: Engines are forked from one process, and start in a second.
    """

    model: str
    prompts: int
    prompt_tokens: int
    rounds: int
    arguments: dict[str, Any] = field(default_factory=dict)
    light: bool = False


@dataclass
class Side(Backend):
    """A backend, and what was measured of it."""

    cold: list[tuple[float, Answer]] = field(default_factory=list)
    oracle: list[Answer] = field(default_factory=list)
    restored: list[tuple[float, Answer]] = field(default_factory=list)
    device_hits: list[float] = field(default_factory=list)
    stored: list[TierContents] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)
    timed: list[dict[str, float]] = field(default_factory=list)
    _timers_read: int = 0

    @property
    def timers(self) -> Path:
        """Where its engine writes its timers."""
        return self.folder.with_suffix(".timers")

    def take_timers(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        seconds, self._timers_read = restore_timers.seconds_since(self.timers, self._timers_read)
        return seconds

    def costs(self) -> list[float]:
        """What restores cost, by the engine's timers."""
        return [sum(parts.values()) for parts in self.timed]

    def latest(self) -> str:
        """The last restore, for the log."""
        raw = f", raw read {self.raw[-1]:.3f} s" if self.raw else ""
        return f"{self.name} {self.restored[-1][0]:.2f} s (cost {self.costs()[-1]:.3f} s{raw})"

    def parts(self) -> dict[str, float]:
        """Medians of the parts of the costs."""
        names = sorted({name for parts in self.timed for name in parts})
        return {name: harness.median([parts.get(name, 0.0) for parts in self.timed]) for name in names}

    def ttft_costs(self) -> list[float]:
        """Restores less device hits, of the round that has them."""
        return [ttft - hit for (ttft, _), hit in zip(self.restored, self.device_hits, strict=False)]


def settled(side: Side) -> None:
    """Wait until nothing has been stored for a while; what is new is the last prompt's."""
    seen, since = -1, time.monotonic()

    def quiet() -> bool:
        nonlocal seen, since
        size = sum(p.stat().st_size for p in side.files())
        if size != seen:
            seen, since = size, time.monotonic()
        return size > 0 and time.monotonic() - since > 2.0

    wait_until(quiet, f"{side.name} has stored the prompt", 120)
    earlier = {chunk for prompt in side.stored for chunk in prompt.chunks}
    side.stored.append(TierContents(tuple(chunk for chunk in contents_of(side.folder).chunks if chunk not in earlier)))


def start(side: Side, plan: Plan, logs: Path) -> Engine:
    """A fresh engine with this side's backend."""
    arguments = dict(plan.arguments) if plan.light else {"page_size": PAGE_TOKENS, **plan.arguments}
    env, log = {restore_timers.VARIABLE: str(side.timers)}, logs / f"demo-sglang-{side.name}.log"
    if plan.light:
        return ForkedEngine(plan.model, log=log, env=env, **side.arguments(), **arguments)
    # Tests give an engine one thread; here recomputing gets every core.
    env["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    return Engine(plan.model, log=log, env=env, **side.arguments(), **arguments)


def first_visits(
    sides: Sequence[Side], plan: Plan, prompts: Sequence[Sequence[int]], logs: Path, say: Progress
) -> None:
    """Each side computes and stores every prompt."""
    for side in sides:
        say(f"{side.name}: computes and stores {len(prompts)} prompts")
        with start(side, plan, logs) as engine:
            ask(engine, tokens_of(1, 200))
            for number, prompt in enumerate(prompts):
                side.cold.append(ask(engine, prompt))
                side.oracle.append(ask(engine, prompt)[1])
                settled(side)
                say(f"    prompt {number + 1}: {side.cold[-1][0]:.2f} s")


def restores(sides: Sequence[Side], plan: Plan, prompts: Sequence[Sequence[int]], logs: Path, say: Progress) -> None:
    """Fresh processes restore every prompt in turns, beside raw reads of our own files."""
    reader = RawReader([stored for side in sides if side.name == MEMKV for stored in side.stored])
    say("fresh processes")
    with ExitStack() as stack:
        engines = [(side, stack.enter_context(start(side, plan, logs))) for side in sides]
        for _, engine in engines:
            ask(engine, tokens_of(2, 200))
        for round_ in range(plan.rounds):
            for number, prompt in enumerate(prompts):
                raw_first = (round_ + number) % 2 == 0
                for side, engine in engines if round_ % 2 else engines[::-1]:
                    restore(side, engine, prompt, side.stored[number], reader, raw_first=raw_first)
                    if round_ == 0:
                        side.device_hits.append(ask(engine, prompt)[0])
                say(f"    round {round_ + 1}, prompt {number + 1}: {', '.join(s.latest() for s in sides)}")


def restore(
    side: Side, engine: Engine, prompt: Sequence[int], stored: TierContents, reader: RawReader, *, raw_first: bool
) -> None:
    """One restore, and beside it, where the files are ours, a raw read of the same."""
    engine.flush()
    harness.drop_from_page_cache(side.files())

    def read_raw() -> None:
        if stored.chunks:
            side.raw.append(reader.read_s(stored))

    if raw_first:
        read_raw()
    side.take_timers()
    side.restored.append(ask(engine, prompt))
    side.timed.append(side.take_timers())
    if not raw_first:
        read_raw()
