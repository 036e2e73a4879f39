"""Writers that die in the middle of it: ``python -m tests.fast.dying_writer ROOT steps|times SEED COUNT``.

Forks one writer for each moment from a process without threads, and prints how each ended, as JSON. With ``steps`` the
n-th writer kills itself (SIGKILL) before its n-th system call, and once in the middle of it where it writes; with
``times`` it is killed after a time drawn at random.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from memkv_engines.tier import directory
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.policy import NamespacePolicy, Quotas, save_policy, save_quotas
from memkv_engines.transports.posix import BUFFERED, ModeReport
from tests.fast.cli_tier_samples import CHUNK_BYTES, ONE, chunk
from tests.fast.samples import aligned

CAPACITY_BYTES = 1000 * CHUNK_BYTES
CALLS = ("open", "rename", "unlink", "mkdir", "pwritev", "pwrite", "pread", "stat", "fstat", "close", "utime")


def write(root: str, round_: int) -> None:
    """Everything a replica writes: manifest, policy, quotas, a new chunk, and one that replaces another."""
    with mock.patch.object(directory, "probe_modes", lambda *_: ModeReport(BUFFERED, "not probed", {}, {})):
        tier = DirectoryTier(root, capacity_bytes=CAPACITY_BYTES)
    tier.write_manifest(ONE)
    fd = os.open(root, os.O_RDONLY)
    save_policy(fd, ONE.folder, NamespacePolicy(priority=round_ % 7))
    save_quotas(fd, Quotas({"t": CAPACITY_BYTES}))
    for prompt, replace in ((f"new {round_}", False), ("again", True)):
        name, data = chunk(ONE, prompt)
        tier.put(ONE.folder, name, [aligned(data)], replace=replace)
        tier.open(ONE.folder, name).close()
    if round_ % 3 == 0:
        tier.remove(ONE.folder, chunk(ONE, f"new {round_}")[0])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def counted(steps: int, half: bool) -> None:
    """From now on this process dies at its n-th call, in the middle of it if that is a write."""
    left = [steps]

    def wrap(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if half and name == "pwritev":
                    real(arguments[0], [arguments[1][0][: arguments[1][0].nbytes // 2]], *arguments[2:])
                elif half and name == "pwrite":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
                die()
            return real(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name), name))
    fcntl.flock = wrap(fcntl.flock, "flock")


def fork(work: Callable[[], None], kill_after_s: float | None = None) -> int:
    """Run something in a child; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main() -> None:
    """Kill writers, at every step or at random times."""
    root, how, seed, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    choice = random.Random(seed)
    chunk(ONE, "warm up")
    ends = []
    for moment in range(count):

        def work(moment: int = moment) -> None:
            if how == "steps":
                counted(moment // 2 + 1, half=moment % 2 == 1)
                write(root, moment)
                return
            for round_ in range(100):
                write(root, 1000 * moment + round_)

        ends.append(fork(work, None if how == "steps" else choice.uniform(0.0, 0.02)))
        if how == "steps" and ends[-2:] == [0, 0]:
            break
    print(json.dumps({"ends": ends, "files": len(list(Path(root).rglob("*.kv")))}))


if __name__ == "__main__":
    main()
