"""Shows a real vLLM skip the prefill of long documents because their KV cache came back from disk.

    make demo                        # or: python -m benchmarks.demo
    make demo ARGS=--quick           # shorter prompts, fp32 only; the numbers mean little
    make demo ARGS=--tiny            # shorter still, for the tests

For each dtype three engine processes run one after the other: one without the connector, one that stores, and one
that finds everything on disk. Writes `build/demo.json` and `build/demo.png`; fails when tokens differ or the restore
did not hit.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import cpu_dtype, harness
from benchmarks.demo_phases import (
    DemoFailed,
    Settings,
    candidate_settings,
    first_visit,
    measure_settings,
    recompute,
    restart,
)
from benchmarks.demo_report import MEANING, Row, draw, print_table
from benchmarks.demo_workload import Workload, build_workload
from benchmarks.engine_run import EngineFailed, EngineSpec
from benchmarks.harness import Progress
from tests.environments.engine_env import ROOT

# Several blocks make a chunk; vLLM's default on a CPU, 128, would fill one with a single block.
BLOCK_SIZE = 32
MAX_MODEL_LEN = 8192
KV_CACHE_BYTES = 1 << 30
LOGS = ROOT / "build" / "logs"


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        prompts: Different prompts.
        prompt_tokens: Length of each.
        repeats: Local hits and restores of each prompt.
        dtypes: One row each; the first is the one whose numbers stand at the top of the JSON.
        tune: Try the engine's settings first and take the fastest.
        environment: Variables for the engine's processes.
    """

    prompts: int
    prompt_tokens: int
    repeats: int
    dtypes: tuple[str, ...]
    tune: bool
    environment: Mapping[str, str] = field(default_factory=dict)


# bfloat16 only where the CPU multiplies it: elsewhere it takes a hundred times as long.
DTYPES = tuple(dict.fromkeys((cpu_dtype.FLOAT32, cpu_dtype.native_dtype())))
FULL = Plan(prompts=4, prompt_tokens=6200, repeats=4, dtypes=DTYPES, tune=True)
QUICK = Plan(prompts=2, prompt_tokens=1500, repeats=1, dtypes=("float32",), tune=False)
# An engine in one process starts in a third of the time.
TINY = Plan(
    prompts=2,
    prompt_tokens=500,
    repeats=1,
    dtypes=("float32",),
    tune=False,
    environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"},
)


def choose_settings(spec: EngineSpec, workload: Workload, say: Progress) -> tuple[Settings, list[dict[str, Any]]]:
    """Tries the candidate settings on one computed prompt each.

    Returns:
        The fastest, and what was measured of each.
    """
    tried: list[tuple[float, Settings]] = []
    say(f"best settings of the engine alone, {spec.dtype}")
    for settings in candidate_settings(workload.prompt_tokens):
        seconds = measure_settings(spec, settings, workload, LOGS / "demo-settings.log")
        say.detail(f"threads {settings.threads}, batches of {settings.batch_tokens} tokens: {seconds:.2f} s")
        tried.append((seconds, settings))
    measured = [{**asdict(settings), "recompute_ttft_s": seconds} for seconds, settings in tried]
    return min(tried, key=lambda pair: pair[0])[1], measured


def measure(spec: EngineSpec, settings: Settings, workload: Workload, plan: Plan, tier: Path, say: Progress) -> Row:
    """Runs the three engine processes of one dtype."""
    alone = settings.applied_to(spec)
    connected = replace(alone, connector={"path": str(tier)})
    name = f"demo-{spec.dtype}"
    say(f"{spec.dtype}, engine 1 of 3: without the connector")
    alone_result = recompute(alone, workload, plan.repeats, LOGS / f"{name}-recompute.log", say.detail)
    say(f"{spec.dtype}, engine 2 of 3: first visit, stores into an empty tier")
    visit = first_visit(connected, workload, tier, BLOCK_SIZE, LOGS / f"{name}-first-visit.log", say.detail)
    say(f"{spec.dtype}, engine 3 of 3: a fresh process, page cache dropped before each restore")
    again = restart(connected, workload, visit.files, plan.repeats, LOGS / f"{name}-restart.log", say.detail)
    return Row(spec.dtype, settings, workload, BLOCK_SIZE, alone_result, visit, again)


def run(plan: Plan, model: Path, folder: Path, say: Progress) -> tuple[dict[str, Any], list[str]]:
    """Measures every dtype of the plan.

    Returns:
        The content of the JSON file, and why the demo failed, if it did.
    """
    say(f"preparing {plan.prompts} prompts of {plan.prompt_tokens} tokens")
    workload = build_workload(str(model), plan.prompts, plan.prompt_tokens, BLOCK_SIZE)
    arguments = {
        "max_model_len": MAX_MODEL_LEN,
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "enable_prefix_caching": True,
    }
    specs = [EngineSpec(str(model), dtype, arguments=arguments, environment=plan.environment) for dtype in plan.dtypes]
    settings = candidate_settings(plan.prompt_tokens)[-1]
    tried: list[dict[str, Any]] = []
    if plan.tune:
        settings, tried = choose_settings(specs[0], workload, say)
    rows, failures = [], []
    for spec in specs:
        with tier_folder(folder) as tier:
            row = measure(spec, settings, workload, plan, tier, say)
            rows.append(row.numbers())
            failures += row.failures()
    first, *others = rows
    body = {
        "model": model.name,
        **first,
        **{SHORT_NAMES.get(row["dtype"], row["dtype"]): row for row in others},
        "settings": {**asdict(settings), **arguments, "tried": tried},
        "environment": {**harness.environment(folder), "vllm": version("vllm"), "torch": version("torch")},
        "meaning": MEANING,
    }
    return body, failures


SHORT_NAMES = {"bfloat16": "bf16", "float32": "fp32"}


@contextmanager
def tier_folder(parent: Path) -> Iterator[Path]:
    """Makes an empty tier directory and removes it afterwards."""
    parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="demo-tier-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two short prompts, fp32 only, settings not tuned")
    size.add_argument("--tiny", action="store_true", help="shorter still, one process for each engine; for the tests")
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "smollm2", help="the model's folder")
    parser.add_argument("--folder", type=Path, default=ROOT / "build", help="where the tier's directory is made")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "demo.json", help="results; the picture goes beside"
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Runs the demo; returns 0 only when it showed what it claims."""
    # `make` ends this with SIGTERM: unwinding ends the engines too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments = parse_arguments()
    plan = TINY if arguments.tiny else QUICK if arguments.quick else FULL
    say = Progress()
    try:
        body, failures = run(plan, arguments.model, arguments.folder, say)
    except (DemoFailed, EngineFailed) as error:
        print(f"\nthe demo failed: {error}", file=sys.stderr)
        return 1
    picture = arguments.output.with_suffix(".png")
    rows = [body, *(body[name] for name in SHORT_NAMES.values() if name in body)]
    harness.write_json(body, arguments.output)
    draw(rows, picture)
    print_table(rows)
    say(f"wrote {arguments.output} and {picture}")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
