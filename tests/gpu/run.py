"""Runs the tests that need a real device.

    python -m tests.gpu.run                          # exit code 3 without a device
    python -m tests.gpu.run --vllm PYTHON --sglang PYTHON   # each of an environment of its own
    python -m tests.gpu.run --sanitizer              # again under compute-sanitizer (all its tools)

The engines' tests run in the engines' own environments, which must see a CUDA build of the engine and
`pip install -e '.[gpu]' pytest pytest-timeout` of this checkout. Which of them were not run is said at the end, and the
exit code is then 5 where all else passed.

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
ROOT = FOLDER.parents[1]
NO_DEVICE, NO_SANITIZER, NO_ENGINE = 3, 4, 5
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ENGINES = {"vllm": "test_vllm_on_device.py", "sglang": "test_sglang_on_device.py"}


def commands(pythons: dict[str, str], rest: list[str], sanitizer: str) -> list[list[str]]:
    """What is to be run, in order.

    Args:
        pythons: the interpreter of each engine's environment.
        rest: further arguments of pytest.
        sanitizer: path of compute-sanitizer, empty to run without it. Engines never run under it.
    """
    engines = FOLDER / "engines"
    tests = [sys.executable, "-m", "pytest", str(FOLDER), f"--ignore={engines}", *rest]
    options = ["--error-exitcode", "9", "--target-processes", "all"]
    plain = [[sanitizer, "--tool", tool, *options, *tests] for tool in TOOLS] if sanitizer else [tests]
    return [*plain, *([pythons[name], "-m", "pytest", str(engines / ENGINES[name]), *rest] for name in pythons)]


def exit_code(codes: list[int], *, all_engines: bool) -> int:
    """That of the first command that failed, also one that a signal ended (negative); else whether all were run."""
    return next((abs(code) for code in codes if code), 0 if all_engines else NO_ENGINE)


def main() -> int:
    """Runs pytest, or says what is missing; 0 only where everything was run and passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitizer", action="store_true", help="run under compute-sanitizer")
    for name in ENGINES:
        parser.add_argument(f"--{name}", metavar="PYTHON", help=f"Python of an environment with a CUDA build of {name}")
    arguments, rest = parser.parse_known_args()
    reason = reason_for_no_device()
    if reason:
        print(
            f"no test was run: they need a CUDA device, and there is none that can be used ({reason})", file=sys.stderr
        )
        return NO_DEVICE
    sanitizer = shutil.which("compute-sanitizer") if arguments.sanitizer else ""
    if sanitizer is None:
        print("compute-sanitizer is not on the path: it comes with the CUDA toolkit", file=sys.stderr)
        return NO_SANITIZER
    pythons = {name: getattr(arguments, name) for name in ENGINES if getattr(arguments, name)}
    codes = [subprocess.call(command, cwd=ROOT) for command in commands(pythons, rest, sanitizer)]
    missing = ENGINES.keys() - pythons.keys()
    for name in sorted(missing):
        print(f"not run: {name} on the device (--{name} PYTHON)", file=sys.stderr)
    return exit_code(codes, all_engines=not missing)


if __name__ == "__main__":
    sys.exit(main())
