"""The machine code of every target: no spills, enough loads in flight, a bound on registers."""

from __future__ import annotations

import json

import pytest

from kernels import build
from tests.kernels.sass_table import (
    BULK_FROM,
    BULK_KERNELS,
    COPY_KERNELS,
    DIGEST_KERNEL,
    Facts,
    facts_of,
    longest_run,
    opcode,
    resources,
)
from tests.kernels.toolchain import Toolchain


@pytest.mark.parametrize("target", build.CUBINS)
def test_machine_code(target: int, compiler: Toolchain) -> None:
    facts = facts_of(target)
    expected = {*COPY_KERNELS, DIGEST_KERNEL} | (set(BULK_KERNELS) if target >= BULK_FROM else set())
    assert {f.kernel for f in facts} == expected
    assert not [problem for f in facts for problem in f.problems()]


def test_what_the_gate_refuses() -> None:
    good = Facts(90, "memkv_gather", 400, 64, 0, 0, 4, 4, 0, 0)
    assert not good.problems()
    for change in ({"registers": 65}, {"spilled_bytes": 4}, {"local": 1}, {"loads_in_flight": 3}, {"wide_stores": 3}):
        assert Facts(**{**good.__dict__, **change}).problems(), change
    bulk = Facts(90, "memkv_gather_bulk", 300, 30, 0, 0, 1, 0, 0, 2)
    assert not bulk.problems()
    assert Facts(**{**bulk.__dict__, "bulk_copies": 1}).problems()


def test_how_machine_code_is_read() -> None:
    assert opcode("@!P0 LDG.E.128.CONSTANT R4, [R2.64]") == "LDG.E.128.CONSTANT"
    assert opcode("EXIT") == "EXIT"
    wide, narrow = "LDG.E.128.CONSTANT", "LDG.E.64"
    assert longest_run([wide, "IADD3", wide, narrow, wide, "STG.E.128", wide]) == 3
    assert longest_run([wide, wide, "BRA", wide]) == 2
    log = "Compiling entry function 'k' for 'sm_90'\n 4 bytes spill stores, 8 bytes spill loads\nUsed 40 registers"
    assert resources(log) == {"k": (40, 12)}


def test_the_fatbin_is_that_of_the_source(compiler: Toolchain) -> None:
    """The recorded nvcc makes the committed bytes again, at another time in another folder: neither is in them."""
    assert json.loads(build.RECORD.read_text())["nvcc"] == compiler.version, "the pinned nvcc is not the recorded one"
    assert "the same bytes" in build.check(compiler.nvcc)


def test_a_changed_source_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SOURCE", build.ROOT / "kernels" / "build.py")
    with pytest.raises(build.BuildError, match="source_sha256"):
        build.check(None)
