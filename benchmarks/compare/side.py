"""A contestant: an engine with one kind of cache, long-lived, asked in turns; and what its processes used."""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks import harness

SETTLE_S = 0.25
SETTLE_TIMEOUT_S = 15.0
# An engine that waits still wakes now and then; one that stores, or polls after its last message, keeps a core busy.
QUIET_CORES = 0.15
IO_COMMAND = b"memkv_engines.offload.process"
# Data files of ours, of vLLM's and SGLang's file tiers, and of LMCache's.
DATA_SUFFIXES = (".kv", ".bin", ".data")
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class SideFailed(Exception):
    """A side did not start, died, or gave no answer."""


@dataclass(frozen=True)
class Reply:
    """What became of one prompt."""

    tokens: tuple[int, ...]
    prompt_tokens: int
    ttft_s: float


@dataclass(frozen=True)
class Result:
    """What became of prompts that were asked together.

    Attributes:
        replies: One per prompt.
        wall_s: From the first prompt's submission to the last token.
        hits: Prompt tokens that were not computed, by the source that the engine names.
        load_s: From a load's submission until all its pages are in place, by the side's own timer, over all loads; None
            where it has none.
    """

    replies: tuple[Reply, ...]
    wall_s: float
    hits: Mapping[str, int]
    load_s: float | None = None


