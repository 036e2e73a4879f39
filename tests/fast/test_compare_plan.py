"""The comparison's profiles: what is asked for, by whom, how long it takes, and whether memory holds it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import cpu_dtype
from benchmarks.compare import __main__ as compare
from benchmarks.compare import plan
from benchmarks.compare.names import MEMKV, NATIVE, NO_CACHE, VLLM_SIDES

# Keys and values of all layers in bfloat16.
KV_BYTES_PER_TOKEN = {"smollm2": 30 * 2 * 3 * 64 * 2, plan.RANDOM_335M: 24 * 2 * 8 * 64 * 2}


def test_the_default_profile_fits_its_time() -> None:
    profile = plan.DEFAULT

    def seconds(stages: list[str], wanted: Sequence[str] | None = None) -> float:
        runs = compare.runs_of(profile, stages, wanted)
        return sum(one.seconds for run in runs for one in run.estimates())

    # What its help says: about an hour.
    assert 600 < seconds(["vllm", "sglang"]) < 60 * 60
    assert seconds(["vllm"], VLLM_SIDES[:3]) < seconds(["vllm"])
    assert [run.name for run in compare.runs_of(plan.FULL, ["vllm", "sglang"])] == ["vllm", "vllm, long", "sglang"]
    for one in plan.PROFILES.values():
        assert max(one.documents.longest, one.conversations.longest, one.rag.longest) <= one.max_model_len
        # vLLM starts only where its longest request fits into its pool.
        assert one.kv_bytes > one.max_model_len * KV_BYTES_PER_TOKEN[one.model]
        assert one.conversations.count // one.conversations.together >= 2
        assert one.documents.lengths.count(one.documents.longest) * one.documents.restores >= 2


@pytest.mark.parametrize("dtype", cpu_dtype.DTYPES)
def test_a_side_is_given_the_time_that_its_longest_prompt_takes(dtype: str) -> None:
    for one in (plan.in_dtype(profile, dtype) for profile in plan.PROFILES.values()):
        assert plan.answer_timeout_s(one) >= 5 * plan.prefill_s(one, one.documents.longest)
    long = plan.in_dtype(plan.LONG, dtype)
    assert plan.prefill_s(long, 8000) > 2 * plan.prefill_s(plan.in_dtype(plan.DEFAULT, dtype), 8000), "a larger model"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_there_is_time_for_every_set_of_processes(dtype: str) -> None:
    talks = plan.in_dtype(plan.TALKS, dtype)
    sides = len(talks.vllm_sides)
    needed_s = sum(one.seconds for one in plan.estimate_vllm(talks, sides, sides))
    assert talks.process_sets > 1 and needed_s <= 60 * talks.vllm_minutes


def test_what_does_not_fit_into_memory_is_told_before_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    wide = plan.in_dtype(plan.DEFAULT, "float32")
    runs = compare.runs_of(wide, ["vllm", "sglang"])
    assert [run.name for run in runs] == ["vllm", "sglang"]
    # Measured: 19.3 GiB in bfloat16; in float32 18.1 GiB for five of the seven.
    assert 18 < plan.vllm_memory_bytes(plan.DEFAULT, VLLM_SIDES) / 2**30 < 21
    assert 23 < plan.vllm_memory_bytes(wide, VLLM_SIDES) / 2**30 < 27
    compare.warn_of_memory(runs, 20 << 30)
    assert "vllm needs about 2" in (told := capsys.readouterr().err) and "--sides" in told and "sglang" not in told
    compare.warn_of_memory(runs, 64 << 30)
    compare.warn_of_memory(compare.runs_of(wide, ["vllm"], [MEMKV, NO_CACHE]), 20 << 30)
    assert capsys.readouterr().err == ""


def test_what_does_not_fit_into_memory_at_once_runs_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    wide = plan.in_dtype(plan.DEFAULT, "float32")
    first, second, third = compare.runs_of(wide, ["vllm", "sglang"], memory_bytes=21 << 30)
    assert (first.name, second.name, third.name) == ("vllm", "vllm, other-sides", "sglang")
    assert set(first.sides) | set(second.sides) == set(VLLM_SIDES)
    assert set(first.sides) & set(second.sides) == {NO_CACHE, NATIVE}, "whom the others are held against"
    assert second.profile.dtype == "float32"
    compare.warn_of_memory([first, second, third], 21 << 30)
    assert capsys.readouterr().err == ""
    assert len(compare.runs_of(wide, ["vllm"], memory_bytes=64 << 30)) == 1
    # Documents alone have no sides that could wait: what does not fit there is told.
    assert [run.name for run in compare.runs_of(plan.LONG, ["vllm"], memory_bytes=8 << 30)] == ["vllm"]
    # Who names sides has chosen.
    chosen = compare.runs_of(wide, ["vllm"], VLLM_SIDES, memory_bytes=21 << 30)
    assert [run.sides for run in chosen] == [VLLM_SIDES]


def test_a_part_does_not_take_the_place_of_the_whole(tmp_path: Path) -> None:
    folders = {name: compare.results_folder(one, tmp_path) for name, one in plan.PROFILES.items()}
    whole = folders.pop("default")
    assert whole.name == "benchmarks" and folders.pop("full") == whole and folders.pop("tiny") == tmp_path
    assert len(folders) == 3 and all(folder == whole / "results" / name for name, folder in folders.items())


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--sides", "memkv;nobody"], ["--stages", "trt"]):
        with pytest.raises(SystemExit):
            compare.main(arguments)
    assert "nobody" in capsys.readouterr().err
    assert compare.main(["--plan", "--profile", "tiny"]) == 0
    assert "estimate" in capsys.readouterr().out
