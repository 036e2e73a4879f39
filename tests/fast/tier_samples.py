"""Directory tiers in a known mode, without timing the device in every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memkv_engines.errors import TransportError
from memkv_engines.limits import ALIGN_BYTES
from memkv_engines.tier import directory
from memkv_engines.transports.posix import ModeReport, PosixTransport
from tests.fast.samples import aligned


def mode_works(folder: Path, mode: str) -> bool:
    """Whether a file system takes a mode."""
    transport = PosixTransport(mode)
    path = folder / "try-mode"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | transport.open_flags)
    except OSError:
        return False
    try:
        transport.write(fd, [aligned(bytes(ALIGN_BYTES))], 0)
    except TransportError:
        return False
    finally:
        os.close(fd)
        path.unlink()
    return True


def fix_mode(monkeypatch: pytest.MonkeyPatch, folder: Path, mode: str) -> None:
    """Make directory tiers take a mode without probing; skips where the file system refuses it."""
    if not mode_works(folder, mode):
        pytest.skip(f"this file system does not take {mode} I/O")
    report = ModeReport(mode, f"{mode}, as the test wants", {}, {})
    monkeypatch.setattr(directory, "probe_modes", lambda *_: report)
