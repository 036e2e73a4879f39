"""What every benchmark needs: where it ran, honest statistics, a cold page cache, and ways to show the result."""

from __future__ import annotations

import datetime
import json
import mmap
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from ctypes import CDLL, c_size_t, c_ubyte, c_void_p, get_errno
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import memkv_engines

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "benchmarks"


# ---------------------------------------------------------------------------------------------------- where it ran


def available_memory_bytes() -> int:
    """Returns how much memory can be had without swapping."""
    told = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(told["MemAvailable"].split()[0]) * 1024


def environment(directory: Path) -> dict[str, Any]:
    """Describe machine and software, without paths or names of this machine.

    Args:
        directory: where the benchmark writes; its file system is recorded.
    """
    return {
        "time_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _field_of("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "transparent_huge_pages": _huge_page_policy(),
        "file_system": file_system_type(directory),
        "python": platform.python_version(),
        "package_version": memkv_engines.__version__,
        "git_revision": _git_revision(),
    }


def cpu_ticks() -> tuple[int, int]:
    """Ticks that the host of a virtual machine kept for others while we had work, and all ticks, since boot."""
    ticks = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    return ticks[7], sum(ticks)


def stolen_share(before: tuple[int, int], after: tuple[int, int]) -> float:
    """Share of the cores' time between two readings of ``cpu_ticks`` that the host kept for others."""
    return (after[0] - before[0]) / max(1, after[1] - before[1])


def page_costs_us(nbytes: int = 64 << 20) -> tuple[float, float]:
    """What 4 KiB of memory cost when they are touched first, in microseconds.

    A virtual machine may give free memory back to its host (free page reporting), and then has to ask for it again:
    what takes memory all the time, as the page cache does, is slower there.

    Args:
        nbytes: how much to take.

    Returns:
        Of memory that nobody had for a while, and of memory that was given back just before.
    """
    costs = []
    for _ in range(2):
        with mmap.mmap(-1, nbytes) as region:
            view = np.frombuffer(region, dtype=np.uint8)
            started = time.perf_counter()
            view[::4096] = 1
            costs.append((time.perf_counter() - started) * 1e6 / (nbytes // 4096))
            del view
    return costs[0], costs[1]


def _field_of(file_name: str, field: str) -> str:
    try:
        lines = Path(file_name).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def _huge_page_policy() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    except OSError:
        return "unknown"
    return text[text.find("[") + 1 : text.find("]")]


def file_system_type(directory: Path) -> str:
    """Type of the file system a directory is on, such as ``ext4``."""
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return "unknown"


def _git_revision() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ------------------------------------------------------------------------------------------------------ statistics


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def percentile(values: Sequence[float], percent: float) -> float:
    """A percentile, interpolated between neighbours.

    Args:
        values: at least one.
        percent: 0 to 100.
    """
    return float(np.percentile(np.asarray(values, dtype=float), percent))


def ratio_of_medians(
    numerators: Sequence[float], denominators: Sequence[float], *, samples: int = 4000, seed: int = 1
) -> tuple[float, float, float]:
    """Ratio of two medians with its 95% bootstrap interval.

    Args:
        numerators: measurements of one side.
        denominators: measurements of the other.
        samples: bootstrap samples.
        seed: makes the interval repeatable.

    Returns:
        Ratio, lower end, upper end.
    """
    generator = np.random.default_rng(seed)

    def medians(values: Sequence[float]) -> npt.NDArray[np.float64]:
        array = np.asarray(values, dtype=np.float64)
        drawn: npt.NDArray[np.float64] = np.median(array[generator.integers(0, len(array), (samples, len(array)))], 1)
        return drawn

    ratios = medians(numerators) / medians(denominators)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return median(numerators) / median(denominators), float(low), float(high)


def median_of_pair_ratios(
    numerators: Sequence[float], denominators: Sequence[float], *, samples: int = 4000, seed: int = 1
) -> tuple[float, float, float]:
    """Median of the ratios of pairs measured one right after the other, with its 95% bootstrap interval.

    What disturbs both members of a pair alike, such as a busy neighbour, cancels.

    Args:
        numerators: measurements of one side.
        denominators: measurements of the other, in the same order.
        samples: bootstrap samples, drawn over the pairs.
        seed: makes the interval repeatable.

    Returns:
        Median, lower end, upper end.
    """
    ratios = np.asarray(numerators, dtype=np.float64) / np.asarray(denominators, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(ratios), (samples, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], 1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


# ------------------------------------------------------------------------------------------------- cold page cache


def drop_from_page_cache(paths: Iterable[str | Path]) -> None:
    """Write files back, drop them from the page cache and make sure they are gone.

    Raises:
        RuntimeError: a page is still resident (the file is mapped or locked, or lives in memory as on tmpfs).
    """
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            pages = resident_pages(fd)
        finally:
            os.close(fd)
        if pages:
            raise RuntimeError(f"{pages} pages of {Path(path).name} are still in the page cache")


def resident_pages(fd: int) -> int:
    """Number of a file's pages in the page cache."""
    length = os.fstat(fd).st_size
    if not length:
        return 0
    libc = CDLL(None, use_errno=True)
    libc.mincore.argtypes = [c_void_p, c_size_t, c_void_p]
    flags = (c_ubyte * -(-length // mmap.PAGESIZE))()
    with mmap.mmap(fd, length, access=mmap.ACCESS_READ) as mapped:
        # numpy gives the address of a read-only map, which ctypes refuses to.
        view = np.frombuffer(mapped, dtype=np.uint8)
        failed = libc.mincore(view.ctypes.data, length, flags)
        del view
    if failed:
        raise OSError(get_errno(), os.strerror(get_errno()))
    return sum(flag & 1 for flag in flags)


# ------------------------------------------------------------------------------------------------- showing results


def write_json(record: dict[str, Any], path: Path) -> Path:
    """Write a result, ``build/benchmarks/<name>.json`` by convention."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


class Progress:
    """Says what is going on, with the time since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, line: str) -> None:
        print(f"[{time.monotonic() - self._started:5.0f} s] {line}", flush=True)

    def detail(self, line: str) -> None:
        """Says something that belongs to the line before."""
        self(f"    {line}")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; the first column to the left, numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def plot_lines(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    panels: dict[str, dict[str, list[tuple[float, float]]]],
) -> Path:
    """Plot one panel per key, one line per inner key, into a PNG.

    Args:
        path: the file.
        title: above all panels.
        x_label: below each panel.
        y_label: at the left.
        panels: panel title -> line label -> points.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), sharey=True, squeeze=False)
    for axis, (panel, lines) in zip(axes[0], panels.items(), strict=True):
        for label, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set(title=panel, xlabel=x_label, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(y_label)
    axes[0][-1].legend(loc="lower right")
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
