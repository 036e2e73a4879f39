"""Benchmarks run tiny, so that none rots; their statistics and their honesty are checked apart."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import bench_tier, harness, raw_limit
from benchmarks.bench_tier import Result
from memkv_engines.limits import KIB, MIB
from tests.fast.samples import noise

SIZE = 64 * KIB


# ------------------------------------------------------------------------------------------------------- bench_tier


def test_the_tier_benchmark_runs(direct: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = direct / "out"
    assert bench_tier.main(["--tiny", "--directory", str(direct), "--json", str(out / "tier.json")]) == 0
    record = json.loads((out / "tier.json").read_text())
    assert record["tiny"] is True
    assert [(r["chunk_bytes"], r["direction"]) for r in record["results"]] == [
        (size, direction) for size in (256 * KIB, 512 * KIB) for direction in ("write", "read")
    ]
    for result in record["results"]:
        assert set(result["shares"]) == {"staging", "pages"}
        assert all("(posix/direct)" in share["config"] for share in result["shares"].values())
        assert result["limit"].startswith("raw/threads=")
        assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in result["seconds"].values())
    assert str(direct) not in json.dumps(record), "no paths of this machine"
    assert (out / "tier.png").stat().st_size > 1000
    assert "staging/threads=" in capsys.readouterr().out
    assert [p.name for p in direct.iterdir()] == ["out"], "it cleans up"


def test_a_transport_that_is_not_to_be_had_is_no_result(direct: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tiny", "--directory", str(direct), "--json", str(direct / "x.json"), "--transport", "posix,gds"]
    assert bench_tier.main(arguments) == bench_tier.REFUSED
    assert "kvikio" in capsys.readouterr().err
    assert list(direct.iterdir()) == []
    with pytest.raises(SystemExit):
        bench_tier.main(["--transport", "rdma"])


def test_where_direct_io_is_refused_there_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memkv_engines.errors import TierUnavailable

    def refuse(*_: object, **__: object) -> None:
        raise TierUnavailable("no direct I/O")

    monkeypatch.setattr(bench_tier, "DirectoryTier", refuse)
    status = bench_tier.main(["--tiny", "--directory", str(tmp_path), "--json", str(tmp_path / "x.json")])
    assert status == bench_tier.REFUSED
    assert list(tmp_path.iterdir()) == []


def result_of(**seconds: list[float]) -> Result:
    return Result(4 * MIB, 10, "write", {way.replace("_", "/"): values for way, values in seconds.items()})


def test_shares_are_ratios_to_the_best_limit_of_the_same_run() -> None:
    result = result_of(
        raw_1=[2.0, 2.2, 2.1], raw_4=[1.0, 1.1, 0.9], fio_8=[1.5] * 3, staging_1=[4.0] * 3, staging_2=[2.0] * 3
    )
    assert result.best("raw", "fio") == "raw/4"
    label, share, low, high = result.shares()["staging"]
    assert (label, share) == ("staging/2", 0.5)
    assert low <= share <= high
    assert bench_tier.problems([result]) == []
    assert result.record()["limit_gb_per_s"] == pytest.approx(40 * MIB / 1e9)


def test_steps_that_the_host_disturbed_do_not_count() -> None:
    result = Result(4 * MIB, 10, "write")
    for seconds, stolen in [(1.0, 0.0)] * 5 + [(9.0, 0.3)] * 6:
        result.add("raw/1", seconds, stolen)
    for seconds, stolen in [(2.0, 0.04)] * 4 + [(8.0, 0.06)] * 5:
        result.add("pages/x", seconds, stolen)
    assert harness.median(result.undisturbed("raw/1")) == 1.0
    assert len(result.undisturbed("pages/x")) == 9, "too few steps to choose from"
    assert result.shares()["pages"][1] == 1 / 8
    assert result.record()["stolen"]["pages/x"] == [0.04] * 4 + [0.06] * 5


def test_stolen_time_is_a_share() -> None:
    first = harness.cpu_ticks()
    assert 0 <= first[0] <= first[1]
    assert harness.stolen_share((10, 100), (15, 200)) == 0.05
    assert harness.stolen_share(first, first) == 0


def test_what_beats_the_limit_was_mis_measured() -> None:
    fine, wrong = result_of(raw_1=[1.0] * 5, pages_x=[0.99] * 5), result_of(raw_1=[1.0] * 5, pages_x=[0.97] * 5)
    assert bench_tier.problems([fine]) == []
    (problem,) = bench_tier.problems([fine, wrong])
    assert "mis-measured" in problem
    assert "pages/x reached 1.031" in problem


# -------------------------------------------------------------------------------------------------------- raw_limit


def test_raw_limits_write_new_files_and_read_them(direct: Path) -> None:
    written = raw_limit.raw_write(direct, 4, SIZE, rounds=2, threads=(1, 2))
    assert written.config in ("threads=1", "threads=2")
    assert {name: len(rounds) for name, rounds in written.all_configs.items()} == {"threads=1": 2, "threads=2": 2}
    assert list(direct.iterdir()) == []
    paths = raw_limit.file_names(direct, 4)
    raw_limit.write_files(paths, [raw_limit.huge_buffer(SIZE, 5)])
    assert {p.read_bytes() for p in paths} == {bytes(raw_limit.huge_buffer(SIZE, 5))}
    assert raw_limit.raw_read(paths, rounds=2, threads=(2,)).seconds > 0
    with pytest.raises(FileExistsError):
        raw_limit.write_files(paths, [raw_limit.huge_buffer(SIZE)])


def test_every_item_is_done_once_and_errors_are_not_lost() -> None:
    done: list[int] = []
    buffers = [memoryview(bytearray(1))] * 4
    assert raw_limit.timed(100, buffers, lambda index, _: done.append(index)) > 0
    assert sorted(done) == list(range(100))

    def fail(index: int, _: memoryview) -> None:
        raise OSError(f"item {index}")

    with pytest.raises(OSError, match="item"):
        raw_limit.timed(100, buffers, fail)


def test_fio_agrees_on_what_it_wrote(direct: Path) -> None:
    fio = raw_limit.Fio(direct)
    if not fio.usable:
        pytest.skip(fio.describe())
    assert fio.run(direct, "write", 3, SIZE, 1) > 0
    assert [p.stat().st_size for p in fio.files(direct)] == [SIZE] * 3
    assert fio.run(direct, "read", 3, SIZE, 1) > 0
    fio.clean(direct)
    assert list(direct.iterdir()) == []


def test_without_fio_its_absence_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    fio = raw_limit.Fio(tmp_path)
    assert (fio.usable, fio.describe()) == (False, "not installed")


# ---------------------------------------------------------------------------------------------------------- harness


def test_statistics() -> None:
    assert harness.median([3, 1, 2]) == 2
    assert harness.percentile([1, 2, 3, 4, 5], 50) == 3
    assert harness.percentile([0, 10], 95) == pytest.approx(9.5)
    ratio, low, high = harness.ratio_of_medians([2.0, 2.1, 1.9, 2.0, 2.2], [1.0, 1.1, 0.9, 1.0, 1.0])
    assert low <= ratio == 2.0 <= high
    assert harness.ratio_of_medians([1.0] * 5, [2.0] * 5) == (0.5, 0.5, 0.5)


def test_a_file_leaves_the_page_cache_or_it_is_said(direct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = direct / "file"
    path.write_bytes(noise(SIZE))
    with path.open("rb") as file:
        assert harness.resident_pages(file.fileno()) == SIZE // os.sysconf("SC_PAGE_SIZE")
        harness.drop_from_page_cache([path])
        assert harness.resident_pages(file.fileno()) == 0
        file.read()
        monkeypatch.setattr(harness.os, "posix_fadvise", lambda *_: None)
        with pytest.raises(RuntimeError, match="file are still in the page cache"):
            harness.drop_from_page_cache([path])


def test_an_empty_file_is_cold(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    harness.drop_from_page_cache([tmp_path / "empty"])


def test_the_environment_names_the_machine_but_not_its_paths(tmp_path: Path) -> None:
    record = harness.environment(tmp_path)
    assert {"cpu", "cores", "kernel", "file_system", "python", "package_version", "git_revision"} <= record.keys()
    text = json.dumps(record)
    assert str(harness.ROOT) not in text
    assert str(tmp_path) not in text
    assert os.uname().nodename not in text or len(os.uname().nodename) < 4
