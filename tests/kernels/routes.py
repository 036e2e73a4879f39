"""Ways to run the kernels on a CPU, each a shared library with the same C interface.

| route | what runs |
|---|---|
| `host` | the .cu as C++ |
| `host-asan` | the same under AddressSanitizer and UBSan; needs a process that preloads them |
| `sm_80` ... `sm_120` | the PTX that nvcc makes for that target, translated to C++ |
| `nvrtc` | the PTX that NVRTC makes for sm_90 |

    memkv_launch(kernel name, pointer to the argument struct, grid, block, seed) -> 0, or -1 for an unknown kernel
    memkv_reset(check), memkv_allow(address, bytes, 1 read | 2 write), memkv_violations, memkv_counts, memkv_bulk_mode

A library starts with checks off: any address may be touched, as a fake driver wants it. Libraries are built once and
kept in `build/kernels/` under a digest of everything they are made from.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from kernels.build import CUBINS, FLAGS, SOURCE, compile_source
from tests.kernels import ptx2c
from tests.kernels.toolchain import ROOT, toolchain

HERE = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "kernels"
HEADERS = tuple(HERE / name for name in ("simt_runtime.h", "host_emulation.h", "ptx_runtime.h", "host_main.cpp"))
TRANSLATOR = (HERE / "ptx2c.py", HERE / "ptx_syntax.py")

PTX_ROUTES = tuple(f"sm_{target}" for target in CUBINS)
CXX_FLAGS = ("-std=c++17", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-strict-aliasing", "-shared", "-fPIC")
HOST_WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")

WIDTHS = (1, 2, 4, 8, 16)
KINDS = {
    1: "unaligned",
    2: "out of bounds",
    3: "not readable",
    4: "not writable",
    5: "written twice",
    6: "read after write",
    7: "write after read",
    8: "lanes diverged",
    9: "outside the parameters",
    10: "outside the constants",
    11: "outside shared memory",
    12: "divided by zero",
    101: "barrier misuse",
    102: "bulk load unaligned",
    103: "outside the stages",
    104: "stage overwritten before it was read",
    105: "bulk store unaligned",
    106: "stage stored before it was loaded",
    107: "deadlock",
    108: "loads left at the end",
    109: "stores left at the end",
}

Span = tuple[int, int]
"""Address and length in bytes."""


class Violation(ctypes.Structure):
    """`simt::Violation`."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("width", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("cta", ctypes.c_uint32),
        ("tid", ctypes.c_uint32),
    )

    def __str__(self) -> str:
        where = f"{self.width} bytes at {self.address:#x} by thread {self.tid} of CTA {self.cta}"
        return f"{KINDS.get(self.kind, self.kind)}: {where}"


# --------------------------------------------------------------------------------------------------------- building


def digest(*parts: str | bytes | Path) -> str:
    """Short digest over texts and files."""
    state = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()[:20]


def publish(path: Path, data: bytes) -> None:
    """Writes a file of the cache whole or not at all: several processes may build at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as out:
        out.write(data)
    os.replace(out.name, path)


def run_compiler(source: Path, flags: Sequence[str], target: Path) -> None:
    """Compiles one C++ file into a shared library; raises `RuntimeError` with the compiler's words."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    command = ["g++", *CXX_FLAGS, *flags, f"-I{HERE}", "-o", str(partial), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"g++ failed on {source.name}:\n{done.stderr[-4000:]}")
    os.replace(partial, target)


def build_host(source: Path = SOURCE, *, sanitize: bool = False, optimize: str = "-O1") -> Path:
    """Builds the .cu as host C++."""
    flags = [optimize, *HOST_WARNINGS, *(SANITIZERS if sanitize else ()), f'-DMEMKV_SOURCE="{source}"']
    target = CACHE / f"host-{digest(source, *HEADERS, ' '.join((*CXX_FLAGS, *flags)))}.so"
    if not target.exists():
        run_compiler(HERE / "host_main.cpp", flags, target)
    return target


def ptx_of(target: int, source: str | None = None) -> str:
    """PTX that nvcc makes for a compute capability."""
    text = SOURCE.read_text() if source is None else source
    name = CACHE / f"sm_{target}-{digest(text, toolchain().version, ' '.join(FLAGS))}.ptx"
    if not name.exists():
        publish(name, compile_source(toolchain().nvcc, [f"-arch=sm_{target}", "-ptx"], "kernels.ptx", text)[0])
    return name.read_text()


