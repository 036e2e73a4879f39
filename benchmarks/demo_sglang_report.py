"""What SGLang's demo tells: the JSON record, the table and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.demo_sglang_phases import Plan, Side
from benchmarks.sglang_backend import FILE, LINKER, MEMKV, PAGE_TOKENS

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
