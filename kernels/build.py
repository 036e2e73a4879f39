"""Builds the kernels that ship: one fatbin for all targets, beside the package's GPU code.

    python kernels/build.py           # rebuild memkv_engines/gpu/memkv_kernels.fatbin (needs nvcc)
    python kernels/build.py --check   # does the committed file match the source?

The same source and the same nvcc give the same bytes: the source is compiled under a fixed name in a folder of its own.
`memkv_kernels.json` beside the fatbin records what it was made from. `--check` compares digests, and where an nvcc of
the recorded version is at hand it also compiles again and compares bytes. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "kernels" / "memkv_kernels.cu"
FATBIN = ROOT / "memkv_engines" / "gpu" / "memkv_kernels.fatbin"
RECORD = FATBIN.with_suffix(".json")

CUBINS = (80, 90, 100, 120)
"""Machine code for these compute capabilities; each also serves later minors of its major."""
PTX = 90
"""What the driver compiles for any other device from 9.0 on: the oldest target that has the bulk variant."""
FLAGS = ("-std=c++17", "-O3")


class BuildError(Exception):
    """nvcc is missing or failed, or the committed fatbin does not match; the message has the remedy."""


def find_nvcc(chosen: Path | None = None) -> Path | None:
    """Returns the nvcc to use: the one chosen, that of the `nvidia-cuda-nvcc` wheel here, or the first on the path."""
    if chosen:
        return chosen
    wheels = sorted(Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cu*/bin/nvcc"))
    on_path = shutil.which("nvcc")
    return wheels[-1] if wheels else Path(on_path) if on_path else None


def nvcc_version(nvcc: Path) -> str:
    """Returns the release of an nvcc, such as `13.0.88`.

    Raises:
        BuildError: It does not run, or prints something else.
    """
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{nvcc} does not run: {error}") from None
    found = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    if not found:
        raise BuildError(f"{nvcc} --version does not say which it is: {text!r}")
    return found[1]


def compile_source(nvcc: Path, arguments: list[str], output: str, source: str | None = None) -> tuple[bytes, str]:
    """Compiles the kernels in an empty folder, so that no path of this machine gets into the result.

    Args:
        nvcc: The compiler.
        arguments: What to make, such as `["-arch=sm_90", "-ptx"]`; `FLAGS` precede it.
        output: Name of the result's file.
        source: Text to compile instead of the kernels' source.

    Returns:
        The result's bytes, and what nvcc printed.

    Raises:
        BuildError: nvcc failed; the message holds what it printed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / SOURCE.name).write_text(SOURCE.read_text() if source is None else source)
        command = [nvcc, *FLAGS, *arguments, "-o", output, SOURCE.name]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(f"nvcc failed:\n{done.stdout}{done.stderr}")
        return (folder / output).read_bytes(), done.stdout + done.stderr


def fatbin_bytes(nvcc: Path) -> bytes:
    """Returns the fatbin of all targets."""
    targets = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in CUBINS]
    targets.append(f"-gencode=arch=compute_{PTX},code=compute_{PTX}")
    return compile_source(nvcc, [*targets, "-fatbin", "--compress-mode=size"], FATBIN.name)[0]


def sha256(data: bytes) -> str:
    """Returns a hexadecimal digest."""
    return hashlib.sha256(data).hexdigest()


def record_of(fatbin: bytes, version: str) -> dict[str, object]:
    """Returns what is recorded beside a fatbin."""
    return {
        "source_sha256": sha256(SOURCE.read_bytes()),
        "nvcc": version,
        "flags": list(FLAGS),
        "targets": [*(f"sm_{target}" for target in CUBINS), f"compute_{PTX}"],
        "fatbin_sha256": sha256(fatbin),
        "fatbin_bytes": len(fatbin),
    }


def build(nvcc: Path) -> dict[str, object]:
    """Writes fatbin and record; returns the record."""
    fatbin = fatbin_bytes(nvcc)
    record = record_of(fatbin, nvcc_version(nvcc))
    FATBIN.parent.mkdir(parents=True, exist_ok=True)
    FATBIN.write_bytes(fatbin)
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    return record


def check(nvcc: Path | None) -> str:
    """Compares the committed fatbin with the source.

    Returns:
        One line that says what was compared.

    Raises:
        BuildError: They differ.
    """
    remedy = "run `python kernels/build.py` and commit both files in memkv_engines/gpu/"
    try:
        fatbin, record = FATBIN.read_bytes(), json.loads(RECORD.read_text())
    except (OSError, ValueError) as error:
        raise BuildError(f"no fatbin with its record: {error}; {remedy}") from None
    expected = record_of(fatbin, str(record.get("nvcc")))
    for name, value in expected.items():
        if record.get(name) != value:
            raise BuildError(f"{RECORD.name} has {name} = {record.get(name)}, now it is {value}; {remedy}")
    if nvcc is None or nvcc_version(nvcc) != record["nvcc"]:
        return f"digests match; not compiled again, since no nvcc {record['nvcc']} is at hand"
    if fatbin_bytes(nvcc) != fatbin:
        raise BuildError(f"nvcc {record['nvcc']} makes other bytes from the same source; {remedy}")
    return f"digests match, and nvcc {record['nvcc']} makes the same bytes"


def main() -> int:
    """Builds or checks; returns 0 when all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    parser.add_argument("--nvcc", type=Path, help="the compiler (default: the wheel's, then the path's)")
    arguments = parser.parse_args()
    nvcc = find_nvcc(arguments.nvcc)
    try:
        if arguments.check:
            print(check(nvcc))
            return 0
        if nvcc is None:
            raise BuildError("no nvcc found; install a CUDA toolkit, or `pip install nvidia-cuda-nvcc nvidia-nvvm`")
        record = build(nvcc)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{FATBIN.relative_to(ROOT)}: {record['fatbin_bytes']} bytes, nvcc {record['nvcc']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
