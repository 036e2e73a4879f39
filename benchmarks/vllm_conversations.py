"""Conversations in turns, too many for the KV memory: what returns to the engine has been thrown out meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.engine_pair import ALONE, CONNECTED, SIDES, Usage, settle, usage_of
from benchmarks.engine_run import Batch, Engine
from benchmarks.texts import documents
from benchmarks.tier_files import contents_of

WRITE_AMPLIFICATION = (
    "payload bytes submitted to the device, counted where the transport writes (store_payload_bytes), "
    "/ bytes of the distinct (block, shard) pairs that the headers of all chunks in the tier list"
)
# Too short to be stored; the step it takes carries the connector's last counters to the engine's metrics.
FLUSH_TOKENS = 8
CHARS_PER_TOKEN = 5


@dataclass(frozen=True)
class ConversationPlan:
    """Shape of the load.

    Attributes:
        conversations: How many take turns.
        turns: Requests of each.
        document_tokens: Length of the first message.
        user_tokens: Length of each later message.
        answer_tokens: Tokens generated for each request.
        together: Conversations that are asked at the same time.
        rounds: Repetitions, each with fresh engines and an empty tier.
    """

    conversations: int
    turns: int
    document_tokens: int
    user_tokens: int
    answer_tokens: int
    together: int
    rounds: int

    @property
    def longest_tokens(self) -> int:
        """Length of a conversation at its end."""
        return self.document_tokens + (self.turns - 1) * self.user_tokens + self.turns * self.answer_tokens

    @property
    def working_set_tokens(self) -> int:
        """Length of all conversations at their end."""
        return self.conversations * self.longest_tokens


@dataclass
class Side:
    """What one engine did in one round.

    Attributes:
        ttft_s: Times to the first token, one list per turn.
        wall_s: Time in which the engine had something to do.
        prompt_tokens: Length of all prompts.
        generated_tokens: Length of all answers.
        local_tokens: Prompt tokens from the engine's own cache.
        external_tokens: Prompt tokens from the tier.
        usage: CPU and I/O of the whole round.
        stored: What the connector stored; empty for the engine without one.
    """

    ttft_s: list[list[float]] = field(default_factory=list)
    wall_s: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    local_tokens: int = 0
    external_tokens: int = 0
    usage: Usage = field(default_factory=lambda: Usage(0.0, 0.0, 0))
    stored: dict[str, float] = field(default_factory=dict)

    def add(self, turn: int, batch: Batch) -> None:
        """Counts what one call gave."""
        while len(self.ttft_s) <= turn:
            self.ttft_s.append([])
        self.ttft_s[turn] += [answer.ttft_s for answer in batch.answers]
        self.wall_s += batch.wall_s
        self.prompt_tokens += sum(answer.prompt_tokens for answer in batch.answers)
        self.generated_tokens += sum(len(answer.tokens) for answer in batch.answers)
        self.external_tokens += batch.external_tokens
        self.local_tokens += sum(answer.cached_tokens for answer in batch.answers) - batch.external_tokens


class _Script:
    """Who says what: the users' messages, the same for both engines."""

    def __init__(self, model: str, plan: ConversationPlan) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
        user_tokens = plan.user_tokens * (plan.turns - 1)
        chars = (plan.document_tokens + user_tokens) * CHARS_PER_TOKEN
        self.openings: list[list[int]] = []
        self.replies: list[list[list[int]]] = []
        # One more: it warms the engines up.
        for document in documents(plan.conversations + 1, chars):
            ids = tokenizer.encode(document.body, add_special_tokens=False).ids
            self.openings.append(ids[: plan.document_tokens])
            rest = ids[plan.document_tokens :]
            self.replies.append(
                [rest[turn * plan.user_tokens : (turn + 1) * plan.user_tokens] for turn in range(plan.turns - 1)]
            )
        self.warm_up = self.openings.pop()