def nvrtc_ptx_of(target: int) -> str:
    """PTX that NVRTC makes: no standard headers, no files, no driver.

    Raises:
        RuntimeError: NVRTC refused the source; the message holds its log.
    """
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture=compute_{target}".encode(), b"--std=c++17"]
    error, program = nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), b"memkv_kernels.cu", 0, [], [])
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.decode())
    ptx = b" " * nvrtc.nvrtcGetPTXSize(program)[1]
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(program)
    return ptx.rstrip(b"\0").decode()


def build_ptx(ptx: str, name: str, optimize: str = "-O0") -> Path:
    """Translates PTX and builds it; optimising takes three times as long as it saves the tests."""
    flags = [optimize, "-w"]
    target = CACHE / f"{name}-{digest(ptx, *HEADERS, *TRANSLATOR, ' '.join((*CXX_FLAGS, *flags)))}.so"
    if not target.exists():
        source = target.with_suffix(".cpp")
        publish(source, ptx2c.translate(ptx)[0].encode())
        run_compiler(source, flags, target)
    return target


def build_route(name: str) -> Path:
    """Builds one route, or takes it from the cache.

    Args:
        name: `host`, `host-asan`, `nvrtc`, or one of `PTX_ROUTES`.

    Returns:
        Path of the shared library.

    Raises:
        ToolchainMissing: A PTX route needs nvcc, and there is none.
        PtxError: The PTX holds something that the translator does not know.
        RuntimeError: A compiler failed.
    """
    if name in ("host", "host-asan"):
        return build_host(sanitize=name == "host-asan")
    if name == "nvrtc":
        return build_ptx(nvrtc_ptx_of(90), "nvrtc")
    return build_ptx(ptx_of(int(name.removeprefix("sm_"))), name)


def build_routes(names: Sequence[str] = ("host", *PTX_ROUTES)) -> dict[str, Path]:
    """Builds several routes; returns the shared library of each by name."""
    return {name: build_route(name) for name in names}


# ---------------------------------------------------------------------------------------------------------- running


class Route:
    """A loaded library. Not for several threads: each library has one machine."""

    def __init__(self, name: str, library: Path) -> None:
        self.name = name
        self.library = ctypes.CDLL(str(library))
        self.library.memkv_launch.argtypes = (
            ctypes.c_char_p,
            ctypes.c_void_p,
            ctypes.c_uint32,
            ctypes.c_uint32,
            ctypes.c_uint64,
        )
        self.library.memkv_allow.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int)
        self.library.memkv_violations.argtypes = (ctypes.POINTER(Violation), ctypes.c_int)

    @property
    def has_bulk(self) -> bool:
        """Whether the bulk variant is in this library."""
        return bool(self.library.memkv_argument_bytes(b"memkv_gather_bulk")) and self.name not in ("host", "host-asan")

    def launch(
        self,
        kernel: str,
        arguments: npt.NDArray[Any],
        *,
        grid: int,
        block: int,
        seed: int = 0,
        read: Sequence[Span] = (),
        write: Sequence[Span] = (),
        lazy: bool = False,
    ) -> list[Violation]:
        """Runs one kernel with the checker on; blocks until it has ended.

        Args:
            kernel: Its name in the ABI.
            arguments: The argument struct, a numpy record of the ABI's size.
            grid: CTAs.
            block: Threads per CTA.
            seed: The order in which CTAs, warps and lanes take turns; 0 is the natural one.
            read: Memory that may be read, and not written.
            write: Memory that may be written once, and not read.
            lazy: Bulk copies move as late as the waits allow instead of at once.

        Returns:
            What the kernel did wrong, at most 64 of them.
        """
        expected = self.library.memkv_argument_bytes(kernel.encode())
        assert expected == arguments.nbytes, f"{kernel} takes {expected} bytes, got {arguments.nbytes}"
        self.library.memkv_reset(1)
        for spans, permission in ((read, 1), (write, 2)):
            for address, length in spans:
                self.library.memkv_allow(address, length, permission)
        if self.has_bulk:
            self.library.memkv_bulk_mode(int(lazy))
        # A copy of exactly this size: reading past the arguments shows under AddressSanitizer.
        copy = ctypes.create_string_buffer(arguments.tobytes(), arguments.nbytes)
        if self.library.memkv_launch(kernel.encode(), copy, grid, block, seed) != 0:
            raise KeyError(kernel)
        found = (Violation * 64)()
        return list(found[: min(self.library.memkv_violations(found, 64), 64)])

    def counts(self) -> tuple[dict[int, int], dict[int, int]]:
        """Global loads and stores of the last launch by their width in bytes (plain C++ reads are not counted)."""
        out = (ctypes.c_uint64 * 10)()
        self.library.memkv_counts(out)
        loads, stores = list(out[:5]), list(out[5:])
        return dict(zip(WIDTHS, loads, strict=True)), dict(zip(WIDTHS, stores, strict=True))
