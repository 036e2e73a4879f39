"""Multi-turn conversations in a real SGLang on a CPU: without storage, with its own `file` backend, and with ours.

    make bench-sglang                         # four engines in turns, about 12 minutes
    make bench-sglang ARGS=--warm             # leaves what was stored in the page cache
    make bench-sglang ARGS=--tiny             # for the tests; the numbers mean nothing

All engines live at once and are asked for the same prompts in turns. The conversations outgrow device and host pool, so
that whoever returns has been thrown out meanwhile. Writes JSON and a picture to `build/benchmarks/`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import cpu_dtype, harness, sglang_conversations
from benchmarks.harness import Progress
from benchmarks.sglang_backend import FILE, LINKER, MEMKV, PAGE_TOKENS, Backend
from benchmarks.sglang_conversations import BASELINES, NONE, SIDES, Side
from benchmarks.vllm_conversations import ConversationPlan
from tests.engines.sglang.engines import PAGE_TOKENS as TINY_PAGE_TOKENS
from tests.engines.sglang.engines import TOLERANCE, Engine
from tests.engines.sglang.forked_engines import ForkedEngine
from tests.environments.engine_env import ROOT
from tests.environments.sglang_models import ensure_model

LOGS = ROOT / "build" / "logs"
# All start at once.
START_TIMEOUT_S = 480.0
# What a prefetch brings and what still lies on the device have room in the host pool together, and nothing else has.
HOST_RATIO = 2.0
RETURNING_HIT_SHARE = 0.5


@dataclass(frozen=True)
class Plan:
    """What to run, and in what kind of engine.

    Attributes:
        model: A model's name.
        load: The conversations.
        arguments: Of every engine, beside its backend's.
    """

    model: str
    load: ConversationPlan
    arguments: Mapping[str, Any]


FULL = Plan(
    "smollm2",
    ConversationPlan(
        conversations=4, turns=3, document_tokens=3000, user_tokens=96, answer_tokens=1, together=1, rounds=3
    ),
    {
        "dtype": cpu_dtype.native_dtype(),
        "page_size": PAGE_TOKENS,
        # One conversation, and a little.
        "max_total_tokens": 60 * PAGE_TOKENS,
        "context_length": 4096,
        "hicache_ratio": HOST_RATIO,
        "disable_overlap_schedule": False,
        # An idle engine must leave the cores to the one that works.
        "sleep_on_idle": True,
    },
)
TINY = Plan(
    "tiny-sg-llama",
    ConversationPlan(
        conversations=4, turns=2, document_tokens=400, user_tokens=48, answer_tokens=1, together=1, rounds=1
    ),
    {
        "dtype": "float32",
        "page_size": TINY_PAGE_TOKENS,
        "max_total_tokens": 33 * TINY_PAGE_TOKENS,
        "hicache_ratio": HOST_RATIO,
        "sleep_on_idle": True,
    },
)


def start(name: str, plan: Plan, folder: Path) -> Side:
    """Starts one side's engine and waits until it answers."""
    backend = None if name == NONE else Backend(name, folder / name, "off" if plan is TINY else "on")
    if backend:
        backend.folder.mkdir()
    arguments = {**(backend.arguments() if backend else {}), **plan.arguments}
    log = LOGS / f"bench-sglang-{name}.log"
    if plan is TINY:
        return Side(ForkedEngine(plan.model, log=log, **arguments), backend)
    # Tests give an engine one thread; here recomputing gets every core.
    env = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    return Side(Engine(plan.model, log=log, env=env, timeout_s=START_TIMEOUT_S, **arguments), backend)


def end(started: Future[Side]) -> None:
    """Ends a side's engine, if it did start."""
    if not started.exception():
        started.result().engine.shutdown()


@contextmanager
def all_sides(plan: Plan, folder: Path) -> Iterator[dict[str, Side]]:
    """Starts all engines at once and ends them afterwards; yields the sides by `SIDES`."""
    # An engine ends with the thread that started it, so the threads stay until all engines have ended. Forked ones
    # start in a second, from a process that ends with the thread that first asked for it: this one.
    with ThreadPoolExecutor(len(SIDES)) as pool, ExitStack() as stack:
        if plan is TINY:
            sides = {}
            for name in SIDES:
                sides[name] = start(name, plan, folder)
                stack.callback(sides[name].engine.shutdown)
            yield sides
            return
        starting = {name: pool.submit(start, name, plan, folder) for name in SIDES}
        for future in starting.values():
            stack.callback(end, future)
        yield {name: future.result() for name, future in starting.items()}


def bench(plan: Plan, folder: Path, *, cold: bool) -> dict[str, Any]:
    """Runs the benchmark.

    Args:
        plan: What to run.
        folder: Where the sides store; made and removed here.
        cold: Drop what was stored from the page cache before each turn.

    Returns:
        The benchmark's record.
    """
    say, load = Progress(), plan.load
    model = ensure_model(plan.model)
    LOGS.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-sglang-", dir=folder, ignore_cleanup_errors=True) as scratch:
        say(f"starts {len(SIDES)} engines at once")
        with all_sides(plan, Path(scratch)) as sides:
            say(f"rounds: {load.rounds}, conversations in each: {load.conversations}, turns in each: {load.turns}")
            ticks = harness.cpu_ticks()
            sglang_conversations.run(sides, load, model, say, cold=cold)
            stolen = harness.stolen_share(ticks, harness.cpu_ticks())
            numbers = sglang_conversations.summarise(sides, load)
        environment = {**harness.environment(Path(scratch)), "sglang": version("sglang"), "stolen_share": stolen}
    return {
        "benchmark": "sglang-conversations",
        **numbers,
        "page_cache": "cold" if cold else "warm",
        "model": plan.model,
        "plan": asdict(load),
        "engine": dict(plan.arguments),
        "environment": environment,
    }


