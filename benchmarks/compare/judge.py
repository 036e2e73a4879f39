"""What was promised, and whether it holds: pure functions of what was measured.

Every judgement compares a figure with a limit through the figure's 95% bootstrap interval, drawn over units that were
measured side by side, so that what disturbed all sides alike cancels. The interval on the right side of the limit:
`met`; on the wrong side: `missed`; across it, or fewer than `MIN_UNITS` units: `not decided`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.compare.intervals import (
    MET,
    MIN_UNITS,
    MISSED,
    UNDECIDED,
    Indices,
    Judgement,
    Statistic,
    interval,
    judged,
    median_of,
    status_of,
)
from benchmarks.compare.names import (
    AGAIN,
    CONVERSATIONS,
    DOCUMENTS,
    FILE,
    FIRST,
    HICACHE,
    LINKER,
    LMCACHE_FS,
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
    THROTTLED,
)
from benchmarks.compare.record import Batch, batches_of

HALF_OF_PEERS, OVER_RAW = 0.5, 1.3
THROUGHPUT_OVER_NO_CACHE = 1.5
FIRST_VISIT_COST = 1.02
# A second visit that took less than this share of the prompt from the connector is no restore.
MIN_HIT_SHARE = 0.9
# Noise is what two sides that do the same differ by. A machine noisier than this decides nothing by it.
MAX_NOISE = 0.10

# ------------------------------------------------------------------------------------------------------ restore cost


def ttft_s(batch: Batch) -> float:
    """Returns the median time to the first token of a batch's requests."""
    return float(np.median([request["ttft_s"] for request in batch["requests"]]))


def prompt_tokens(batch: Batch) -> int:
    """Returns the length of a batch's prompts."""
    return int(sum(request["prompt_tokens"] for request in batch["requests"]))


def external_tokens(batch: Batch) -> int:
    """Returns how many prompt tokens of a batch came from outside the engine's own device cache."""
    hits: Mapping[str, int] = batch["hits"]
    return sum(hits.get(source, 0) for source in ("connector", "host", "storage"))


def restore_costs(batches: Sequence[Batch], side: str, length: int) -> dict[tuple[str, int], float]:
    """Returns what restores cost a side, by document and round: time to first token less that of a local hit.

    Visits that did not restore the prompt, or have no local hit to compare with, are left out.
    """
    found = {}
    local = {
        (batch["unit"], batch["round"]): batch
        for batch in batches_of(batches, side=side, workload=DOCUMENTS, step=LOCAL, length=length)
    }
    for batch in batches_of(batches, side=side, workload=DOCUMENTS, step=AGAIN, length=length):
        key = batch["unit"], batch["round"]
        if key in local and external_tokens(batch) >= MIN_HIT_SHARE * prompt_tokens(batch):
            found[key] = ttft_s(batch) - ttft_s(local[key])
    return found


def judge_restore(
    batches: Sequence[Batch], raw_reads: Sequence[Mapping[str, Any]], length: int, side: str = MEMKV
) -> Judgement:
    """Returns whether a restore costs at most half of either peer's, or 1.3 times the raw read of the same bytes."""
    return _judge_restore(
        batches, raw_reads, length, restore_costs(batches, side, length), f"{side}: restoring {length} tokens costs"
    )


def judge_load(
    batches: Sequence[Batch], raw_reads: Sequence[Mapping[str, Any]], length: int, side: str = MEMKV
) -> Judgement:
    """Returns the same by a side's own timer of its loads, without the engine's attention and its scatter."""
    found = {
        (batch["unit"], batch["round"]): float(batch["load_s"])
        for batch in batches_of(batches, side=side, workload=DOCUMENTS, step=AGAIN, length=length)
        if batch["load_s"] is not None and external_tokens(batch) >= MIN_HIT_SHARE * prompt_tokens(batch)
    }
    return _judge_restore(
        batches, raw_reads, length, found, f"{side}: loading {length} tokens, by its own timer in the engine, takes"
    )


