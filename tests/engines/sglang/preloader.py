"""A process that has imported SGLang and forks engines from there; `forked_engines.py` starts it and asks it.

    python -m tests.engines.sglang.preloader SOCKET

SOCKET is the number of an inherited Unix socket. A request holds variables for an engine's environment, as JSON, and
three descriptors: its standard input, output and error. The answer is `{"pid": ...}`, with a descriptor of that process
beside it, or `{"refused": ...}` with the reason. This process ends when the other end of the socket is closed, and the
engines end with it.

An engine forked here runs the same code as one that `engine_process.py` starts, in a session of its own. The processes
that SGLang spawns are forked there too. They inherit what importing SGLang left in memory, and what the engine's own
process did before it started them; of that, the handler of SIGQUIT and the state of random generators are undone, since
a spawned process has neither. The sharing is fair to what the tests ask: models, pools, storage backends and
threads are made after the last fork. A process with more than one thread is never forked, because a lock that another
thread held would stay held for ever; then the process is spawned, or the engine started in the plain way.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import sys
import tempfile

from tests.engines import forking
from tests.engines.sglang import engine_process

LONGEST_REQUEST = 1 << 16


def preload() -> None:
    """Imports what the processes of an engine would, in the order in which they do."""
    import sglang.srt.entrypoints.engine
    from sglang.srt.plugins import load_plugins

    load_plugins()
    import sglang.srt.models.registry  # noqa: F401

    # What is here stays: a collection in an engine would only copy the memory that it shares with others.
    gc.collect()
    gc.freeze()


def is_engine(requests: socket.socket) -> bool:
    """Forks engines as asked for; returns True in each of them, and False here when nobody can ask any more."""
    # Nobody waits for engines here: they are asked after by descriptor.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, LONGEST_REQUEST, 3)
        if not request:
            return False
        threads = forking.thread_count()
        if threads > 1:
            requests.send(json.dumps({"refused": f"{threads} threads would not survive a fork"}).encode())
        else:
            pid = os.fork()
            if pid == 0:
                requests.close()
                become_engine(json.loads(request), descriptors)
                return True
            answer_with(requests, pid)
        for descriptor in descriptors:
            os.close(descriptor)


def answer_with(requests: socket.socket, pid: int) -> None:
    """Tells who was forked. It may have ended already, and is then reported as refused."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        requests.send(json.dumps({"refused": "it ended at once"}).encode())
        return
    socket.send_fds(requests, [json.dumps({"pid": pid}).encode()], [descriptor])
    os.close(descriptor)


def become_engine(variables: dict[str, str], descriptors: list[int]) -> None:
    """Makes this forked process what a new one would be."""
    os.setsid()
    for standard, descriptor in enumerate(descriptors):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(variables)
    tempfile.tempdir = None
    forking.forget_random_state()
    # SGLang sets its start method by force, so that is kept, and what it does is replaced.
    forking.fork_instead_of_spawning()


def main() -> None:
    """Preloads, and forks engines until the other end of the socket is closed."""
    ctypes.CDLL(None).prctl(engine_process.PR_SET_PDEATHSIG, signal.SIGKILL)
    # An interrupt in a terminal is for whoever started this, who then closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = socket.socket(fileno=int(sys.argv[1]))
    preload()
    if is_engine(requests):
        engine_process.main()


if __name__ == "__main__":
    main()
