"""Conversations in turns in SGLang, too many for its device and host pools, asked of several engines side by side.

Every side sees the same prompts, one right after the other: what disturbs the machine disturbs all of them, and each
request is a pair with the same request to another side. An answer is one token long, so that the time of a request is
the time to the first token. To ask for more in a second request would measure SGLang's CPU attention, which goes over
the whole prefix again even where nothing is computed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Progress
from benchmarks.sglang_backend import FILE, LINKER, MEMKV, Backend, ask
from benchmarks.texts import documents
from benchmarks.vllm_conversations import CHARS_PER_TOKEN, ConversationPlan, percentiles
from tests.engines.sglang.engines import Answer, Engine

NONE = "none"
SIDES = (NONE, FILE, MEMKV, LINKER)
BASELINES = (NONE, FILE)
SOURCES = ("device", "host", "storage")
ANSWER_TOKENS = 1
SETTLE_S = 0.25
SETTLE_TIMEOUT_S = 10.0
# An engine that sleeps still wakes once a second; one that stores keeps a core busy.
QUIET_CORES = 0.1
MEANING = {
    "tokens_per_s": "prompt and answer tokens / time in which the side had a request; median over the rounds. Stores "
    "that go on after an answer are waited for outside of that time",
    "first_turn_ttft_s": "nothing stored, nothing cached",
    "returning_ttft_s": "of all later turns",
    "hit_tokens": "prompt tokens not computed, by the source SGLang names; it counts what a linker brings as `host`",
    "returning_hit_share": "prompt tokens not computed / prompt tokens, later turns only",
    "engine_cpu_s": "CPU seconds of SGLang's own processes in each round, stores after the answer included",
    "io_cpu_s": "CPU seconds of the I/O processes in each round; the file backend has none of its own",
    "stored": "files at the end of all rounds",
    "page_cache": "cold: what the sides stored is dropped from it before each turn",
    "ratios": "side against baseline, above 1 is better: medians of the ratios of pairs, each with its 95% bootstrap "
    "interval; throughput by conversation, times to the first token by request",
    "agreement": "requests to which a side gave the same first token as `none`, and as all others; the largest "
    "difference of their log-probabilities. bf16 may decide between two likely tokens either way",
}


@dataclass(frozen=True)
class Usage:
    """CPU seconds of an engine's processes.

    Attributes:
        engine_cpu_s: Of SGLang's own.
        io_cpu_s: Of our I/O processes.
    """

    engine_cpu_s: float
    io_cpu_s: float

    def since(self, earlier: Usage) -> Usage:
        """Returns the difference to an earlier moment."""
        return Usage(self.engine_cpu_s - earlier.engine_cpu_s, self.io_cpu_s - earlier.io_cpu_s)


@dataclass(frozen=True)
class Visit:
    """One request: which one, and what became of it."""

    round: int
    conversation: int
    turn: int
    prompt_tokens: int
    ttft_s: float
    answer: Answer

    @property
    def tokens(self) -> int:
        """Length of prompt and answer."""
        return self.prompt_tokens + len(self.answer.tokens)


@dataclass
class Side:
    """A running engine, where it stores, and what was measured of it.

    Attributes:
        engine: Asked by nothing else meanwhile.
        backend: Where it stores; None for the engine without storage.
        visits: All requests so far.
        usage: What each round used.
    """

    engine: Engine
    backend: Backend | None
    visits: list[Visit] = field(default_factory=list)
    usage: list[Usage] = field(default_factory=list)

    def files(self) -> list[Path]:
        """Returns what it stored."""
        return self.backend.files() if self.backend else []


def usage_of(engine: Engine) -> Usage:
    """Returns what an engine's processes have used since they started."""
    seconds = {False: 0.0, True: 0.0}
    for pid in engine.pids():
        with contextlib.suppress(OSError):
            is_io = b"memkv_engines.offload.process" in Path(f"/proc/{pid}/cmdline").read_bytes()
            user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
            seconds[is_io] += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return Usage(seconds[False], seconds[True])


def settle(engine: Engine) -> None:
    """Waits until an engine has stored what it computed, so that it leaves the cores to the next one."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    before = usage_of(engine)
    while time.monotonic() < deadline:
        time.sleep(SETTLE_S)
        now = usage_of(engine)
        used = now.since(before)
        if used.engine_cpu_s + used.io_cpu_s <= QUIET_CORES * SETTLE_S:
            return
        before = now


def messages_of(model: Path, plan: ConversationPlan) -> list[list[list[int]]]:
    """Returns what the users say: messages by conversation of all rounds, and one conversation more to warm up with."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    lengths = [plan.document_tokens] + [plan.user_tokens] * (plan.turns - 1)
    found = []
    for document in documents(plan.rounds * plan.conversations + 1, sum(lengths) * CHARS_PER_TOKEN):
        ids = iter(tokenizer.encode(document.body, add_special_tokens=False).ids)
        found.append([list(islice(ids, length)) for length in lengths])
    return found


def run(sides: Mapping[str, Side], plan: ConversationPlan, model: Path, say: Progress, *, cold: bool) -> None:
    """Runs all rounds; each has conversations of its own.

    Args:
        sides: By `SIDES`.
        plan: What to run; one conversation is asked at a time.
        model: Folder with the tokenizer.
        say: Told how it goes.
        cold: Drop what was stored from the page cache before each turn.
    """
    messages = messages_of(model, plan)
    warm_up = messages.pop()[0]
    for side in sides.values():
        ask(side.engine, warm_up, ANSWER_TOKENS)
        settle(side.engine)
    for number in range(plan.rounds):
        before = {name: usage_of(side.engine) for name, side in sides.items()}
        ours = messages[number * plan.conversations : (number + 1) * plan.conversations]
        _run_round(sides, plan, ours, number, say, cold)
        for name, side in sides.items():
            side.usage.append(usage_of(side.engine).since(before[name]))


