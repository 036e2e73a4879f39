"""Engine processes for the vLLM tests: imports vLLM once, then forks a process for each scenario it is given.

    python -m tests.engines.vllm.engine_runner SOCKET

Importing vLLM costs more than most scenarios, and while it is done no thread runs, so a fork is as good as a fresh
start. Who connects to the socket sends one line of JSON (`timeout_s`, `log`, `steps`) and gets one back: what each step
with a `name` reported, or nothing if the process died. Steps, `{"do": NAME, ...}`, are played in order by the method of
`Player` of that name; the rest of a step are its arguments. This process ends when its standard input does.
"""

from __future__ import annotations

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
import traceback

from vllm.platforms import current_platform

from tests.engines.vllm.player import Player

_PR_SET_PDEATHSIG = 1


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


def _play_scenario(connection: socket.socket) -> None:
    """The forked process: read the scenario, play it, answer."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with connection.makefile("r") as lines:
        scenario = json.loads(lines.readline())
    log = os.open(scenario["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.dump_traceback_later(scenario["timeout_s"], exit=True)
    reports = Player().play(scenario["steps"])
    connection.sendall(json.dumps(reports).encode() + b"\n")


def _fork(connection: socket.socket, listener: socket.socket) -> None:
    sys.stdout.flush()
    if os.fork():
        connection.close()
        return
    listener.close()
    code = 1
    try:
        _play_scenario(connection)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(path: str) -> None:
    """Fork a process for every connection until standard input ends."""
    _prepare()
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
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
