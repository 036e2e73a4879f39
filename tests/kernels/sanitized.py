"""The suites over the .cu as C++ under AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.kernels.sanitized             # starts a process of its own that preloads the sanitizers
    python -m tests.kernels.sanitized library.so  # what that process runs

The checker of the routes sees every access to global memory; the sanitizers see the rest: the argument struct, plain
reads of tables, shifts and overflows in the arithmetic around them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.kernels import copy_suite, digest_suite
from tests.kernels.routes import ROOT, Route, build_host

DONE = "every check ran"


def preloads() -> str:
    """The sanitizers' libraries, for `LD_PRELOAD`: Python itself is not built with them."""
    names = ("libasan.so", "libubsan.so")
    ask = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True) for name in names]
    return ":".join(answer.stdout.strip() for answer in ask)


def run_process(library: Path, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Runs the suites over a sanitized library in a process of its own; its output says what a sanitizer found."""
    settings = {
        "LD_PRELOAD": preloads(),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # so that every buffer of Python lies between red zones
    }
    command = [sys.executable, "-m", "tests.kernels.sanitized", str(library)]
    environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, cwd=ROOT)


def run_suites(library: Path) -> None:
    """Runs every check; a sanitizer's finding ends the process."""
    route = Route("host-asan", library)
    for check in copy_suite.ORDINARY:
        check(copy_suite.Variant(route))
    for digest_check in digest_suite.CHECKS:
        digest_check(route)
    print(DONE)


def main() -> int:
    """Returns 0 when nothing was found."""
    if len(sys.argv) > 1:
        run_suites(Path(sys.argv[1]))
        return 0
    done = run_process(build_host(sanitize=True))
    print(done.stdout + done.stderr)
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
