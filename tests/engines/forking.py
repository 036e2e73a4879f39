"""Forks where an engine spawns: its processes then share what importing the engine left in memory, and start at once.

A process with more than one thread is spawned after all, because a lock that another thread held would stay held for
ever, unless its engine forks in that state by itself.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
from multiprocessing import context, popen_fork, popen_spawn_posix, process, resource_tracker
from pathlib import Path

SPAWNED = "spawned, not forked"


class ForkedProcess:
    """A process that is not a child of this one, with the part of `subprocess.Popen` that engines are ended with.

    Args:
        pid: its number.
        descriptor: a descriptor of it (`os.pidfd_open`), which becomes this object's.
    """

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        self._descriptor: int | None = descriptor

    def wait(self, timeout: float | None = None) -> None:
        """Waits for its end.

        Raises:
            subprocess.TimeoutExpired: It has not ended in time.
        """
        if self._descriptor is None:
            return
        end = select.poll()
        end.register(self._descriptor, select.POLLIN)
        if not end.poll(None if timeout is None else timeout * 1000):
            raise subprocess.TimeoutExpired("engine", timeout or 0.0)
        os.close(self._descriptor)
        self._descriptor = None

    def terminate(self) -> None:
        """Asks it to end."""
        if self._descriptor is not None:
            signal.pidfd_send_signal(self._descriptor, signal.SIGTERM)


def fork_instead_of_spawning(*, with_threads: bool = False) -> None:
    """From now on a spawned process of `multiprocessing` is a forked one, in this process and in those it forks.

    Args:
        with_threads: also where this process has several threads.
    """
    way = FreshFork if with_threads else _forked_or_spawned
    context.SpawnProcess._Popen = staticmethod(way)  # type: ignore[assignment,method-assign]


def thread_count() -> int:
    """Returns how many threads this process has, those without Python included."""
    return len(list(Path("/proc/self/task").iterdir()))


def _forked_or_spawned(child: process.BaseProcess) -> popen_fork.Popen:
    threads = thread_count()
    if threads > 1:
        print(f"{child.name} is {SPAWNED}: {threads} threads", file=sys.stderr, flush=True)
        return popen_spawn_posix.Popen(child)
    # A spawned process gets the resource tracker of the one that spawns it; a forked one would start its own.
    resource_tracker.ensure_running()
    return FreshFork(child)


class FreshFork(popen_fork.Popen):
    """A forked process without what a spawned one does not inherit."""

    def _launch(self, process_obj: process.BaseProcess) -> None:
        run = process_obj.run

        def run_fresh() -> None:
            signal.signal(signal.SIGQUIT, signal.SIG_DFL)
            forget_random_state()
            run()

        process_obj.run = run_fresh  # type: ignore[method-assign]
        super()._launch(process_obj)


def forget_random_state() -> None:
    """Seeds generators anew, which would give each forked process the same numbers, such as its ports."""
    import numpy as np

    random.seed()
    np.random.seed()
