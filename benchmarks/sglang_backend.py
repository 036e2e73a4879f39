"""The storage backends that SGLang's demo and benchmarks compare, and one question to an engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines.sglang.engines import Answer, Engine, hicache, linker, memkv_extra

PAGE_TOKENS = 64
MEMKV, LINKER, FILE = "memkv", "linker", "file"


@dataclass
class Backend:
    """One backend and where it stores.

    Attributes:
        name: `MEMKV`, `LINKER` or `FILE`.
        folder: Its directory.
        cost_gate: Off for a tiny model, which may recompute faster than a busy machine loads it.
    """

    name: str
    folder: Path
    cost_gate: str = "on"

    def arguments(self) -> dict[str, Any]:
        """Returns the engine's arguments."""
        if self.name == FILE:
            return hicache("file", file_storage_path=str(self.folder))
        if self.name == LINKER:
            return linker(self.folder, cost_gate=self.cost_gate)
        return hicache("dynamic", **memkv_extra(self.folder, cost_gate=self.cost_gate))

    def files(self) -> list[Path]:
        """Returns what it stored."""
        return sorted(p for p in self.folder.rglob("*") if p.suffix in (".bin", ".kv"))


def ask(engine: Engine, prompt: Sequence[int], tokens: int = 1) -> tuple[float, Answer]:
    """Returns the seconds to the answer, and the answer."""
    start = time.perf_counter()
    answer = engine.generate(list(prompt), tokens)
    return time.perf_counter() - start, answer
