"""The translator refuses what it does not know, and translated code reports what goes wrong."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.kernels.abi import address
from tests.kernels.ptx2c import translate
from tests.kernels.ptx_syntax import PtxError
from tests.kernels.routes import KINDS, Route, build_ptx

HEAD = ".version 9.0\n.target sm_90\n.address_size 64\n"


def kernel(body: str, name: str = "k") -> str:
    """A kernel with one parameter, an address."""
    registers = ".reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<9>; .reg .b64 %d<9>;\n"
    load = f"ld.param.u64 %d0, [{name}_param_0];\n"
    return f".visible .entry {name}(\n.param .u64 {name}_param_0\n)\n{{\n{registers}{load}{body}\nret;\n}}\n"


@pytest.mark.parametrize(
    "instruction",
    [
        "bar.sync 0;",
        "fma.rn.f32 %r0, %r1, %r2, %r3;",
        "shfl.sync.idx.b32 %r0, %r1, 0, 31, -1;",
        "atom.global.add.u32 %r0, [%d0], 1;",
        "ld.volatile.global.u32 %r0, [%d0];",
        "ld.local.u32 %r0, [%d0];",
        "st.global.wt.u32 [%d0], %r0;",
        "cvt.rn.f32.u32 %r0, %r1;",
        "setp.eq.and.u32 %p0, %r0, %r1, %p1;",
        "mul.hi.u32 %r0, %r1, %r2;",
        "cvta.shared.u32 %d1, %r0;",
        "cp.async.bulk.wait_all;",
        "mov.u32 %r0, %laneid;",
        ".local .align 8 .b8 stack[16];",
        "@%p0 shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1;",
    ],
)
def test_what_is_not_known_is_an_error(instruction: str) -> None:
    translate(HEAD + kernel("mov.u32 %r0, 1;"))
    with pytest.raises(PtxError):
        translate(HEAD + kernel(instruction))


def test_what_is_declared_outside_kernels_is_known_or_an_error() -> None:
    with pytest.raises(PtxError):
        translate(HEAD + ".global .align 4 .b8 counter[4];\n" + kernel(""))


CASES = {
    "unaligned": "ld.global.u32 %r0, [%d0+2];",
    "out of bounds": "ld.global.u32 %r0, [%d0+4096];",
    "not writable": "st.global.u32 [%d0], %r0;",
    "not readable": "ld.global.u32 %r0, [%d0+64];",
    "written twice": "st.global.u32 [%d0+64], %r0; st.global.u16 [%d0+66], %h0;",
    "outside the parameters": "ld.param.u32 %r0, [parameters_param_0+8];",
    "divided by zero": "mov.u32 %r0, 0; rem.u32 %r1, 7, %r0;",
    "outside shared memory": "mov.u32 %r0, 70000; ld.shared.u32 %r1, [%r0];",
    "lanes diverged": (
        "mov.u32 %r0, %tid.x; setp.eq.u32 %p0, %r0, 3; @%p0 bra OUT;\nshfl.sync.bfly.b32 %r1|%p1, %r0, 1, 31, -1;\nOUT:"
    ),
    "deadlock": (
        "mbarrier.init.shared::cta.b64 [%r0], 1; fence.mbarrier_init.release.cluster;\n"
        "fence.proxy.async.shared::cta;\nWAIT: mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r0], 0; @!%p0 bra WAIT;"
    ),
}


@pytest.fixture(scope="module")
def broken() -> Route:
    """A library with one wrong kernel per case; `parameters` is the case that needs its own name."""
    names = {kind: "parameters" if "parameters" in kind else f"k{number}" for number, kind in enumerate(CASES)}
    ptx = HEAD + "".join(kernel(body, names[kind]) for kind, body in CASES.items())
    return Route("broken", build_ptx(ptx, "broken"))


@pytest.mark.parametrize("kind", CASES)
def test_what_goes_wrong_is_reported(broken: Route, kind: str) -> None:
    name = "parameters" if "parameters" in kind else f"k{list(CASES).index(kind)}"
    memory = np.zeros(32, np.uint64)
    arguments = np.array(address(memory), np.uint64)
    threads = 32 if kind == "lanes diverged" else 1
    spans = {"read": [(address(memory), 64)], "write": [(address(memory) + 64, 64)]}
    found = broken.launch(name, arguments, grid=1, block=threads, **spans)
    assert found and KINDS[found[0].kind] == kind, [str(violation) for violation in found]


def test_shuffles_and_bit_operations() -> None:
    """Instructions whose result is known: what the translator makes of them is compared with plain arithmetic."""
    body = """
        mov.u32 %r0, %tid.x; mul.lo.s32 %r1, %r0, 3; shfl.sync.bfly.b32 %r2|%p0, %r1, 5, 31, -1;
        prmt.b32 %r3, %r0, 287454020, 21522; shf.l.wrap.b32 %r4, %r0, %r2, 7;
        cvt.u64.u32 %d1, %r0; mov.u64 %d2, -1; bfi.b64 %d3, %d1, %d2, 8, 16;
        shr.s64 %d4, %d2, 70; mul.hi.u64 %d5, %d3, %d2; sub.s64 %d4, %d5, %d4;
        mul.wide.u32 %d6, %r0, 32; add.s64 %d6, %d6, %d0; cvt.u64.u32 %d7, %r4;
        st.global.v2.u32 [%d6], {%r2, %r3}; st.global.u64 [%d6+8], %d7;
        st.global.u64 [%d6+16], %d3; st.global.u64 [%d6+24], %d4;
    """
    route = Route("shuffle", build_ptx(HEAD + kernel(body), "shuffle"))
    memory = np.zeros((32, 4), np.uint64)
    span = (address(memory), memory.nbytes)
    assert not route.launch("k", np.array(address(memory), np.uint64), grid=1, block=32, seed=5, write=[span])
    for lane, (first, fourth, inserted, last) in enumerate(memory.tolist()):
        partner = (lane ^ 5) * 3
        # Selector 0x5412: bytes 2 and 1 of the lane, then 4 and 5, which are the lowest two of 0x11223344.
        permuted = (lane >> 16 & 255) | (lane >> 8 & 255) << 8 | 0x44 << 16 | 0x33 << 24
        assert first == partner | permuted << 32
        assert fourth == (partner << 7 | lane >> 25) & 0xFFFFFFFF
        assert inserted == (2**64 - 1) & ~(0xFFFF << 8) | lane << 8
        assert last == ((inserted * (2**64 - 1) >> 64) + 1) % 2**64


def test_a_kernel_that_is_not_there() -> None:
    route = Route("missing", build_ptx(HEAD + kernel(""), "missing"))
    assert route.library.memkv_launch(b"other", ctypes.c_char_p(b""), 1, 1, 0) == -1