def _judge_restore(
    batches: Sequence[Batch],
    raw_reads: Sequence[Mapping[str, Any]],
    length: int,
    ours: Mapping[tuple[str, int], float],
    what: str,
) -> Judgement:
    raw = {(one["unit"], one["round"]): float(one["seconds"]) for one in raw_reads}
    peers = {name: restore_costs(batches, name, length) for name in (NATIVE, LMCACHE_FS)}
    there = {name: costs for name, costs in peers.items() if costs}
    keys = sorted(set(ours) & set(raw) & (set.intersection(*map(set, there.values())) if there else set(ours)))
    matrix = {name: np.array([costs[key] for key in keys]) for name, costs in there.items()}
    own, read = np.array([ours[key] for key in keys]), np.array([raw[key] for key in keys])

    def over_limit(indices: Indices) -> float:
        half = HALF_OF_PEERS * min((np.median(costs[indices]) for costs in matrix.values()), default=0.0)
        return float(np.median(own[indices]) / max(half, OVER_RAW * np.median(read[indices])))

    missing = [name for name in peers if name not in there]
    note = f"no restores by {', '.join(missing)} to compare with" if missing else ""
    return judged(
        f"{what} at most the larger of half of vLLM's native fs and LMCache's fs, and 1.3 x the raw read "
        "(seconds / limit)",
        len(keys),
        over_limit,
        1.0,
        at_most=True,
        note=note,
    )


# -------------------------------------------------------------------------------------------------------- throughput


def rates(batches: Sequence[Batch], workload: str, side: str) -> dict[str, tuple[float, float]]:
    """Returns tokens and seconds of a side by unit, all steps together."""
    found: dict[str, tuple[float, float]] = {}
    for batch in batches_of(batches, workload=workload, side=side):
        tokens, seconds = found.get(batch["unit"], (0.0, 0.0))
        made = sum(request["prompt_tokens"] + len(request["tokens"]) for request in batch["requests"])
        found[batch["unit"]] = tokens + made, seconds + batch["wall_s"]
    return found


def throughput(batches: Sequence[Batch], workload: str, side: str) -> float | None:
    """Returns tokens per second of all units together; None where there are none."""
    found = rates(batches, workload, side).values()
    seconds = sum(s for _, s in found)
    return sum(t for t, _ in found) / seconds if seconds else None


def judge_throughput(
    batches: Sequence[Batch],
    workload: str,
    side: str,
    others: Sequence[str],
    factor: float,
    promise: str,
    *,
    required: bool = True,
) -> Judgement:
    """Returns whether a side's throughput is at least `factor` times that of the best of others."""
    found = {name: rates(batches, workload, name) for name in (side, *others)}
    there = [name for name in others if found[name]]
    keys = sorted(set.intersection(set(found[side]), *(set(found[name]) for name in there))) if there else []
    arrays = {name: np.array([found[name][key] for key in keys]).reshape(-1, 2) for name in (side, *there)}

    def rate(name: str, indices: Indices) -> float:
        tokens, seconds = arrays[name][indices].sum(axis=0)
        return float(tokens / seconds)

    def ratio(indices: Indices) -> float:
        return rate(side, indices) / max(rate(name, indices) for name in there)

    missing = [name for name in others if name not in there]
    note = f"without {', '.join(missing)}" if missing else ""
    set_of = {batch["unit"]: set_number(batch) for batch in batches_of(batches, workload=workload, side=side)}
    sets = [set_of[key] for key in keys]
    return judged(promise, len(keys), ratio, factor, at_most=False, note=note, required=required, sets=sets)


# ------------------------------------------------------------------------------------------------------- first visits


def is_first_visit(batch: Batch) -> bool:
    """Tells whether nothing of a batch's prompts had been seen before."""
    return batch["step"] == FIRST or (batch["workload"] == CONVERSATIONS and batch["step"] == "turn 1")