def run_round(engines: Mapping[str, Engine], plan: ConversationPlan, model: str, tier: Path) -> dict[str, Side]:
    """Runs all conversations, group by group and engine by engine.

    Args:
        engines: Both, by `SIDES`; nothing but this may use them meanwhile.
        plan: What to run.
        model: Folder with the tokenizer.
        tier: The directory of the connected engine's tier.
    """
    script = _Script(model, plan)
    sides = {side: Side() for side in SIDES}
    for engine in engines.values():
        engine.generate([script.warm_up], plan.answer_tokens)
    before = {side: usage_of(engines[side]) for side in SIDES}
    histories = {side: [list(opening) for opening in script.openings] for side in SIDES}
    for turn in range(plan.turns):
        for first in range(0, plan.conversations, plan.together):
            group = range(first, min(first + plan.together, plan.conversations))
            # The side that goes first changes, so that neither always inherits the other's heat.
            for side in SIDES if (turn + first // plan.together) % 2 == 0 else SIDES[::-1]:
                settle()
                _take_turn(engines[side], sides[side], histories[side], script, turn, group, plan)
    for side in SIDES:
        _finish(engines[side], sides[side], before[side], tier if side == CONNECTED else None)
    return sides


def _take_turn(
    engine: Engine,
    side: Side,
    histories: list[list[int]],
    script: _Script,
    turn: int,
    group: range,
    plan: ConversationPlan,
) -> None:
    if turn:
        for number in group:
            histories[number] += script.replies[number][turn - 1]
    batch = engine.generate([histories[number] for number in group], plan.answer_tokens)
    side.add(turn, batch)
    for number, answer in zip(group, batch.answers, strict=True):
        histories[number] += answer.tokens


def _finish(engine: Engine, side: Side, before: Usage, tier: Path | None) -> None:
    settle()
    engine.generate([list(range(FLUSH_TOKENS))], 1)
    side.usage = usage_of(engine).since(before)
    if tier is None:
        return
    prefix = "vllm:memkv_engines_"
    metrics = engine.metrics()
    side.stored = {name.removeprefix(prefix): metrics[name] for name in sorted(metrics) if name.startswith(prefix)}
    payload = contents_of(tier).payload()
    side.stored["distinct_payload_bytes"] = payload.distinct
    side.stored["payload_bytes_in_tier"] = payload.written


# --------------------------------------------------------------------------------------------------------- the result


def summarise(rounds: Sequence[dict[str, Side]], plan: ConversationPlan) -> dict[str, Any]:
    """Returns the numbers of all rounds, with the ratios of the two engines."""
    sides = {side: [one[side] for one in rounds] for side in SIDES}
    body: dict[str, Any] = {side: _side_numbers(runs) for side, runs in sides.items()}
    rates = {side: [_rate(run) for run in runs] for side, runs in sides.items()}
    returning = {side: [t for run in runs for turn in run.ttft_s[1:] for t in turn] for side, runs in sides.items()}
    body["throughput_ratio"] = harness.median_of_pair_ratios(rates[CONNECTED], rates[ALONE])
    body["returning_ttft_ratio"] = harness.ratio_of_medians(returning[ALONE], returning[CONNECTED])
    submitted = sum(run.stored["store_payload_bytes"] for run in sides[CONNECTED])
    distinct = sum(run.stored["distinct_payload_bytes"] for run in sides[CONNECTED])
    body["write_amplification"] = submitted / distinct if distinct else None
    body["write_amplification_formula"] = WRITE_AMPLIFICATION
    body["working_set_tokens"] = plan.working_set_tokens
    return body


def _rate(run: Side) -> float:
    return (run.prompt_tokens + run.generated_tokens) / run.wall_s


def _side_numbers(runs: Sequence[Side]) -> dict[str, Any]:
    first = [t for run in runs for t in run.ttft_s[0]]
    returning = [t for run in runs for turn in run.ttft_s[1:] for t in turn]
    return {
        "tokens_per_s": harness.median([_rate(run) for run in runs]),
        "generated_tokens_per_s": harness.median([run.generated_tokens / run.wall_s for run in runs]),
        "wall_s": [run.wall_s for run in runs],
        "requests": len(first) + len(returning),
        "first_turn_ttft_s": percentiles(first),
        "returning_ttft_s": percentiles(returning),
        "prompt_tokens": sum(run.prompt_tokens for run in runs),
        "local_hit_tokens": sum(run.local_tokens for run in runs),
        "external_hit_tokens": sum(run.external_tokens for run in runs),
        "engine_cpu_s": [run.usage.engine_cpu_s for run in runs],
        "io_cpu_s": [run.usage.io_cpu_s for run in runs],
        "io_write_bytes": [run.usage.io_write_bytes for run in runs],
        "stored": [run.stored for run in runs],
        "ttft_s_by_turn": [run.ttft_s for run in runs],
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Returns p50, p90 and p99; empty for no values."""
    return {f"p{percent}": harness.percentile(seconds, percent) for percent in (50, 90, 99)} if seconds else {}