# ---------------------------------------------------------------------------------------------------------- showing it


def show(body: dict[str, Any], picture: Path) -> None:
    """Prints the tables and draws the times to the first token."""
    sides = [body[side] for side in SIDES]
    rows = [["tokens/s, prompt and answer", *(f"{side['tokens_per_s']:.0f}" for side in sides)]]
    for name, key in (("first turn", "first_turn_ttft_s"), ("later turns", "returning_ttft_s")):
        rows += [[f"TTFT {p}, {name}", *(f"{side[key][p]:.3f} s" for side in sides)] for p in ("p50", "p90", "p99")]
    rows.append(["prompt tokens", *(str(side["prompt_tokens"]) for side in sides)])
    for source in sglang_conversations.SOURCES:
        rows.append([f"  from {source}", *(str(side["hit_tokens"][source]) for side in sides)])
    rows += [
        ["hit share, later turns", *(f"{side['returning_hit_share']:.1%}" for side in sides)],
        ["CPU s of SGLang", *(f"{sum(side['engine_cpu_s']):.1f}" for side in sides)],
        ["CPU s of the I/O process", *(f"{sum(side['io_cpu_s']):.2f}" for side in sides)],
        ["stored", *(f"{side['stored']['bytes'] / 1e6:.1f} MB" for side in sides)],
        ["objects", *(str(side["stored"]["objects"]) for side in sides)],
    ]
    title = f"SGLang, conversations that outgrow its pools, {body['page_cache']} page cache"
    harness.print_table(title, ["", *SIDES], rows)
    print("A linker has no host pool: SGLang counts what it brings from the tier as `host`.")
    for baseline in BASELINES:
        _show_ratios(body["ratios"][baseline], baseline)
    agreement = body["agreement"]
    print(
        f"same first token on all sides: {agreement['all_sides_share']:.1%} of the requests; "
        f"log-probabilities differ by up to {agreement['largest_logprob_difference']:.2g}"
    )
    lines = {
        side: [(turn + 1.0, harness.median(times)) for turn, times in enumerate(body[side]["ttft_s_by_turn"])]
        for side in SIDES
    }
    harness.plot_lines(picture, "SGLang, conversations that outgrow its pools", "turn", "median TTFT, s", {"": lines})


def _show_ratios(ratios: dict[str, dict[str, Sequence[float]]], baseline: str) -> None:
    labels = {"throughput": "throughput", "first_turn_ttft": "first TTFT", "returning_ttft": "later TTFT"}
    rows = [[label, *(_interval(of_side[key]) for of_side in ratios.values())] for key, label in labels.items()]
    harness.print_table(f"times better than {baseline} [95% interval over pairs]", ["", *ratios], rows)


def _interval(values: Sequence[float]) -> str:
    middle, low, high = values
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


# ---------------------------------------------------------------------------------------------------------------- main


def problems_of(body: dict[str, Any], *, exact: bool) -> list[str]:
    """Returns why the numbers are not what they claim to be; empty when they are.

    Args:
        body: The record.
        exact: All sides must answer alike, as they do in float32.
    """
    found = [
        f"{side}: later turns hit only {body[side]['returning_hit_share']:.1%}"
        for side in (FILE, MEMKV, LINKER)
        if body[side]["returning_hit_share"] < RETURNING_HIT_SHARE
    ]
    if body[NONE]["returning_hit_share"] > 1 - RETURNING_HIT_SHARE:
        found.append("the conversations fit into the device's pool")
    found += [
        f"{side}: more came from the host pool than from storage"
        for side in (FILE, MEMKV)
        if body[side]["hit_tokens"]["host"] > body[side]["hit_tokens"]["storage"]
    ]
    agreement = body["agreement"]
    if exact and (agreement["all_sides_share"] < 1 or agreement["largest_logprob_difference"] > TOLERANCE):
        found.append("the sides do not answer alike")
    return found


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.bench_sglang",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tiny", action="store_true", help="in two minutes, for the tests")
    parser.add_argument("--warm", action="store_true", help="leave what was stored in the page cache")
    parser.add_argument("--folder", type=Path, default=ROOT / "build", help="where the sides store")
    parser.add_argument("--output", type=Path, default=harness.BUILD, help="folder for the JSON and the picture")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0 only when it measured what it claims."""
    parsed = parse_arguments(arguments)
    body = bench(TINY if parsed.tiny else FULL, parsed.folder, cold=not parsed.warm)
    body["tiny"] = parsed.tiny
    output = harness.write_json(body, parsed.output / "bench_sglang.json")
    show(body, output.with_suffix(".png"))
    print(f"wrote {output} and {output.with_suffix('.png').name}")
    problems = problems_of(body, exact=parsed.tiny)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    # `make` ends this with SIGTERM: unwinding ends the engines and removes what they stored.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise SystemExit(main())
