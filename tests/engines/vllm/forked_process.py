"""An engine's process that is forked from one that has imported vLLM (`engine_runner.py`)."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence

START_TIMEOUT_S = 60.0


class ForkedProcess:
    """Not a child of this process, with the part of `subprocess.Popen` that `benchmarks.engine_run.Engine` uses.

    Args:
        parent: the socket of the process to fork from, which is ready.
        environment: of the new process.
        descriptors: of requests, answers and output.
    """

    def __init__(self, parent: str, environment: Mapping[str, str], descriptors: Sequence[int]) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(START_TIMEOUT_S)
        self._connection.connect(parent)
        order = json.dumps({"environment": dict(environment)}).encode() + b"\n"
        sent = socket.send_fds(self._connection, [order], descriptors)
        self._connection.sendall(order[sent:])
        with self._connection.makefile("r") as lines:
            self.pid: int = json.loads(lines.readline())["pid"]

    def wait(self, timeout: float | None = None) -> None:
        """Waits for its end.

        Raises:
            subprocess.TimeoutExpired: it has not ended in time.
        """
        end = select.poll()
        end.register(self._connection, select.POLLIN)
        if not end.poll(None if timeout is None else timeout * 1000):
            raise subprocess.TimeoutExpired("engine", timeout or 0.0)

    def __del__(self) -> None:
        self._connection.close()

    def terminate(self) -> None:
        """Asks it to end."""
        os.kill(self.pid, signal.SIGTERM)
