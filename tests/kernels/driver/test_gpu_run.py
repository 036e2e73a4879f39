"""`make test-gpu` where there is no GPU: what it would run, and that it says why it runs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.run import ENGINES, FOLDER, NO_DEVICE, NO_ENGINE, ROOT, TOOLS, commands, exit_code

# Asked in a process of its own: here the fake driver is loaded.
_ASK = [sys.executable, "-c", "import ctypes; ctypes.CDLL('libcuda.so.1')"]
without_a_driver = pytest.mark.skipif(
    subprocess.run(_ASK, capture_output=True).returncode == 0, reason="this machine has a CUDA driver"
)


@without_a_driver
def test_without_a_device_it_says_so_and_fails() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.gpu.run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == NO_DEVICE
    assert "no test was run" in done.stderr


def test_engines_run_in_their_own_environments_and_never_under_the_sanitizer() -> None:
    plain = commands({"vllm": "/v/python"}, ["-x"], "")
    assert [command[0] for command in plain] == [sys.executable, "/v/python"]
    assert all(command[-1] == "-x" for command in plain)
    watched = commands({"vllm": "/v/python", "sglang": "/s/python"}, [], "/cuda/compute-sanitizer")
    assert [command[2] for command in watched[: len(TOOLS)]] == list(TOOLS)
    assert [command[0] for command in watched[len(TOOLS) :]] == ["/v/python", "/s/python"]
    assert all(Path(FOLDER / "engines" / name).is_file() for name in ENGINES.values())


@pytest.mark.parametrize(
    ("codes", "all_engines", "code"),
    [([0, 0], True, 0), ([0, 0], False, NO_ENGINE), ([0, 1, 0], False, 1), ([0, -11], True, 11)],
)
def test_it_is_0_only_where_everything_ran_and_passed(codes: list[int], all_engines: bool, code: int) -> None:
    assert exit_code(codes, all_engines=all_engines) == code


@without_a_driver
def test_what_needs_a_device_is_skipped_and_says_why() -> None:
    """Collected all the same, so that it does not rot unseen."""
    command = [sys.executable, "-m", "pytest", "-q", str(FOLDER)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" not in done.stdout
    assert "no CUDA driver" in done.stdout