def judge_first_visit(batches: Sequence[Batch], side: str = MEMKV, baseline: str = PREFIX_CACHE) -> list[Judgement]:
    """Returns whether storing delays a first visit, and whether it costs CPU time, by more than 2%.

    What the I/O processes use is counted apart: into that the engine's own work does not scatter.
    """
    pairs = paired([b for b in batches if is_first_visit(b)], side, baseline)

    def ratio_of(numbers: Callable[[Batch], float]) -> Statistic:
        return median_of(np.array([numbers(ours) / numbers(theirs) for ours, theirs in pairs]))

    shares = np.array([ours["usage"]["io_process_cpu_s"] / theirs["usage"]["cpu_s"] for ours, theirs in pairs])
    return [
        judged(
            f"{side}: a first visit's time to first token is at most 2% longer than {baseline}'s",
            len(pairs),
            ratio_of(ttft_s),
            FIRST_VISIT_COST,
            at_most=True,
            sets=sets_of(pairs),
        ),
        judged(
            f"{side}: a first visit costs at most 2% more CPU seconds than {baseline}'s, stores included",
            len(pairs),
            ratio_of(lambda batch: float(batch["usage"]["cpu_s"])),
            FIRST_VISIT_COST,
            at_most=True,
            required=False,
            sets=sets_of(pairs),
        ),
        judged(
            f"{side}: storing a first visit takes its I/O processes at most 2% of the CPU seconds that {baseline} uses "
            "(share)",
            len(pairs),
            median_of(shares),
            FIRST_VISIT_COST - 1.0,
            at_most=True,
            sets=sets_of(pairs),
        ),
    ]


def paired(batches: Sequence[Batch], side: str, other: str) -> list[tuple[Batch, Batch]]:
    """Returns the visits of two sides with the same labels, side by side."""
    theirs = {_place(batch): batch for batch in batches_of(batches, side=other)}
    return [(b, theirs[_place(b)]) for b in batches_of(batches, side=side) if _place(b) in theirs]


def set_number(batch: Batch) -> int:
    """Returns which set of processes a visit was made in."""
    return int(batch.get("processes", 1))


def sets_of(pairs: Sequence[tuple[Batch, Batch]]) -> list[int]:
    """Returns that of each pair."""
    return [set_number(ours) for ours, _ in pairs]


def _place(batch: Batch) -> tuple[Any, ...]:
    return batch["workload"], batch["step"], batch["unit"], batch["round"]


# ------------------------------------------------------------------------------------- a hit, and recomputing instead


@dataclass(frozen=True)
class Cell:
    """One workload or length: hits against recomputing the same prompts.

    Attributes:
        side: Whose hits.
        what: Workload, or length of document.
        status: Whether a hit is no slower than recomputing by more than noise.
        ratio, low, high: Time to first token of a hit / of recomputing, and the 95% interval; None for too few.
        units: Pairs.
        hit_share: Prompt tokens from outside the engine / all prompt tokens, of those visits.
    """

    side: str
    what: str
    status: str
    ratio: float | None
    low: float | None
    high: float | None
    units: int
    hit_share: float


def noise_of(batches: Sequence[Batch], one: str = NO_CACHE, other: str = PREFIX_CACHE) -> float | None:
    """Returns what two sides that both compute a first visit differ by; None for too few.

    The larger end of the 95% interval of their ratio, less 1, at most `MAX_NOISE`.
    """
    pairs = paired([b for b in batches if is_first_visit(b)], one, other)
    if len(pairs) < MIN_UNITS:
        return None
    ratios = np.array([ttft_s(a) / ttft_s(b) for a, b in pairs])
    _, low, high = interval(len(pairs), median_of(ratios), sets=sets_of(pairs))
    return min(MAX_NOISE, max(high - 1.0, 1.0 / low - 1.0, 0.0))


