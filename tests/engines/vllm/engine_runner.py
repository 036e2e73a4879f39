"""Engine processes for the vLLM tests: imports vLLM once, then forks a process for each that is asked for.

    python -m tests.engines.vllm.engine_runner SOCKET

Importing vLLM costs more than most scenarios, and while it is done no thread runs, so a fork is as good as a fresh
start. Who connects to the socket sends one line of JSON:

* `{"timeout_s", "log", "steps"}`, a scenario, and gets a line back: what each step with a `name` reported, or nothing
  if the process died. Steps, `{"do": NAME, ...}`, are played in order by the method of `Player` of that name; the rest
  of a step are its arguments.
* `{"environment"}` with three descriptors, an engine of `benchmarks/engine_run.py` that serves the first two and prints
  to the third, and gets its `pid` with a descriptor of the process.

This process ends when its standard input does.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import tempfile
import traceback
from typing import Any

from vllm.platforms import current_platform

from benchmarks import engine_run
from tests.engines import forking
from tests.engines.vllm.player import Player

_PR_SET_PDEATHSIG = 1
ENGINE_DESCRIPTORS = 3


def _prepare() -> None:
    """Do once what every engine would do again, and would do slowly."""
    for module in (
        "vllm.model_executor.models.gemma3",
        "vllm.model_executor.models.llama",
        "vllm.v1.worker.cpu_worker",
        "memkv_engines.vllm.connector",
    ):
        importlib.import_module(module)
    platform = type(current_platform)
    platform.register_triton_kernel_overrides()
    platform.register_triton_kernel_overrides = classmethod(lambda cls: None)
    # Engines collect garbage as they come and go: half a second each time, for nothing that a test would miss.
    gc.freeze()
    gc.collect = lambda *_: 0
    gc.unfreeze = lambda: None


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The order and the descriptors that came with it."""
    line, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, ENGINE_DESCRIPTORS)
    if not line:
        sys.exit()  # Somebody wanted to know whether this process is ready.
    while not line.endswith(b"\n"):
        more = connection.recv(1 << 20)
        assert more, "the order is incomplete"
        line += more
    return json.loads(line), descriptors


def _print_to(log: int) -> None:
    for stream in (1, 2):
        os.dup2(log, stream)


def _play_scenario(scenario: dict[str, Any], connection: socket.socket) -> None:
    """The forked process: play the scenario, answer."""
    _print_to(os.open(scenario["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    faulthandler.dump_traceback_later(scenario["timeout_s"], exit=True)
    reports = Player().play(scenario["steps"])
    connection.sendall(json.dumps(reports).encode() + b"\n")


def _run_engine(environment: dict[str, str], descriptors: list[int], connection: socket.socket) -> None:
    """The forked process: be what `python -m benchmarks.engine_run` would be."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    forking.forget_random_state()
    # vLLM spawns on a CPU; where there is a GPU it forks, and has the same threads then.
    forking.fork_instead_of_spawning(with_threads=True)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    requests, answers, log = descriptors
    _print_to(log)
    os.close(log)
    own = os.pidfd_open(os.getpid())
    socket.send_fds(connection, [json.dumps({"pid": os.getpid()}).encode()], [own])
    os.close(own)
    connection.close()
    engine_run.serve(requests, answers)


def _become(connection: socket.socket) -> None:
    """The forked process: do what is asked for, and end."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    order, descriptors = _receive(connection)
    if "environment" in order:
        try:
            _run_engine(order["environment"], descriptors, connection)
        finally:
            # As a process of its own would end, so that the engine's children are ended too.
            atexit._run_exitfuncs()
    else:
        _play_scenario(order, connection)


def _fork(connection: socket.socket, listener: socket.socket) -> None:
    sys.stdout.flush()
    if os.fork():
        connection.close()
        return
    listener.close()
    code = 1
    try:
        _become(connection)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(path: str) -> None:
    """Fork a process for every connection until standard input ends."""
    _prepare()
    assert forking.thread_count() == 1, "threads do not survive a fork"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [], 1.0)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if sys.stdin in ready:
                return
            if listener in ready:
                _fork(listener.accept()[0], listener)


if __name__ == "__main__":
    main(sys.argv[1])
