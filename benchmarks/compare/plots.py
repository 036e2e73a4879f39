"""One page of plots."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
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
    "memkv, memory": "#52b788",
    "sglang, no storage": "#adb5bd", "sglang, file": "#f4a261", "memkv hicache": "#006d77", "memkv linker": "#83c5be",
}  # fmt: skip


Stage = Mapping[str, Any]
Panel = Callable[[Any], None]
"""Draws on axes."""


def draw(body: Mapping[str, Any], path: Path) -> None:
    """Draws the page: a panel for each thing that was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = panels_of(body)
    rows = max(1, -(-len(panels) // 2))
    figure, axes = plt.subplots(rows, 2, figsize=(13, 1.0 + 4.5 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        panel(axis)
    figure.suptitle("memkv-engines beside its peers, one machine, one run (`make compare`)")
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def panels_of(body: Mapping[str, Any]) -> list[Panel]:
    """Returns what there is to draw, in order."""
    found: list[Panel | None] = []
    if vllm := body["stages"].get("vllm"):
        talks = _turns(vllm, VLLM_SIDES, "vLLM: conversations that outgrow the KV pool")
        found += [_by_length(vllm), _restores(vllm), _rates(vllm), talks]
    found.append(_cells(body["cells"], body["noise"]))
    if sglang := body["stages"].get("sglang"):
        found.append(_turns(sglang, SGLANG_SIDES, "SGLang: conversations that outgrow its pools"))
    return [panel for panel in found if panel is not None]


def _by_length(stage: Stage) -> Panel | None:
    lines = {}
    for side in VLLM_SIDES:
        found: dict[int, list[float]] = {}
        for batch in batches_of(stage["batches"], side=side, workload=DOCUMENTS, step=AGAIN):
            found.setdefault(batch["length"], []).append(judge.ttft_s(batch))
        if found:
            lines[side] = sorted((length, float(np.median(times))) for length, times in found.items())

    def panel(axis: Any) -> None:
        for side, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=side, color=COLOURS[side])
        title = "vLLM: second visit to a document"
        axis.set(title=title, xlabel="tokens", ylabel="median TTFT, s (log)", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)

    return panel if lines else None


def _restores(stage: Stage) -> Panel | None:
    length = max(stage["profile"]["documents"]["lengths"])
    costs = {}
    for side in VLLM_SIDES:
        found = list(judge.restore_costs(stage["batches"], side, length).values())
        if found and side != THROTTLED:
            costs[side] = found
    raw = [one["seconds"] for one in stage["raw_reads"] if one["length"] == length]

    def panel(axis: Any) -> None:
        for number, (side, values) in enumerate(costs.items()):
            axis.scatter([number] * len(values), values, color=COLOURS[side], alpha=0.6)
            axis.hlines(float(np.median(values)), number - 0.3, number + 0.3, color=COLOURS[side])
        if raw:
            axis.axhline(float(np.median(raw)), color="black", linestyle=":", label="raw read of our files")
            axis.legend(fontsize=8)
        axis.set_xticks(range(len(costs)), list(costs), fontsize=8)
        title = f"vLLM: what restoring {length} tokens costs"
        axis.set(title=title, ylabel="TTFT less local hit, s", ylim=(0, None))
        axis.grid(alpha=0.3, axis="y")

    return panel if costs else None


def _rates(stage: Stage) -> Panel | None:
    rates = {
        workload: {side: judge.throughput(stage["batches"], workload, side) or 0.0 for side in VLLM_SIDES}
        for workload in (CONVERSATIONS, RESUMED, RAG, REPETITION)
    }
    rates = {workload: values for workload, values in rates.items() if any(values.values())}
    sides = [side for side in VLLM_SIDES if any(values[side] for values in rates.values())]

    def panel(axis: Any) -> None:
        width = 0.8 / len(sides)
        for number, side in enumerate(sides):
            at = np.arange(len(rates)) + number * width
            axis.bar(at, [values[side] for values in rates.values()], width, label=side, color=COLOURS[side])
        labels = [textwrap.fill(workload, 16) for workload in rates]
        axis.set_xticks(np.arange(len(rates)) + 0.4 - width / 2, labels, fontsize=8)
        axis.set(title="vLLM: throughput", ylabel="prompt and answer tokens / s")
        axis.grid(alpha=0.3, axis="y")
        axis.legend(fontsize=8)

    return panel if rates else None


def _turns(stage: Stage, sides: tuple[str, ...], title: str) -> Panel | None:
    lines = {}
    for side in sides:
        found: dict[int, list[float]] = {}
        for batch in batches_of(stage["batches"], side=side, workload=CONVERSATIONS):
            turn = int(batch["step"].removeprefix("turn "))
            found.setdefault(turn, []).extend(request["ttft_s"] for request in batch["requests"])
        if found:
            lines[side] = sorted((turn, float(np.median(times))) for turn, times in found.items())

    def panel(axis: Any) -> None:
        for side, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=side, color=COLOURS[side])
        axis.set(title=title, xlabel="turn", ylabel="median TTFT, s", ylim=(0, None))
        axis.set_xticks(sorted({turn for points in lines.values() for turn, _ in points}))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)

    return panel if lines else None


def _cells(cells: list[Mapping[str, Any]], noise: Mapping[str, float | None]) -> Panel | None:
    shown = [cell for cell in cells if cell["ratio"] is not None]
    limits = [value for value in noise.values() if value is not None]

    def panel(axis: Any) -> None:
        for number, cell in enumerate(shown):
            colour = COLOURS[cell["side"]]
            if cell["low"] is not None:
                axis.hlines(number, cell["low"], cell["high"], color=colour, linewidth=3, alpha=0.5)
            axis.plot(cell["ratio"], number, "o", color=colour)
        axis.axvline(1.0 + max(limits, default=0.0), color="black", linestyle=":")
        axis.set_yticks(range(len(shown)), [f"{cell['side']}: {cell['what']}" for cell in shown], fontsize=8)
        title = "A hit against recomputing (left of the line: faster)"
        axis.set(title=title, xlabel="TTFT of a hit / of recomputing", xlim=(0, None))
        axis.grid(alpha=0.3, axis="x")

    return panel if shown else None
