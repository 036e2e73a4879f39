"""The I/O processes of this process, and what may befall them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def io_processes() -> list[int]:
    """Process ids of the I/O services that run for this process."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            for child in (task / "children").read_text().split():
                if b"memkv_engines.offload.process" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """As if the device hung: processes that do not answer. Those that were ended meanwhile stay so."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
