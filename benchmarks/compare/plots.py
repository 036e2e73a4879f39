"""One page of plots."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare import judge
from benchmarks.compare.names import (
    AGAIN,
    CONVERSATIONS,
    DOCUMENTS,
    RAG,
    REPETITION,
    RESUMED,
    SGLANG_SIDES,
    THROTTLED,
    VLLM_SIDES,
)
from benchmarks.compare.record import batches_of

COLOURS = {
    "vllm, no cache": "#adb5bd", "vllm, prefix cache": "#6c757d", "vllm, native fs": "#f4a261",
    "lmcache, fs": "#e76f51", "lmcache, memkv": "#83c5be", "memkv": "#006d77", "memkv, slow tier": "#4ea8de",
    "memkv, page cache": "#52b788",
    "sglang, no storage": "#adb5bd", "sglang, file": "#f4a261", "memkv hicache": "#006d77", "memkv linker": "#83c5be",
}  # fmt: skip


def draw(body: Mapping[str, Any], path: Path) -> None:
    """Draws the page; panels without measurements say so."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 2, figsize=(13, 14))
    vllm, sglang = (body["stages"].get(name) for name in ("vllm", "sglang"))
    _by_length(axes[0][0], vllm)
    _restores(axes[0][1], vllm)
    _rates(axes[1][0], vllm)
    _turns(axes[1][1], vllm, VLLM_SIDES, "vLLM: conversations that outgrow the KV pool")
    _cells(axes[2][0], body["cells"], body["noise"])
    _turns(axes[2][1], sglang, SGLANG_SIDES, "SGLang: conversations that outgrow its pools")
    figure.suptitle("memkv-engines beside its peers, one machine, one run (`make compare`)")
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _empty(axis: Any, title: str) -> None:
    axis.set_title(title)
    axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes)
    axis.set_axis_off()


def _by_length(axis: Any, stage: Mapping[str, Any] | None) -> None:
    title = "vLLM: second visit to a document"
    lines = {}
    for side in VLLM_SIDES if stage else ():
        assert stage is not None
        found: dict[int, list[float]] = {}
        for batch in batches_of(stage["batches"], side=side, workload=DOCUMENTS, step=AGAIN):
            found.setdefault(batch["length"], []).append(judge.ttft_s(batch))
        if found:
            lines[side] = sorted((length, float(np.median(times))) for length, times in found.items())
    if not lines:
        _empty(axis, title)
        return
    for side, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=side, color=COLOURS[side])
    axis.set(title=title, xlabel="tokens", ylabel="median TTFT, s (log)", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _restores(axis: Any, stage: Mapping[str, Any] | None) -> None:
    length = max(stage["profile"]["documents"]["lengths"]) if stage else 0
    title = f"vLLM: what restoring {length} tokens costs"
    costs = {}
    for side in VLLM_SIDES if stage else ():
        assert stage is not None
        found = list(judge.restore_costs(stage["batches"], side, length).values())
        if found and side != THROTTLED:
            costs[side] = found
    if not costs or stage is None:
        _empty(axis, title)
        return
    raw = [one["seconds"] for one in stage["raw_reads"] if one["length"] == length]
    for number, (side, values) in enumerate(costs.items()):
        axis.scatter([number] * len(values), values, color=COLOURS[side], alpha=0.6)
        axis.hlines(float(np.median(values)), number - 0.3, number + 0.3, color=COLOURS[side])
    if raw:
        axis.axhline(float(np.median(raw)), color="black", linestyle=":", label="raw read of our files")
        axis.legend(fontsize=8)
    axis.set_xticks(range(len(costs)), list(costs), fontsize=8)
    axis.set(title=title, ylabel="TTFT less local hit, s", ylim=(0, None))
    axis.grid(alpha=0.3, axis="y")


def _rates(axis: Any, stage: Mapping[str, Any] | None) -> None:
    title, workloads = "vLLM: throughput", (CONVERSATIONS, RESUMED, RAG, REPETITION)
    found = {
        side: [judge.throughput(stage["batches"], workload, side) for workload in workloads]
        for side in (VLLM_SIDES if stage else ())
        if stage is not None and any(batches_of(stage["batches"], side=side, workload=CONVERSATIONS))
    }
    if not found:
        _empty(axis, title)
        return
    width = 0.8 / len(found)
    for number, (side, values) in enumerate(found.items()):
        at = np.arange(len(workloads)) + number * width
        axis.bar(at, [value or 0.0 for value in values], width, label=side, color=COLOURS[side])
    labels = [textwrap.fill(workload, 16) for workload in workloads]
    axis.set_xticks(np.arange(len(workloads)) + 0.4 - width / 2, labels, fontsize=8)
    axis.set(title=title, ylabel="prompt and answer tokens / s")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=8)


def _turns(axis: Any, stage: Mapping[str, Any] | None, sides: tuple[str, ...], title: str) -> None:
    lines = {}
    for side in sides if stage else ():
        assert stage is not None
        found: dict[int, list[float]] = {}
        for batch in batches_of(stage["batches"], side=side, workload=CONVERSATIONS):
            turn = int(batch["step"].removeprefix("turn "))
            found.setdefault(turn, []).extend(request["ttft_s"] for request in batch["requests"])
        if found:
            lines[side] = sorted((turn, float(np.median(times))) for turn, times in found.items())
    if not lines:
        _empty(axis, title)
        return
    for side, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=side, color=COLOURS[side])
    axis.set(title=title, xlabel="turn", ylabel="median TTFT, s", ylim=(0, None))
    axis.set_xticks(sorted({turn for points in lines.values() for turn, _ in points}))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _cells(axis: Any, cells: list[Mapping[str, Any]], noise: Mapping[str, float | None]) -> None:
    title = "A hit against recomputing (left of the line: faster)"
    shown = [cell for cell in cells if cell["ratio"] is not None]
    if not shown:
        _empty(axis, title)
        return
    for number, cell in enumerate(shown):
        colour = COLOURS[cell["side"]]
        if cell["low"] is not None:
            axis.hlines(number, cell["low"], cell["high"], color=colour, linewidth=3, alpha=0.5)
        axis.plot(cell["ratio"], number, "o", color=colour)
    limits = [value for value in noise.values() if value is not None]
    axis.axvline(1.0 + max(limits, default=0.0), color="black", linestyle=":")
    axis.set_yticks(range(len(shown)), [f"{cell['side']}: {cell['what']}" for cell in shown], fontsize=8)
    axis.set(title=title, xlabel="TTFT of a hit / of recomputing", xlim=(0, None))
    axis.grid(alpha=0.3, axis="x")
