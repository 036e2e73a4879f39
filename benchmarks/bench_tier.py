"""How near to the device's limit does the directory tier get?

For each chunk size the same number of new files is written and read back, page cache cold, in four ways, interleaved
over the rounds of one run and in another order each round:

* ``raw``: create, one direct write, close; open, one direct read, close; from huge pages (``raw_limit``);
* ``fio``, where it is installed: the same files, its own clock;
* ``staging``: ``DirectoryTier.put`` and ``open`` + ``read`` on the same huge pages: no copy, no checksum;
* ``pages``: engine pages through the I/O service's own process: gather, digest, write; read, verify, scatter.

``raw``, ``fio`` and ``staging`` each take the number of threads that suits them best. The limit is the best median of
``raw`` and ``fio``; what is reported is each way's share of it. Nothing beats the limit: a share above 1.02 means that
the measurement is wrong, and fails. All ways move the same payload; the header of a chunk counts as overhead.
On a virtual machine the host may keep the cores for others. Each step notes how much of their time (``stolen``), and
medians are taken over the steps that lost at most 5%, where there are five of them, for every way alike.
The tier's bucket folders exist before the first timed round, as they do in a tier that has been used for a while.

With ``--transport posix,nixl`` (in the environment ``device``) ``staging`` and ``pages`` run over each, in the same
rounds; every row names the transport that was really taken.

Usage: ``python -m benchmarks.bench_tier [--directory DIR] [--sizes 2,4,8,16] [--transport posix] [--json FILE]``
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.raw_limit import FIO_DEPTHS, THREADS, Fio, file_names, huge_buffer, read_files, timed, write_files
from benchmarks.through_service import ServiceBench, Shape
from memkv_engines.errors import ConfigError, MemKVError
from memkv_engines.keys import ChunkKey, Namespace, Shard
from memkv_engines.limits import KIB, MIB
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.transports.files import address_of
from memkv_engines.transports.select import Policy, plan

MAX_SHARE = 1.02
MAX_STOLEN = 0.05
MIN_UNDISTURBED = 5
REFUSED = 3
"""Exit status where the file system takes no direct I/O, so that there is no limit to compare with, or a transport is
not to be had."""
_LIMITS = ("raw", "fio")


class Contestant(ABC):
    """One way to write and read the files of a round; ``label`` is ``way/configuration``."""

    label: str

    @abstractmethod
    def write(self) -> float:
        """Write all files; seconds."""

    @abstractmethod
    def read(self) -> float:
        """Read them all; seconds."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files."""

    def clean(self) -> None:
        """Remove them; folders stay."""
        for path in self.files():
            path.unlink()


class Raw(Contestant):
    """Plain system calls."""

    def __init__(self, directory: Path, count: int, buffers: Sequence[memoryview]) -> None:
        self.label = f"raw/threads={len(buffers)}"
        self._paths, self._buffers = file_names(directory, count), buffers

    def write(self) -> float:
        return write_files(self._paths, self._buffers)

    def read(self) -> float:
        return read_files(self._paths, self._buffers)

    def files(self) -> list[Path]:
        return [path for path in self._paths if path.exists()]


class FioRun(Contestant):
    """The same by fio."""

    def __init__(self, fio: Fio, directory: Path, count: int, size_bytes: int, depth: int) -> None:
        self.label = f"fio/depth={depth}"
        self._fio, self._directory = fio, directory
        self._what = (count, size_bytes, depth)

    def write(self) -> float:
        return self._fio.run(self._directory, "write", *self._what)

    def read(self) -> float:
        return self._fio.run(self._directory, "read", *self._what)

    def files(self) -> list[Path]:
        return self._fio.files(self._directory)


