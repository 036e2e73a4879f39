"""Where the I/O service runs: in a child process, or on threads of the engine."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from typing import Protocol

import msgspec

from memkv_engines.errors import IoServiceError
from memkv_engines.limits import SERVICE_REAP_TIMEOUT_S, SHUTDOWN_DRAIN_TIMEOUT_S
from memkv_engines.offload.channel import EngineEnd
from memkv_engines.offload.keeping import start_keepers
from memkv_engines.offload.messages import Ready, Reply, Request, Setup, Stop, decode_reply, encode
from memkv_engines.offload.pages import GatedPages, MappedPages
from memkv_engines.offload.process import open_tier
from memkv_engines.offload.service import IoService

_unreaped: list[subprocess.Popen[bytes]] = []


class Backend(Protocol):
    """Where the service runs."""

    name: str

    def send(self, message: Request) -> None:
        """Hand a message over without blocking."""

    def fence(self) -> None:
        """Gathers are about to be waited for. Does not block."""

    def receive(self) -> list[Reply]:
        """Replies that have arrived; raises ``IoServiceError`` when the service is gone."""

    def wait(self, timeout_s: float) -> None:
        """Block until a reply may have arrived or the time is up."""

    def kill(self) -> None:
        """End it now. On return it will never touch the engine's pages again."""

    def stop(self) -> None:
        """Let it finish what was gathered, bounded."""


class ProcessBackend:
    """The service in a child process."""

    name = "process"

    def __init__(self, setup: Setup) -> None:
        # The canary stays referenced for as long as the child may read it.
        self._canary = ctypes.create_string_buffer(os.urandom(16), 16)
        setup = msgspec.structs.replace(
            setup, engine_pid=os.getpid(), canary_address=ctypes.addressof(self._canary), canary=self._canary.raw
        )
        ours, theirs = socket.socketpair()
        env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path()}
        env["PYTHONSAFEPATH"] = "1"  # `-m` must not import what lies in the engine's working directory
        with theirs:
            try:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "memkv_engines.offload.process", str(theirs.fileno()), _death_signal()],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=env,
                )
            except BaseException:
                ours.close()
                raise
        self._end = EngineEnd(ours)
        try:
            self.send(setup)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    def send(self, message: Request) -> None:
        self._end.send(encode(message))

    def fence(self) -> None:
        pass  # It gathers as fast as it can.

    def receive(self) -> list[Reply]:
        return [decode_reply(data) for data in self._end.receive()]

    def wait(self, timeout_s: float) -> None:
        self._end.wait(timeout_s)

    def kill(self) -> None:
        self._child.kill()
        self._end.close()
        _reap(self._child)

    def stop(self) -> None:
        try:
            self.send(Stop())
            self._child.wait(SHUTDOWN_DRAIN_TIMEOUT_S + 1.0)
        except (IoServiceError, subprocess.TimeoutExpired):
            pass
        self.kill()


class ThreadBackend:
    """The service on threads of this process: where a child may not reach the engine's memory."""

    name = "thread"

    def __init__(self, setup: Setup) -> None:
        self._replies: deque[Reply] = deque()
        self._gate = GatedPages(MappedPages()) if setup.groups else None
        tier = open_tier(setup)
        self._service = IoService(setup, tier, self._gate, self._replies.append)
        self._service.start()
        self._keepers = [] if setup.read_only else start_keepers(tier)
        self._replies.append(Ready(tier.name, tier.mode_report.reason, memory=self._service.memory))

    def send(self, message: Request) -> None:
        self._service.submit(message)

    def fence(self) -> None:
        pass  # It gathers as fast as it can.

    def receive(self) -> list[Reply]:
        return [self._replies.popleft() for _ in range(len(self._replies))]

    def wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._replies and time.monotonic() < deadline:
            time.sleep(0.0005)

    def kill(self) -> None:
        for keeper in self._keepers:
            keeper.stop()
        if self._gate is not None:
            self._gate.close()

    def stop(self) -> None:
        self._service.stop(SHUTDOWN_DRAIN_TIMEOUT_S)
        self.kill()


def _reap(child: subprocess.Popen[bytes]) -> None:
    """Wait for a killed child, but not for ever: one that sits in a dead file system cannot be reaped yet.

    It never returns to user mode, and a copy into the engine's pages that was under way ends within milliseconds: what
    a hung read still delivers lands in the child's own staging.
    """
    _unreaped.append(child)
    deadline = time.monotonic() + SERVICE_REAP_TIMEOUT_S
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    still_dying()


def still_dying() -> int:
    """How many killed children have not ended yet: a device that hangs holds each, and it holds its staging memory."""
    _unreaped[:] = [c for c in _unreaped if c.poll() is None]
    return len(_unreaped)


def _death_signal() -> str:
    # The kernel ties the death signal to the thread that starts the child: only the main thread lives long enough.
    return "die-with-parent" if threading.current_thread() is threading.main_thread() else ""


def _python_path() -> str:
    # The child must import this very package, also where the engine found it through sys.path manipulation.
    package_parent = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return os.pathsep.join([package_parent, *filter(None, [os.environ.get("PYTHONPATH")])])
