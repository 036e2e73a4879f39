"""In which dtype benchmarks run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import cpu_dtype
from benchmarks.compare import plan

X86 = "processor\t: 0\nflags\t\t: fpu avx2 {}\n\nprocessor\t: 1\nflags\t\t: fpu avx2 {}\n"


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        (X86.format("avx512_bf16", "avx512_bf16"), "bfloat16"),
        (X86.format("amx_bf16", "amx_bf16"), "bfloat16"),
        (X86.format("avx512f", "avx512f"), "float32"),
        ("Features\t: fp asimd bf16\n", "bfloat16"),
        ("bogomips: 1\n", "float32"),
    ],
)
def test_the_cpu_decides(text: str, dtype: str, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(text)
    assert cpu_dtype.native_dtype(cpuinfo) == dtype


def test_a_machine_that_does_not_tell_gets_float32(tmp_path: Path) -> None:
    assert cpu_dtype.native_dtype(tmp_path / "missing") == "float32"


def test_pools_hold_as_many_tokens_in_every_dtype() -> None:
    assert [cpu_dtype.kv_bytes(100, dtype) for dtype in cpu_dtype.DTYPES] == [100, 100, 200]
    profile = plan.in_dtype(plan.DEFAULT, "float32")
    assert (profile.dtype, profile.kv_bytes) == ("float32", 2 * plan.DEFAULT.kv_bytes)
    assert profile.dram_tier_bytes == 2 * plan.DEFAULT.dram_tier_bytes
    assert profile.staging_bytes == 2 * plan.DEFAULT.staging_bytes
    assert plan.in_dtype(plan.DEFAULT, "bfloat16") == plan.DEFAULT
