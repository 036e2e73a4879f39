"""What the demo found: numbers, verdict, table and picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.demo_phases import FirstVisit, Recompute, Restart, Settings
from benchmarks.demo_workload import Workload
from benchmarks.engine_run import Answer
from benchmarks.tier_files import TierContents

# Restored less than this share of a prompt's whole blocks, the demo shows something else than it claims.
MIN_HIT_SHARE = 0.9

MEANING = {
    "prompt_tokens": "tokens of each measured prompt",
    "recompute_ttft_s": "time to first token without a connector, nothing cached; median over the prompts",
    "first_visit_ttft_s": "with the connector and nothing to hit, stores running; median over the prompts",
    "restore_ttft_s": "fresh process, chunks read from the tier, page cache dropped before each; median over all",
    "local_hit_ttft_s": "without a connector, the prompt is in the engine's own prefix cache; median over all",
    "speedup": "recompute_ttft_s / restore_ttft_s",
    "external_hit_tokens": "prompt tokens that one restore takes from the tier; median over all restores",
    "chunks": "chunk files that all measured prompts left in the tier, full and tail",
    "chunk_bytes": "file size of a full chunk",
    "stored_bytes": "sum of the sizes of those files",
    "blocks_per_chunk": "engine blocks in a full chunk",
    "partial_chunk_hits": "chunks of which a diverging prompt used the leading blocks only",
    "tail_chunks": "chunks with fewer blocks than a full one",
    "raw_read_s": "reading the files of one prompt by direct I/O into huge pages, taken just before each restore; "
    "median over all",
    "load_s": "of a restore: from the load's submission until every page is in place, by the connector's own timer; "
    "median over all",
    "load_over_raw_read": "load_s / raw_read_s: median over the pairs and the ends of its 95% interval",
    "restore_over_limit": "restore_ttft_s / (raw_read_s + local_hit_ttft_s)",
    "tokens_equal": "fp32: all answers to a prompt are the same; bf16: computed answers are the same, and restored "
    "ones are those of a local hit (vLLM's own cache hits round differently there)",
}


@dataclass(frozen=True)
class Row:
    """One dtype's measurements."""

    dtype: str
    settings: Settings
    workload: Workload
    block_size: int
    recompute: Recompute
    first_visit: FirstVisit
    restart: Restart

    def numbers(self) -> dict[str, Any]:
        """Returns what `MEANING` explains, and the single values behind it."""
        stored = self.stored
        restored = [one for prompt in self.restart.restored for one in prompt]
        recompute_s = _median(answer.ttft_s for answer in self.recompute.cold)
        restore_s = _median(one.answer.ttft_s for one in restored)
        local_s = _median(answer.ttft_s for prompt in self.recompute.local for answer in prompt)
        raw_s = _median(one.raw_read_s for one in restored)
        return {
            "dtype": self.dtype,
            "prompt_tokens": self.workload.prompt_tokens,
            "recompute_ttft_s": recompute_s,
            "first_visit_ttft_s": _median(answer.ttft_s for answer in self.first_visit.answers),
            "restore_ttft_s": restore_s,
            "local_hit_ttft_s": local_s,
            "speedup": recompute_s / restore_s,
            "external_hit_tokens": int(_median(one.external_tokens for one in restored)),
            "chunks": len(stored.chunks),
            "chunk_bytes": stored.chunk_bytes,
            "stored_bytes": stored.stored_bytes,
            "blocks_per_chunk": stored.blocks_per_chunk,
            "partial_chunk_hits": self.partial_chunk_hits,
            "tail_chunks": len(stored.tails),
            "raw_read_s": raw_s,
            "load_s": _median(one.load_s for one in restored),
            "load_over_raw_read": harness.median_of_pair_ratios(
                [one.load_s for one in restored], [one.raw_read_s for one in restored]
            ),
            "restore_over_limit": restore_s / (raw_s + local_s),
            "tokens_equal": self.tokens_equal,
            "settings": asdict(self.settings),
            "raw_read_threads": self.restart.raw_threads,
            "prompts": self._prompts(),
            "diverging_prompt": {
                "shared_blocks": self.workload.shared_blocks,
                "external_hit_tokens": self.restart.diverging.external_tokens,
                "recompute_ttft_s": self.recompute.diverging_cold.ttft_s,
                "restore_ttft_s": self.restart.diverging.answer.ttft_s,
                "local_hit_ttft_s": self.recompute.diverging_local.ttft_s,
            },
            "engine_start_s": {
                "recompute": self.recompute.start_s,
                "first_visit": self.first_visit.start_s,
                "restart": self.restart.start_s,
            },
        }

    @property
    def stored(self) -> TierContents:
        """What the measured prompts left in the tier."""
        return TierContents(tuple(chunk for files in self.first_visit.files for chunk in files.chunks))

    @property
    def partial_chunk_hits(self) -> int:
        """1 where the diverging prompt's hit ends inside a chunk, else 0."""
        blocks = self.restart.diverging.external_tokens // self.block_size
        return int(blocks > 0 and blocks % max(self.stored.blocks_per_chunk, 1) != 0)

    @property
    def tokens_equal(self) -> bool:
        """Whether no answer depends on where the KV came from; see `MEANING`."""
        return not self.differences()

    def differences(self) -> list[str]:
        """Returns which answers differ that should not."""
        found = []
        for number, cold in enumerate(self.recompute.cold):
            local = self.recompute.local[number]
            restored = [one.answer for one in self.restart.restored[number]]
            name = f"{self.dtype}, prompt {number + 1}"
            found += _unequal(f"{name}: first visit", cold, [self.first_visit.answers[number]])
            found += _unequal(f"{name}: restored", local[0], [*local[1:], *restored])
            if self._exact:
                found += _unequal(f"{name}: local hit", cold, local)
        restored_diverging = self.restart.diverging.answer
        found += _unequal(f"{self.dtype}, diverging: restored", self.recompute.diverging_local, [restored_diverging])
        if self._exact:
            found += _unequal(f"{self.dtype}, diverging: local", self.recompute.diverging_cold, [restored_diverging])
        return found

    def failures(self) -> list[str]:
        """Returns why the demo did not show what it is for; empty when it did."""
        found = [f"tokens differ: {difference}" for difference in self.differences()]
        whole = (self.workload.prompt_tokens - 1) // self.block_size * self.block_size
        for number, restored in enumerate(self.restart.restored):
            least = min(one.external_tokens for one in restored)
            if least < MIN_HIT_SHARE * whole:
                found.append(f"{self.dtype}, prompt {number + 1}: only {least} of {whole} tokens came from the tier")
        if not self.partial_chunk_hits:
            found.append(f"{self.dtype}: the diverging prompt used no part of a chunk")
        return found

    @property
    def _exact(self) -> bool:
        return self.dtype == "float32"

    def _prompts(self) -> list[dict[str, Any]]:
        return [
            {
                "title": self.workload.titles[number],
                "recompute_ttft_s": cold.ttft_s,
                "first_visit_ttft_s": self.first_visit.answers[number].ttft_s,
                "restore_ttft_s": [one.answer.ttft_s for one in self.restart.restored[number]],
                "local_hit_ttft_s": [answer.ttft_s for answer in self.recompute.local[number]],
                "raw_read_s": [one.raw_read_s for one in self.restart.restored[number]],
                "load_s": [one.load_s for one in self.restart.restored[number]],
                "external_hit_tokens": [one.external_tokens for one in self.restart.restored[number]],
                "chunks": len(self.first_visit.files[number].chunks),
                "stored_bytes": self.first_visit.files[number].stored_bytes,
                "answer": self.restart.restored[number][0].answer.text,
            }
            for number, cold in enumerate(self.recompute.cold)
        ]


