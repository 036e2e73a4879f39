"""Engines forked by a preloader: really forked, none for a foreign environment, and none left when its owner dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.forking import SPAWNED
from tests.engines.prompts import tokens_of
from tests.engines.sglang.engines import (
    SHARED_MEMORY,
    env_of_engines,
    hicache,
    session_pids,
    shared_memory_of,
    wait_until,
)
from tests.engines.sglang.forked_engines import ForkedEngine, Refused, preloader
from tests.environments.engine_env import ROOT

OWNER = """
import os
import sys
from pathlib import Path
from tests.engines.sglang.engines import hicache
from tests.engines.sglang.forked_engines import ForkedEngine, preloader
folder = Path(sys.argv[1])
engine = ForkedEngine("tiny-sg-llama", log=folder / "engine.log", **hicache("file", file_storage_path=str(folder)))
print(preloader().process.pid, os.getsid(engine.pids()[0]), flush=True)
sys.stdin.read()
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_every_process_of_an_engine_is_forked(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    storage = hicache("file", file_storage_path=str(tmp_path))
    with ForkedEngine("tiny-sg-llama", log=log, **storage) as engine:
        assert engine.plain_because == ""
        assert SPAWNED not in log.read_text()
        assert len(engine.generate(tokens_of(5, 64)).tokens) == 12


def test_an_engine_with_variables_of_its_own_is_not_forked() -> None:
    with open(os.devnull, "wb") as nowhere, pytest.raises(Refused, match="SGLANG_USE_CPU_ENGINE"):
        preloader().fork(env_of_engines(SGLANG_USE_CPU_ENGINE="0"), nowhere)


def test_nothing_is_left_when_the_owner_of_the_preloader_is_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # What a killed owner cannot remove goes there.
        env={**os.environ, "TMPDIR": str(tmp_path)},
        cwd=ROOT,
    )
    assert owner.stdin is not None and owner.stdout is not None
    held: set[int] = set()
    try:
        with owner.stdin, owner.stdout:
            preloading, session = map(int, owner.stdout.readline().split())
            held = shared_memory_of(session_pids(session))
            assert is_running(preloading) and len(session_pids(session)) >= 3
            owner.kill()
            wait_until(lambda: not is_running(preloading), "the preloader has ended")
            wait_until(lambda: not session_pids(session), "every process of the engine has ended")
    finally:
        owner.kill()
        owner.wait()
        # Nobody is left to do it: SGLang leaves these behind, however it was started.
        for path in SHARED_MEMORY.iterdir():
            if path.stat().st_ino in held:
                path.unlink()
