"""RESULTS.md and its page of plots, from the combined record alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare import intervals, judge
from benchmarks.compare.names import (
    AGAIN,
    CONVERSATIONS,
    DOCUMENTS,
    FILE,
    FIRST,
    HICACHE,
    LINKER,
    LMCACHE_FS,
    LMCACHE_MEMKV,
    LOCAL,
    MEMKV,
    MEMKV_MEMORY,
    NATIVE,
    NO_CACHE,
    NO_STORAGE,
    PREFIX_CACHE,
    RAG,
    REPETITION,
    RESUMED,
    SGLANG_SIDES,
    THROTTLED,
    VLLM_SIDES,
)
from benchmarks.compare.plan import RANDOM_335M
from benchmarks.compare.record import Batch, batches_of
from benchmarks.harness import percentile

OURS = (MEMKV, MEMKV_MEMORY, LMCACHE_MEMKV, THROTTLED, HICACHE, LINKER)
ORDER = (*VLLM_SIDES, *SGLANG_SIDES)
PLOT = "RESULTS.png"
TITLES = {"vllm": "vLLM", "sglang": "SGLang"}
MODELS = {"smollm2": "SmolLM2-135M-Instruct", RANDOM_335M: "Qwen3 of 335 million random weights"}
NOTHING = "-"
# Who of ours is held against whom, where rows that we lose are looked for.
_IN_VLLM, _IN_SGLANG = (NO_CACHE, PREFIX_CACHE, NATIVE, LMCACHE_FS), (NO_STORAGE, FILE)
OPPONENTS = {
    "vllm": {MEMKV: _IN_VLLM, MEMKV_MEMORY: _IN_VLLM, LMCACHE_MEMKV: (LMCACHE_FS,)},
    "sglang": {HICACHE: _IN_SGLANG, LINKER: _IN_SGLANG},
}


def is_later(batch: Batch) -> bool:
    """Tells whether something of a batch's prompts may have been seen before."""
    return not judge.is_first_visit(batch) and batch["step"] != LOCAL


def requests_of(batches: Iterable[Batch]) -> list[float]:
    """Returns all times to the first token."""
    return [request["ttft_s"] for batch in batches for request in batch["requests"]]


def workload_rows(batches: Sequence[Batch], workload: str, sides: Sequence[str]) -> list[dict[str, Any]]:
    """Returns one row of figures per side."""
    rows = []
    for side in sides:
        found = [b for b in batches_of(batches, side=side, workload=workload) if b["step"] != LOCAL]
        if not found:
            continue
        later, first = [b for b in found if is_later(b)], [b for b in found if judge.is_first_visit(b)]
        hits: dict[str, int] = {}
        for batch in later:
            for source, tokens in batch["hits"].items():
                hits[source] = hits.get(source, 0) + tokens
        rows.append(
            {
                "side": side,
                "requests": sum(len(b["requests"]) for b in found),
                "first_ttft_s": percentiles(requests_of(first)),
                "later_ttft_s": percentiles(requests_of(later)),
                "tokens_per_s": rate_of(found),
                "prompt_tokens": sum(judge.prompt_tokens(b) for b in later),
                "hit_tokens": hits,
                "cpu_s": sum(b["usage"]["cpu_s"] for b in found),
                "read_bytes": sum(b["usage"]["read_bytes"] for b in found),
                "write_bytes": sum(b["usage"]["write_bytes"] for b in found),
                "calls": sum(b["usage"]["read_calls"] + b["usage"]["write_calls"] for b in found),
            }
        )
    return rows


