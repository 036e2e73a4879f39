"""What the device and the file system can do for files of one size: the limit that a tier is measured against.

Every file is new: created, filled by one direct write and closed inside the timed region, with no preallocation and
no reuse, since that is what a tier has to do as well. Buffers are huge pages, touched beforehand. The number of
threads that does best counts. ``fio``, where it is installed, writes and reads the same number of files of the same
size as a second opinion.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import drop_from_page_cache, median

THREADS = (2, 4, 8)
FIO_DEPTHS = (4, 8)
_HUGE_PAGE_BYTES = 2 << 20
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC
_READ_FLAGS = os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC

Work = Callable[[int, memoryview], None]


@dataclass(frozen=True)
class Limit:
    """The best configuration: its name, its median and its rounds, in seconds for all files."""

    config: str
    seconds: float
    rounds: tuple[float, ...]
    all_configs: dict[str, tuple[float, ...]]


def huge_buffer(size_bytes: int, seed: int = 0) -> memoryview:
    """Memory on huge pages, where the kernel gives them, faulted in and filled with noise."""
    area = mmap.mmap(-1, size_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        area.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        pass  # A kernel without transparent huge pages: all contestants are slower alike.
    whole = np.frombuffer(area, dtype=np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE_BYTES
    whole[start : start + size_bytes] = np.random.default_rng(seed).integers(0, 256, size_bytes, dtype=np.uint8)
    return memoryview(area)[start : start + size_bytes]


def timed(count: int, buffers: Sequence[memoryview], work: Work) -> float:
    """Seconds from the common start of one thread per buffer until item 0 to ``count - 1`` are all done.

    Raises:
        Exception: whatever the work raised first.
    """
    items = itertools.count()  # next() on it is atomic
    gate = threading.Barrier(len(buffers) + 1)
    errors: list[BaseException] = []

    def run(buffer: memoryview) -> None:
        gate.wait()
        try:
            while not errors and (index := next(items)) < count:
                work(index, buffer)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(buffer,)) for buffer in buffers]
    for thread in threads:
        thread.start()
    gate.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - start
    if errors:
        raise errors[0]
    return elapsed


def write_files(paths: Sequence[Path], buffers: Sequence[memoryview]) -> float:
    """Write new files, one thread per buffer; seconds."""

    def work(index: int, buffer: memoryview) -> None:
        fd = os.open(paths[index], _WRITE_FLAGS, 0o600)
        try:
            if os.pwritev(fd, [buffer], 0) != buffer.nbytes:
                raise OSError(f"short write to file {index}")
        finally:
            os.close(fd)

    return timed(len(paths), buffers, work)


def read_files(paths: Sequence[Path], buffers: Sequence[memoryview]) -> float:
    """Read whole files as long as the buffers, one thread per buffer; seconds."""

    def work(index: int, buffer: memoryview) -> None:
        fd = os.open(paths[index], _READ_FLAGS)
        try:
            if os.preadv(fd, [buffer], 0) != buffer.nbytes:
                raise OSError(f"short read from file {index}")
        finally:
            os.close(fd)

    return timed(len(paths), buffers, work)


def file_names(directory: Path, count: int) -> list[Path]:
    """Paths for the files of one round."""
    return [directory / f"raw-{index:05d}" for index in range(count)]


def raw_write(directory: Path, count: int, size_bytes: int, rounds: int, threads: Sequence[int] = THREADS) -> Limit:
    """Find the best way to write new files.

    Args:
        directory: empty folder; it is empty again afterwards.
        count: files per round.
        size_bytes: size of each, a multiple of 4096.
        rounds: measurements per number of threads, interleaved.
        threads: numbers of threads to try.
    """
    buffers = [huge_buffer(size_bytes, seed) for seed in range(max(threads))]
    paths = file_names(directory, count)
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for n in threads:
            seconds.setdefault(f"threads={n}", []).append(write_files(paths, buffers[:n]))
            for path in paths:
                path.unlink()
    return best_of(seconds)


def raw_read(paths: Sequence[Path], rounds: int, threads: Sequence[int] = THREADS) -> Limit:
    """Find the best way to read existing files of one size, from a cold page cache.

    Args:
        paths: the files.
        rounds: measurements per number of threads, interleaved.
        threads: numbers of threads to try.
    """
    buffers = [huge_buffer(paths[0].stat().st_size, seed) for seed in range(max(threads))]
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for n in threads:
            drop_from_page_cache(paths)
            seconds.setdefault(f"threads={n}", []).append(read_files(paths, buffers[:n]))
    return best_of(seconds)


def best_of(seconds: dict[str, list[float]]) -> Limit:
    """The configuration with the shortest median."""
    config = min(seconds, key=lambda name: median(seconds[name]))
    rounds = tuple(seconds[config])
    return Limit(config, median(rounds), rounds, {name: tuple(values) for name, values in seconds.items()})


# -------------------------------------------------------------------------------------------------------------- fio


def fio_version() -> str | None:
    """The installed fio, or None."""
    program = shutil.which("fio")
    if program is None:
        return None
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip()


class Fio:
    """Runs fio with the first I/O engine and buffer type that work in a directory.

    Args:
        directory: where to try; left empty.
    """

    def __init__(self, directory: Path) -> None:
        self.version = fio_version()
        self.engine = self.memory = ""
        if self.version is None:
            return
        for engine, memory in itertools.product(("io_uring", "libaio", "psync"), ("mmaphuge", "mmap")):
            try:
                self._run(directory, "write", 1, _HUGE_PAGE_BYTES, 1, engine, memory)
            except (OSError, subprocess.CalledProcessError, ValueError):
                continue
            finally:
                self.clean(directory)
            self.engine, self.memory = engine, memory
            return

    @property
    def usable(self) -> bool:
        """Whether fio is there and works."""
        return bool(self.engine)

    def describe(self) -> str:
        """For the record."""
        if self.version is None:
            return "not installed"
        return f"{self.version} {self.engine} iomem={self.memory}" if self.engine else f"{self.version}, does not work"

    def run(self, directory: Path, direction: str, count: int, size_bytes: int, depth: int) -> float:
        """Write new files or read the ones it wrote before; seconds by fio's own clock."""
        return self._run(directory, direction, count, size_bytes, depth, self.engine, self.memory)

    def files(self, directory: Path) -> list[Path]:
        """What it wrote."""
        return sorted(directory.glob("fio.*"))

    def clean(self, directory: Path) -> None:
        """Remove what it wrote."""
        for path in self.files(directory):
            path.unlink()

    def _run(
        self, directory: Path, direction: str, count: int, size_bytes: int, depth: int, engine: str, memory: str
    ) -> float:
        command = [
            "fio", "--name=fio", f"--directory={directory}", "--output-format=json",
            f"--rw={direction}", f"--bs={size_bytes}", f"--filesize={size_bytes}", f"--nrfiles={count}",
            f"--size={size_bytes * count}", "--direct=1", f"--ioengine={engine}", f"--iodepth={depth}",
            f"--iomem={memory}", "--fallocate=none", "--file_service_type=sequential", "--openfiles=64",
            "--invalidate=0", "--thread", *(["--create_on_open=1"] if direction == "write" else []),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][direction]
        if job["io_bytes"] != size_bytes * count:
            raise ValueError(f"fio moved {job['io_bytes']} B instead of {size_bytes * count} B")
        return float(job["io_bytes"]) / float(job["bw_bytes"])