def _unequal(what: str, reference: Answer, others: Iterable[Answer]) -> list[str]:
    differing = [answer for answer in others if answer.tokens != reference.tokens]
    return [f"{what} {answer.text!r} instead of {reference.text!r}" for answer in differing[:1]]


def _median(values: Iterable[float]) -> float:
    return harness.median(list(values))


# ------------------------------------------------------------------------------------------------- table and picture

BARS = (
    ("recompute", "recompute_ttft_s", "#8d99ae"),
    ("first visit\n(stores)", "first_visit_ttft_s", "#f4a261"),
    ("restore\nafter restart", "restore_ttft_s", "#2a9d8f"),
    ("local hit\n(no load at all)", "local_hit_ttft_s", "#264653"),
)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints one column per dtype."""
    lines: list[tuple[str, list[str]]] = [
        ("prompt", [f"{row['prompt_tokens']} tokens x {len(row['prompts'])}" for row in rows]),
        ("recompute", [f"{row['recompute_ttft_s']:.2f} s" for row in rows]),
        ("first visit", [f"{row['first_visit_ttft_s']:.2f} s" for row in rows]),
        ("restore", [f"{row['restore_ttft_s']:.3f} s" for row in rows]),
        ("  speed-up", [f"{row['speedup']:.1f} x" for row in rows]),
        ("  raw read", [f"{row['raw_read_s']:.3f} s" for row in rows]),
        ("  load, by its timer", [f"{row['load_s']:.3f} s" for row in rows]),
        ("  load / raw read [95%]", ["{:.2f} [{:.2f}, {:.2f}]".format(*row["load_over_raw_read"]) for row in rows]),
        ("local hit", [f"{row['local_hit_ttft_s']:.3f} s" for row in rows]),
        ("  restore / limit", [f"{row['restore_over_limit']:.2f}" for row in rows]),
        ("tier tokens", [str(row["external_hit_tokens"]) for row in rows]),
        (
            "chunks",
            [f"{row['chunks']} of {row['chunk_bytes'] / 1e6:.2f} MB, {row['tail_chunks']} shorter" for row in rows],
        ),
        ("blocks a chunk", [str(row["blocks_per_chunk"]) for row in rows]),
        ("stored", [f"{row['stored_bytes'] / 1e6:.0f} MB" for row in rows]),
        ("partial hits", [str(row["partial_chunk_hits"]) for row in rows]),
        ("same tokens", ["yes" if row["tokens_equal"] else "[bold red]NO[/]" for row in rows]),
    ]
    harness.print_table(
        "time to first token, medians", ["", *(row["dtype"] for row in rows)], [[name, *cells] for name, cells in lines]
    )
    print("limit = raw read of the same files + local hit, which has nothing to load")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the four times of each dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(rows), figsize=(5.5 * len(rows), 4.2), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        values = [row[key] for _, key, _ in BARS]
        bars = axis.bar([name for name, _, _ in BARS], values, color=[color for _, _, color in BARS])
        axis.bar_label(bars, [f"{value:.2f} s" for value in values], padding=2)
        axis.set_title(f"{row['dtype']}, {row['prompt_tokens']} tokens: {row['speedup']:.1f}x faster")
        axis.set_ylabel("time to first token, s")
        axis.margins(y=0.12)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("SmolLM2-135M in vLLM: the KV cache comes back from disk", fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