def order_of(turn: int, conversation: int) -> tuple[str, ...]:
    """Returns who is asked first, second ...: no side always goes first, nor always after the same other one."""
    first = (turn + conversation) % len(SIDES)
    order = SIDES[first:] + SIDES[:first]
    return order[::-1] if turn % 2 else order


def _run_round(
    sides: Mapping[str, Side],
    plan: ConversationPlan,
    messages: Sequence[Sequence[Sequence[int]]],
    round_: int,
    say: Progress,
    cold: bool,
) -> None:
    histories: list[list[int]] = [[] for _ in messages]
    for turn in range(plan.turns):
        if turn and cold:
            for side in sides.values():
                harness.drop_from_page_cache(side.files())
        for number, history in enumerate(histories):
            history += messages[number][turn]
            order = order_of(round_ + turn, number)
            for name in order:
                ttft_s, answer = ask(sides[name].engine, history, ANSWER_TOKENS)
                sides[name].visits.append(Visit(round_, number, turn, len(history), ttft_s, answer))
                settle(sides[name].engine)
            times = ", ".join(f"{name} {sides[name].visits[-1].ttft_s:.2f} s" for name in SIDES)
            say(f"    round {round_ + 1}, turn {turn + 1}, conversation {number + 1}: {times}")
            # All go on from the same answer, whatever they said themselves.
            history += sides[order[0]].visits[-1].answer.tokens


# --------------------------------------------------------------------------------------------------------- the result


def summarise(sides: Mapping[str, Side], plan: ConversationPlan) -> dict[str, Any]:
    """Returns the numbers of all rounds, with the ratios of the sides."""
    body: dict[str, Any] = {name: _side_numbers(side, plan) for name, side in sides.items()}
    body["ratios"] = {
        baseline: {name: _ratios(sides[name], sides[baseline]) for name in SIDES if name not in (NONE, baseline)}
        for baseline in BASELINES
    }
    body["agreement"] = agreement_of(sides)
    body["working_set_tokens"] = plan.working_set_tokens
    body["meaning"] = MEANING
    return body


def _side_numbers(side: Side, plan: ConversationPlan) -> dict[str, Any]:
    rounds = [[visit for visit in side.visits if visit.round == number] for number in range(plan.rounds)]
    returning = [visit for visit in side.visits if visit.turn]
    files = side.files()
    return {
        "tokens_per_s": harness.median([_rate(visits) for visits in rounds]),
        "wall_s": [sum(visit.ttft_s for visit in visits) for visits in rounds],
        "requests": len(side.visits),
        "first_turn_ttft_s": percentiles([visit.ttft_s for visit in side.visits if not visit.turn]),
        "returning_ttft_s": percentiles([visit.ttft_s for visit in returning]),
        "prompt_tokens": sum(visit.prompt_tokens for visit in side.visits),
        "generated_tokens": sum(len(visit.answer.tokens) for visit in side.visits),
        "hit_tokens": {
            "all": sum(visit.answer.cached for visit in side.visits),
            **{source: sum(visit.answer.details.get(source, 0) for visit in side.visits) for source in SOURCES},
        },
        "returning_hit_share": sum(v.answer.cached for v in returning) / sum(v.prompt_tokens for v in returning),
        "engine_cpu_s": [usage.engine_cpu_s for usage in side.usage],
        "io_cpu_s": [usage.io_cpu_s for usage in side.usage],
        "stored": {"objects": len(files), "bytes": sum(path.stat().st_size for path in files)},
        "ttft_s_by_turn": [[v.ttft_s for v in side.visits if v.turn == turn] for turn in range(plan.turns)],
    }


def _rate(visits: Sequence[Visit]) -> float:
    return sum(visit.tokens for visit in visits) / sum(visit.ttft_s for visit in visits)


def _conversation_rates(side: Side) -> list[float]:
    found: dict[tuple[int, int], list[Visit]] = {}
    for visit in side.visits:
        found.setdefault((visit.round, visit.conversation), []).append(visit)
    return [_rate(visits) for visits in found.values()]


def _ratios(side: Side, baseline: Side) -> dict[str, tuple[float, float, float]]:
    def ttfts(of: Side, returning: bool) -> list[float]:
        return [visit.ttft_s for visit in of.visits if bool(visit.turn) == returning]

    pairs = {
        "throughput": (_conversation_rates(side), _conversation_rates(baseline)),
        "first_turn_ttft": (ttfts(baseline, False), ttfts(side, False)),
        "returning_ttft": (ttfts(baseline, True), ttfts(side, True)),
    }
    return {name: harness.median_of_pair_ratios(*pair) for name, pair in pairs.items()}


def agreement_of(sides: Mapping[str, Side]) -> dict[str, Any]:
    """How far the sides' answers agree; see `MEANING`."""
    tokens = {name: [visit.answer.tokens for visit in side.visits] for name, side in sides.items()}
    gaps = [
        abs(one.answer.logprobs[0] - other.answer.logprobs[0])
        for name, side in sides.items()
        for one, other in zip(side.visits, sides[NONE].visits, strict=True)
        if name != NONE and one.answer.tokens == other.answer.tokens
    ]
    return {
        "all_sides_share": _share([len(set(map(tuple, same))) == 1 for same in zip(*tokens.values(), strict=True)]),
        "with_none_share": {
            name: _share([a == b for a, b in zip(tokens[name], tokens[NONE], strict=True)])
            for name in sides
            if name != NONE
        },
        "logprobs_compared": len(gaps),
        "largest_logprob_difference": max(gaps, default=0.0),
    }


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
