"""Runs the test gates, each inside its time budget.

    python tests/run_gates.py               # all gates
    python tests/run_gates.py --gate fast   # one gate; repeatable
    python tests/run_gates.py --list

Builds the environments and models that the gates need, which no budget covers. A gate that exceeds its budget is
ended with everything it started, and fails. So does a gate whose pytest ran no test. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "environments"))

# Found through the path set above, since this runs before anything is installed.
import build  # noqa: E402
import engine_env  # noqa: E402

REPORTS = ROOT / "build" / "gates"
GRACE_S = 10.0


@dataclass(frozen=True)
class Gate:
    """A set of checks with a time budget.

    Attributes:
        name: What `--gate` takes.
        proves: One line for `--list`.
        budget_s: Seconds after which the gate is ended.
        environment: The environment whose interpreter runs it.
        tests: The folder that pytest runs.
        tools: Arguments for the interpreter, one tuple per check that precedes pytest.
        models: Model kinds to build first.
        models_from: The module that builds them.
        settings: Variables added to the process environment.
    """

    name: str
    proves: str
    budget_s: float
    environment: str
    tests: str
    tools: tuple[tuple[str, ...], ...] = ()
    models: tuple[str, ...] = ()
    models_from: str = "tests.environments.models"
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What became of a gate; `failures` is empty when it passed."""

    gate: Gate
    seconds: float
    failures: tuple[str, ...]


GATES = (
    Gate(
        name="fast",
        proves="style, types, and the package without any engine",
        budget_s=420,
        environment="dev",
        tests="tests/fast",
        tools=(("-m", "ruff", "check", "."), ("-m", "ruff", "format", "--check", "."), ("-m", "mypy")),
    ),
    Gate(
        name="faults",
        proves="whatever goes wrong below the tier: right bytes or counted misses, in time (engines: their own gates)",
        budget_s=240,
        environment="dev",
        tests="tests/faults",
    ),
    Gate(
        name="vllm",
        proves="the package inside a real vLLM on a CPU",
        budget_s=1200,
        environment="vllm",
        tests="tests/engines/vllm",
        models=("all",),
        settings=engine_env.engine_settings(),
    ),
    Gate(
        name="sglang",
        proves="a real SGLang on a CPU, with its hierarchical cache",
        budget_s=1200,
        environment="sglang",
        tests="tests/engines/sglang",
        models=("all",),
        models_from="tests.environments.sglang_models",
        settings={**engine_env.engine_settings(), **engine_env.sglang_settings()},
    ),
    Gate(
        name="lmcache",
        proves="both doors into a real LMCache; vLLM on a CPU with LMCache's connector and server, restarted",
        budget_s=420,
        environment="lmcache",
        tests="tests/engines/lmcache",
        models=("tiny-llama",),
        settings=engine_env.engine_settings(),
    ),
    Gate(
        name="kernels",
        proves="the GPU path without a GPU: real PTX on the CPU, the mover on a fake driver, the real NIXL and kvikio",
        budget_s=480,
        environment="device",
        tests="tests/kernels",
    ),
    Gate(
        name="benchmarks",
        proves="the demo, the vLLM benchmarks and the comparison still run (tiny; they judge nothing)",
        budget_s=900,
        environment="vllm",
        tests="tests/engines/benchmarks",
        models=("all",),
        settings=engine_env.engine_settings(),
    ),
)


class Timeout(Exception):
    """A command did not end in the time it had."""


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a command and everything in its process group: politely first, then not."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        # Again for whatever outlived the command's own process.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(command: Sequence[str | Path], timeout_s: float | None = None, env: dict[str, str] | None = None) -> int:
    """Runs a command in a process group of its own and leaves nothing of that group behind.

    Returns:
        The command's exit code.

    Raises:
        Timeout: The command ran longer than `timeout_s`.
    """
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env=env, start_new_session=True)
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise Timeout from None
    finally:
        end_group(process)


