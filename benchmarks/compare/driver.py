"""Asks all sides for the same prompts in turns, and goes on without one that fails."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.compare import plan as plans
from benchmarks.compare import prompts as workloads
from benchmarks.compare.names import AGAIN, CONVERSATIONS, DOCUMENTS, FIRST, LOCAL, RESUMED
from benchmarks.compare.prompts import Conversation, Corpus
from benchmarks.compare.record import Record
from benchmarks.compare.side import Meter, Result, Side
from benchmarks.tier_files import RawReader, TierContents, contents_of, wait_for_blocks

FLUSH_TOKENS = 8

Say = Callable[[str], None]


class Clock:
    """Tells whether there is time left for what could be left out."""

    def __init__(self, minutes: float) -> None:
        self._ends = time.monotonic() + 60.0 * minutes

    def is_late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._ends


class Driver:
    """All sides of one stage.

    Args:
        record: Where measurements go.
        clock: When to leave out further rounds.
        say: Told how it goes.
        set_number: Which set of processes these are, from 1 on.
    """

    def __init__(self, record: Record, clock: Clock, say: Say, set_number: int = 1) -> None:
        self._set_number = set_number
        self._sides: dict[str, Side] = {}
        self._meters: dict[str, Meter] = {}
        self._record, self._clock, self._say = record, clock, say
        self._visits = 0
        self._stored: dict[str, TierContents] = {}
        self._raw: RawReader | None = None
        self._talks: list[dict[str, list[list[int]]]] = []

    # ------------------------------------------------------------------------------------------ sides that may fail

    def add(self, makers: Mapping[str, Callable[[], Side]]) -> None:
        """Starts sides; one that cannot even be started is noted."""
        for name, make in makers.items():
            self._record.add_side(name, "")
            try:
                self._sides[name] = make()
            # Whatever an engine's start may raise: the others are not to suffer from it.
            except Exception as error:
                self._say(f"{name}: FAILED to start: {type(error).__name__}")
                self._record.fail(name, "start", error)
                continue
            self._record.set_side(name, what=self._sides[name].what)

    def join(self, name: str, make: Callable[[], Side], warm_up: Sequence[Sequence[int]]) -> None:
        """Starts one side more, waits until it answers, and warms it up with prompts."""
        self.add({name: make})
        with self._or_out(name, "start"):
            side = self._sides[name]
            side.prepare()
            side.wait_until_ready()
            self._meters[name] = Meter(side.pids())
            for prompt in warm_up:
                side.ask([prompt], FLUSH_TOKENS)
            self._meters[name].settle()
            self._record.set_side(name, status="ok")

    def retire(self, names: Iterable[str]) -> None:
        """Ends sides that are not needed any more."""
        for name in names:
            if name in self._sides:
                with self._or_out(name, "its end"):
                    self._note_end(name)
                    self._sides.pop(name).close()

    def start(self, warm_up: Sequence[Sequence[int]]) -> None:
        """Waits until every side answers, and warms each up with a prompt of its own."""
        for name in list(self._sides):
            with self._or_out(name, "start"):
                self._sides[name].prepare()
        for name in list(self._sides):
            with self._or_out(name, "start"):
                started = time.monotonic()
                self._sides[name].wait_until_ready()
                self._say(f"{name}: ready after {time.monotonic() - started:.0f} s more")
        for name, prompt in zip(list(self._sides), warm_up, strict=False):
            with self._or_out(name, "warm-up"):
                side = self._sides[name]
                self._meters[name] = Meter(side.pids())
                side.ask([prompt], FLUSH_TOKENS)
                self._meters[name].settle()
                self._record.set_side(name, status="ok")

    def finish(self) -> None:
        """Notes memory and what is stored, and ends all sides."""
        for name in self._sides:
            self._note_end(name)
        self._record.save()
        self.close()

    def _note_end(self, name: str) -> None:
        side, meter = self._sides[name], self._meters[name]
        self._record.peaks(name, peak_rss_bytes=meter.peak_rss_bytes, peak_pss_bytes=meter.peak_pss_bytes)
        if not side.only_loads:
            self._record.stored(side)

    def close(self) -> None:
        """Ends all sides."""
        for side in self._sides.values():
            # One that cannot be ended must not keep the others alive.
            with contextlib.suppress(Exception):
                side.close()
        self._sides.clear()

    @contextlib.contextmanager
    def _or_out(self, name: str, where: str) -> Iterator[None]:
        """A side that fails is noted, ended, and asked no more; whatever its engine raised."""
        try:
            yield
        except Exception as error:
            told = str(error).splitlines()
            self._say(f"{name}: FAILED in {where}: {told[0] if told else type(error).__name__}")
            self._record.fail(name, where, error)
            side = self._sides.pop(name, None)
            if side is not None:
                with contextlib.suppress(Exception):
                    side.close()

    # ------------------------------------------------------------------------------------------------------ visits

    def order(self, names: Iterable[str]) -> list[str]:
        """Returns the sides among these that still run, another one first at every call."""
        found = [name for name in self._sides if name in set(names)]
        self._visits += 1
        first = self._visits % max(1, len(found))
        turned = found[first:] + found[:first]
        return turned[::-1] if self._visits % 2 else turned

    def visit(self, name: str, prompts: Sequence[Sequence[int]], max_tokens: int, **labels: Any) -> Result | None:
        """Asks one side and waits until it is quiet and all it wrote is on the device; None when it failed."""
        result = None
        with self._or_out(name, f"{labels['workload']}, {labels['step']}"):
            side, meter = self._sides[name], self._meters[name]
            before = meter.usage()
            result = side.ask(prompts, max_tokens)
            used = meter.settle().since(before)
            # What one left to the kernel to be written must not take the device from the next.
            os.sync()
            meter.read_memory()
            self._record.add_batch(name, {**labels, "processes": self._set_number}, result, used)
        return result

    def forget(self, name: str) -> None:
        """Leaves a side with what is on its device."""
        with self._or_out(name, "emptying its memory"):
            self._sides[name].forget_and_cool()
            self._meters[name].settle()

    def forget_all(self) -> None:
        """The same for all sides."""
        for name in list(self._sides):
            self.forget(name)

    def asked_for_documents(self) -> list[str]:
        """Returns the sides that still run and are asked for documents."""
        return [name for name, side in self._sides.items() if not side.keeps_memory]

    def storing(self) -> list[str]:
        """Returns those of them that store."""
        return [n for n in self.asked_for_documents() if self._sides[n].stores and not self._sides[n].only_loads]

    def visited_first(self) -> list[str]:
        """Returns the sides that compute what they have not seen: all but those that only load."""
        return [name for name, side in self._sides.items() if not side.only_loads]

    # --------------------------------------------------------------------------------------------------- documents

    def documents_first(
        self, documents: Mapping[str, Sequence[int]], plan: plans.Documents, raw_of: str, block_size: int
    ) -> None:
        """First visits; notes which files `raw_of` stored for each document."""
        for unit, prompt in documents.items():
            for name in self.order(set(self.visited_first()) & set(self.asked_for_documents())):
                folder = self._sides[name].folder if name == raw_of else None
                earlier = contents_of(folder) if folder else None
                self.visit(
                    name, [prompt], plan.answer_tokens,
                    workload=DOCUMENTS, step=FIRST, unit=unit, length=len(prompt), round=0,
                )  # fmt: skip
                if folder and earlier is not None:
                    self._stored[unit] = wait_for_blocks(folder, earlier, len(prompt) // block_size)
            self._tell(DOCUMENTS, FIRST, unit, 0)

    def documents_again(
        self,
        documents: Mapping[str, Sequence[int]],
        plan: plans.Documents,
        number: int,
        names: Sequence[str],
        *,
        local_hits: bool = True,
    ) -> None:
        """Second visits by some sides, each followed by a hit in the engine's own cache; and the raw read.

        Args:
            documents: What to ask for.
            plan: Of the workload.
            number: Which round it is; the first is 1.
            names: Who is asked.
            local_hits: Ask sides that store once more at once.
        """
        for unit, prompt in documents.items():
            for name in self.order(names):
                labels = {"workload": DOCUMENTS, "unit": unit, "length": len(prompt), "round": number}
                self.forget(name)
                if name in self._sides:
                    self.visit(name, [prompt], plan.answer_tokens, step=AGAIN, **labels)
                if local_hits and name in self._sides and self._sides[name].stores:
                    self.visit(name, [prompt], plan.answer_tokens, step=LOCAL, **labels)
            self._read_raw(unit, len(prompt), number)
            self._tell(DOCUMENTS, AGAIN, unit, number)

    def _read_raw(self, unit: str, length: int, number: int) -> None:
        files = self._stored.get(unit)
        if files is None or not files.chunks:
            return
        try:
            self._raw = self._raw or RawReader([files])
            seconds = self._raw.read_s(files)
        except (OSError, RuntimeError) as error:
            self._record.note(f"no raw read of {unit} in round {number}: {error}")
            return
        self._record.body["raw_reads"].append(
            {"unit": unit, "length": length, "round": number, "seconds": seconds, "bytes": files.stored_bytes}
        )

    # ----------------------------------------------------------------------------------------------- other workloads

    def conversations(self, plan: plans.Conversations, corpus: Corpus, *, cold: bool) -> None:
        """All rounds; each side goes on from its own answers.

        Args:
            plan: What to run.
            corpus: Where texts come from.
            cold: Drop what is stored from the page cache before each turn.
        """
        rounds = self._rounds(plan)
        for number in rounds:
            if number > rounds[0] and self._clock.is_late():
                self._record.note(f"{CONVERSATIONS}: out of time before round {number} of {rounds[-1]}")
                return
            talks = workloads.conversations(corpus, plan.count, plan.turns, plan.document_tokens, plan.user_tokens)
            self._talk(plan, talks, number, cold)

    def resume(self, plan: plans.Conversations, corpus: Corpus) -> None:
        """One more turn of every conversation, by sides that store, with nothing left in memory.

        So it is after a restart, or when more has been stored meanwhile than memory holds.
        """
        storing = [name for name in self.visited_first() if self._sides[name].stores]
        names = [name for name in storing if not self._sides[name].keeps_memory]
        self.forget_all()
        for number, histories in zip(self._rounds(plan), self._talks, strict=False):
            messages = [corpus.take(plan.user_tokens) for _ in range(plan.count)]
            for unit, group in _groups(plan, number):
                for name in self.order(names):
                    asked = [histories[name][talk] + messages[talk] for talk in group]
                    labels = {"step": "next turn", "unit": unit, "length": len(asked[0]), "round": number}
                    self.visit(name, asked, plan.answer_tokens, workload=RESUMED, **labels)
                self._tell(RESUMED, "next turn", unit, number)

    def _rounds(self, plan: plans.Conversations) -> range:
        """Numbers of rounds, which go on from one set of processes to the next."""
        first = (self._set_number - 1) * plan.rounds + 1
        return range(first, first + plan.rounds)

    def _talk(self, plan: plans.Conversations, talks: Sequence[Conversation], number: int, cold: bool) -> None:
        histories = {name: [list(talk.opening) for talk in talks] for name in self._sides}
        for turn in range(1, plan.turns + 1):
            if cold and turn > 1:
                for name in list(self._sides):
                    with self._or_out(name, "dropping its files from the page cache"):
                        self._sides[name].cool()
            for unit, group in _groups(plan, number):
                for name in self.order(self._talking(plan, number)):
                    history = histories[name]
                    if turn > 1:
                        for talk in group:
                            history[talk] += talks[talk].messages[turn - 2]
                    labels = {"step": f"turn {turn}", "unit": unit, "length": len(history[group[0]]), "round": number}
                    asked = [history[talk] for talk in group]
                    result = self.visit(name, asked, plan.answer_tokens, workload=CONVERSATIONS, **labels)
                    if result:
                        for talk, reply in zip(group, result.replies, strict=True):
                            history[talk] += reply.tokens
                self._tell(CONVERSATIONS, f"turn {turn}", unit, number)
        self._talks.append(histories)

    def _talking(self, plan: plans.Conversations, number: int) -> list[str]:
        names = self.visited_first()
        return names if number <= plan.recomputed_rounds else [name for name in names if self._sides[name].stores]

    def requests(self, workload: str, prompts: Sequence[Sequence[int]], together: int, answer_tokens: int) -> None:
        """Prompts in groups, one group after the other."""
        for first in range(0, len(prompts), together):
            group, unit = prompts[first : first + together], str(first // together + 1)
            for name in self.order(self.visited_first()):
                self.visit(
                    name, group, answer_tokens,
                    workload=workload, step="request", unit=unit, length=max(map(len, group)), round=1,
                )  # fmt: skip
            self._tell(workload, "request", unit, 1)

    def _tell(self, workload: str, step: str, unit: str, number: int) -> None:
        found = {
            batch["side"]: batch["wall_s"]
            for batch in self._record.body["batches"]
            if (batch["workload"], batch["step"], batch["unit"], batch["round"]) == (workload, step, unit, number)
        }
        times = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found.items())
        self._say(f"    {workload}, {unit}, {step}, round {number}: {times} s")


def _groups(plan: plans.Conversations, number: int) -> Iterator[tuple[str, range]]:
    """Yields the conversations of a round that are asked at the same time, and what they are called together."""
    for first in range(0, plan.count, plan.together):
        yield f"{number}.{first // plan.together + 1}", range(first, min(first + plan.together, plan.count))
