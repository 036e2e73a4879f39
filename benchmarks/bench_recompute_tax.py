"""The recompute tax: what share of an engine's prefill goes to tokens that it had computed before.

    make bench-recompute-tax                               # a generated trace of conversations
    make bench-recompute-tax ARGS="--trace trace.jsonl"    # one in Mooncake's form (`benchmarks/traces.py`)
    make bench-recompute-tax ARGS=--tiny                   # for the tests; the numbers mean nothing

Two real vLLM engines serve the same trace in turns, request by request: one with its own prefix cache alone, in a KV
pool of a given size, and one with the connector. Hits are the engine's own counters; what had been computed before is
known from the trace. Arrival times give the order; requests are not queued behind each other. Writes JSON and a picture
to `build/benchmarks/`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import cpu_dtype, harness, traces
from benchmarks.demo import tier_folder
from benchmarks.engine_pair import ALONE, CONNECTED, SIDES, engine_pair, settle
from benchmarks.engine_run import Engine, EngineFailed, EngineSpec
from benchmarks.recompute_tax import Served, fit, tax
from benchmarks.traces import Request, TraceError
from tests.environments.engine_env import ROOT

LOGS = ROOT / "build" / "logs"
VOCABULARY = 40_000
# Answers cost decoding, which is not what is asked here.
MAX_OUTPUT_TOKENS = 8
MEANING = {
    "seen_tokens": "leading prompt tokens that an earlier request of the trace had computed, in its whole blocks",
    "computed_tokens": "prompt tokens less those from engine's cache and connector, by the engine's counters",
    "computed_again_tokens": "of them, tokens that had been computed before",
    "tax_tokens_share": "computed_again_tokens / computed_tokens",
    "tax_seconds_share": "the same in prefill seconds, by `prefill`",
    "prefill": "seconds = per_token * tokens + per_pair * (last^2 - first^2), fitted to the times to the first token "
    "of all requests that loaded nothing",
}


@dataclass(frozen=True)
class Plan:
    """What kind of trace, and what kind of engine.

    Attributes:
        conversations, turns, document_tokens, turn_tokens: Of the generated trace.
        trace_block_tokens: Length of its blocks.
        block_size: Of the engine.
        max_model_len: Longest prompt and answer; longer requests of a trace are left out.
        kv_mib: The KV pool, in MiB of bfloat16.
    """

    conversations: int
    turns: int
    document_tokens: int
    turn_tokens: int
    trace_block_tokens: int
    block_size: int
    max_model_len: int
    kv_mib: int


FULL = Plan(
    conversations=6, turns=4, document_tokens=2048, turn_tokens=256, trace_block_tokens=256, block_size=128,
    max_model_len=4096, kv_mib=128,
)  # fmt: skip
TINY = Plan(
    conversations=4, turns=2, document_tokens=320, turn_tokens=64, trace_block_tokens=32, block_size=32,
    max_model_len=512, kv_mib=16,
)  # fmt: skip


def trace_of(arguments: argparse.Namespace, plan: Plan) -> tuple[list[Request], int, int]:
    """Returns the trace, the length of its blocks, and how many requests were left out as too long."""
    if arguments.trace is None:
        block = plan.trace_block_tokens
        made = traces.conversations(
            count=plan.conversations,
            turns=plan.turns,
            document_tokens=plan.document_tokens,
            turn_tokens=plan.turn_tokens,
            output_tokens=MAX_OUTPUT_TOKENS,
            block_tokens=block,
        )
        return made, block, 0
    block = arguments.trace_block_tokens
    found = traces.read_trace(arguments.trace, block, arguments.requests)
    fitting = [one for one in found if one.input_tokens + MAX_OUTPUT_TOKENS <= plan.max_model_len]
    if not fitting:
        raise TraceError(f"no request of {arguments.trace.name} has at most {plan.max_model_len} tokens")
    return fitting, block, len(found) - len(fitting)


def serve(
    engines: dict[str, Engine], trace: Sequence[Request], block_tokens: int, *, settles: bool
) -> dict[str, list[Served]]:
    """Serves a trace with both engines, request by request; who goes first changes.

    Args:
        engines: By `SIDES`.
        trace: What to serve.
        block_tokens: Length of its blocks.
        settles: Wait before each request until the engine asked last stops polling.
    """
    served: dict[str, list[Served]] = {side: [] for side in SIDES}
    for number, (request, seen) in enumerate(zip(trace, traces.seen_tokens(trace, block_tokens), strict=True)):
        prompt = traces.prompt_of(request, block_tokens, VOCABULARY)
        for side in SIDES if number % 2 else SIDES[::-1]:
            if settles:
                settle()
            answer, external = engines[side].ask(prompt, max(1, min(request.output_tokens, MAX_OUTPUT_TOKENS)))
            local = answer.cached_tokens - external
            served[side].append(Served(answer.prompt_tokens, seen, local, external, answer.ttft_s))
        times = ", ".join(f"{side} {served[side][-1].ttft_s:.2f} s" for side in SIDES)
        print(
            f"    request {number + 1} of {len(trace)}, {request.input_tokens} tokens, {seen} seen: {times}", flush=True
        )
    return served


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark; returns its record."""
    plan = TINY if arguments.tiny else FULL
    trace, block_tokens, left_out = trace_of(arguments, plan)
    kv_bytes = arguments.kv_mib << 20 if arguments.kv_mib else cpu_dtype.kv_bytes(plan.kv_mib << 20, arguments.dtype)
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"} if arguments.tiny else {}
    spec = EngineSpec(
        str(arguments.model),
        arguments.dtype,
        threads=arguments.threads,
        arguments={
            "max_model_len": plan.max_model_len,
            "block_size": plan.block_size,
            "kv_cache_memory_bytes": kv_bytes,
            "max_num_batched_tokens": 8192,
            "enable_prefix_caching": True,
        },
        environment=environment,
    )
    # One thread of a busy machine may recompute a short prompt faster than it loads it; there, loading is tested.
    gate = "off" if arguments.tiny else "on"
    with (
        tier_folder(arguments.folder) as tier,
        engine_pair(spec, tier, LOGS, "bench-recompute-tax", cost_gate=gate) as engines,
    ):
        warm_up = Request(0.0, plan.document_tokens, 1, tuple(range(-1, -1 - plan.document_tokens // block_tokens, -1)))
        for engine in engines.values():
            engine.ask(traces.prompt_of(warm_up, block_tokens, VOCABULARY) or [1], 1)
        served = serve(engines, trace, block_tokens, settles=not arguments.tiny)
        environment_now = {**harness.environment(tier), "vllm": version("vllm")}
    cost = fit([*served[ALONE], *served[CONNECTED]])
    return {
        "benchmark": "recompute-tax",
        "tiny": arguments.tiny,
        **{side: tax(served[side], cost) for side in SIDES},
        "prefill": asdict(cost),
        "kv_pool_bytes": kv_bytes,
        "trace": {
            "source": "generated" if arguments.trace is None else arguments.trace.name,
            "requests": len(trace),
            "left_out": left_out,
            "block_tokens": block_tokens,
            "lines": [json_line.as_json() for json_line in trace],
        },
        "plan": asdict(plan),
        "meaning": MEANING,
        "environment": environment_now,
    }


def show(body: dict[str, Any], picture: Path) -> None:
    """Prints the table and draws the tokens by where they came from."""
    sides = [body[side] for side in SIDES]
    rows = [
        ["prompt tokens", *(str(side["prompt_tokens"]) for side in sides)],
        ["  computed before", *(str(side["seen_tokens"]) for side in sides)],
        ["  from the engine's own cache", *(str(side["local_hit_tokens"]) for side in sides)],
        ["  from the tier", *(str(side["external_hit_tokens"]) for side in sides)],
        ["  computed", *(str(side["computed_tokens"]) for side in sides)],
        ["    again", *(str(side["computed_again_tokens"]) for side in sides)],
        ["recompute tax, tokens", *(f"{side['tax_tokens_share']:.1%}" for side in sides)],
        ["recompute tax, prefill seconds", *(f"{side['tax_seconds_share']:.1%}" for side in sides)],
        ["prefill seconds", *(f"{side['prefill_s']:.1f}" for side in sides)],
    ]
    harness.print_table(f"the recompute tax, KV pool of {body['kv_pool_bytes'] >> 20} MiB", ["", *SIDES], rows)
    draw(body, picture)


def draw(body: dict[str, Any], path: Path) -> None:
    """Draws where the prompt tokens came from, one bar a side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 2.8))
    left = [0.0, 0.0]
    parts = {
        "computed for the first time": [
            body[side]["computed_tokens"] - body[side]["computed_again_tokens"] for side in SIDES
        ],
        "computed again": [body[side]["computed_again_tokens"] for side in SIDES],
        "from the engine's own cache": [body[side]["local_hit_tokens"] for side in SIDES],
        "from the tier": [body[side]["external_hit_tokens"] for side in SIDES],
    }
    for (label, values), colour in zip(parts.items(), ("#adb5bd", "#e76f51", "#264653", "#2a9d8f"), strict=True):
        axis.barh(SIDES, values, left=left, label=label, color=colour)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.set(xlabel="prompt tokens of the trace", title="Where the tokens of a conversation trace come from")
    axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def problems_of(body: dict[str, Any]) -> list[str]:
    """Returns why the numbers are not what they claim to be; empty when they are."""
    found = []
    if body[ALONE]["external_hit_tokens"]:
        found.append("the engine without a connector hit a tier")
    if not body[ALONE]["computed_again_tokens"]:
        found.append("nothing was computed again: the trace fits into the KV pool")
    if not body[CONNECTED]["external_hit_tokens"]:
        found.append("nothing came from the tier")
    return found


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the parsed command line."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    parser = argparse.ArgumentParser(
        prog="benchmarks.bench_recompute_tax",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trace", type=Path, help="a trace to replay instead of a generated one")
    parser.add_argument("--requests", type=int, default=60, help="take so many of it (default: %(default)s)")
    parser.add_argument(
        "--trace-block-tokens",
        type=int,
        default=traces.MOONCAKE_BLOCK_TOKENS,
        help="length of the blocks that its hash_ids name (default: %(default)s)",
    )
    parser.add_argument("--kv-mib", type=int, help="the KV pool, in MiB")
    parser.add_argument("--tiny", action="store_true", help="in a minute, for the tests")
    parser.add_argument(
        "--dtype",
        choices=cpu_dtype.DTYPES,
        default=cpu_dtype.native_dtype(),
        help="of weights and KV (default: %(default)s, which this CPU multiplies)",
    )
    parser.add_argument("--threads", default=cores, help="VLLM_CPU_OMP_THREADS_BIND (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "smollm2", help="the model's folder")
    parser.add_argument("--folder", type=Path, default=ROOT / "build", help="where the tier's directory is made")
    parser.add_argument("--output", type=Path, default=harness.BUILD, help="folder for the JSON and the picture")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0 only when it measured what it claims."""
    # `make` ends this with SIGTERM: unwinding ends the engines too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parsed = parse_arguments(arguments)
    try:
        body = bench(parsed)
    except (EngineFailed, TraceError, OSError, ValueError) as error:
        print(f"the benchmark failed: {error}", file=sys.stderr)
        return 1
    output = harness.write_json(body, parsed.output / "recompute-tax.json")
    show(body, output.with_suffix(".png"))
    print(f"wrote {output} and {output.with_suffix('.png').name}")
    problems = problems_of(body)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
