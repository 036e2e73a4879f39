"""The tier benchmark over every transport, tiny; its rows name what was taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_gpu, bench_tier, gpu_pool
from benchmarks.gpu_storage import GDSIO, Job, storage_rows
from memkv_engines.transports.gds import COMPAT, GPUDIRECT
from tests.fake_cuda.build import build
from tests.fake_cuda.control import load
from tests.fast.tier_samples import mode_works
from tests.kernels.routes import build_route


def test_rows_name_the_transport_that_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not mode_works(tmp_path, "direct"):
        pytest.skip("this file system takes no direct I/O")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(build().parent))
    out = tmp_path / "out" / "tier.json"
    arguments = ["--tiny", "--directory", str(tmp_path), "--json", str(out), "--transport", "posix,nixl,gds"]
    assert bench_tier.main(arguments) == 0
    for result in json.loads(out.read_text())["results"]:
        configs = {way: share["config"] for way, share in result["shares"].items()}
        assert set(configs) == {"staging", "pages", "staging-nixl", "pages-nixl", "staging-gds", "pages-gds"}
        for way, config in configs.items():
            name = {"nixl": "(nixl/posix-uring/direct)", "gds": "(gds/compat)"}.get(
                way.partition("-")[2], "(posix/direct)"
            )
            assert config.endswith(name)


def test_device_memory_through_kvikio_is_never_called_gpudirect(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = load()
    fake.set_kernels(build_route("host"))
    monkeypatch.setattr(gpu_pool.GpuPool.__init__, "__defaults__", (262144, 65536))
    job = Job(threads=2, chunks=2, chunk_bytes=65536, rounds=1)
    size = bench_gpu.Size(131072, num_blocks=64, rounds=1, storage=job)
    with (
        gpu_pool.GpuPool(gpu_pool.Layout("one tile", 1, 32768), 64) as pool,
        bench_gpu.mover_over(pool, size) as mover,
    ):
        rows = {(row["way"], row["do"]): row for row in storage_rows(mover, tmp_path, job, {"PATH": ""})}
    for do in ("write", "read"):
        assert "GPUDirect Storage lacks" in rows[GPUDIRECT, do]["absent"]
        assert rows[COMPAT, do]["gb_per_s"] > 0
        assert rows["posix/direct, host memory", do]["gb_per_s"] > 0
        assert "gdsio is not on PATH" in rows[GDSIO, do]["absent"]
    assert list(tmp_path.iterdir()) == []