def hit_pairs(batches: Sequence[Batch], side: str, recomputing: Sequence[str]) -> dict[str, list[tuple[Batch, Batch]]]:
    """Returns later visits of a side beside the same visits of one that recomputes, by workload or length.

    Visits at which the side had nothing stored that it could have loaded (a first turn, a first request) are left out.
    The first of `recomputing` that was asked counts.
    """
    found: dict[str, list[tuple[Batch, Batch]]] = {}
    theirs = [{_place(batch): batch for batch in batches_of(batches, side=name)} for name in recomputing]
    for batch in batches_of(batches, side=side):
        other = next((one[_place(batch)] for one in theirs if _place(batch) in one), None)
        is_later = batch["step"] == AGAIN or (batch["step"].startswith("turn") and batch["step"] != "turn 1")
        is_request = batch["workload"] in (RAG, REPETITION) and external_tokens(batch) > 0
        if other is not None and (is_later or is_request):
            what = f"{DOCUMENTS}, {batch['length']} tokens" if batch["workload"] == DOCUMENTS else batch["workload"]
            found.setdefault(what, []).append((batch, other))
    return found


def hit_cells(batches: Sequence[Batch], side: str, recomputing: Sequence[str], noise: float) -> list[Cell]:
    """Returns a cell for each workload and length."""
    cells = []
    for what, pairs in sorted(hit_pairs(batches, side, recomputing).items()):
        ratios = np.array([ttft_s(ours) / ttft_s(theirs) for ours, theirs in pairs])
        share = sum(external_tokens(ours) for ours, _ in pairs) / sum(prompt_tokens(ours) for ours, _ in pairs)
        if len(pairs) < MIN_UNITS:
            # Too few for an interval. What is seen in all of them counts as long as it is far from the limit.
            cells.append(_few(side, what, ratios, share, noise))
            continue
        ratio, low, high = interval(len(pairs), median_of(ratios), sets=sets_of(pairs))
        status = status_of(low, high, 1.0 + noise, at_most=True)
        cells.append(Cell(side, what, status, ratio, low, high, len(pairs), share))
    return cells


def _few(side: str, what: str, ratios: npt.NDArray[np.float64], share: float, noise: float) -> Cell:
    clear = len(ratios) >= 2 and (ratios.max() <= 1.0 - MAX_NOISE or ratios.min() > (1.0 + noise) * (1.0 + MAX_NOISE))
    status = (MET if ratios.max() < 1.0 else MISSED) if clear else UNDECIDED
    return Cell(side, what, status, float(np.median(ratios)), None, None, len(ratios), share)


def judge_hits(cells: Sequence[Cell], side: str, wanted: Sequence[str], noise: float | None) -> Judgement:
    """Returns whether a hit is never slower than recomputing by more than noise: the worst of all cells.

    Args:
        cells: All cells.
        side: Whose.
        wanted: What must have been measured.
        noise: What two recomputing sides differ by; None where that was not measured, and the cells allow for none.
    """
    found = {cell.what: cell for cell in cells if cell.side == side}
    missing = [what for what in wanted if what not in found]
    slower = [what for what, cell in found.items() if cell.status == MISSED]
    open_ = [what for what, cell in found.items() if cell.status == UNDECIDED]
    notes = []
    if missing:
        notes.append(f"not measured: {', '.join(missing)}")
    if slower:
        notes.append(f"slower: {', '.join(slower)}")
    if open_:
        notes.append(f"open: {', '.join(open_)}")
    if noise is None:
        notes.append("noise was not measured, and none is allowed for")
    status = MISSED if slower else UNDECIDED if missing or open_ or not found else MET
    worst = max(found.values(), key=lambda cell: cell.ratio or 0.0, default=None)
    return Judgement(
        f"{side}: no workload or length at which a hit is slower than recomputing by more than noise (worst ratio)",
        status,
        worst.ratio if worst else None,
        worst.low if worst else None,
        worst.high if worst else None,
        1.0 + (noise or 0.0),
        True,
        sum(cell.units for cell in found.values()),
        "; ".join(notes),
    )


# --------------------------------------------------------------------------------------------------------------- all


@dataclass(frozen=True)
class Verdict:
    """All judgements, the cells behind them, and the noise they were held against."""

    judgements: tuple[Judgement, ...]
    cells: tuple[Cell, ...]
    noise: float | None


