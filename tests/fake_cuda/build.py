"""Builds the fake `libcuda.so.1` with g++, once per content of its sources.

    python -m tests.fake_cuda.build        # prints the folder to put on LD_LIBRARY_PATH

Standard library only. A process that cannot be started with LD_LIBRARY_PATH loads the file itself before anything else
asks for `libcuda.so.1` (`control.load`): the dynamic linker then finds it by its SONAME.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "fake_cuda"
SOURCES = tuple(HERE / name for name in ("fake_cuda.cpp", "fake_cuda.h", "fake_cuda_api.inc", "fake_cuda_control.inc"))
FLAGS = ("-std=c++17", "-O1", "-g", "-Wall", "-Werror", "-fvisibility=hidden", "-shared", "-fPIC")


def compile_shared(source: Path, output: Path, *flags: str) -> Path:
    """Compile one C++ file into a shared library; atomic, so that two builders do not disturb each other.

    Raises:
        RuntimeError: g++ is missing or refuses; the message has its output.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder) / output.name
        command = ["g++", *FLAGS, *flags, "-o", str(made), str(source), "-ldl"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise RuntimeError("the fake CUDA driver needs g++ (Debian: apt install g++)") from error
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        os.replace(made, output)
    return output


def digest_of(*sources: Path) -> str:
    """A short digest of the flags and of what the files hold."""
    hasher = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sources:
        hasher.update(source.read_bytes())
    return hasher.hexdigest()[:16]


def build() -> Path:
    """The path of `libcuda.so.1`; compiles it when its sources changed."""
    library = BUILD / digest_of(*SOURCES) / "libcuda.so.1"
    if not library.exists():
        compile_shared(SOURCES[0], library, "-Wl,-soname,libcuda.so.1")
    return library


if __name__ == "__main__":
    print(build().parent)
    sys.exit(0)
