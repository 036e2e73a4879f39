"""Four processes write to one capacity: how many bytes are on disk at most?

    .venvs/dev/bin/python -m tests.trust.capacity                    # 5 runs of each scenario (about 4 minutes)
    .venvs/dev/bin/python -m tests.trust.capacity --runs 1 --seconds 2

Each writer stores chunks of many sizes on two threads, replaces and removes some, collides with the others on the same
names, and has its own keeper, which evicts; meanwhile this process lists the directories without a pause, temporary
files too. In half of the scenarios writers are killed with SIGKILL and started again. In the control nobody asks the
count.

One listing is not one moment: it sees chunks that go while it is made. So two figures are told: the bytes `seen` in one
listing, and those that `stayed` from one listing to the next, which were there together. The bound on both is
capacity_bytes and what is being written: a chunk for each thread, also for those of killed writers.

Writes build/capacity.json. Exit status 0: within the bound in every run, and beyond it in the control; 1: not so;
2: wrong usage.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from memkv_engines.errors import TierError
from memkv_engines.keys import ChunkKey
from memkv_engines.limits import ALIGN_BYTES, MIB
from memkv_engines.offload import keeping
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.striped import StripedTier, open_directories
from memkv_engines.tier.usage import Count, UsageFile
from tests.fast.samples import NAMESPACE, SHARD, aligned, chain
from tests.trust import report

WRITERS, THREADS = 4, 2
CAPACITY_BYTES = 96 * MIB
LARGEST_CHUNK_BYTES = 2 * MIB
PROMPTS = 400
KILL_EVERY_S = 0.7
# Of the capacity: then the watching begins.
NEARLY_FULL_SHARE = 0.85
FILL_TIMEOUT_S = 60.0
# A keeper that pauses a second, as it does elsewhere, would leave little to see.
EVICT_PAUSE_S = 0.02
CONTROL = "control: nobody asks the count"


@dataclass(frozen=True)
class Scenario:
    """What is tried: so many directories, writers killed or not, the count asked or not."""

    directories: int = 1
    kills: bool = False
    counts: bool = True


SCENARIOS = {
    "one directory": Scenario(),
    "one directory, writers killed": Scenario(kills=True),
    "two directories": Scenario(2),
    "two directories, writers killed": Scenario(2, kills=True),
}


# ----------------------------------------------------------------------------------------------- in a writer's process


def write_on(folders: Sequence[str], seed: int, counts: bool) -> None:
    """Store, replace and remove chunks until this process is killed."""
    keeping.EVICT_PAUSE_S = keeping.EVICT_PAUSE_MAX_S = EVICT_PAUSE_S
    if not counts:
        UsageFile.reserve = _reserve_anything  # type: ignore[method-assign]
    tier = open_directories(folders, direct_io="off", capacity_bytes=CAPACITY_BYTES)
    keeping.start_keepers(tier)
    for thread in range(1, THREADS):
        threading.Thread(target=_put_chunks, args=(tier, seed + thread), daemon=True).start()
    _put_chunks(tier, seed)


def _reserve_anything(self: UsageFile, size_bytes: int, _: int) -> tuple[bool, Count]:
    self.add(size_bytes)
    return True, self.count()


def _put_chunks(tier: DirectoryTier | StripedTier, seed: int) -> None:
    choice = random.Random(seed)
    memory = aligned(os.urandom(LARGEST_CHUNK_BYTES))
    while True:
        prompt = choice.randrange(PROMPTS)
        hashes = chain(2, str(prompt))
        name = ChunkKey(NAMESPACE.digest, hashes[0], hashes[1], 2, 0, SHARD).name
        # A name always has the same size: what replaces a chunk is as large as the chunk.
        size = ALIGN_BYTES * (1 + random.Random(prompt).randrange(LARGEST_CHUNK_BYTES // ALIGN_BYTES))
        try:
            if choice.random() < 0.05:
                tier.remove(NAMESPACE.folder, name)
            tier.put(NAMESPACE.folder, name, [memory[:size]], replace=choice.random() < 0.4)
        except TierError:
            time.sleep(0.001)  # Full: the keeper is at it.


# -------------------------------------------------------------------------------------------------- around the writers


def listed(folder: Path) -> dict[int, int]:
    """Bytes of every file below the namespace's folder, by inode: one that is renamed meanwhile counts once."""
    found: dict[int, int] = {}
    for entry in _files(folder / NAMESPACE.folder):
        with contextlib.suppress(OSError):
            info = entry.stat(follow_symlinks=False)
            found[info.st_ino] = info.st_size
    return found


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    with contextlib.suppress(OSError), os.scandir(folder) as buckets:
        for bucket in buckets:
            if bucket.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError), os.scandir(bucket.path) as files:
                    yield from files


