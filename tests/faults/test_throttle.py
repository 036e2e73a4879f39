"""The throttle is as slow as it says, for all who read together, and ends when it is switched off."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.faults.control import Injector, throttle

READ_ALL = """
import os, sys, threading, time
paths = sys.argv[1:]
def read(path):
    fd = os.open(path, os.O_RDONLY)
    os.preadv(fd, [bytearray(os.fstat(fd).st_size)], 0)
threads = [threading.Thread(target=read, args=[path]) for path in paths]
started = time.monotonic()
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(time.monotonic() - started)
"""


def read(injector: Injector, paths: list[Path]) -> float:
    """Seconds in which a process reads files on a thread each."""
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, *map(str, paths)],
        env=injector.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return float(done.stdout)


def test_readers_share_one_bandwidth(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.kv" for number in range(4)]
    for path in paths:
        path.write_bytes(bytes(1_000_000))
    with Injector(tmp_path, service_only=False) as injector:
        injector.arm(throttle(10))
        assert 0.4 <= read(injector, paths)
        assert injector.disarm() == 4
        assert read(injector, paths) < 0.4


def test_who_waits_goes_on_when_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "0.kv"
    path.write_bytes(bytes(1_000_000))
    with Injector(tmp_path, service_only=False) as injector:
        injector.arm(throttle(0.01))
        timer = threading.Timer(1.5, injector.disarm)
        timer.start()
        started = time.monotonic()
        assert 0.5 < read(injector, [path]) < 50
        assert time.monotonic() - started < 50
        timer.join()