class Staging(Contestant):
    """The tier, from and into staging memory."""

    def __init__(self, way: str, tier: DirectoryTier, count: int, buffers: Sequence[memoryview]) -> None:
        self.label = f"{way}/threads={len(buffers)} {taken(tier.name)}"
        self._tier, self._buffers = tier, buffers
        namespace = Namespace({"benchmark": "bench_tier"})
        self._folder = namespace.folder
        hashes = [hashlib.sha256(index.to_bytes(4, "big")).digest() for index in range(count)]
        shard = Shard(0, 1, 1, 0, 1, 1)
        self._names = [ChunkKey(namespace.digest, h, h, 1, 0, shard).name for h in hashes]

    def write(self) -> float:
        def put(index: int, buffer: memoryview) -> None:
            if not self._tier.put(self._folder, self._names[index], [buffer]).written_bytes:
                raise RuntimeError("the chunk was there before it was written")

        return timed(len(self._names), self._buffers, put)

    def read(self) -> float:
        def get(index: int, buffer: memoryview) -> None:
            with self._tier.open(self._folder, self._names[index]) as reader:
                reader.read([buffer], 0)

        return timed(len(self._names), self._buffers, get)

    def files(self) -> list[Path]:
        return sorted(self._tier.root.rglob("*.kv"))


class Pages(Contestant):
    """The tier, from and into engine pages, through the I/O service."""

    def __init__(self, way: str, service: ServiceBench) -> None:
        self.label = f"{way}/process {taken(service.tier_name)}"
        self._service = service

    def write(self) -> float:
        return self._service.write()

    def read(self) -> float:
        elapsed = self._service.read()
        self._service.check_loaded()
        return elapsed

    def files(self) -> list[Path]:
        return self._service.chunk_files()


def taken(tier_name: str) -> str:
    """The transport that a tier really uses, as its name tells: ``directory(posix/direct)`` -> ``(posix/direct)``."""
    return tier_name[tier_name.index("(") :]


def way_of(way: str, transport: str) -> str:
    """``staging`` over posix, ``staging-nixl`` over NIXL."""
    return way if transport == "posix" else f"{way}-{transport}"


# --------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Result:
    """All rounds of one chunk size in one direction, in seconds per way and configuration."""

    chunk_bytes: int
    count: int
    direction: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    stolen: dict[str, list[float]] = field(default_factory=dict)

    def add(self, label: str, seconds: float, stolen: float) -> None:
        """Note one step: how long it took, and the share of the cores' time that the host kept."""
        self.seconds.setdefault(label, []).append(seconds)
        self.stolen.setdefault(label, []).append(stolen)

    def undisturbed(self, label: str) -> list[float]:
        """Seconds of the steps during which the host left us the cores; of all steps where those are too few."""
        pairs = zip(self.seconds[label], self.stolen.get(label, []), strict=False)
        kept = [seconds for seconds, stolen in pairs if stolen <= MAX_STOLEN]
        return kept if len(kept) >= MIN_UNDISTURBED else self.seconds[label]

    @property
    def total_bytes(self) -> int:
        """Payload moved per round."""
        return self.chunk_bytes * self.count

    def best(self, *ways: str) -> str:
        """Label of the shortest median among some ways."""
        labels = [label for label in self.seconds if label.split("/")[0] in ways]
        return min(labels, key=lambda label: harness.median(self.undisturbed(label)))

    def gb_per_s(self, label: str) -> float:
        """Payload per second of the median round."""
        return self.total_bytes / harness.median(self.undisturbed(label)) / 1e9

    def shares(self) -> dict[str, tuple[str, float, float, float]]:
        """Per way that is not a limit: its best label, its share of the limit and the 95% interval."""
        limit = self.best(*_LIMITS)
        ways = dict.fromkeys(label.split("/")[0] for label in self.seconds)
        return {
            way: (self.best(way), *harness.ratio_of_medians(self.undisturbed(limit), self.undisturbed(self.best(way))))
            for way in ways
            if way not in _LIMITS
        }

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        limit = self.best(*_LIMITS)
        return {
            "chunk_bytes": self.chunk_bytes,
            "count": self.count,
            "direction": self.direction,
            "limit": limit,
            "limit_gb_per_s": self.gb_per_s(limit),
            "shares": {
                way: {"config": label, "gb_per_s": self.gb_per_s(label), "share": share, "interval_95": [low, high]}
                for way, (label, share, low, high) in self.shares().items()
            },
            "seconds": self.seconds,
            "stolen": self.stolen,
        }


