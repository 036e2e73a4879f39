"""The GPU benchmark from end to end on the fake driver (its figures mean nothing), and what it says with no device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import bench_gpu, gpu_pool, gpu_storage
from benchmarks.gpu_pool import Layout
from benchmarks.gpu_storage import GDSIO, Job, failed_shares, find_gdsio, gdsio_command, parse_gdsio, storage_rows
from memkv_engines.errors import ConfigError
from memkv_engines.transports.gds import COMPAT, GPUDIRECT
from tests.kernels.driver.rig import Engine

TINY = bench_gpu.Size(131072, num_blocks=64, rounds=1, storage=Job(threads=2, chunks=2, chunk_bytes=65536, rounds=1))
# What a forum's reader showed of version 1.11.
PRINTED = (
    "IoType: READ XferType: GPUD Threads: 4 DataSetSize: 104837120/104857600(KiB) IOSize: 1024(KiB) "
    "Throughput: 6.622534 GiB/sec, Avg_Latency: 589.436984 usecs ops: 102380 total_time 15.097011 secs"
)
ROOT = Path(__file__).resolve().parents[3]


class NoKvikio:
    """kvikio has its own test, in `transports/test_benchmark.py`: here nothing may be left in the driver."""

    def __init__(self, **_: object) -> None:
        raise ConfigError("kvikio keeps streams and memory of the driver for good")


def test_tiny(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layouts = (Layout("small tiles", 2, 1024), Layout("long tiles", 2, 32768), Layout("one tile", 1, 32768))
    monkeypatch.setattr(bench_gpu, "LAYOUTS", layouts)
    monkeypatch.setattr(bench_gpu, "TINY", TINY)
    monkeypatch.setattr(bench_gpu, "BUDGETS", (1, 8))
    monkeypatch.setattr(gpu_pool.GpuPool.__init__, "__defaults__", (262144, 65536))
    gdsio = tmp_path / "bin" / "gdsio"
    gdsio.parent.mkdir()
    gdsio.write_text(f"#!/bin/sh\necho '{PRINTED}'\n")
    gdsio.chmod(0o755)
    monkeypatch.setenv("PATH", str(gdsio.parent), prepend=os.pathsep)
    monkeypatch.setattr(gpu_storage, "GdsTransport", NoKvikio)
    assert bench_gpu.main(["--tiny", "--path", str(tmp_path), "--json", str(tmp_path / "gpu.json")]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    ways = {(row["layout"], row["way"]) for row in result["device"] + result["host"]}
    for layout in layouts:
        assert {way for name, way in ways if name == layout.name} == {
            *("gather", "scatter", "plain device copy", bench_gpu.TORCH),
            *("store", "load", "one contiguous copy", "cuMemcpyBatchAsync per tile"),
        }
    absent = {row["way"] for row in result["device"] + result["host"] if "gb_per_s" not in row}
    assert absent <= {bench_gpu.TORCH, "cuMemcpyBatchAsync per tile"}
    assert all(row["absent"] for row in result["device"] + result["host"] if row["way"] in absent)
    storage = {(row["way"], row["do"]): row for row in result["storage"]}
    for do in ("write", "read"):
        assert storage[GPUDIRECT, do]["absent"] == "kvikio keeps streams and memory of the driver for good"
        assert (COMPAT, do) in storage
        assert storage[GDSIO, do]["gb_per_s"] == pytest.approx(7.11, abs=0.01)
        assert storage["posix/direct, host memory", do]["gb_per_s"] > 0
    assert [row["ctas"] for row in result["budget"]] == [1, 8]


def test_bars() -> None:
    def rows(gather: float) -> list[dict[str, object]]:
        ways = {"gather": gather, "scatter": 100.0, "plain device copy": 1000.0, "one contiguous copy": 50.0}
        return [{"layout": "a", "way": way, "gb_per_s": rate} for way, rate in ways.items()]

    sweep = [{"ctas": 8, "slowdown": 0.01}, {"ctas": 32, "slowdown": 0.5}]
    assert bench_gpu.failed_bars(rows(100.0), [], sweep) == []
    assert bench_gpu.failed_bars(rows(99.0), [], sweep) == ["a: gather 99 GB/s, the bar is 100"]
    assert "8 CTAs" in bench_gpu.failed_bars(rows(100.0), [], [{"ctas": 8, "slowdown": 0.04}])[0]


def test_without_a_device_it_says_so_and_fails() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_gpu", "--tiny"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        pytest.skip("this machine has a device")
    assert done.returncode == bench_gpu.NO_DEVICE
    assert "nothing was measured: no CUDA driver" in done.stderr


# ---------------------------------------------------------------------------------------------------------------- gdsio


def test_gdsio_is_found_where_cuda_puts_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="gdsio is not on PATH, in CUDA_HOME or below"):
        find_gdsio({"PATH": str(tmp_path)}, tmp_path)

    def install(home: Path) -> str:
        program = home / "gds/tools/gdsio"
        program.parent.mkdir(parents=True)
        program.write_text("")
        program.chmod(0o755)
        return str(program)

    local = tmp_path / "usr/local"
    for home in ("cuda-9.2", "cuda-13.0", "cuda-12.9"):
        newest = install(local / home)
        assert find_gdsio({}, tmp_path) == (newest if home != "cuda-12.9" else str(local / "cuda-13.0/gds/tools/gdsio"))
    install(local / "cuda")
    assert find_gdsio({}, tmp_path) == str(local / "cuda/gds/tools/gdsio")
    assert find_gdsio({"CUDA_HOME": str(tmp_path / "mine")}, tmp_path) == str(local / "cuda/gds/tools/gdsio")
    install(tmp_path / "mine")
    assert find_gdsio({"CUDA_HOME": str(tmp_path / "mine")}, tmp_path) == str(tmp_path / "mine/gds/tools/gdsio")


def test_what_gdsio_is_asked_and_what_it_says() -> None:
    job = Job(threads=8, chunks=64, chunk_bytes=4 << 20, rounds=1)
    asked = " ".join(gdsio_command("gdsio", "there", job, reads=False))
    assert asked == "gdsio -D there -d 0 -w 8 -s 262144K -i 4096K -x 0 -I 1"
    assert gdsio_command("gdsio", "there", job, reads=True)[-1] == "0"
    assert parse_gdsio(PRINTED) == pytest.approx(6.622534 * 2**30 / 1e9)
    assert parse_gdsio(PRINTED.replace("GiB/sec", "MiB/sec")) == pytest.approx(6.622534 * 2**20 / 1e9)
    with pytest.raises(RuntimeError, match="took CPU_GPU instead of GPUD"):
        parse_gdsio(PRINTED.replace("GPUD", "CPU_GPU"))
    with pytest.raises(RuntimeError, match="prints no throughput: file register error"):
        parse_gdsio("file register error")


def test_the_bar_beside_gdsio_holds_only_where_both_were_measured() -> None:
    def rows(ours: float | None, theirs: float | None) -> list[dict[str, object]]:
        rates = ((GPUDIRECT, ours), (GDSIO, theirs))
        found = [{"way": w, "do": d, "gb_per_s": r} for w, r in rates for d in ("write", "read") if r is not None]
        return [*found, {"way": COMPAT, "do": "read", "gb_per_s": 1.0}, {"way": "x", "do": "read", "absent": "why"}]

    assert failed_shares(rows(9.0, 10.0)) == failed_shares(rows(None, 10.0)) == failed_shares(rows(1.0, None)) == []
    assert failed_shares(rows(8.0, 10.0))[0] == "gds/gpudirect write: 8.0 GB/s, gdsio 10.0"


@pytest.mark.parametrize(
    ("script", "reason"),
    [(None, "gdsio is not on PATH"), ("exit 3", "fails with 3"), ("echo nothing", "prints no throughput: nothing")],
)
def test_without_gdsio_its_rows_say_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, reason: str
) -> None:
    monkeypatch.setattr(gpu_pool.GpuPool.__init__, "__defaults__", (262144, 65536))
    if script:
        (tmp_path / "gdsio").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "gdsio").chmod(0o755)
    monkeypatch.setattr(gpu_storage, "GdsTransport", NoKvikio)
    with (
        gpu_pool.GpuPool(Layout("one tile", 1, 32768), 64) as pool,
        bench_gpu.mover_over(pool, TINY) as mover,
    ):
        rows = storage_rows(mover, tmp_path, TINY.storage, {"PATH": str(tmp_path)})
    said = [row["absent"] for row in rows if row["way"] == GDSIO]
    assert len(said) == 2 and all(reason in words for words in said)
