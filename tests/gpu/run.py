"""Runs the tests that need a real device.

    python -m tests.gpu.run                # exit code 3 without a device
    python -m tests.gpu.run --sanitizer    # again under compute-sanitizer (memcheck, racecheck, initcheck, synccheck)

Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from tests.gpu.conftest import reason_for_no_device

FOLDER = Path(__file__).resolve().parent
NO_DEVICE, NO_SANITIZER = 3, 4
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def main() -> int:
    """Runs pytest, or says what is missing; never 0 without having run a test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitizer", action="store_true", help="run under compute-sanitizer")
    arguments, rest = parser.parse_known_args()
    reason = reason_for_no_device()
    if reason:
        print(
            f"no test was run: they need a CUDA device, and there is none that can be used ({reason})", file=sys.stderr
        )
        return NO_DEVICE
    tests = [sys.executable, "-m", "pytest", str(FOLDER), *rest]
    if not arguments.sanitizer:
        return subprocess.call(tests)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on the path: it comes with the CUDA toolkit", file=sys.stderr)
        return NO_SANITIZER
    codes = [
        subprocess.call([sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *tests])
        for tool in TOOLS
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