def measure(contestants: Sequence[Contestant], chunk_bytes: int, count: int, rounds: int) -> Iterator[Result | str]:
    """Run the rounds; yields a label before each step, and at the end both results.

    Round 0 warms up (folders, the service's memory, the device) and is not kept.
    """
    results = [Result(chunk_bytes, count, "write"), Result(chunk_bytes, count, "read")]
    order = random.Random(1)
    for round_ in range(rounds + 1):
        for contestant in order.sample(contestants, len(contestants)):
            yield contestant.label
            try:
                written = _step(contestant.write)
                harness.drop_from_page_cache(contestant.files())
                taken = (written, _step(contestant.read))
            finally:
                contestant.clean()
            if round_:
                for result, (seconds, stolen) in zip(results, taken, strict=True):
                    result.add(contestant.label, seconds, stolen)
    yield from results


def _step(work: Callable[[], float]) -> tuple[float, float]:
    before = harness.cpu_ticks()
    seconds = work()
    return seconds, harness.stolen_share(before, harness.cpu_ticks())


@contextmanager
def contestants_for(
    directory: Path,
    chunk_bytes: int,
    count: int,
    threads: Sequence[int],
    fio: Fio | None,
    transports: Sequence[str] = ("posix",),
) -> Iterator[list[Contestant]]:
    """Make the contestants, each in a folder of its own, and end what they started."""
    ours = [(way_of("staging", transport), way_of("pages", transport)) for transport in transports]
    folders = {way: directory / way for way in ("raw", "fio", *(way for pair in ours for way in pair))}
    for folder in folders.values():
        folder.mkdir()
    buffers = [huge_buffer(chunk_bytes, seed) for seed in range(max(threads))]
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        everyone: list[Contestant] = [Raw(folders["raw"], count, buffers[:n]) for n in threads]
        for transport, (staging, pages) in zip(transports, ours, strict=True):
            tier = open_tier(folders[staging], transport, max(threads))
            stack.callback(tier.close)
            for buffer in buffers:
                tier.register_memory(address_of(buffer), buffer.nbytes)
            everyone += [Staging(staging, tier, count, buffers[:n]) for n in threads]
            service = ServiceBench(folders[pages], Shape.of(count, chunk_bytes), transport=transport)
            everyone.append(Pages(pages, stack.enter_context(service)))
        if fio is not None and fio.usable:
            everyone += [FioRun(fio, folders["fio"], count, chunk_bytes, depth) for depth in FIO_DEPTHS]
        yield everyone


def open_tier(folder: Path, transport: str, threads: int) -> DirectoryTier:
    """A tier with direct I/O over a transport; raises ``ConfigError`` where that does not work here."""
    planned = None if transport == "posix" else plan(Policy(transport), folder, threads=threads)
    return DirectoryTier(folder, direct_io="on", transport=planned)


# --------------------------------------------------------------------------------------------------------- reporting


def problems(results: Sequence[Result]) -> list[str]:
    """What shows that the measurement is wrong: shares above what is possible."""
    return [
        f"{result.direction} of {result.chunk_bytes / MIB:g} MiB: {label} reached {share:.3f} of the limit "
        f"({result.best(*_LIMITS)}); nothing beats the limit, so this was mis-measured"
        for result in results
        for label, share, _, _ in result.shares().values()
        if share > MAX_SHARE
    ]


def show(results: Sequence[Result]) -> None:
    """Print the table."""
    rows = []
    for result in results:
        limit = result.best(*_LIMITS)
        what = f"{result.direction} {result.chunk_bytes / MIB:g} MiB"
        shares = {limit: ("", ""), **{label: _share_texts(*share) for label, *share in result.shares().values()}}
        for label, texts in shares.items():
            steps = f"{len(result.undisturbed(label))}/{len(result.seconds[label])}"
            rows.append([what, label, f"{result.gb_per_s(label):.2f}", *texts, steps])
            what = ""
    columns = ["chunk", "way", "GB/s", "share", "95% interval", "steps"]
    harness.print_table("Medians and share of the limit", columns, rows)


