"""Lists every line of `memkv_engines/gpu/` that the tests on the fake driver do not execute.

    python -m tests.kernels.driver.unexecuted

Lines that stand here with a reason are listed with it; any other makes the exit code 1. Needs `coverage`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import coverage
import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "memkv_engines" / "gpu"
TESTS = ("tests/kernels/driver", "tests/fast/test_gpu_pure.py")

# File, text of the line, reason.
NO_DRIVER = "needs a process without any libcuda: test_no_driver runs it in a child"
EXPLAINED = {
    ("driver.py", "except RuntimeError as error:"): NO_DRIVER,
    ("driver.py", 'raise GpuUnavailable(f"no CUDA driver: {error}") from error'): NO_DRIVER,
}


def main() -> int:
    """Runs the tests; returns 1 if one fails or an unexplained line was not executed."""
    watch = coverage.Coverage(source=[str(PACKAGE)], data_file=None)
    watch.start()
    code = pytest.main(["-q", *(str(ROOT / tests) for tests in TESTS)])
    watch.stop()
    missing = executed = 0
    print(f"\nlines of {PACKAGE.relative_to(ROOT)} that were not executed:")
    for path in sorted(PACKAGE.glob("*.py")):
        _, statements, _, lines, _ = watch.analysis2(str(path))
        executed += len(statements) - len(lines)
        text = path.read_text().splitlines()
        for line in lines:
            reason = EXPLAINED.get((path.name, text[line - 1].strip()))
            missing += reason is None
            print(f"  {path.name}:{line}: {text[line - 1].strip()}    # {reason or 'NOT EXPLAINED'}")
    print(f"{executed} lines executed, {missing} not executed and not explained")
    return 1 if code or missing else 0


if __name__ == "__main__":
    sys.exit(main())
