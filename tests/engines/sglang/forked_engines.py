"""Engines for tests that start in seconds, since importing SGLang is paid once: `ForkedEngine` in place of `Engine`.

A preloader (`preloader.py`) starts with the first of them and ends with this process.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import IO

from tests.engines.forking import ForkedProcess
from tests.engines.sglang.engines import END_TIMEOUT_S, START_TIMEOUT_S, Engine, Started, env_of_engines
from tests.environments.engine_env import ROOT

LOG = ROOT / "build" / "logs" / "sglang-preloader.log"
# Read after the import; an engine with any other variable of its own starts in the plain way.
READ_LATE = (
    "TMPDIR",
    "SGLANG_CPU_OMP_THREADS_BIND",
    "MEMKV_RESTORE_TIMERS",
    # For the processes it starts itself: those of the fault suite.
    "LD_PRELOAD",
    "MEMKV_FAULTS_CONTROL",
    "PYTHONPATH",
)


class Refused(Exception):
    """The preloader cannot fork this engine."""


class PipedProcess(ForkedProcess):
    """A forked process that is spoken to through pipes."""

    def __init__(self, pid: int, descriptor: int, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        super().__init__(pid, descriptor)
        self.stdin: IO[bytes] | None = stdin
        self.stdout: IO[bytes] | None = stdout


class Preloader:
    """A process that has imported SGLang, in one environment."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = settled(env)
        # What SGLang locks while it loads a model lies in the temporary folder that it found when it was imported.
        self._folder = tempfile.mkdtemp(prefix="memkv-sg-preloader-")
        LOG.parent.mkdir(parents=True, exist_ok=True)
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._requests.settimeout(START_TIMEOUT_S)
        with theirs, LOG.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.engines.sglang.preloader", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self._env, "TMPDIR": self._folder},
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
            )

    def fork(self, env: Mapping[str, str], output: IO[bytes]) -> PipedProcess:
        """Returns a new engine's process.

        Raises:
            Refused: Its environment differs in what is read at import, or the preloader cannot fork.
        """
        differing = {name for name, _ in settled(env).items() ^ self._env.items()}
        if differing:
            raise Refused(f"other variables than the preloader's: {', '.join(sorted(differing))}")
        stdin, to_engine = os.pipe()
        from_engine, stdout = os.pipe()
        try:
            pid, descriptor = self._ask(late_of(env), [stdin, stdout, output.fileno()])
        except BaseException:
            os.close(to_engine)
            os.close(from_engine)
            raise
        finally:
            os.close(stdin)
            os.close(stdout)
        return PipedProcess(pid, descriptor, os.fdopen(to_engine, "wb"), os.fdopen(from_engine, "rb"))

    def end(self) -> None:
        """Ends it, and with it every engine that is left."""
        self._requests.close()
        try:
            self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ask(self, variables: Mapping[str, str], descriptors: list[int]) -> tuple[int, int]:
        """Returns the new process and a descriptor of it."""
        try:
            socket.send_fds(self._requests, [json.dumps(variables).encode()], descriptors)
            answer, received, _, _ = socket.recv_fds(self._requests, 1 << 12, 1)
        except OSError as error:
            raise AssertionError(f"the preloader does not answer ({error}): see {LOG.relative_to(ROOT)}") from error
        assert answer, f"the preloader has ended: see {LOG.relative_to(ROOT)}"
        told = json.loads(answer)
        if "refused" in told:
            raise Refused(told["refused"])
        return told["pid"], received[0]


def settled(env: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that are settled once SGLang is imported."""
    return {name: value for name, value in env.items() if name not in READ_LATE}


def late_of(env: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that an engine can have for itself."""
    return {name: env[name] for name in READ_LATE if name in env}


@functools.cache
def preloader() -> Preloader:
    """Returns this process's only preloader, which ends with the thread that asks first: ask on the main thread."""
    made = Preloader(env_of_engines())
    atexit.register(made.end)
    return made


class ForkedEngine(Engine):
    """An engine forked from a process that has imported SGLang already; otherwise like `Engine`.

    Its processes are forked where a user's are spawned, and so share what importing SGLang left in memory. All that an
    engine does after that is done in each anew, by the same code. One that asks for other variables (`env`) is started
    in the plain way.

    Attributes:
        plain_because: Why it was started in the plain way after all, or nothing.
    """

    plain_because = ""

    def _start(self, env: Mapping[str, str], output: IO[bytes]) -> Started:
        try:
            return preloader().fork(env, output)
        except Refused as error:
            self.plain_because = str(error)
            return super()._start(env, output)
