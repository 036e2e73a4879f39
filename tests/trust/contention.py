"""Preempt, abort, finish, under memory pressure in a real vLLM: every stored chunk is compared with a recomputation.

    .venvs/vllm/bin/python -m tests.trust.contention                       # 10,000 rounds (about half an hour)
    .venvs/vllm/bin/python -m tests.trust.contention --rounds 200 --variants threads --seed 7 --add

A round is one request that ends: it finishes, or is aborted while it waits, loads or runs; preemptions are counted
beside, by the engine. How it is done and compared is in `tests/engines/vllm/contention.py`. The control plays some
rounds without the fence that keeps pages until they have been copied: it must show contaminated chunks.

Writes build/contention.json. Exit status 0: enough rounds, with preemptions and aborts in each variant, no contaminated
chunk and no wrong token, and contaminated chunks in the control; 1: not so; 2: wrong usage. Runs in `.venvs/vllm`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.engines.vllm.scenario import LONG_TIMEOUT_S, Reports, Step, play, start
from tests.trust import report

MODEL = "tiny-llama"
KV_BYTES_PER_TOKEN = 4096  # of this model in float32
ROUNDS_PER_ENGINE = 250
SCARCE = "threads, scarce staging"
CONTROL = "control: no fence"
# Of figures that are not counts, what tells most.
WORST = {"worst_difference": max, "closest_foreign": min}
CLEAN = {"max_model_len": 1024, "max_num_batched_tokens": 1024, "enable_prefix_caching": False}


@dataclass(frozen=True)
class Variant:
    """One way to run the engine.

    Attributes:
        pages: KV blocks that the engine has; the longest request needs 24 of 32 tokens.
        block_tokens: tokens in each.
        before: steps before the engine starts.
        start: arguments of the start.
        extra: of the connector.
        after: steps once it has started.
        freezes: of the I/O process, other than usual (`Contention`).
    """

    pages: int = 32
    block_tokens: int = 32
    before: tuple[Step, ...] = ()
    start: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    after: tuple[Step, ...] = ()
    freezes: dict[str, float] = field(default_factory=dict)


VARIANTS = {
    "child process": Variant(),
    "child process, async scheduling": Variant(16, 64, start={"force_async_scheduling": True}),
    "threads": Variant(28, extra={"io_process": "off"}),
    # Chunks are shed, and stored when their requests have ended and their pages are free.
    SCARCE: Variant(44, extra={"io_process": "off"}, after=({"do": "scarce", "share": 0.8},)),
    "device path (fake driver)": Variant(26, before=({"do": "fake_gpu", "kernels": True},)),
}


def one_engine(variant: Variant, rounds: int, seed: int) -> dict[str, Any]:
    """Play some rounds in one engine and compare what they stored; an engine that dies is told as well."""
    engine = {
        "block_size": variant.block_tokens,
        "kv_cache_memory_bytes": variant.pages * variant.block_tokens * KV_BYTES_PER_TOKEN,
        "max_model_len": 768,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 10,
    }
    with tempfile.TemporaryDirectory() as folder:
        tier, trace = Path(folder, "kv"), Path(folder, "trace.json")
        played, compared = Reports(), Reports()
        try:
            played = play(
                *variant.before,
                start(MODEL, tier, engine=engine, **variant.extra) | variant.start,
                *variant.after,
                {"do": "contend", "name": "rounds", "rounds": rounds, "seed": seed, "trace": str(trace)}
                | variant.freezes,
                timeout_s=LONG_TIMEOUT_S,
            )
            compared = play(
                start(MODEL, engine={**CLEAN, "block_size": variant.block_tokens}),
                {"do": "recompute", "name": "compared", "tier": str(tier), "trace": str(trace)},
                timeout_s=LONG_TIMEOUT_S,
            )
        except AssertionError as error:
            return {"engines": 1, "dead_engines": 1, "notes": [str(error)[-2000:]]}
    counted = played["rounds"].pop("counted")
    return {
        "engines": 1,
        "dead_engines": 0,
        "notes": [],
        **played["rounds"],
        "counted": counted,
        **compared["compared"],
    }


def play_variant(name: str, rounds: int, seed: int, progress: tqdm[Any]) -> dict[str, Any]:
    """As many engines as it takes; the sum."""
    total: dict[str, Any] = {}
    done = 0
    while done < rounds:
        step = min(ROUNDS_PER_ENGINE, rounds - done)
        found = one_engine(VARIANTS.get(name) or control(), step, seed + done)
        report.added(total, found, **WORST)
        done += step
        progress.update(step)
    return total


def control() -> Variant:
    """The same without the fence, and with gathers so late that pages have been given to others meanwhile."""
    return Variant(after=({"do": "unfence"},), freezes={"freeze_s": 0.2, "freeze_per_step": 0.2})


def broken(name: str, found: dict[str, Any]) -> list[str]:
    """What does not hold for a variant."""
    if found["dead_engines"]:
        return [f"{name}: {found['dead_engines']} dead engines: {found['notes'][:1]}"]
    if name == CONTROL:
        return [] if found["contaminated"] else [f"{name}: nothing was contaminated: the comparison proves nothing"]
    told = []
    if found["contaminated"] or found["wrong_tokens"]:
        told.append(
            f"{found['contaminated']} contaminated chunks, {found['wrong_tokens']} wrong tokens: {found['examples']}"
        )
    if not found["chunks"] or not found["answer_tokens"] or not found["counted"].get("external"):
        told.append("nothing was stored, answered or loaded")
    if not found["counted"].get("preemptions"):
        told.append("no preemption: no pressure")
    if not any(way.startswith("aborted") for way in found["ways"]):
        told.append("no abort")
    if name == SCARCE and not found["counted"].get("store_leftovers"):
        told.append("nothing was stored after its request had ended")
    if found["closest_foreign"] < 1000 * max(found["worst_difference"], 1e-3):
        told.append(f"another block may differ by as little as {found['closest_foreign']:.3g}")
    if found["counted"].get("boundary_errors"):
        told.append(f"{found['counted']['boundary_errors']} errors at the boundary")
    return [f"{name}: {what}" for what in told]


def row_of(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The line of the table."""
    ways, counted = found.get("ways", {}), found.get("counted", {})
    return {
        "variant": name,
        "rounds": found.get("rounds", 0),
        "finished": ways.get("finished", 0),
        "aborted": sum(count for way, count in ways.items() if way.startswith("aborted")),
        "preemptions": counted.get("preemptions", 0),
        "restored tokens": counted.get("external", 0),
        "chunks": found.get("chunks", 0),
        "blocks": found.get("blocks", 0),
        "contaminated": found.get("contaminated", 0),
        "wrong tokens": f"{found.get('wrong_tokens', 0)} of {found.get('answer_tokens', 0)}",
        "dead engines": found["dead_engines"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Play, compare, show, write."""
    parser = report.parser(__doc__ or "", "contention.json")
    parser.add_argument("--rounds", type=int, default=10_000, help="of all variants together")
    parser.add_argument("--control-rounds", type=int, default=250, help="0 only with --add")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--add", action="store_true", help="add to the report that is there; give another seed")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.control_rounds < (not options.add):
        parser.error("--rounds, --control-rounds: give at least 1")
    each = -(-options.rounds // len(options.variants))
    found: dict[str, dict[str, Any]] = {}
    with tqdm(total=each * len(options.variants) + options.control_rounds, unit="round", disable=None) as progress:
        for name in options.variants:
            found[name] = play_variant(name, each, options.seed, progress)
        if options.control_rounds:
            found[CONTROL] = play_variant(CONTROL, options.control_rounds, options.seed, progress)
    if options.add and options.output.exists():
        for name, before in json.loads(options.output.read_text())["variants"].items():
            found[name] = report.added(before, found.get(name, {}), **WORST)
    if CONTROL not in found:
        parser.error("--control-rounds: the report has none so far")
    wrong = [line for name, variant in found.items() for line in broken(name, variant)]
    return report.conclude(options, {"variants": found}, [row_of(*item) for item in found.items()], wrong)


if __name__ == "__main__":
    sys.exit(main())
