"""Files and device memory: our GDS transport beside NVIDIA's own tool, `gdsio`, and the drive's limit from host memory.

Every way writes files of one chunk each with as many threads, then reads them, all with O_DIRECT. A way that is not to
be had has a row that says why. `gdsio` takes whatever path cuFile chooses: with ``"allow_compat_mode": true`` in
cufile.json its figure may be one of a copy through host memory, so it stands for GPUDirect only where our own row,
which refuses such a fallback, stands beside it. Not run on a GPU yet.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import median
from memkv_engines.errors import MemKVError
from memkv_engines.gpu.mover import DeviceMover
from memkv_engines.transports.base import DeviceView, FileTransport, View
from memkv_engines.transports.gds import COMPAT, GPUDIRECT, GdsTransport
from memkv_engines.transports.posix import DIRECT, PosixTransport

GDSIO = "gdsio -x 0"
GDSIO_TIMEOUT_S = 600.0
MIN_SHARE_OF_GDSIO = 0.9
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """How much is moved: each of some threads moves some chunks, one file each."""

    threads: int
    chunks: int
    chunk_bytes: int
    rounds: int

    @property
    def total_bytes(self) -> int:
        """Of all threads."""
        return self.threads * self.chunks * self.chunk_bytes


def storage_rows(mover: DeviceMover, folder: Path, job: Job, environ: Mapping[str, str] = os.environ) -> list[Row]:
    """Rows of every way, two each: ``way``, ``do`` (write or read), and ``gb_per_s`` or ``absent`` with the reason."""
    rows = []
    for way, measure in (
        (GPUDIRECT, lambda: _through_gds(mover, folder, job, gpudirect=True)),
        (COMPAT, lambda: _through_gds(mover, folder, job, gpudirect=False)),
        (GDSIO, lambda: _through_gdsio(folder, job, environ)),
        ("posix/direct, host memory", lambda: _through_posix(folder, job)),
    ):
        try:
            rates = measure()
        except (MemKVError, OSError, RuntimeError) as error:
            rows += [{"way": way, "do": do, "absent": str(error)} for do in ("write", "read")]
        else:
            rows += [
                {"way": way, "do": do, "gb_per_s": rate} for do, rate in zip(("write", "read"), rates, strict=True)
            ]
    return rows


def failed_shares(rows: Sequence[Row]) -> list[str]:
    """Where our direct path is slower than it may be beside `gdsio`; nothing where either is absent."""
    rate = {(row["way"], row["do"]): row["gb_per_s"] for row in rows if "gb_per_s" in row}
    failed = []
    for do in ("write", "read"):
        ours, theirs = rate.get((GPUDIRECT, do)), rate.get((GDSIO, do))
        if ours is not None and theirs is not None and ours < MIN_SHARE_OF_GDSIO * theirs:
            failed.append(f"{GPUDIRECT} {do}: {ours:.1f} GB/s, gdsio {theirs:.1f}")
    return failed


# ------------------------------------------------------------------------------------------------------------- our ways


def _through_gds(mover: DeviceMover, folder: Path, job: Job, *, gpudirect: bool) -> tuple[float, float]:
    transport = GdsTransport(gpudirect=gpudirect, threads=job.threads)
    slots = [slot for slot in (mover.acquire_slot() for _ in range(job.threads)) if slot is not None]
    try:
        if len(slots) < job.threads:
            raise RuntimeError(f"{len(slots)} device slots for {job.threads} threads")
        start = min(slot.address for slot in slots)
        transport.register(start, max(s.address + s.size_bytes for s in slots) - start, device=0)
        return _rates(transport, [DeviceView(slot.address, job.chunk_bytes) for slot in slots], folder, job)
    finally:
        transport.close()
        for slot in slots:
            mover.release_slot(slot)


def _through_posix(folder: Path, job: Job) -> tuple[float, float]:
    views = [memoryview(mmap.mmap(-1, job.chunk_bytes)) for _ in range(job.threads)]
    return _rates(PosixTransport(DIRECT), views, folder, job)


def _rates(transport: FileTransport[Any], views: Sequence[View], folder: Path, job: Job) -> tuple[float, float]:
    """GB/s of writing and of reading, medians over rounds."""

    def one_round(move: Callable[[Any, Sequence[View], int], object], flags: int, where: Path) -> float:
        def work(number: int) -> None:
            for chunk in range(job.chunks):
                fd = os.open(where / f"{number}-{chunk}", flags | os.O_CLOEXEC | transport.open_flags, 0o600)
                handle = transport.attach(fd, writable=bool(flags & os.O_RDWR))
                try:
                    move(handle, [views[number]], 0)
                finally:
                    transport.detach(handle)

        started = time.perf_counter()
        with ThreadPoolExecutor(job.threads) as threads:
            list(threads.map(work, range(job.threads)))
        return job.total_bytes / (time.perf_counter() - started) / 1e9

    written, read = [], []
    for _ in range(job.rounds):
        with tempfile.TemporaryDirectory(dir=folder) as where:
            written.append(one_round(transport.write, os.O_RDWR | os.O_CREAT, Path(where)))
            read.append(one_round(transport.read, os.O_RDONLY, Path(where)))
    return median(written), median(read)


# ---------------------------------------------------------------------------------------------------------------- gdsio


def find_gdsio(environ: Mapping[str, str], root: Path = Path("/")) -> str:
    """Path of `gdsio`: on the path, below ``CUDA_HOME``, or where CUDA's packages put it (the newest).

    Raises:
        RuntimeError: there is none; says where it was looked for.
    """
    found = shutil.which("gdsio", path=environ.get("PATH", ""))
    if found:
        return found
    homes = [Path(environ[key]) for key in ("CUDA_HOME", "CUDA_PATH") if environ.get(key)]
    installed = sorted((root / "usr/local").glob("cuda-*"), key=lambda path: _numbers(path.name), reverse=True)
    for home in (*homes, root / "usr/local/cuda", *installed):
        program = home / "gds/tools/gdsio"
        if os.access(program, os.X_OK):
            return str(program)
    raise RuntimeError("gdsio is not on PATH, in CUDA_HOME or below /usr/local/cuda*: install package gds-tools")


def gdsio_command(program: str, folder: str, job: Job, *, reads: bool) -> list[str]:
    """A file per thread (-D, -w) of -s bytes in requests of -i, through GPUDirect (-x 0), in order (-I 0 or 1)."""
    size_kib, request_kib = job.chunks * job.chunk_bytes // 1024, job.chunk_bytes // 1024
    return [
        *(program, "-D", folder, "-d", "0", "-w", str(job.threads), "-s", f"{size_kib}K"),
        *("-i", f"{request_kib}K", "-x", "0", "-I", "0" if reads else "1"),
    ]


def parse_gdsio(output: str) -> float:
    """GB/s in what `gdsio` prints.

    Raises:
        RuntimeError: there is no such figure, or it is not of a transfer to GPU memory.
    """
    kind = re.search(r"XferType:\s*(\S+)", output)
    rate = re.search(r"Throughput:\s*([\d.]+)\s*([KMG]iB)/sec", output)
    if kind is None or rate is None:
        raise RuntimeError(f"gdsio prints no throughput: {output.strip()[-300:]}")
    if kind.group(1) != "GPUD":
        raise RuntimeError(f"gdsio took {kind.group(1)} instead of GPUD")
    return float(rate.group(1)) * _UNITS[rate.group(2)] / 1e9


def _through_gdsio(folder: Path, job: Job, environ: Mapping[str, str]) -> tuple[float, float]:
    program = find_gdsio(environ)
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(job.rounds):
        with tempfile.TemporaryDirectory(dir=folder) as where:
            for reads in (False, True):  # It reads the files that it has written.
                try:
                    done = subprocess.run(
                        gdsio_command(program, where, job, reads=reads),
                        capture_output=True,
                        text=True,
                        timeout=GDSIO_TIMEOUT_S,
                        check=False,
                        env=dict(environ),
                        cwd=where,  # cuFile leaves its log where it runs.
                    )
                except subprocess.TimeoutExpired as error:
                    raise RuntimeError(f"gdsio does not end in {GDSIO_TIMEOUT_S:.0f} s") from error
                if done.returncode:
                    raise RuntimeError(f"gdsio fails with {done.returncode}: {(done.stdout + done.stderr)[-300:]}")
                rates[reads].append(parse_gdsio(done.stdout))
    return median(rates[False]), median(rates[True])


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))
