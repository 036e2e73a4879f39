"""Shows a real SGLang bring the KV cache of long documents back from disk, beside SGLang's own `file` backend.

    make demo-sglang                          # or: python -m benchmarks.demo_sglang
    make demo-sglang ARGS=--quick             # one prompt, once
    make demo-sglang ARGS=--tiny              # for the tests; the numbers mean nothing

Three engines take turns: with our hierarchical cache backend, with our linker and with `file`. All compute and store
the prompts, all are ended, all start again as fresh processes; then each prompt is restored by one after the other,
page cache cold, device and host cache flushed, and beside each restore of ours its files are read raw. What a restore
costs is told by timers inside the engine (`restore_timers`): SGLang's CPU attention goes over the whole prefix even
where nothing is computed, so that times to the first token say little. Writes `build/demo_sglang.json` and
`build/demo_sglang.png`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import cpu_dtype, harness
from benchmarks.demo_sglang_phases import Plan, Side, first_visits, restores
from benchmarks.demo_sglang_report import draw, record_of, show
from benchmarks.demo_workload import build_workload
from benchmarks.harness import Progress
from benchmarks.sglang_backend import FILE, LINKER, MEMKV
from tests.engines.prompts import tokens_of
from tests.environments.engine_env import ROOT
from tests.environments.sglang_models import ensure_model

FULL = Plan(
    "smollm2",
    3,
    6200,
    6,
    {
        "max_total_tokens": 24_576,
        "context_length": 8192,
        "dtype": cpu_dtype.native_dtype(),
        "disable_overlap_schedule": False,
        # Engines take turns: an idle one must leave the cores to the one that works.
        "sleep_on_idle": True,
    },
)
QUICK = replace(FULL, prompts=1, rounds=1)
TINY = Plan("tiny-sg-llama", 2, 600, 1, light=True)


def main(argv: Sequence[str]) -> int:
    """Run the demo.

    Returns:
        0; 1 if an answer changed or the restore did not hit.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.demo_sglang", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="in a minute, for the tests; the numbers mean nothing")
    parser.add_argument("--quick", action="store_true", help="one prompt, once")
    parser.add_argument("--output", type=Path, default=ROOT / "build", help="folder for the JSON and the picture")
    arguments = parser.parse_args(argv)
    plan, say = TINY if arguments.tiny else QUICK if arguments.quick else FULL, Progress()
    logs = ROOT / "build" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.tiny:
        prompts: list[Sequence[int]] = [tokens_of(seed, plan.prompt_tokens) for seed in range(5, 5 + plan.prompts)]
    else:
        prompts = list(build_workload(str(ensure_model(plan.model)), plan.prompts, plan.prompt_tokens, 64).prompts)
    scratch = Path(tempfile.mkdtemp(prefix="demo-sglang-", dir=arguments.output))
    try:
        gate = "off" if arguments.tiny else "on"
        sides = {name: Side(name, scratch / name, gate) for name in (FILE, MEMKV, LINKER)}
        for side in sides.values():
            side.folder.mkdir()
        first_visits(list(sides.values()), plan, prompts, logs, say)
        restores(list(sides.values()), plan, prompts, logs, say)
        record = {**record_of(sides, plan), "environment": harness.environment(scratch)}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    harness.write_json(record, arguments.output / "demo_sglang.json")
    draw(record, arguments.output / "demo_sglang.png")
    show(record)
    say("wrote demo_sglang.json and demo_sglang.png")
    hit = min(record["external_hit_tokens"], record["linker_hit_tokens"]) >= 0.9 * plan.prompt_tokens
    if not hit:
        print("the restore did not hit: see build/logs", file=sys.stderr)
    return 0 if record["tokens_equal"] and hit else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