class Run:
    """One run of a scenario.

    Args:
        scenario: what is tried.
        root: an empty folder.
        seed: of the writers and kills.
    """

    def __init__(self, scenario: Scenario, root: Path, seed: int) -> None:
        self._scenario, self._choice = scenario, random.Random(seed)
        self._folders = [root / str(number) for number in range(scenario.directories)]
        for folder in self._folders:
            folder.mkdir()
        self._context = multiprocessing.get_context("spawn")
        self._started = self.kills = 0

    def play(self, seconds: float) -> dict[str, Any]:
        """Write and list for a while; what was seen."""
        writers = [self._start() for _ in range(WRITERS)]
        seen = stayed = listings = 0
        before: list[dict[int, int]] = [{} for _ in self._folders]
        try:
            self._await_full(writers)
            end = time.monotonic() + seconds
            next_kill = time.monotonic() + KILL_EVERY_S
            while time.monotonic() < end:
                now = [listed(folder) for folder in self._folders]
                listings += 1
                seen = max(seen, *(sum(files.values()) for files in now))
                both = (sum(min(b[i], n[i]) for i in b.keys() & n.keys()) for b, n in zip(before, now, strict=True))
                stayed = max(stayed, *both)
                before = now
                if self._scenario.kills and time.monotonic() > next_kill:
                    next_kill = time.monotonic() + KILL_EVERY_S
                    self._kill(writers)
            assert all(writer.is_alive() for writer in writers), "a writer has died by itself"
        finally:
            for writer in writers:
                writer.kill()
            for writer in writers:
                writer.join()
        half_written = (WRITERS + self.kills) * THREADS * LARGEST_CHUNK_BYTES
        return {
            "seen_overshoot_bytes": seen - CAPACITY_BYTES,
            "stayed_overshoot_bytes": stayed - CAPACITY_BYTES,
            "allowed_bytes": half_written,
            "listings": listings,
            "kills": self.kills,
        }

    def _start(self) -> SpawnProcess:
        self._started += 1
        folders = [str(folder) for folder in self._folders]
        arguments = (folders, self._choice.getrandbits(32), self._scenario.counts)
        process = self._context.Process(target=write_on, args=arguments, daemon=True)
        process.start()
        return process

    def _kill(self, writers: list[SpawnProcess]) -> None:
        number = self._choice.randrange(WRITERS)
        writers[number].kill()
        writers[number].join()
        self.kills += 1
        writers[number] = self._start()

    def _await_full(self, writers: list[SpawnProcess]) -> None:
        deadline = time.monotonic() + FILL_TIMEOUT_S
        while min(sum(listed(folder).values()) for folder in self._folders) < NEARLY_FULL_SHARE * CAPACITY_BYTES:
            assert time.monotonic() < deadline and all(w.is_alive() for w in writers), "it does not fill"
            time.sleep(0.01)


def play(scenario: Scenario, runs: int, seconds: float, seed: int, progress: tqdm[Any]) -> list[dict[str, Any]]:
    """The runs of a scenario, each in an empty folder."""
    found = []
    for number in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            found.append(Run(scenario, Path(folder), seed + number).play(seconds))
        progress.update()
    return found


def broken(name: str, runs: Sequence[dict[str, Any]]) -> list[str]:
    """What does not hold for a scenario."""
    worst = max(run["stayed_overshoot_bytes"] for run in runs)
    if name == CONTROL:
        return [] if worst > runs[0]["allowed_bytes"] else [f"{name}: not exceeded: this could not have seen it"]
    told = []
    for number, run in enumerate(runs):
        for kind in ("seen", "stayed"):
            over = run[f"{kind}_overshoot_bytes"]
            if over > run["allowed_bytes"]:
                told.append(f"{name}, run {number}: {over} B over ({kind}), {run['allowed_bytes']} B being written")
        if not run["listings"]:
            told.append(f"{name}, run {number}: not listed")
    return told


def row_of(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The line of the table."""
    return {
        "scenario": name,
        "runs": len(runs),
        "listings": sum(run["listings"] for run in runs),
        "kills": sum(run["kills"] for run in runs),
        "capacity [MiB]": CAPACITY_BYTES / MIB,
        "over, seen [MiB]": max(run["seen_overshoot_bytes"] for run in runs) / MIB,
        "over, stayed [MiB]": max(run["stayed_overshoot_bytes"] for run in runs) / MIB,
        "being written [MiB]": max(run["allowed_bytes"] for run in runs) / MIB,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, show, write."""
    parser = report.parser(__doc__ or "", "capacity.json")
    parser.add_argument("--runs", type=int, default=5, help="of each scenario")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each run")
    options = parser.parse_args(arguments)
    if options.runs < 1 or options.seconds <= 0:
        parser.error("--runs, --seconds: give more than 0")
    found: dict[str, list[dict[str, Any]]] = {}
    with tqdm(total=options.runs * len(SCENARIOS) + 1, unit="run", disable=None) as progress:
        for name, scenario in SCENARIOS.items():
            found[name] = play(scenario, options.runs, options.seconds, options.seed, progress)
        found[CONTROL] = play(Scenario(counts=False), 1, options.seconds, options.seed, progress)
    wrong = [line for name, runs in found.items() for line in broken(name, runs)]
    figures = {"capacity_bytes": CAPACITY_BYTES, "writers": WRITERS, "threads": THREADS, "scenarios": found}
    return report.conclude(options, figures, [row_of(*item) for item in found.items()], wrong)


if __name__ == "__main__":
    sys.exit(main())