def rate_of(batches: Sequence[Batch]) -> float:
    """Returns prompt and answer tokens per second."""
    tokens = sum(request["prompt_tokens"] + len(request["tokens"]) for b in batches for request in b["requests"])
    return float(tokens / sum(b["wall_s"] for b in batches))


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Returns p50, p90 and p99; empty for no values."""
    return {f"p{percent}": percentile(seconds, percent) for percent in (50, 90, 99)} if seconds else {}


def document_rows(body: Mapping[str, Any], length: int, sides: Sequence[str]) -> list[dict[str, Any]]:
    """Returns what documents of one length took each side."""
    rows = []
    for side in sides:
        of_side = list(batches_of(body["batches"], side=side, workload=DOCUMENTS, length=length))
        by_step = {step: [b for b in of_side if b["step"] == step] for step in (FIRST, AGAIN, LOCAL)}
        if not of_side:
            continue
        costs = judge.restore_costs(body["batches"], side, length)
        again = by_step[AGAIN]
        tokens = sum(judge.prompt_tokens(b) for b in again)
        rows.append(
            {
                "side": side,
                "visits": len(again),
                **{step: median_ttft(found) for step, found in by_step.items()},
                "restore_cost_s": float(np.median(list(costs.values()))) if costs else None,
                "hit_share": sum(map(judge.external_tokens, again)) / tokens if tokens else None,
                "read_bytes": float(np.median([b["usage"]["read_bytes"] for b in again])) if again else None,
                "same_tokens": same_tokens(by_step[AGAIN], by_step[LOCAL]),
            }
        )
    return rows


def median_ttft(batches: Sequence[Batch]) -> float | None:
    """Returns the median time to the first token."""
    return float(np.median(requests_of(batches))) if batches else None


def same_tokens(again: Sequence[Batch], local: Sequence[Batch]) -> str:
    """Returns how many restored answers equal that of the local hit right after them."""
    pairs = [(a, b) for a in again for b in local if (a["unit"], a["round"]) == (b["unit"], b["round"])]
    if not pairs:
        return NOTHING
    same = sum([r["tokens"] for r in a["requests"]] == [r["tokens"] for r in b["requests"]] for a, b in pairs)
    return f"{same} of {len(pairs)}"


def losses(stage: str, batches: Sequence[Batch]) -> list[list[str]]:
    """Returns every workload and measure at which another side was better than ours, whatever the noise."""
    rows = []
    for side, others in OPPONENTS[stage].items():
        for workload in (DOCUMENTS, CONVERSATIONS, RESUMED, RAG, REPETITION):
            for measure, numbers, more_is_better in MEASURES:
                for other in others:
                    rows += _loss(batches, workload, measure, numbers, side, other, more_is_better)
    return rows


def _loss(
    batches: Sequence[Batch],
    workload: str,
    measure: str,
    numbers: Callable[[Batch], float | None],
    side: str,
    other: str,
    more_is_better: bool,
) -> list[list[str]]:
    found = judge.paired([b for b in batches if b["workload"] == workload], side, other)
    told = [(numbers(ours), numbers(theirs), judge.set_number(ours)) for ours, theirs in found]
    pairs = [(a / b, number) for a, b, number in told if a is not None and b is not None and b > 0]
    if not pairs:
        return []
    ratios, sets = np.array([ratio for ratio, _ in pairs]), [number for _, number in pairs]
    value, low, high = intervals.interval(len(pairs), intervals.median_of(ratios), sets=sets)
    worse = value < 1.0 if more_is_better else value > 1.0
    if not worse:
        return []
    clear = len(pairs) >= intervals.MIN_UNITS and (high < 1.0 if more_is_better else low > 1.0)
    return [
        [workload, measure, side, other, f"{value:.2f} [{low:.2f}, {high:.2f}]", str(len(pairs)),
         "yes" if clear else "within noise"]
    ]  # fmt: skip


def _of_first(numbers: Callable[[Batch], float]) -> Callable[[Batch], float | None]:
    return lambda batch: numbers(batch) if judge.is_first_visit(batch) else None


def _of_later(numbers: Callable[[Batch], float]) -> Callable[[Batch], float | None]:
    return lambda batch: numbers(batch) if is_later(batch) else None


MEASURES: tuple[tuple[str, Callable[[Batch], float | None], bool], ...] = (
    ("TTFT, first visits", _of_first(judge.ttft_s), False),
    ("TTFT, later visits", _of_later(judge.ttft_s), False),
    ("time of a visit", _of_later(lambda batch: float(batch["wall_s"])), False),
    ("CPU seconds, first visits", _of_first(lambda batch: float(batch["usage"]["cpu_s"])), False),
    ("CPU seconds, later visits", _of_later(lambda batch: float(batch["usage"]["cpu_s"])), False),
)


# -------------------------------------------------------------------------------------------------------------- text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown, columns of numbers to the right."""
    rows = [list(row) for row in rows]
    numeric = [all(row[n][:1] in "-0123456789" for row in rows) for n in range(len(head))]
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join("---:" if right else "---" for right in numeric) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def number(value: float | None, digits: int = 2) -> str:
    """Returns a figure, or a dash."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def three(values: Mapping[str, float]) -> str:
    """Returns p50 / p90 / p99."""
    return " / ".join(number(values.get(name)) for name in ("p50", "p90", "p99")) if values else NOTHING


def megabytes(value: float | None) -> str:
    """Returns bytes in MB."""
    return NOTHING if value is None else f"{value / 1e6:.0f}"


def judgement_rows(judgements: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Returns the table of judgements."""
    rows = []
    for one in judgements:
        interval = NOTHING
        if one["value"] is not None:
            interval = number(one["value"], 3)
            if one["low"] is not None:
                interval += f" [{number(one['low'], 3)}, {number(one['high'], 3)}]"
        bound = f"{'at most' if one['at_most'] else 'at least'} {number(one['limit'], 3)}"
        promise = one["promise"] + ("" if one["required"] else " (no promise)")
        rows.append(
            [one["run"], promise, f"**{one['status']}**", interval, bound, str(one["units"]), one["note"] or ""]
        )
    return rows


