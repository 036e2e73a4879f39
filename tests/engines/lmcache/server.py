"""LMCache's server as users start it, with our adapter as its second level."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.environments.engine_env import ROOT, engine_env

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
CHUNK_TOKENS = 256


def free_ports(count: int) -> list[int]:
    """Returns ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Server:
    """A running server.

    Args:
        log: where its output goes.
        parameters: our keys.
    """

    def __init__(self, log: Path, parameters: dict[str, Any]) -> None:
        self.log = log
        self.port, self._http_port, metrics_port = free_ports(3)
        adapter = {
            "type": "plugin",
            "module_path": "memkv_engines.lmcache.l2_adapter",
            "class_name": "MemKVL2Adapter",
            "adapter_params": parameters,
        }
        arguments = {
            "host": "localhost",
            "port": self.port,
            "http-port": self._http_port,
            "prometheus-port": metrics_port,
            "chunk-size": CHUNK_TOKENS,
            "l1-size-gb": 0.25,
            "eviction-policy": "LRU",
            # An engine on a CPU copies its blocks itself, which the server's default does not offer.
            "supported-transfer-mode": "auto",
            "l2-adapter": json.dumps(adapter),
        }
        words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lmcache.cli.main", "server", *words],
                stdout=out,
                stderr=out,
                cwd=ROOT,
                env=engine_env(LMCACHE_TRACK_USAGE="false", LMCACHE_DISABLE_BANNER="1"),
                start_new_session=True,
            )

    def await_start(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError):
                self.get("/healthcheck")
                return
            assert self._process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.1)

    def get(self, path: str) -> bytes:
        """What its HTTP front answers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._http_port}{path}", timeout=10) as answer:
            return bytes(answer.read())

    def counters(self) -> dict[str, int]:
        """What our adapter counted, as LMCache's status page shows it."""
        found = _find_counters(json.loads(self.get("/status")))
        assert found is not None, self.get("/status")
        return found

    def await_counter(self, name: str, value: int, timeout_s: float = 30.0) -> dict[str, int]:
        """Wait until something was counted so often; returns all counters."""
        deadline = time.monotonic() + timeout_s
        while (counters := self.counters()).get(name, 0) < value:
            assert time.monotonic() < deadline, (counters, self.log.read_text()[-4000:])
            time.sleep(0.1)
        return counters

    def connector(self) -> dict[str, Any]:
        """Extra config of LMCache's connector."""
        return {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": self.port, "lmcache.mp.mq_timeout": 60}

    def stop(self) -> int:
        """End it as a service manager does; returns its exit code."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        try:
            return self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server does not stop:\n{self.log.read_text()[-4000:]}") from None

    def kill(self) -> None:
        """End it, and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def server(log: Path, parameters: dict[str, Any]) -> Iterator[Server]:
    """A server that runs, and is stopped in order at the end."""
    one = Server(log, parameters)
    try:
        one.await_start()
        yield one
        assert one.stop() in (0, 130, -signal.SIGINT), log.read_text()[-4000:]
    finally:
        one.kill()


def _find_counters(status: Any) -> dict[str, int] | None:
    if isinstance(status, dict):
        if status.get("type") == "MemKVL2Adapter":
            return dict(status["counters"])
        status = list(status.values())
    if isinstance(status, list):
        return next((found for one in status if (found := _find_counters(one)) is not None), None)
    return None
