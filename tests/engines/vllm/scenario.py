"""Builds scenarios for `engine_runner.py` and plays them, each in an engine process of its own."""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.environments.engine_env import ROOT, engine_env
from tests.environments.models import ensure_model

TIMEOUT_S = 200
# For scenarios of minutes, on a machine that is busy with others.
LONG_TIMEOUT_S = 900
IMPORT_TIMEOUT_S = 600
_FIRST = threading.Lock()
AT_ONCE = 2
MIB = 1 << 20
MAX_TOKENS = 12
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Two engines at a time would otherwise be bound to the same core.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

Step = dict[str, Any]
Reports = dict[str, dict[str, Any]]


# ------------------------------------------------------------------------------------------------------------ steps


def model(kind: str) -> str:
    """Returns the folder of a small model."""
    return str(ensure_model(kind))


def start(kind: str, tier: Path | None = None, *, engine: dict[str, Any] | None = None, **extra: Any) -> Step:
    """A step that starts an engine, with the connector if a tier's directory is given.

    Args:
        kind: a small model's name.
        tier: the tier's directory.
        engine: arguments for the engine.
        **extra: extra config of the connector.
    """
    # A look-up that is late on a busy machine would be an honest miss, and a small model often recomputes faster than
    # such a machine loads: neither is what these tests are about (`test_cost_gate.py` is about the latter).
    patient = {"chunk_target_bytes": 2 * MIB, "probe_timeout_ms": 20_000, "cost_gate": "off"}
    connector = {"path": str(tier), **patient, **extra} if tier else None
    return {"do": "start", "model": model(kind), "connector": connector, "engine": engine or {}}


def ask(name: str, prompts: list[list[int]], **more: Any) -> Step:
    """A step that answers prompts."""
    return {"do": "generate", "name": name, "prompts": prompts, "max_tokens": MAX_TOKENS, **more}


def settle(name: str | None = None) -> Step:
    """A step that waits until what was stored is in the tier."""
    return {"do": "settle", "name": name}


def reset() -> Step:
    """A step after which only the tier can answer what has been asked before."""
    return {"do": "reset"}


def misses(report: dict[str, Any]) -> dict[str, int]:
    """What went wrong with loads, by counter."""
    return {name: n for name, n in report["counted"].items() if name.startswith(("miss_", "boundary_"))}


# ---------------------------------------------------------------------------------------------------------- playing


class Engines:
    """The process that engine processes are forked from; ends with this one."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="memkv-engines-"))
        atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        self._path = str(self._folder / "socket")
        self._log = self._folder / "parent.log"
        self._serial = 0
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.engines.vllm.engine_runner", self._path],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=engine_env(**SETTINGS),
                cwd=ROOT,
            )

    def _connect(self) -> socket.socket:
        deadline = time.monotonic() + IMPORT_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(self._path)
                return connection
            except OSError:
                connection.close()
                time.sleep(0.1)
        raise AssertionError(f"vLLM was not imported in {IMPORT_TIMEOUT_S} s:\n{self._log.read_text()[-4000:]}")

    def forks(self) -> str:
        """The socket that engines are asked for at; blocks until vLLM is imported."""
        self._connect().close()
        return self._path

    def play(self, steps: Sequence[Step], timeout_s: int = TIMEOUT_S) -> Reports:
        """Plays a scenario in a process of its own, which ends after `timeout_s` in any case."""
        self._serial += 1
        log = self._folder / f"{self._serial}-{random.getrandbits(32)}.log"
        order = {"timeout_s": timeout_s, "log": str(log), "steps": steps}
        with self._connect() as connection, connection.makefile("r") as lines:
            connection.sendall(json.dumps(order).encode() + b"\n")
            answer = lines.readline()
        if os.environ.get("PRINT_STEPS"):
            print("\n".join(line for line in log.read_text().splitlines() if " s  " in line), file=sys.stderr)
        assert answer, f"the engine process died:\n{log.read_text()[-8000:]}"
        reports: Reports = json.loads(answer)
        return reports


def engines() -> Engines:
    """The process that engine processes are forked from."""
    # `cache` alone lets two threads that ask first both start one.
    with _FIRST:
        return _engines()


@functools.cache
def _engines() -> Engines:
    return Engines()


def play(*steps: Step, timeout_s: int = TIMEOUT_S) -> Reports:
    """Plays one scenario in an engine process of its own and returns the named steps' reports."""
    return engines().play(steps, timeout_s)


def play_all(*scenarios: Sequence[Step]) -> list[Reports]:
    """Plays several scenarios, at most two at a time."""
    engines()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda steps: play(*steps), scenarios))