def results(body: Mapping[str, Any]) -> str:
    """Returns RESULTS.md.

    Args:
        body: The combined record, as `build/compare.json` has it.
    """
    parts = [_head(body)]
    for name, stage in body["stages"].items():
        parts += _failures(name, stage)
    parts += [
        "## What was promised, and whether it holds",
        "Figures with their 95% bootstrap intervals over what was measured side by side. An interval across the limit, "
        f"or fewer than {intervals.MIN_UNITS} comparisons, decides nothing.",
        table(["run", "promise", "holds", "figure", "limit", "units", "note"], judgement_rows(body["judgements"])),
        f"![plots]({PLOT})",
    ]
    for name, stage in body["stages"].items():
        cells = [cell for cell in body["cells"] if cell["run"] == name]
        parts += [f"## {TITLES[stage['stage']]}{name.removeprefix(stage['stage'])}", *_stage(stage, cells)]
    parts.append(_notes(body))
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(body: Mapping[str, Any]) -> str:
    environment = body["environment"]
    versions: dict[str, str] = {}
    for stage in body["stages"].values():
        versions |= stage["environment"]["versions"]
    commit, _, changes = environment["git_revision"].partition("+")
    revision = commit[:12] + (" with changes" if changes else "")
    profile = next((stage["profile"] for stage in body["stages"].values()), {})
    shown = ", ".join(f"{name} {value}" for name, value in sorted(versions.items()))
    lines = [
        "# Results",
        f"Made by `make compare` (profile `{body['profile']}`, {body['minutes']:.0f} minutes) and by nothing else; "
        "`build/compare.json` has every sample.",
        f"{environment['cores']} cores of {environment['cpu']}, {environment['memory_gib']} GiB, "
        f"{environment['file_system']}, kernel {environment['kernel']}; Python {environment['python']}, {shown}; "
        f"memkv-engines {environment['package_version']} at {revision}, "
        f"{environment['time_utc'][:10]}.",
    ]
    if profile:
        lines.append(
            f"{profile['dtype']}, on a CPU: no GPU takes part. All engines of a table live at "
            "the same time, in processes of their own, and are asked for the same prompts in turns, one after the "
            "other; which goes first changes. The page cache is dropped where a second visit says so. On another "
            "machine, take the ratios and not the seconds."
        )
    return "\n\n".join(lines)


