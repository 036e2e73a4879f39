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
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import cpu_dtype, harness, restore_timers
from benchmarks.demo_workload import build_workload
from benchmarks.tier_files import RawReader, TierContents, contents_of
from tests.engines.prompts import tokens_of
from tests.engines.sglang.engines import Answer, Engine, hicache, linker, memkv_extra, wait_until
from tests.engines.sglang.forked_engines import ForkedEngine
from tests.environments.engine_env import ROOT
from tests.environments.sglang_models import ensure_model

PAGE_TOKENS = 64
MEMKV, LINKER, FILE = "memkv", "linker", "file"
TOLERANCE = 1e-3
"""How far log-probabilities of a restored prompt may lie from those of a hit in the device's own cache, before storage
was ever asked. Those of a computed prompt are no oracle in bf16: there each batch shape rounds in its own way."""
MEANING = {
    "recompute_ttft_s": "nothing stored, nothing cached; stores run beside it; median over the prompts",
    "device_hit_ttft_s": "the prompt is in the device's own cache; median",
    "restore_ttft_s": "fresh process, page cache cold, all full pages from the tier; median",
    "restore_cost_s": "from the start of the storage prefetch to pages in the host pool, plus load-back; timers in the "
    "engine, median",
    "restore_cost_parts_s": "medians of the parts of that cost; a linker looks up and loads on the scheduler's thread",
    "file_backend_restore_cost_s": "the same with SGLang's own `file` backend, in turns",
    "linker_restore_cost_s": "look-up and load by our linker, in turns",
    "restore_cost_ttft_s": "median, over the first round, of restore less the device hit of the prompt right after it",
    "ratios": "medians of the ratios of costs in pairs, each with its 95% bootstrap interval",
    "raw_read_s": "the files of the prompt by direct I/O into huge pages, in turns right before and right after its "
    "restore; median over both of ours",
    "objects": "files in the tier, and their mean size",
}


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    model: str
    prompts: int
    prompt_tokens: int
    rounds: int
    arguments: dict[str, Any] = field(default_factory=dict)


FULL = Plan(
    "smollm2",
    3,
    6200,
    5,
    {
        "max_total_tokens": 24_576,
        "context_length": 8192,
        "dtype": cpu_dtype.native_dtype(),
        "disable_overlap_schedule": False,
        # Two engines take turns: an idle one must leave the cores to the other.
        "sleep_on_idle": True,
    },
)
QUICK = replace(FULL, prompts=1, rounds=1)
TINY = Plan("tiny-sg-llama", 2, 600, 1)