def tests_run(report: Path) -> int:
    """Returns how many tests pytest ran, by its report; skipped ones do not count."""
    try:
        suites = list(ET.parse(report).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        return 0
    return sum(int(suite.get("tests", 0)) - int(suite.get("skipped", 0)) for suite in suites)


def commands_of(gate: Gate, report: Path) -> list[tuple[str, list[str | Path]]]:
    """Returns the gate's commands, each with a short name."""
    python = build.python_of(build.VENVS / gate.environment)
    commands: list[tuple[str, list[str | Path]]] = [(" ".join(tool[1:3]), [python, *tool]) for tool in gate.tools]
    # Hypothesis draws the same examples each time: a change is judged by what it changed. Run pytest itself to explore.
    pytest = ("-m", "pytest", gate.tests, f"--junitxml={report}", "--hypothesis-profile=ci")
    return [*commands, ("pytest", [python, *pytest])]


def run_gate(gate: Gate) -> Result:
    """Runs a gate's commands in order; one that fails does not stop the next, the budget's end does."""
    report = REPORTS / f"{gate.name}.xml"
    report.unlink(missing_ok=True)
    failures: list[str] = []
    started = time.monotonic()
    print(f"\n== gate {gate.name}: {gate.proves} (budget {gate.budget_s:.0f} s)", flush=True)
    for name, command in commands_of(gate, report):
        print(f"-- {name}", flush=True)
        left_s = gate.budget_s - (time.monotonic() - started)
        try:
            code = run(command, max(left_s, 0.0), {**os.environ, **gate.settings})
        except Timeout:
            failures.append(f"over budget in {name}")
            break
        if code != 0:
            failures.append(f"{name} ended with code {code}")
        elif name == "pytest" and tests_run(report) == 0:
            failures.append("pytest ran no test")
    return Result(gate, time.monotonic() - started, tuple(failures))


def set_up(gates: Sequence[Gate]) -> None:
    """Builds what the gates need.

    Raises:
        build.BuildError: Something could not be built.
    """
    started = time.monotonic()
    print("== setup: environments and models (not repeated while nothing changes)", flush=True)
    for name in dict.fromkeys(gate.environment for gate in gates):
        build.build(name)
    for gate in gates:
        python = build.python_of(build.VENVS / gate.environment)
        if gate.models and run([python, "-m", gate.models_from, *gate.models]) != 0:
            raise build.BuildError(f"the models {', '.join(gate.models)} could not be built")
    REPORTS.mkdir(parents=True, exist_ok=True)
    print(f"setup took {time.monotonic() - started:.1f} s", flush=True)


def print_table(results: Sequence[Result]) -> None:
    """Prints one line per gate, and the closing count."""
    print(f"\n{'gate':<8} {'seconds':>8} {'budget':>7}  result")
    for result in results:
        verdict = "; ".join(result.failures) or "passed"
        print(f"{result.gate.name:<8} {result.seconds:>8.1f} {result.gate.budget_s:>7.0f}  {verdict}")
    failed = sum(bool(result.failures) for result in results)
    print(f"\ngates: {len(results) - failed} passed, {failed} failed", flush=True)


def list_gates() -> None:
    """Prints the gates."""
    for gate in GATES:
        print(f"{gate.name:<8} {gate.budget_s:>5.0f} s  {gate.proves}")


def parse_arguments() -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [gate.name for gate in GATES]
    parser.add_argument("--gate", action="append", choices=names, help="run only this gate; repeatable")
    parser.add_argument("--list", action="store_true", help="show the gates and their budgets")
    return parser.parse_args()


def main() -> int:
    """Runs the chosen gates; returns 0 only when all passed."""
    # `make` and CI end this with SIGTERM: unwinding ends the running gate's processes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Otherwise every process would compile what it imports, every time: with an engine, that doubles a start.
    os.environ["PYTHONDONTWRITEBYTECODE"] = ""
    arguments = parse_arguments()
    if arguments.list:
        list_gates()
        return 0
    gates = [gate for gate in GATES if not arguments.gate or gate.name in arguments.gate]
    try:
        set_up(gates)
    except build.BuildError as error:
        print(error, file=sys.stderr)
        print("\nsetup failed, no gate was run\n\ngates: 0 passed, 1 failed", flush=True)
        return 1
    results = [run_gate(gate) for gate in gates]
    print_table(results)
    return 1 if any(result.failures for result in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
