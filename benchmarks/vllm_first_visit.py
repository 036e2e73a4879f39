"""What storing costs a prompt that the tier has never seen: pairs of bursts, with and without the connector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.engine_pair import ALONE, CONNECTED, SIDES, Usage, settle, usage_of
from benchmarks.engine_run import Engine
from benchmarks.texts import documents
from benchmarks.tier_files import contents_of, wait_for_blocks

CHARS_PER_TOKEN = 5
ANSWER_TOKENS = 16
STORING_SHARE = (
    "CPU seconds of the connector's I/O processes, until the last chunk is written, "
    "/ CPU seconds of the engine without the connector from the burst's start to its last token"
)
ENGINE_SHARE = "CPU seconds of vLLM's own processes over a burst, with the connector / without it"


@dataclass(frozen=True)
class FirstVisitPlan:
    """How much to measure.

    Attributes:
        pairs: Bursts on each engine.
        burst: Prompts asked one right after the other, so that the stores of one meet the prefill of the next.
        prompt_tokens: Length of each prompt; all are different.
    """

    pairs: int
    burst: int
    prompt_tokens: int


@dataclass(frozen=True)
class Burst:
    """What one engine did with one burst.

    Attributes:
        ttft_s: Of each prompt.
        wall_s: Of the whole burst.
        tokens: Prompt and answer tokens of the burst.
        usage: CPU and I/O, the engine's own until the last token, the I/O processes' until all is stored.
        stored_blocks: Blocks that arrived in the tier.
    """

    ttft_s: tuple[float, ...]
    wall_s: float
    tokens: int
    usage: Usage
    stored_blocks: int


def run_pairs(
    engines: Mapping[str, Engine], plan: FirstVisitPlan, block_size: int, model: str, tier: Path
) -> dict[str, list[Burst]]:
    """Runs the bursts, in turns on two engines; the one that goes first alternates.

    Args:
        engines: Both, by `SIDES`; nothing but this may use them meanwhile.
        plan: What to run.
        block_size: Tokens in a block of the engines.
        model: Folder with the tokenizer.
        tier: The directory of the connected engine's tier.
    """
    *prompts, warm_up = _prompts(model, plan)
    bursts: dict[str, list[Burst]] = {side: [] for side in SIDES}
    for engine in engines.values():
        engine.ask(warm_up, ANSWER_TOKENS)
    for pair in range(plan.pairs):
        burst = prompts[pair * plan.burst : (pair + 1) * plan.burst]
        for side in SIDES if pair % 2 == 0 else SIDES[::-1]:
            settle()
            bursts[side].append(_run_burst(engines[side], burst, tier if side == CONNECTED else None, block_size))
    return bursts


def _prompts(model: str, plan: FirstVisitPlan) -> list[list[int]]:
    """Returns the prompts of all bursts, and one more to warm up with; each begins like no other text here."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    found = documents(plan.pairs * plan.burst + 1, plan.prompt_tokens * CHARS_PER_TOKEN)
    texts = [f"A first visit to {document.title}.\n{document.body}" for document in found]
    return [tokenizer.encode(text, add_special_tokens=False).ids[: plan.prompt_tokens] for text in texts]


def _run_burst(engine: Engine, prompts: Sequence[Sequence[int]], tier: Path | None, block_size: int) -> Burst:
    earlier = contents_of(tier) if tier else None
    before = usage_of(engine)
    batches = [engine.generate([prompt], ANSWER_TOKENS) for prompt in prompts]
    used = usage_of(engine).since(before)
    stored_blocks = 0
    if tier is not None and earlier is not None:
        expected = sum(len(prompt) // block_size for prompt in prompts)
        stored_blocks = wait_for_blocks(tier, earlier, expected).blocks
        final = usage_of(engine).since(before)
        used = Usage(used.engine_cpu_s, final.io_cpu_s, final.io_write_bytes)
    answers = [answer for batch in batches for answer in batch.answers]
    return Burst(
        tuple(answer.ttft_s for answer in answers),
        sum(batch.wall_s for batch in batches),
        sum(answer.prompt_tokens + len(answer.tokens) for answer in answers),
        used,
        stored_blocks,
    )


def summarise(bursts: dict[str, list[Burst]], plan: FirstVisitPlan) -> dict[str, Any]:
    """Returns the ratios of the two engines, each with its 95% interval, and the numbers behind them."""
    ttft = {side: [t for burst in bursts[side] for t in burst.ttft_s] for side in SIDES}
    rate = {side: [burst.tokens / burst.wall_s for burst in bursts[side]] for side in SIDES}
    cpu = {side: [burst.usage.engine_cpu_s for burst in bursts[side]] for side in SIDES}
    io_cpu = [burst.usage.io_cpu_s for burst in bursts[CONNECTED]]
    return {
        "pairs": plan.pairs,
        "prompts_per_burst": plan.burst,
        "prompt_tokens": plan.prompt_tokens,
        "ttft_s": {side: harness.median(ttft[side]) for side in SIDES},
        "ttft_ratio": harness.median_of_pair_ratios(ttft[CONNECTED], ttft[ALONE]),
        "tokens_per_s": {side: harness.median(rate[side]) for side in SIDES},
        "throughput_ratio": harness.median_of_pair_ratios(rate[CONNECTED], rate[ALONE]),
        "storing_cpu_share": harness.median_of_pair_ratios(io_cpu, cpu[ALONE]),
        "storing_cpu_share_formula": STORING_SHARE,
        "engine_cpu_ratio": harness.median_of_pair_ratios(cpu[CONNECTED], cpu[ALONE]),
        "engine_cpu_ratio_formula": ENGINE_SHARE,
        "engine_cpu_s": cpu,
        "io_cpu_s": io_cpu,
        "io_write_bytes": [burst.usage.io_write_bytes for burst in bursts[CONNECTED]],
        "stored_blocks": [burst.stored_blocks for burst in bursts[CONNECTED]],
        "ttft_s_all": ttft,
        "tokens_per_s_all": rate,
    }