def _share_texts(share: float, low: float, high: float) -> tuple[str, str]:
    return f"{share:.1%}", f"{low:.0%} to {high:.0%}"


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw throughput over chunk size."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for result in results:
        lines = panels.setdefault(result.direction, {})
        labels = {"limit": result.best(*_LIMITS), **{way: label for way, (label, *_) in result.shares().items()}}
        for way, label in labels.items():
            lines.setdefault(way, []).append((result.chunk_bytes / MIB, result.gb_per_s(label)))
    harness.plot_lines(path, "Directory tier against the device's limit", "chunk in MiB", "GB/s", panels)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.bench_tier", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--directory", type=Path, help="where to write; a folder in it is made and removed")
    parser.add_argument("--sizes", default="2,4,8,16", help="chunk sizes in MiB")
    parser.add_argument("--total-mib", type=int, default=512, help="payload per round")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count, after one to warm up")
    parser.add_argument("--threads", default=",".join(map(str, THREADS)), help="numbers of threads to try")
    parser.add_argument("--transport", default="posix", help="posix, nixl, gds; several, with commas, share the rounds")
    parser.add_argument("--no-fio", action="store_true", help="leave fio out")
    parser.add_argument("--json", type=Path, default=harness.BUILD / "tier.json", help="the record; a plot beside it")
    parser.add_argument("--tiny", action="store_true", help="seconds, not minutes: shows that it runs, judges nothing")
    arguments = parser.parse_args(argv)
    arguments.sizes = [int(float(size) * MIB) for size in arguments.sizes.split(",")]
    arguments.threads = [int(n) for n in arguments.threads.split(",")]
    arguments.transports = arguments.transport.split(",")
    if not set(arguments.transports) <= {"posix", "nixl", "gds"}:
        parser.error(f"--transport={arguments.transport}: give posix, nixl, gds, or several of them")
    arguments.total = arguments.total_mib * MIB
    if arguments.tiny:
        arguments.sizes, arguments.total, arguments.rounds = [256 * KIB, 512 * KIB], MIB, 2
        arguments.threads, arguments.no_fio = [1, 2], True
    return arguments


def run(arguments: argparse.Namespace, base: Path) -> tuple[list[Result], dict[str, Any]]:
    """Measure all sizes below a folder."""
    from tqdm import tqdm

    fio = None if arguments.no_fio else Fio(base)
    results: list[Result] = []
    ours = len(arguments.transports) * (len(arguments.threads) + 1)
    steps = len(arguments.sizes) * (arguments.rounds + 1) * (len(arguments.threads) + ours + 2 * bool(fio))
    with tqdm(total=steps, disable=None, unit="step") as progress:
        for chunk_bytes in arguments.sizes:
            count = max(2, arguments.total // chunk_bytes)
            folder = base / f"size-{chunk_bytes}"
            folder.mkdir()
            with contestants_for(folder, chunk_bytes, count, arguments.threads, fio, arguments.transports) as everyone:
                for step in measure(everyone, chunk_bytes, count, arguments.rounds):
                    if isinstance(step, Result):
                        results.append(step)
                    else:
                        progress.set_description(f"{chunk_bytes / MIB:g} MiB {step}")
                        progress.update()
    return results, {"environment": harness.environment(base), "fio": fio.describe() if fio else "left out"}


def main(argv: Sequence[str]) -> int:
    """Run the benchmark.

    Returns:
        0; 1 if the measurement contradicts itself; ``REFUSED`` where the file system takes no direct I/O.
    """
    arguments = parse(argv)
    parent = arguments.directory or harness.BUILD
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-tier-", dir=parent) as scratch:
        try:
            for transport in arguments.transports:
                open_tier(Path(scratch) / "probe", transport, threads=1).close()
        except ConfigError as error:
            print(f"a transport cannot be had here: {error}", file=sys.stderr)
            return REFUSED
        except MemKVError as error:
            print(f"no direct I/O here, so no limit to compare with: {error}", file=sys.stderr)
            return REFUSED
        results, record = run(arguments, Path(scratch))
    found = [] if arguments.tiny else problems(results)
    record |= {"benchmark": "tier", "tiny": arguments.tiny, "rounds": arguments.rounds, "problems": found}
    harness.write_json(record | {"results": [result.record() for result in results]}, arguments.json)
    plot(results, arguments.json.with_suffix(".png"))
    show(results)
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
