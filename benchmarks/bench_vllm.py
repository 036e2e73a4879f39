"""vLLM with and without the connector: conversations that outgrow the KV memory, and the price of a first visit.

    make bench-vllm                            # multi-turn conversations
    make bench-vllm ARGS=--first-visit         # stores on and nothing to hit, against no connector
    make bench-vllm ARGS=--tiny                # both in seconds, for the tests; the numbers mean nothing

Both engines live at once and are asked in turns, in the same run. Writes JSON and a picture to `build/benchmarks/`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import cpu_dtype, harness, vllm_conversations, vllm_first_visit
from benchmarks.demo import tier_folder
from benchmarks.engine_pair import ALONE, CONNECTED, SIDES, engine_pair
from benchmarks.engine_run import Engine, EngineFailed, EngineSpec
from benchmarks.vllm_conversations import ConversationPlan, Side
from benchmarks.vllm_first_visit import Burst, FirstVisitPlan
from tests.environments.engine_env import ROOT

BLOCK_SIZE = 32
LOGS = ROOT / "build" / "logs"

CONVERSATIONS = ConversationPlan(
    conversations=6, turns=4, document_tokens=3000, user_tokens=96, answer_tokens=32, together=2, rounds=3
)
TINY_CONVERSATIONS = ConversationPlan(
    conversations=3, turns=2, document_tokens=400, user_tokens=48, answer_tokens=4, together=1, rounds=1
)
FIRST_VISIT = FirstVisitPlan(pairs=6, burst=2, prompt_tokens=6000)
TINY_FIRST_VISIT = FirstVisitPlan(pairs=2, burst=1, prompt_tokens=300)
# In bfloat16.
KV_BYTES = {"conversations": 160 << 20, "tiny": 16 << 20, "first_visit": 1 << 30}


def engine_spec(arguments: argparse.Namespace, kv_bytes: int, max_model_len: int) -> EngineSpec:
    """Returns the engine without the connector; `kv_bytes` is its pool in bfloat16."""
    environment = {}
    if arguments.tiny:
        # One process starts in a third of the time.
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    return EngineSpec(
        str(arguments.model),
        arguments.dtype,
        threads=arguments.threads,
        arguments={
            "max_model_len": max_model_len,
            "block_size": BLOCK_SIZE,
            "kv_cache_memory_bytes": cpu_dtype.kv_bytes(kv_bytes, arguments.dtype),
            "max_num_batched_tokens": 8192,
            "enable_prefix_caching": True,
        },
        environment=environment,
    )


@contextmanager
def fresh_pair(arguments: argparse.Namespace, spec: EngineSpec) -> Iterator[tuple[dict[str, Engine], Path]]:
    """Starts both engines on an empty tier; yields them and the tier's directory."""
    with (
        tier_folder(arguments.folder) as tier,
        engine_pair(spec, tier, LOGS, "bench-vllm") as engines,
    ):
        yield engines, tier


