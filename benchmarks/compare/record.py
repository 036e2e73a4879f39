"""What was measured, written out as it goes, so that nothing is lost with a run that ends early."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.compare.side import Result, Side, Usage
from tests.environments.engine_env import ROOT

ERROR_CHARS = 4000
_PATH = re.compile(r"(?<![\w.}~*-])/(?:[\w.+@-]+/)+([\w.+@-]*)")

Batch = dict[str, Any]


def without_paths(text: str) -> str:
    """Returns a text in which no absolute path is left but its last part."""
    return _PATH.sub(r".../\1", text.replace(str(ROOT), "."))


class Record:
    """One stage's measurements.

    Args:
        path: The JSON file; written at every `save`, whole or not at all.
        head: What stands at its top.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self._path = path
        self.body: dict[str, Any] = {
            **head,
            "complete": False,
            "sides": {},
            "notes": [],
            "raw_reads": [],
            "batches": [],
        }
        self.save()

    def save(self) -> None:
        """Writes what there is."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.body), encoding="utf-8")
        temporary.replace(self._path)

    def add_side(self, name: str, what: str) -> None:
        """Notes a contestant, or that it starts anew."""
        known = self.body["sides"].get(name, {})
        self.body["sides"][name] = {**known, "what": what, "status": "starting", "error": ""}

    def set_side(self, name: str, **values: Any) -> None:
        """Notes more of a contestant."""
        self.body["sides"][name].update(values)

    def peaks(self, name: str, **values: int) -> None:
        """Notes figures of which the highest counts."""
        side = self.body["sides"][name]
        side.update({key: max(value, side.get(key, 0)) for key, value in values.items()})

    def fail(self, name: str, where: str, error: BaseException) -> None:
        """Notes that a contestant is out."""
        text = without_paths(f"{where}: {type(error).__name__}: {error}")
        self.set_side(name, status="failed", error=text[:ERROR_CHARS])
        self.save()

    def note(self, text: str) -> None:
        """Notes something that the results have to say."""
        self.body["notes"].append(without_paths(text))
        self.save()

    def add_batch(self, side: str, labels: dict[str, Any], result: Result, usage: Usage) -> None:
        """Notes one visit."""
        self.body["batches"].append(
            {
                "side": side,
                **labels,
                "wall_s": result.wall_s,
                "hits": dict(result.hits),
                "load_s": result.load_s,
                "usage": asdict(usage),
                "requests": [
                    {"prompt_tokens": reply.prompt_tokens, "ttft_s": reply.ttft_s, "tokens": list(reply.tokens)}
                    for reply in result.replies
                ],
            }
        )
        self.save()

    def stored(self, side: Side) -> None:
        """Notes what a contestant has on its device at its end, beside what it had at earlier ends."""
        files, known = side.files(), self.body["sides"][side.name]
        self.set_side(
            side.name,
            stored_bytes=known.get("stored_bytes", 0) + sum(path.stat().st_size for path in files),
            stored_files=known.get("stored_files", 0) + len(files),
        )


def batches_of(batches: Sequence[Batch], **labels: Any) -> Iterator[Batch]:
    """Yields the batches with these labels."""
    for batch in batches:
        if all(batch.get(name) == value for name, value in labels.items()):
            yield batch
