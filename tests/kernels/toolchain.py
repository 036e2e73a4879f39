"""Finds the CUDA compiler and disassembler, or gets them: nothing here needs a GPU or a driver.

    python -m tests.kernels.toolchain             # say what is used
    python -m tests.kernels.toolchain --install   # get the wheels into build/toolchain

Looked for in this order: the wheels in this environment, those in `build/toolchain`, then the path. The wheels are
preferred since their version is pinned, so that a machine's own toolkit does not decide what the tests see.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from kernels.build import nvcc_version

ROOT = Path(__file__).resolve().parent.parent.parent
INSTALLED = ROOT / "build" / "toolchain"

PACKAGES = (
    "nvidia-cuda-nvcc==13.0.88",  # nvcc, ptxas, fatbinary
    "nvidia-nvvm==13.0.88",  # cicc, which nvcc calls
    "nvidia-cuda-crt==13.0.88",  # headers that nvcc includes
    "nvidia-cuda-runtime==13.0.88",  # cuda_runtime.h, likewise
    "nvidia-cuda-nvdisasm==13.2.51",  # the oldest release on its own; reads 13.0's cubins
)
NVRTC_PACKAGES = ("nvidia-cuda-nvrtc==13.0.88", "cuda-bindings==13.0.3")


class ToolchainMissing(Exception):
    """No compiler or no disassembler; the message says how to get them."""


@dataclass(frozen=True)
class Toolchain:
    """Programs that compile and take apart kernels.

    Attributes:
        nvcc: The compiler.
        nvdisasm: The disassembler.
        version: nvcc's release, such as `13.0.88`.
    """

    nvcc: Path
    nvdisasm: Path
    version: str


def folders() -> list[Path]:
    """Where the wheels put their programs, in the order of preference."""
    sites = sorted(Path(sys.prefix).glob("lib/python*/site-packages"))
    return [site / "nvidia" / "cu13" / "bin" for site in (*sites, INSTALLED)]


def find_program(name: str) -> Path | None:
    """Returns a program of the toolchain, or None."""
    for folder in folders():
        if (folder / name).is_file():
            return folder / name
    on_path = shutil.which(name)
    return Path(on_path) if on_path else None


@functools.cache
def toolchain() -> Toolchain:
    """Returns the toolchain.

    Raises:
        ToolchainMissing: A program is missing.
    """
    programs = {name: find_program(name) for name in ("nvcc", "nvdisasm")}
    missing = [name for name, path in programs.items() if path is None]
    nvcc, nvdisasm = programs["nvcc"], programs["nvdisasm"]
    if nvcc is None or nvdisasm is None:
        raise ToolchainMissing(f"no {' and no '.join(missing)}: run `python -m tests.kernels.toolchain --install`")
    return Toolchain(nvcc, nvdisasm, nvcc_version(nvcc))


def install() -> None:
    """Installs the wheels into `build/toolchain`; blocks for the download (about 100 MB)."""
    command = [sys.executable, "-m", "pip", "install", "--no-compile", "--no-deps", "--upgrade", "--target", INSTALLED]
    subprocess.run([*map(str, command), *PACKAGES], check=True)


def main() -> int:
    """Prints the toolchain; returns 1 when something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="get the pinned wheels into build/toolchain first")
    if parser.parse_args().install:
        install()
    try:
        found = toolchain()
    except ToolchainMissing as error:
        print(error, file=sys.stderr)
        return 1
    print(f"nvcc     {found.version}  {found.nvcc}\nnvdisasm           {found.nvdisasm}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