@dataclass
class Side:
    """One backend: where it stores, and what was measured of it."""

    name: str
    folder: Path
    # Off for a tiny model, which may recompute faster than a busy machine loads.
    cost_gate: str = "on"
    cold: list[tuple[float, Answer]] = field(default_factory=list)
    oracle: list[Answer] = field(default_factory=list)
    restored: list[tuple[float, Answer]] = field(default_factory=list)
    device_hits: list[float] = field(default_factory=list)
    stored: list[TierContents] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)
    timed: list[dict[str, float]] = field(default_factory=list)
    _timers_read: int = 0

    def arguments(self) -> dict[str, Any]:
        """The engine's arguments."""
        if self.name == FILE:
            return hicache("file", file_storage_path=str(self.folder))
        if self.name == LINKER:
            return linker(self.folder, cost_gate=self.cost_gate)
        return hicache("dynamic", **memkv_extra(self.folder, cost_gate=self.cost_gate))

    @property
    def timers(self) -> Path:
        """Where its engine writes its timers."""
        return self.folder.with_suffix(".timers")

    def take_timers(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        seconds, self._timers_read = restore_timers.seconds_since(self.timers, self._timers_read)
        return seconds

    def files(self) -> list[Path]:
        """What it stored."""
        return sorted(p for p in self.folder.rglob("*") if p.suffix in (".bin", ".kv"))

    def costs(self) -> list[float]:
        """What restores cost, by the engine's timers."""
        return [sum(parts.values()) for parts in self.timed]

    def latest(self) -> str:
        """The last restore, for the log."""
        raw = f", raw read {self.raw[-1]:.3f} s" if self.raw else ""
        return f"{self.name} {self.restored[-1][0]:.2f} s (cost {self.costs()[-1]:.3f} s{raw})"

    def parts(self) -> dict[str, float]:
        """Medians of the parts of the costs."""
        names = sorted({name for parts in self.timed for name in parts})
        return {name: harness.median([parts.get(name, 0.0) for parts in self.timed]) for name in names}

    def ttft_costs(self) -> list[float]:
        """Restores less device hits, of the round that has them."""
        return [ttft - hit for (ttft, _), hit in zip(self.restored, self.device_hits, strict=False)]


class Say:
    """Says what goes on, with the time since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, line: str) -> None:
        print(f"[{time.monotonic() - self._started:5.0f} s] {line}", flush=True)


def ask(engine: Engine, prompt: Sequence[int], tokens: int = 1) -> tuple[float, Answer]:
    """Time to the answer of one token, and the answer."""
    start = time.perf_counter()
    answer = engine.generate(list(prompt), tokens)
    return time.perf_counter() - start, answer


def settled(side: Side) -> None:
    """Wait until nothing has been stored for a while; what is new is the last prompt's."""
    seen, since = -1, time.monotonic()

    def quiet() -> bool:
        nonlocal seen, since
        size = sum(p.stat().st_size for p in side.files())
        if size != seen:
            seen, since = size, time.monotonic()
        return size > 0 and time.monotonic() - since > 2.0

    wait_until(quiet, f"{side.name} has stored the prompt", 120)
    earlier = {chunk for prompt in side.stored for chunk in prompt.chunks}
    side.stored.append(TierContents(tuple(chunk for chunk in contents_of(side.folder).chunks if chunk not in earlier)))


def start(side: Side, plan: Plan, logs: Path) -> Engine:
    """A fresh engine with this side's backend."""
    arguments = {"page_size": PAGE_TOKENS, **plan.arguments} if plan is not TINY else dict(plan.arguments)
    env, log = {restore_timers.VARIABLE: str(side.timers)}, logs / f"demo-sglang-{side.name}.log"
    if plan is TINY:
        return ForkedEngine(plan.model, log=log, env=env, **side.arguments(), **arguments)
    # Tests give an engine one thread; here recomputing gets every core.
    env["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    return Engine(plan.model, log=log, env=env, **side.arguments(), **arguments)


def first_visits(sides: Sequence[Side], plan: Plan, prompts: Sequence[Sequence[int]], logs: Path, say: Say) -> None:
    """Each side computes and stores every prompt."""
    for side in sides:
        say(f"{side.name}: computes and stores {len(prompts)} prompts")
        with start(side, plan, logs) as engine:
            ask(engine, tokens_of(1, 200))
            for number, prompt in enumerate(prompts):
                side.cold.append(ask(engine, prompt))
                side.oracle.append(ask(engine, prompt)[1])
                settled(side)
                say(f"    prompt {number + 1}: {side.cold[-1][0]:.2f} s")


def restores(sides: Sequence[Side], plan: Plan, prompts: Sequence[Sequence[int]], logs: Path, say: Say) -> None:
    """Fresh processes restore every prompt in turns, beside raw reads of our own files."""
    reader = RawReader([stored for side in sides if side.name == MEMKV for stored in side.stored])
    say("fresh processes")
    with ExitStack() as stack:
        engines = [(side, stack.enter_context(start(side, plan, logs))) for side in sides]
        for _, engine in engines:
            ask(engine, tokens_of(2, 200))
        for round_ in range(plan.rounds):
            for number, prompt in enumerate(prompts):
                raw_first = (round_ + number) % 2 == 0
                for side, engine in engines if round_ % 2 else engines[::-1]:
                    restore(side, engine, prompt, side.stored[number], reader, raw_first=raw_first)
                    if round_ == 0:
                        side.device_hits.append(ask(engine, prompt)[0])
                say(f"    round {round_ + 1}, prompt {number + 1}: {', '.join(s.latest() for s in sides)}")


def restore(
    side: Side, engine: Engine, prompt: Sequence[int], stored: TierContents, reader: RawReader, *, raw_first: bool
) -> None:
    """One restore, and beside it, where the files are ours, a raw read of the same."""
    engine.flush()
    harness.drop_from_page_cache(side.files())

    def read_raw() -> None:
        if stored.chunks:
            side.raw.append(reader.read_s(stored))

    if raw_first:
        read_raw()
    side.take_timers()
    side.restored.append(ask(engine, prompt))
    side.timed.append(side.take_timers())
    if not raw_first:
        read_raw()


def same_answers(sides: Sequence[Side], prompts: int) -> bool:
    """Whether every restored answer is that of a hit in the device's own cache."""
    for side in sides:
        for index, (_, answer) in enumerate(side.restored):
            oracle = side.oracle[index % prompts]
            if answer.tokens != oracle.tokens or abs(answer.logprobs[0] - oracle.logprobs[0]) > TOLERANCE:
                return False
    return True


def record_of(sides: dict[str, Side], plan: Plan) -> dict[str, Any]:
    """The content of the JSON file."""
    ours, linked, theirs = sides[MEMKV], sides[LINKER], sides[FILE]
    sizes = [path.stat().st_size for path in ours.files()]
    seconds = {
        "recompute_ttft_s": harness.median([t for t, _ in ours.cold]),
        "device_hit_ttft_s": harness.median(ours.device_hits),
        "restore_ttft_s": harness.median([t for t, _ in ours.restored]),
        "restore_cost_s": harness.median(ours.costs()),
        "restore_cost_ttft_s": harness.median(ours.ttft_costs()),
        "linker_restore_ttft_s": harness.median([t for t, _ in linked.restored]),
        "linker_restore_cost_s": harness.median(linked.costs()),
        "linker_restore_cost_ttft_s": harness.median(linked.ttft_costs()),
        "file_backend_restore_ttft_s": harness.median([t for t, _ in theirs.restored]),
        "file_backend_restore_cost_s": harness.median(theirs.costs()),
        "file_backend_restore_cost_ttft_s": harness.median(theirs.ttft_costs()),
        "raw_read_s": harness.median([*ours.raw, *linked.raw]),
    }
    ratios = {
        "restore_cost / file_backend_restore_cost": ratio_of(ours.costs(), theirs.costs()),
        "restore_cost / raw_read": ratio_of(ours.costs(), ours.raw),
        "linker_restore_cost / file_backend_restore_cost": ratio_of(linked.costs(), theirs.costs()),
        "linker_restore_cost / raw_read": ratio_of(linked.costs(), linked.raw),
    }
    return {
        "model": plan.model,
        "sglang": version("sglang"),
        "dtype": plan.arguments.get("dtype", "float32"),
        "prompts": plan.prompts,
        "prompt_tokens": plan.prompt_tokens,
        "page_tokens": PAGE_TOKENS,
        **seconds,
        "speedup": seconds["recompute_ttft_s"] / seconds["restore_ttft_s"],
        "ratios": ratios,
        "pairs_measured": len(ours.restored),
        "restore_cost_parts_s": {name: side.parts() for name, side in sides.items()},
        "external_hit_tokens": harness.median([a.from_storage for _, a in ours.restored]),
        "linker_hit_tokens": harness.median([a.cached for _, a in linked.restored]),
        "objects": {
            "count": len(sizes),
            "mean_bytes": sum(sizes) / len(sizes),
            "below_2_mib": sum(s < 2 << 20 for s in sizes),
            "bytes_below_2_mib_share": sum(s for s in sizes if s < 2 << 20) / sum(sizes),
        },
        "stored_bytes": sum(sizes),
        "file_backend_objects": len(theirs.files()),
        "tokens_equal": same_answers([ours, linked, theirs], plan.prompts),
        "answers": {
            name: {
                "computed": [(a.tokens, a.logprobs) for _, a in s.cold],
                "device_hit": [(a.tokens, a.logprobs) for a in s.oracle],
                "restored": [(a.tokens, a.logprobs) for _, a in s.restored],
            }
            for name, s in sides.items()
        },
        "pairs": {
            name: {
                "restore_ttft_s": [t for t, _ in s.restored],
                "device_hit_ttft_s": s.device_hits,
                "timers": s.timed,
                "raw_read_s": s.raw,
            }
            for name, s in sides.items()
        },
        "meaning": MEANING,
    }


def ratio_of(ones: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Median ratio of pairs and its interval."""
    ratio = harness.median_of_pair_ratios(ones, others)
    return {"median": ratio[0], "interval_95": ratio[1:]}


def show(record: dict[str, Any]) -> None:
    """Print the table."""

    def seconds(*keys: str) -> list[str]:
        return [f"{record[key]:.3f} s" if key else "" for key in keys]

    def ratio(name: str) -> str:
        low, high = record["ratios"][name]["interval_95"]
        return f"{record['ratios'][name]['median']:.2f} [{low:.2f}, {high:.2f}]"

    objects = record["objects"]
    rows = [
        ["recompute", *seconds("recompute_ttft_s", "", "")],
        ["device hit", *seconds("device_hit_ttft_s", "", "")],
        ["restore", *seconds("restore_ttft_s", "linker_restore_ttft_s", "file_backend_restore_ttft_s")],
        ["restore cost", *seconds("restore_cost_s", "linker_restore_cost_s", "file_backend_restore_cost_s")],
        [
            "  / file's [95%]",
            ratio("restore_cost / file_backend_restore_cost"),
            ratio("linker_restore_cost / file_backend_restore_cost"),
            "",
        ],
        ["  / raw read [95%]", ratio("restore_cost / raw_read"), ratio("linker_restore_cost / raw_read"), ""],
        ["raw read", *seconds("raw_read_s", "", "")],
        ["tokens restored", f"{record['external_hit_tokens']:.0f}", f"{record['linker_hit_tokens']:.0f}", ""],
        [
            "objects",
            f"{objects['count']} of {objects['mean_bytes'] / 1e6:.2f} MB",
            "",
            str(record["file_backend_objects"]),
        ],
        ["same answers", "yes" if record["tokens_equal"] else "NO", "", ""],
    ]
    title = f"SGLang, prompts of {record['prompt_tokens']} tokens"
    harness.print_table(title, ["", "hierarchical cache", "linker", "SGLang's file"], rows)


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the times to the first token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = {
        "time to first token in s": {
            "recompute": "recompute_ttft_s",
            "restore, SGLang's file": "file_backend_restore_ttft_s",
            "restore, hierarchical cache": "restore_ttft_s",
            "restore, linker": "linker_restore_ttft_s",
            "device hit": "device_hit_ttft_s",
        },
        "restore cost in s": {
            "SGLang's file": "file_backend_restore_cost_s",
            "hierarchical cache": "restore_cost_s",
            "linker": "linker_restore_cost_s",
            "raw read": "raw_read_s",
        },
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 2.8))
    for axis, (label, keys) in zip(axes, bars.items(), strict=True):
        axis.barh(list(keys)[::-1], [record[key] for key in list(keys.values())[::-1]])
        axis.set(xlabel=label)
    figure.suptitle(f"SGLang {record['sglang']} on a CPU, {record['model']}, {record['prompt_tokens']} tokens")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
    plan, say = TINY if arguments.tiny else QUICK if arguments.quick else FULL, Say()
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