def judge_conversations(batches: Sequence[Batch], asked: Collection[str]) -> list[Judgement]:
    """Returns the judgements on conversations in vLLM: against no tier, and against the best peer."""
    ours = [side for side in (MEMKV, MEMKV_MEMORY) if side in asked]
    without, peers = [NO_CACHE, PREFIX_CACHE], [NATIVE, LMCACHE_FS]
    promise = f"conversations that outgrow the KV pool run at least {THROUGHPUT_OVER_NO_CACHE} times as fast as without"
    found = [
        judge_throughput(
            batches, CONVERSATIONS, side, without, THROUGHPUT_OVER_NO_CACHE,
            f"{side}: {promise} a cache, or with vLLM's own alone",
        )
        for side in ours if any(name in asked for name in without)
    ]  # fmt: skip
    if not any(name in asked for name in peers):
        return found
    # The peers have memory before their disk: so has one of ours. The promise is made for both.
    told = {
        MEMKV_MEMORY: "they run at least as fast as with the best peer",
        MEMKV: "they run at least as fast, each time from the disk, as with the best peer from memory",
    }
    found += [
        judge_throughput(batches, CONVERSATIONS, side, peers, 1.0, f"{side}: {text}")
        for side, text in told.items()
        if side in ours
    ]
    if MEMKV in ours:
        resumed = "resumed when nothing is left in memory, they run at least as fast as with the best peer"
        found.append(judge_throughput(batches, RESUMED, MEMKV, peers, 1.0, f"{MEMKV}: {resumed}"))
    return found


def judge_vllm(body: Mapping[str, Any]) -> Verdict:
    """Returns the judgements on vLLM's stage: on what was run, beside those who took part."""
    batches, asked, workloads = body["batches"], body["asked"], body["profile"]["workloads"]
    lengths = sorted(set(body["profile"]["documents"]["lengths"])) if DOCUMENTS in workloads else []
    noise = noise_of(batches)
    # Recomputing with the same settings but for the connector comes first.
    recomputing = tuple(name for name in (PREFIX_CACHE, NO_CACHE) if name in asked)
    cells = [
        cell
        for side in (MEMKV, MEMKV_MEMORY, THROTTLED)
        for cell in hit_cells(batches, side, recomputing, noise or 0.0)
    ]
    judgements = []
    if MEMKV in asked and lengths:
        reads = body["raw_reads"]
        judgements += [judge_restore(batches, reads, lengths[-1]), judge_load(batches, reads, lengths[-1])]
    if CONVERSATIONS in workloads:
        judgements += judge_conversations(batches, asked)
    if MEMKV in asked and PREFIX_CACHE in asked:
        judgements += judge_first_visit(batches)
    by_length = [f"{DOCUMENTS}, {length} tokens" for length in lengths]
    talks = [CONVERSATIONS] if CONVERSATIONS in workloads else []
    wanted = {MEMKV: [*by_length, *talks], MEMKV_MEMORY: talks, THROTTLED: by_length}
    judgements += [
        judge_hits(cells, side, what, noise) for side, what in wanted.items() if side in asked and what and recomputing
    ]
    return Verdict(tuple(judgements), tuple(cells), noise)


def judge_sglang(body: Mapping[str, Any]) -> Verdict:
    """Returns the judgements on SGLang's stage."""
    batches = body["batches"]
    judgements: list[Judgement] = []
    # Only one side recomputes here, so that the noise is that of first visits with and without the hierarchical cache.
    noise = noise_of(batches, NO_STORAGE, FILE)
    cells = [cell for side in (HICACHE, LINKER) for cell in hit_cells(batches, side, (NO_STORAGE,), noise or 0.0)]
    for side in (HICACHE, LINKER):
        judgements += [
            judge_throughput(
                batches, CONVERSATIONS, side, [FILE], 1.0,
                f"{side}: conversations run at least as fast as with SGLang's file backend", required=False,
            ),
            judge_hits(cells, side, [CONVERSATIONS], noise),
        ]  # fmt: skip
    return Verdict(tuple(judgements), tuple(cells), noise)
