"""LMCache's server in a process of its own: `lmcache server`, with a second level on disk."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.compare.side import SideFailed
from benchmarks.engine_run import tail_of
from tests.environments.engine_env import ROOT, engine_env

HOST = "127.0.0.1"
START_TIMEOUT_S = 240.0
CALL_TIMEOUT_S = 30.0
END_TIMEOUT_S = 20.0
POLL_S = 0.2
# It must not outlive whoever started it.
_START = (
    "import ctypes, runpy; ctypes.CDLL(None).prctl(1, 15); runpy.run_module('lmcache.cli.main', run_name='__main__')"
)


class LMCacheServer:
    """Starts at construction; `wait_until_ready` before the engine is started, which talks to it at its start.

    Args:
        python: The interpreter of an environment with LMCache.
        adapter: The second level: the value of `--l2-adapter`.
        l1_bytes: Memory of the first level.
        log: Where its output goes; overwritten.
        environment: Further variables of the process.
    """

    def __init__(
        self,
        python: Path,
        adapter: Mapping[str, Any],
        l1_bytes: int,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port, self._http_port = free_ports(2)
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [
            str(python), "-c", _START, "server", "--host", "localhost", "--port", str(self.port),
            "--http-port", str(self._http_port), "--l1-size-gb", str(l1_bytes / 2**30), "--eviction-policy", "LRU",
            "--l2-adapter", json.dumps(adapter), "--disable-metrics",
        ]  # fmt: skip
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        variables = {
            "PYTHONHASHSEED": "0",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": paths,
            "LMCACHE_TRACK_USAGE": "false",
            "LMCACHE_DISABLE_BANNER": "1",
            **(environment or {}),
        }
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=engine_env(None, **variables),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process, in a session of its own."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Waits until it answers.

        Raises:
            SideFailed: It did not within `START_TIMEOUT_S`, or has ended.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError, urllib.error.URLError):
                self._call("/healthcheck")
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SideFailed(f"LMCache's server did not start\n{tail_of(self._log)}")
            time.sleep(POLL_S)

    def forget(self) -> None:
        """Empties its first level.

        Raises:
            SideFailed: It refused.
        """
        try:
            self._call("/cache/clear", {"tier": "l1"})
        except (OSError, urllib.error.URLError) as error:
            raise SideFailed(f"LMCache's server did not empty its memory: {error}") from error

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> None:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://{HOST}:{self._http_port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=CALL_TIMEOUT_S) as answer:
            answer.read()


def free_ports(count: int) -> list[int]:
    """Returns ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]