@dataclass(frozen=True)
class Usage:
    """What a tree of processes has used.

    Attributes:
        cpu_s: CPU seconds.
        read_bytes: Bytes fetched from block devices.
        write_bytes: Bytes submitted to block devices, or dirtied in the page cache.
        read_calls: read-like system calls, pipes and sockets included.
        write_calls: write-like system calls, likewise.
        io_process_cpu_s: CPU seconds of our I/O processes, which `cpu_s` includes.
    """

    cpu_s: float = 0.0
    read_bytes: int = 0
    write_bytes: int = 0
    read_calls: int = 0
    write_calls: int = 0
    io_process_cpu_s: float = 0.0

    def plus(self, other: Usage) -> Usage:
        """Returns the sum."""
        return Usage(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def since(self, earlier: Usage) -> Usage:
        """Returns the difference to an earlier moment."""
        return Usage(*(a - b for a, b in zip(self.values(), earlier.values(), strict=True)))

    def values(self) -> tuple[float, int, int, int, int, float]:
        """Returns the fields in order."""
        return (
            self.cpu_s, self.read_bytes, self.write_bytes, self.read_calls, self.write_calls, self.io_process_cpu_s
        )  # fmt: skip


@dataclass
class Meter:
    """Reads what the processes below some roots use, from `/proc`; what ended keeps its last values.

    Attributes:
        roots: Process ids; their descendants and the members of their sessions count too.
        peak_rss_bytes: Largest sum of resident memory at a call of `read_memory`; shared pages count once a process.
        peak_pss_bytes: Largest sum of proportional memory; shared pages count once.
    """

    roots: Sequence[int]
    peak_rss_bytes: int = 0
    peak_pss_bytes: int = 0
    _seen: dict[int, Usage] = field(default_factory=dict)

    def usage(self) -> Usage:
        """Returns what all processes have used since they started."""
        for pid in tree_of(self.roots):
            with contextlib.suppress(OSError, ValueError):
                self._seen[pid] = usage_of(pid)
        total = Usage()
        for used in self._seen.values():
            total = total.plus(used)
        return total

    def read_memory(self) -> None:
        """Notes how much memory the tree has now."""
        rss = pss = 0
        for pid in tree_of(self.roots):
            with contextlib.suppress(OSError, ValueError):
                rss += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
                pss += pss_of(Path(f"/proc/{pid}/smaps_rollup").read_text())
        self.peak_rss_bytes = max(self.peak_rss_bytes, rss)
        self.peak_pss_bytes = max(self.peak_pss_bytes, pss)

    def settle(self) -> Usage:
        """Waits until the tree leaves the cores to the next side and what it stores is stored; returns its usage."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        before = self.usage()
        while time.monotonic() < deadline:
            time.sleep(SETTLE_S)
            now = self.usage()
            if now.cpu_s - before.cpu_s <= QUIET_CORES * SETTLE_S and now.write_bytes == before.write_bytes:
                return now
            before = now
        return before


def tree_of(roots: Iterable[int]) -> list[int]:
    """Returns the running processes that descend from the roots or are in their sessions."""
    wanted = set(roots)
    parents: dict[int, tuple[int, int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent, _, session = stat_fields(Path(entry.path, "stat").read_text())[:4]
                if state != "Z":
                    parents[int(entry.name)] = int(parent), int(session)
    found = {pid for pid, (_, session) in parents.items() if pid in wanted or session in wanted}
    while True:
        more = {pid for pid, (parent, _) in parents.items() if parent in found} - found
        if not more:
            return sorted(found)
        found |= more


def stat_fields(text: str) -> list[str]:
    """Returns the fields of `/proc/<pid>/stat` that follow the name, which may hold anything."""
    return text.rsplit(")", 1)[1].split()


def usage_of(pid: int) -> Usage:
    """Returns what one process has used."""
    user, system = stat_fields(Path(f"/proc/{pid}/stat").read_text())[11:13]
    cpu_s = (int(user) + int(system)) * _TICK_S
    used = io_of(Path(f"/proc/{pid}/io").read_text(), cpu_s)
    is_ours = IO_COMMAND in Path(f"/proc/{pid}/cmdline").read_bytes()
    return replace(used, io_process_cpu_s=cpu_s) if is_ours else used


def io_of(text: str, cpu_s: float) -> Usage:
    """Returns the usage in the text of `/proc/<pid>/io`."""
    told = {name: int(value) for name, value in (line.split(":") for line in text.splitlines())}
    return Usage(cpu_s, told["read_bytes"], told["write_bytes"], told["syscr"], told["syscw"])


def pss_of(text: str) -> int:
    """Returns the proportional memory in the text of `/proc/<pid>/smaps_rollup`, in bytes."""
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) * 1024


class Side(ABC):
    """A contestant. It starts in the background when it is made; `wait_until_ready` comes before anything else.

    Attributes:
        name: What it is called in the results.
        what: One line on what it is.
        folder: Where it stores; None where nothing outlives eviction.
        only_loads: It stores nothing of its own and is asked only for what another side stored.
        keeps_memory: Nobody empties its memory, so it is not asked for what has to come from the disk.
    """

    name: str
    what: str
    folder: Path | None = None
    only_loads: bool = False
    keeps_memory: bool = False

    def prepare(self) -> None:  # noqa: B027
        """Starts what could not be started with the rest; all sides are prepared before one is waited for.

        Raises:
            SideFailed: It did not start.
        """

    @abstractmethod
    def wait_until_ready(self) -> None:
        """Waits until it can be asked.

        Raises:
            SideFailed: It did not start.
        """

    @abstractmethod
    def ask(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Result:
        """Answers prompts greedily.

        Raises:
            SideFailed: It died or gave no answer.
        """

    @abstractmethod
    def forget(self) -> None:
        """Empties what it holds in memory, so that only what it stored is left."""

    @abstractmethod
    def pids(self) -> list[int]:
        """Returns the roots of its processes."""

    @abstractmethod
    def close(self) -> None:
        """Ends it, whatever state it is in."""

    @property
    def stores(self) -> bool:
        """Whether anything outlives eviction."""
        return self.folder is not None

    def files(self) -> list[Path]:
        """Returns what it stored."""
        if self.folder is None:
            return []
        return sorted(path for path in self.folder.rglob("*") if path.suffix in DATA_SUFFIXES)

    def forget_and_cool(self) -> None:
        """Leaves only what is on the device itself: memory emptied, and its files dropped from the page cache."""
        self.forget()
        self.cool()

    def cool(self) -> None:
        """Drops what it stored from the page cache."""
        for path in self.files():
            # A file may be replaced meanwhile.
            with contextlib.suppress(FileNotFoundError):
                harness.drop_from_page_cache([path])