def _failures(name: str, stage: Mapping[str, Any]) -> list[str]:
    failed = [(side, one["error"]) for side, one in stage["sides"].items() if one["status"] == "failed"]
    rows = [[side, first_line(error)] for side, error in failed]
    parts = [f"## What failed ({name})", table(["side", "what happened"], rows)] if rows else []
    if not stage["complete"]:
        parts.append(f"**The {name} stage did not reach its end: {stage.get('error', 'it was ended')}.**")
    return parts


def first_line(text: str) -> str:
    """Returns the first line, fit for a table."""
    return (text.splitlines() or [""])[0].replace("|", "/")[:300]


def _stage(stage: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[str]:
    name, batches = stage["stage"], stage["batches"]
    sides = [side for side in ORDER if side in stage["sides"]]
    parts = [
        table(["side", "what it is"], [[side, stage["sides"][side]["what"] or NOTHING] for side in sides]),
        _setup(name, stage["profile"]),
    ]
    if name == "vllm":
        asked = DOCUMENTS in stage["profile"]["workloads"]
        for length in sorted(set(stage["profile"]["documents"]["lengths"])) if asked else ():
            parts += _documents(stage, length, sides)
    for workload in (CONVERSATIONS, RESUMED, RAG, REPETITION):
        parts += _workload(batches, workload, sides)
    parts += _hits(cells, sides)
    parts += ["### Memory and what is stored", _memory(stage, sides)]
    lost = losses(name, batches)
    parts.append("### Where ours is behind")
    head = ["workload", "measure", "ours", "better", "ours / theirs [95%]", "pairs", "beyond noise"]
    parts.append(table(head, lost) if lost else "No row of this run.")
    return parts


def _setup(name: str, profile: Mapping[str, Any]) -> str:
    if name == "sglang":
        return (
            f"Model {'of random weights' if profile['light'] else MODELS[profile['model']]}. "
            f"Device pool of {profile['sglang_pool_tokens']} tokens, host pool of twice that; one token is generated, "
            "so that the time of a request is that to its first token. What is stored is dropped from the page cache "
            "before each turn."
        )
    return (
        f"Model {MODELS[profile['model']]}. KV pool {profile['kv_bytes'] >> 20} MiB, blocks of {profile['block_size']} "
        f"tokens, at most {profile['max_model_len']} tokens. vLLM's native tier and LMCache have "
        f"{profile['dram_tier_bytes'] >> 20} MiB of memory before their disk; {MEMKV} has none, and stages in "
        f"{profile['staging_bytes'] >> 20} MiB; {MEMKV_MEMORY} has as much as the peers, its staging included. "
        "`connector` are tokens from there, whatever level they came from."
    )


def _documents(stage: Mapping[str, Any], length: int, sides: Sequence[str]) -> list[str]:
    rows = [
        [
            row["side"],
            number(row[FIRST]),
            number(row[AGAIN], 3),
            number(row[LOCAL], 3),
            number(row["restore_cost_s"], 3),
            NOTHING if row["hit_share"] is None else f"{row['hit_share']:.0%}",
            megabytes(row["read_bytes"]),
            row["same_tokens"],
            str(row["visits"]),
        ]
        for row in document_rows(stage, length, sides)
    ]
    raw = [one["seconds"] for one in stage["raw_reads"] if one["length"] == length]
    if raw:
        rows.append(["raw read of our files", "", "", "", number(float(np.median(raw)), 3), "", "", "", str(len(raw))])
    head = [
        "side", "first visit, s", "second visit, s", "local hit, s", "restore cost, s", "from connector", "read, MB",
        "same tokens", "second visits",
    ]  # fmt: skip
    title = f"### Documents of {length} tokens, asked twice"
    text = (
        "Medians of times to the first token. Before a second visit the engine's cache and every tier in memory are "
        "emptied, and files dropped from the page cache; a side without a tier recomputes. Restore cost: second visit "
        "less the local hit right after it. Same tokens: restored answers that equal that of the local hit."
    )
    return [title, text, table(head, rows)]


def _workload(batches: Sequence[Batch], workload: str, sides: Sequence[str]) -> list[str]:
    rows = [
        [
            row["side"],
            str(row["requests"]),
            number(row["tokens_per_s"], 0),
            three(row["first_ttft_s"]),
            three(row["later_ttft_s"]),
            ", ".join(f"{source} {tokens}" for source, tokens in row["hit_tokens"].items() if tokens) or "0",
            str(row["prompt_tokens"]),
            number(row["cpu_s"], 1),
            megabytes(row["read_bytes"]),
            megabytes(row["write_bytes"]),
            str(row["calls"]),
        ]
        for row in workload_rows(batches, workload, sides)
    ]
    if not rows:
        return []
    head = [
        "side", "requests", "tokens/s", "TTFT first visits, s", "TTFT later, s", "hit tokens, later",
        "of prompt tokens", "CPU s", "read, MB", "written, MB", "read and write calls",
    ]  # fmt: skip
    text = "TTFT: p50 / p90 / p99."
    if len({row[1] for row in rows}) > 1:
        text += " Sides without a tier take part in the first rounds only: their sums are of fewer requests."
    if workload == RESUMED:
        text += (
            " Before that, the engines' caches and every tier in memory are emptied, and files dropped from the page "
            "cache."
        )
    return [f"### {workload[0].upper()}{workload[1:]}", text, table(head, rows)]


def _hits(cells: Sequence[Mapping[str, Any]], sides: Sequence[str]) -> list[str]:
    rows = []
    for cell in cells:
        if cell["side"] not in sides:
            continue
        spread = "" if cell["low"] is None else f" [{number(cell['low'], 3)}, {number(cell['high'], 3)}]"
        ratio = number(cell["ratio"], 3) + spread
        rows.append(
            [cell["side"], cell["what"], ratio, str(cell["units"]), f"{cell['hit_share']:.0%}", f"**{cell['status']}**"]
        )
    if not rows:
        return []
    head = ["side", "what", "TTFT / recomputing [95%]", "pairs", "loaded", "no slower"]
    return ["### A hit against recomputing", table(head, rows)]


def _memory(stage: Mapping[str, Any], sides: Sequence[str]) -> str:
    rows = []
    for side in sides:
        one = stage["sides"][side]
        written = sum(b["usage"]["write_bytes"] for b in batches_of(stage["batches"], side=side))
        stored = one.get("stored_bytes")
        rows.append(
            [
                side,
                one["status"],
                number(one["peak_pss_bytes"] / 2**30 if "peak_pss_bytes" in one else None),
                number(one["peak_rss_bytes"] / 2**30 if "peak_rss_bytes" in one else None),
                megabytes(stored),
                str(one.get("stored_files", NOTHING)),
                number(written / stored if stored else None),
            ]
        )
    head = ["side", "status", "peak PSS, GiB", "peak RSS, GiB", "stored, MB", "files", "written / stored"]
    return table(head, rows)


def _notes(body: Mapping[str, Any]) -> str:
    notes = [f"- {name}: {note}" for name, stage in body["stages"].items() for note in stage["notes"]]
    for name, stage in body["stages"].items():
        share = stage["environment"].get("stolen_share")
        if share is not None:
            notes.append(f"- {name}: the host kept {share:.1%} of the cores' time for others.")
        if costs := stage["environment"].get("page_costs_us"):
            notes.append(
                f"- {name}: before the engines started, 4 KiB of memory that nobody had for a while cost {costs[0]:.1f}"
                f" us, and {costs[1]:.1f} us when given back just before; what is written through the page cache pays "
                "for it."
            )
    for name, noise in body["noise"].items():
        told = "was not measured" if noise is None else f"is {noise:.1%}: two sides that both compute differ by that"
        notes.append(f"- {name}: noise {told}.")
    return "\n\n".join(["## Notes", "\n".join(notes)]) if notes else ""


def write(body: Mapping[str, Any], folder: Path) -> None:
    """Writes RESULTS.md and its plots into a folder."""
    from benchmarks.compare.plots import draw

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "RESULTS.md").write_text(results(body), encoding="utf-8")
    draw(body, folder / PLOT)
