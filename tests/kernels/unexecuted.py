"""Lists every line of the GPU path's modules that their tests do not execute, area by area.

    python -m tests.kernels.unexecuted [gpu | transports | offload]

Lines that stand here with a reason are listed with it; any other makes the exit code 1, and so does a reason whose line
is executed or gone. Needs `coverage`. Tests run `gpu` and `transports` (`test_unexecuted.py`); `offload`
takes a minute or two and is run by hand.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import coverage
import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "memkv_engines"

NO_DRIVER = "needs a process without any libcuda: test_no_driver runs it in a child"
NO_LIBRARY = "needs an environment without the library: tests/fast runs it in the environment dev"
CHILD = "beside the fake driver such plugins hang or crash: refusal_of and vendor_suite show it in other processes"


@dataclass(frozen=True)
class Area:
    """Modules, the tests that answer for them, and the lines that are left out.

    Attributes:
        modules: patterns below the package.
        tests: files that pytest runs.
        explained: lines that are left out: file, function and text, with the reason.
        unexplained_max: others that may be left out; to be lowered, never raised.
    """

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    explained: dict[tuple[str, str, str], str]
    unexplained_max: int = 0


AREAS = {
    "gpu": Area(
        ("gpu/*.py",),
        (
            "tests/kernels/driver/test_faults.py",
            "tests/kernels/driver/test_life.py",
            "tests/kernels/driver/test_mover_bytes.py",
            "tests/kernels/driver/test_refusals.py",
            "tests/fast/test_gpu_pure.py",
        ),
        {
            ("driver.py", "__init__", "except RuntimeError as error:"): NO_DRIVER,
            ("driver.py", "__init__", 'raise GpuUnavailable(f"no CUDA driver: {error}") from error'): NO_DRIVER,
        },
    ),
    "transports": Area(
        ("transports/gds.py", "transports/nixl.py"),
        (
            "tests/kernels/transports/test_gds.py",
            "tests/kernels/transports/test_gds_refusals.py",
            "tests/kernels/transports/test_nixl.py",
        ),
        {
            ("gds.py", "installed_version", "except metadata.PackageNotFoundError:"): NO_LIBRARY,
            ("gds.py", "installed_version", "continue"): NO_LIBRARY,
            ("gds.py", "installed_version", 'return ""'): NO_LIBRARY,
            (
                "gds.py",
                "what_gpudirect_lacks",
                'lacks.append("the package kvikio-cu13 or kvikio-cu12")',
            ): NO_LIBRARY,
            ("gds.py", "_load", "except ImportError as error:"): NO_LIBRARY,
            ("gds.py", "_load", "raise ConfigError("): NO_LIBRARY,
            ("nixl.py", "_start", "raise ConfigError("): CHILD,
            ("nixl.py", "_load", "except ImportError as error:"): NO_LIBRARY,
            (
                "nixl.py",
                "_load",
                'raise ConfigError(f"transport=nixl: NIXL cannot be imported: {error}. '
                'Set transport=posix") from error',
            ): NO_LIBRARY,
        },
    ),
    "offload": Area(
        ("offload/direct_*.py", "offload/device_*.py", "offload/pinned.py", "offload/moving.py"),
        (
            "tests/fast/test_device_client.py",
            "tests/fast/test_direct_client.py",
            "tests/fast/test_direct_sleep.py",
            "tests/fast/test_gpu_door.py",
            "tests/fast/test_io_service.py",
            "tests/fast/test_stopped_loads.py",
            "tests/kernels/transports/test_direct.py",
        ),
        {},
        # A bound and no proof: what engines alone do is not run here, and a few lines depend on who is late.
        unexplained_max=66,
    ),
}


def functions_of(source: str) -> dict[int, str]:
    """The innermost function of every line that is in one."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    # Outer ones first: `ast.walk` goes from the outside in.
    return {line: n.name for n in functions for line in range(n.lineno, (n.end_lineno or n.lineno) + 1)}


def measure(area: Area) -> tuple[int, list[str]]:
    """Runs an area's tests.

    Returns:
        The exit code of pytest, and what is wrong: unexplained lines, and explanations without a line.
    """
    modules = [path for pattern in area.modules for path in sorted(PACKAGE.glob(pattern))]
    watch = coverage.Coverage(include=list(map(str, modules)), data_file=None)
    watch.start()
    code = int(pytest.main(["-q", *(str(ROOT / tests) for tests in area.tests)]))
    watch.stop()
    problems, unused, executed, unexplained = list[str](), set(area.explained), 0, 0
    print("\nlines that were not executed:")
    for path in modules:
        _, statements, _, lines, _ = watch.analysis2(str(path))
        executed += len(statements) - len(lines)
        source = path.read_text()
        text, functions = source.splitlines(), functions_of(source)
        for line in lines:
            words = text[line - 1].strip()
            key = (path.name, functions.get(line, ""), words)
            unused.discard(key)
            reason = area.explained.get(key)
            print(f"  {path.name}:{line}: {words}    # {reason or 'NOT EXPLAINED'}")
            if reason is None:
                unexplained += 1
                problems.append(f"{path.name}:{line}: not executed: {words}")
    if unexplained <= area.unexplained_max:
        problems = []
    problems += [f"{name}, {where}: explained, but executed or gone: {words}" for name, where, words in sorted(unused)]
    print(f"{executed} lines executed")
    return code, problems


def main(arguments: Sequence[str]) -> int:
    """Runs the tests of the areas; returns 1 if one fails or the list is not right."""
    # As the transports' conftest does, before anything is imported.
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
    failed = False
    for name in arguments or AREAS:
        code, problems = measure(AREAS[name])
        print("\n".join([f"{name}: {len(problems)} problems", *problems]))
        failed |= bool(code or problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
