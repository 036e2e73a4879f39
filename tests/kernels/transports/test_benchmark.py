"""The tier benchmark over every transport, tiny; its rows name what was taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_tier
from tests.fake_cuda.build import build
from tests.fast.tier_samples import mode_works


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