def bench_conversations(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the multi-turn benchmark."""
    spec = engine_spec(arguments, KV_BYTES["conversations"], 4096)
    rounds = []
    for number in range(CONVERSATIONS.rounds):
        print(f"round {number + 1} of {CONVERSATIONS.rounds}: two fresh engines, an empty tier", flush=True)
        with fresh_pair(arguments, spec) as (engines, tier):
            rounds.append(vllm_conversations.run_round(engines, CONVERSATIONS, spec.model, tier))
    return [conversations_result(rounds, CONVERSATIONS, spec)]


def bench_first_visit(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the first-visit benchmark."""
    spec = engine_spec(arguments, KV_BYTES["first_visit"], 8192)
    print(f"{FIRST_VISIT.pairs} pairs of {FIRST_VISIT.burst} prompts, two engines in turns", flush=True)
    with fresh_pair(arguments, spec) as (engines, tier):
        bursts = vllm_first_visit.run_pairs(engines, FIRST_VISIT, BLOCK_SIZE, spec.model, tier)
    return [first_visit_result(bursts, FIRST_VISIT, spec)]


def bench_tiny(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs both benchmarks on one pair of engines, as short as they get."""
    spec = engine_spec(arguments, KV_BYTES["tiny"], 512)
    with fresh_pair(arguments, spec) as (engines, tier):
        bursts = vllm_first_visit.run_pairs(engines, TINY_FIRST_VISIT, BLOCK_SIZE, spec.model, tier)
        sides = vllm_conversations.run_round(engines, TINY_CONVERSATIONS, spec.model, tier)
    return [
        first_visit_result(bursts, TINY_FIRST_VISIT, spec),
        conversations_result([sides], TINY_CONVERSATIONS, spec),
    ]


def conversations_result(rounds: Sequence[dict[str, Side]], plan: ConversationPlan, spec: EngineSpec) -> dict[str, Any]:
    """Returns the multi-turn benchmark's record."""
    numbers = vllm_conversations.summarise(rounds, plan)
    return {"benchmark": "vllm-conversations", **numbers, "plan": asdict(plan), "engine": asdict(spec)}


def first_visit_result(bursts: dict[str, list[Burst]], plan: FirstVisitPlan, spec: EngineSpec) -> dict[str, Any]:
    """Returns the first-visit benchmark's record."""
    numbers = vllm_first_visit.summarise(bursts, plan)
    return {"benchmark": "vllm-first-visit", **numbers, "plan": asdict(plan), "engine": asdict(spec)}


# ---------------------------------------------------------------------------------------------------------- showing it


def show_conversations(body: dict[str, Any], picture: Path) -> None:
    """Prints the multi-turn table and draws the times to the first token."""
    sides = [body[side] for side in SIDES]
    rows = [
        ["tokens/s, prompt and answer", *(f"{side['tokens_per_s']:.0f}" for side in sides)],
        ["generated tokens/s", *(f"{side['generated_tokens_per_s']:.1f}" for side in sides)],
    ]
    for name, key in (("first turn", "first_turn_ttft_s"), ("later turns", "returning_ttft_s")):
        rows += [[f"TTFT {p}, {name}", *(f"{side[key][p]:.3f} s" for side in sides)] for p in ("p50", "p90", "p99")]
    rows += [
        ["prompt tokens", *(str(side["prompt_tokens"]) for side in sides)],
        ["  from the engine's own cache", *(str(side["local_hit_tokens"]) for side in sides)],
        ["  from the tier", *(str(side["external_hit_tokens"]) for side in sides)],
        ["CPU s of vLLM", *(f"{sum(side['engine_cpu_s']):.1f}" for side in sides)],
        ["CPU s of the I/O processes", *(f"{sum(side['io_cpu_s']):.2f}" for side in sides)],
        ["payload stored", "-", f"{_stored(body, 'store_payload_bytes') / 1e6:.1f} MB"],
        ["  of it distinct", "-", f"{_stored(body, 'distinct_payload_bytes') / 1e6:.1f} MB"],
        ["chunks shed", "-", f"{_stored(body, 'store_shed'):.0f}"],
    ]
    harness.print_table("conversations that outgrow the KV memory", ["", *SIDES], rows)
    print(f"throughput: {_interval(body['throughput_ratio'])} of recomputing (95% interval)")
    print(f"later turns: first token {_interval(body['returning_ttft_ratio'])} times sooner")
    amplification = body["write_amplification"]
    print(f"write amplification {amplification:.3f} = {body['write_amplification_formula']}" if amplification else "")
    panel = {
        side: [(turn + 1.0, harness.median(times)) for turn, times in enumerate(_pooled_turns(body[side]))]
        for side in SIDES
    }
    harness.plot_lines(picture, "conversations that outgrow the KV memory", "turn", "median TTFT, s", {"": panel})


def show_first_visit(body: dict[str, Any], picture: Path) -> None:
    """Prints the first-visit table and draws each pair's time to the first token."""
    rows = [
        ["time to first token", *(f"{body['ttft_s'][side]:.3f} s" for side in SIDES), _interval(body["ttft_ratio"])],
        [
            "tokens/s",
            *(f"{body['tokens_per_s'][side]:.0f}" for side in SIDES),
            _interval(body["throughput_ratio"]),
        ],
        [
            "CPU s of vLLM in a burst",
            *(f"{harness.median(body['engine_cpu_s'][side]):.2f}" for side in SIDES),
            _interval(body["engine_cpu_ratio"]),
        ],
        [
            "CPU s of storing / of prefill",
            "",
            f"{harness.median(body['io_cpu_s']):.3f}",
            _interval(body["storing_cpu_share"], digits=4),
        ],
    ]
    harness.print_table("a first visit: stores on, nothing to hit", ["", *SIDES, "ratio, 95% interval"], rows)
    print(f"storing share = {body['storing_cpu_share_formula']}")
    lines = {side: [(n + 1.0, t) for n, t in enumerate(body["ttft_s_all"][side])] for side in SIDES}
    harness.plot_lines(picture, "a first visit: stores on, nothing to hit", "prompt", "TTFT, s", {"": lines})


def _interval(values: Sequence[float], digits: int = 3) -> str:
    middle, low, high = values
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _stored(body: dict[str, Any], name: str) -> float:
    return float(sum(stored.get(name, 0) for stored in body[CONNECTED]["stored"]))


def _pooled_turns(side: dict[str, Any]) -> list[list[float]]:
    return [[t for times in turn for t in times] for turn in zip(*side["ttft_s_by_turn"], strict=True)]


SHOW = {"vllm-conversations": show_conversations, "vllm-first-visit": show_first_visit}


# ---------------------------------------------------------------------------------------------------------------- main


def problems_of(body: dict[str, Any]) -> list[str]:
    """Returns why the numbers are not what they claim to be; empty when they are."""
    if body["benchmark"] == "vllm-first-visit":
        return [] if all(body["stored_blocks"]) else ["a burst left nothing in the tier"]
    found = [] if body[CONNECTED]["external_hit_tokens"] else ["nothing came from the tier"]
    return found + (["the engine without a connector hit a tier"] if body[ALONE]["external_hit_tokens"] else [])


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the parsed command line."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-visit", action="store_true", help="measure the cost of storing instead")
    parser.add_argument("--tiny", action="store_true", help="both benchmarks in seconds, for the tests")
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
    """Runs the chosen benchmark; returns 0 only when it measured what it claims."""
    # `make` ends this with SIGTERM: unwinding ends the engines too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parsed = parse_arguments(arguments)
    bench = bench_tiny if parsed.tiny else bench_first_visit if parsed.first_visit else bench_conversations
    try:
        results = bench(parsed)
    except EngineFailed as error:
        print(f"the benchmark failed: {error}", file=sys.stderr)
        return 1
    problems = []
    for result in results:
        result["environment"] = {**harness.environment(parsed.folder), "vllm": version("vllm")}
        result["tiny"] = parsed.tiny
        output = harness.write_json(result, parsed.output / f"{result['benchmark']}.json")
        SHOW[result["benchmark"]](result, output.with_suffix(".png"))
        print(f"wrote {output} and {output.with_suffix('.png').name}")
        problems += problems_of(result)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
