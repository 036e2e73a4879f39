"""The client keeps its promises while its service dies, hangs or never starts: one answer a job, no late write."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from memkv_engines.errors import ConfigError, IoServiceError
from memkv_engines.limits import MIB
from memkv_engines.offload import backends, client
from memkv_engines.offload.backends import ProcessBackend
from memkv_engines.offload.channel import EngineEnd
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.pages import GatedPages, Iovecs, MappedPages, Pages
from memkv_engines.offload.results import LoadResult, StoreResult
from memkv_engines.tier.directory import DirectoryTier
from tests.fast.io_samples import (
    BLOCKS_PER_CHUNK,
    Pool,
    block_outermost,
    load,
    make_run,
    make_store,
    path_of,
    quick_folder,
    results_of,
    setup_for,
    started,
    store,
    until,
)
from tests.fast.samples import chain

N = BLOCKS_PER_CHUNK
ROOT = Path(__file__).resolve().parents[2]
HASHES = chain(N, "life")


@pytest.fixture(autouse=True)
def _restart_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SERVICE_RESTART_BACKOFF_S", 0.01)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def pool() -> Pool:
    return block_outermost(0, 64, 64 * 1024)


@pytest.fixture
def running(pool: Pool, tmp_path: Path) -> Iterator[IoClient]:
    """A client with a child process and one stored chunk; short deadlines."""
    client = started(setup_for(tmp_path, [pool]), "on", load_timeout_ms=500, fence_timeout_ms=400)
    assert store(client, make_store(pool, HASHES, range(N))) == ("stored",)
    yield client
    client.close()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def child_of(client: IoClient) -> int:
    assert client.child_pid is not None
    return client.child_pid


def check_restart(client: IoClient, pool: Pool, old: int) -> None:
    """The service comes back by polling alone, and works."""

    def back() -> bool:
        assert client.poll() == []
        return client.mode == "process"

    until(back)
    assert client.child_pid != old
    assert client.counters["io_service_restarts"] == 1
    assert load(client, make_run(pool, HASHES, range(32, 32 + N))).kinds == ("",)
    assert [pool.block(32 + i) for i in range(N)] == [pool.block(i) for i in range(N)]


# --------------------------------------------------------------------------------------------------------------- killed


def test_killed_while_idle(running: IoClient, pool: Pool) -> None:
    pid = child_of(running)
    os.kill(pid, signal.SIGKILL)
    until(lambda: running.poll() == [] and running.mode == "down")
    assert running.fence() is True or running.mode == "down"
    check_restart(running, pool, pid)


def test_killed_before_a_load(running: IoClient, pool: Pool) -> None:
    pid = child_of(running)
    os.kill(pid, signal.SIGSTOP)  # so that it cannot answer first
    running.submit_load(7, (make_run(pool, HASHES, range(8, 12)), make_run(pool, HASHES, range(12, 16))))
    assert running.poll() == []
    os.kill(pid, signal.SIGKILL)
    assert results_of(running) == [LoadResult(7, (0, 0), ("io_service", "io_service"))]
    assert running.pending_loads == 0
    assert running.counters["miss_io_service"] == 2
    check_restart(running, pool, pid)


def test_killed_before_a_store(running: IoClient, pool: Pool) -> None:
    pid = child_of(running)
    os.kill(pid, signal.SIGSTOP)
    running.submit_store(8, (make_store(pool, chain(N, "b"), range(N)),))
    os.kill(pid, signal.SIGKILL)
    assert running.fence() is False
    assert running.poll() == [StoreResult(8, ("failed",))]
    assert running.pending_stores == 0
    assert running.counters["store_failed"] == 1


@pytest.mark.parametrize("delay_ms", [0, 3])
def test_killed_in_the_middle_of_everything(running: IoClient, pool: Pool, delay_ms: int) -> None:
    before = pool.memory.copy()
    for job in range(20):
        running.submit_load(100 + job, (make_run(pool, HASHES, range(8, 12)),))
        running.submit_store(200 + job, (make_store(pool, chain(N, f"m{delay_ms}.{job}"), range(N)),))
    time.sleep(delay_ms / 1000)
    os.kill(child_of(running), signal.SIGKILL)
    running.fence()
    answers = results_of(running, 40)
    assert sorted(a.job_id for a in answers if isinstance(a, LoadResult)) == list(range(100, 120))
    assert sorted(a.job_id for a in answers if isinstance(a, StoreResult)) == list(range(200, 220))
    assert (running.pending_loads, running.pending_stores) == (0, 0)
    good = pool.with_copies(before, {8 + i: i for i in range(N)})
    assert ((pool.memory == before) | (pool.memory == good)).all()
    for answer in answers:
        assert not isinstance(answer, LoadResult) or answer.kinds in (("",), ("io_service",))
    # What was published is whole, and a store that was cut short left nothing that looks like a chunk.
    until(lambda: running.poll() == [] and running.mode == "process")
    for job in range(20):
        result = load(running, make_run(pool, chain(N, f"m{delay_ms}.{job}"), range(16, 20)))
        assert result.kinds in (("",), ("missing",))


def test_jobs_while_the_service_is_down_fail_at_once(running: IoClient, pool: Pool) -> None:
    os.kill(child_of(running), signal.SIGKILL)
    until(lambda: running.poll() == [] and running.mode == "down")
    running.submit_load(1, (make_run(pool, HASHES, range(8, 12)),))
    running.submit_store(2, (make_store(pool, HASHES, range(N)),))
    running.fence()
    assert running._results == [LoadResult(1, (0,), ("io_service",)), StoreResult(2, ("failed",))]


def test_it_is_started_ever_more_rarely_but_never_given_up(
    running: IoClient, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/bin/false")
        os.kill(child_of(running), signal.SIGKILL)
        deadline = time.monotonic() + 0.7
        while time.monotonic() < deadline:
            running.poll()
            time.sleep(0.002)
        # Pauses of 0.01, 0.02, 0.04, ... s.
        assert 2 <= running.counters["io_service_restarts"] <= 7
        assert running.mode == "down"
    until(lambda: running.poll() == [] and running.mode == "process")
    assert load(running, make_run(pool, HASHES, range(8, 12))).kinds == ("",)


# -------------------------------------------------------------------------------------------------------------- stopped


def test_a_load_that_hangs_is_given_up_and_writes_nothing_any_more(running: IoClient, pool: Pool) -> None:
    pid = child_of(running)
    os.kill(pid, signal.SIGSTOP)
    before = pool.memory.copy()
    start = time.monotonic()
    running.submit_load(1, (make_run(pool, HASHES, range(8, 12)),))
    assert results_of(running) == [LoadResult(1, (0,), ("io_service",))]
    assert 0.4 < time.monotonic() - start < 3
    # Before the answer was given, the child had gone: there is nobody left to wake up and write.
    assert gone(pid)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    assert (pool.memory == before).all()
    check_restart(running, pool, pid)


def test_a_fence_that_hangs_ends(running: IoClient, pool: Pool) -> None:
    pid = child_of(running)
    os.kill(pid, signal.SIGSTOP)
    running.submit_store(1, (make_store(pool, chain(N, "b"), range(N)),))
    start = time.monotonic()
    assert running.fence() is False
    assert 0.3 < time.monotonic() - start < 3
    assert gone(pid)
    assert running.poll() == [StoreResult(1, ("failed",))]
    assert running.counters["gather_microseconds"] >= 300_000


def test_submitting_and_polling_never_block(running: IoClient, pool: Pool) -> None:
    """However much waits for a service that does not read."""
    os.kill(child_of(running), signal.SIGSTOP)
    run = make_run(pool, HASHES, range(8, 12))
    slowest = 0.0
    for job in range(50):
        start = time.monotonic()
        running.submit_load(job, (run,) * 1000)
        running.poll()
        slowest = max(slowest, time.monotonic() - start)
    assert slowest < 2  # A send that blocked would never come back: nobody reads.
    answers = results_of(running, 50)
    assert {a.job_id for a in answers if isinstance(a, LoadResult)} == set(range(50))


# -------------------------------------------------------------------------------------------------------- start and end


@pytest.mark.parametrize("mode", ["on", "off", "auto"])
def test_a_directory_that_cannot_be_used_is_refused(mode: str, pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match="file"):
        started(setup_for(tmp_path / "file" / "kv", [pool]), mode)


def test_a_child_that_cannot_start_is_reaped(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(IoServiceError, match="io_process=on"):
        started(setup_for(tmp_path, [pool]), "on")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing here"))
    with pytest.raises(IoServiceError, match="io_process=on"):
        started(setup_for(tmp_path, [pool]), "on")


def test_auto_falls_back_to_threads_where_the_child_cannot_read_our_memory(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The child is told of a canary at an address that holds something else.
    false = SimpleNamespace(
        create_string_buffer=ctypes.create_string_buffer, addressof=lambda _: pool.memory.ctypes.data
    )
    monkeypatch.setattr(backends, "ctypes", false)
    with pytest.raises(IoServiceError, match="reads differently"):
        started(setup_for(tmp_path, [pool]), "on")
    client = started(setup_for(tmp_path, [pool]), "auto")
    monkeypatch.undo()
    assert (client.mode, client.child_pid) == ("thread", None)
    assert store(client, make_store(pool, HASHES, range(N))) == ("stored",)
    assert load(client, make_run(pool, HASHES, range(8, 12))).kinds == ("",)
    client.close()


def test_auto_prefers_the_child(pool: Pool, tmp_path: Path) -> None:
    client = started(setup_for(tmp_path, [pool]), "auto")
    assert client.mode == "process"
    pid = child_of(client)
    client.close()
    client.close()
    assert gone(pid)
    assert client.mode == "down"
    assert client.poll() == []


@pytest.mark.parametrize("mode", ["on", "off"])
def test_closing_finishes_what_was_gathered(mode: str, tmp_path: Path) -> None:
    pool = block_outermost(0, 8, MIB)
    client = started(setup_for(tmp_path, [pool], staging_bytes=64 * MIB), mode)
    prompts = [chain(N, f"close{i}") for i in range(8)]
    client.submit_store(1, tuple(make_store(pool, hashes, range(N)) for hashes in prompts))
    assert client.fence()
    client.close()
    reader = started(setup_for(tmp_path, [pool]), "off")
    for hashes in prompts:
        assert path_of(tmp_path, pool, hashes).exists()
        assert load(reader, make_run(pool, hashes, range(4, 8))).good_blocks == (N,)
    reader.close()


_ENGINE = """
import sys, time
from pathlib import Path
from tests.fast.io_samples import block_outermost, setup_for, started
client = started(setup_for(Path(sys.argv[1]), [block_outermost(0, 8, 4096)]), "on")
print(client.child_pid, flush=True)
time.sleep(60)
"""


def test_the_child_dies_with_the_engine(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _ENGINE, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as engine:
        assert engine.stdout is not None
        child = int(engine.stdout.readline())
        assert not gone(child)
        engine.kill()
    until(lambda: gone(child) or _is_zombie(child))


def _is_zombie(pid: int) -> bool:
    """Dead, but whoever inherited it has not taken notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_more_descriptors_than_select_can_watch(pool: Pool, tmp_path: Path) -> None:
    held = [os.open("/dev/null", os.O_RDONLY)]
    try:
        while held[-1] < 1030:
            held.append(os.dup(held[0]))
    except OSError:
        pytest.skip("this machine does not allow so many")
    try:
        client = started(setup_for(tmp_path, [pool]), "on")
        assert store(client, make_store(pool, HASHES, range(N))) == ("stored",)
        client.close()
    finally:
        for fd in held:
            os.close(fd)


# -------------------------------------------------------------------------------------------------------------- threads


class SlowPages(Pages):
    """Copies that wait for a word."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.copies = 0

    def gather(self, iovecs: Iovecs, tiles: int, staging_address: int, block_bytes: int, stride_bytes: int) -> None:
        self.entered.set()
        assert self.go.wait(10)
        self.copies += 1

    scatter = gather


def test_a_closed_gate_waits_for_copies_and_lets_no_other_in() -> None:
    slow = SlowPages()
    gate = GatedPages(slow)
    nothing = np.zeros((0, 2), dtype=np.uint64)
    copying = threading.Thread(target=gate.scatter, args=(nothing, 1, 0, 1, 1))
    copying.start()
    assert slow.entered.wait(10)
    closed = threading.Event()
    closing = threading.Thread(target=lambda: (gate.close(), closed.set()))
    closing.start()
    assert not closed.wait(0.05)
    refused = 0
    for copy in (gate.scatter, gate.gather):
        try:
            copy(nothing, 1, 0, 1, 1)
        except IoServiceError:
            refused += 1
    slow.go.set()
    copying.join(10)
    closing.join(10)
    assert closed.is_set()
    # A copy that came while the gate was closing was refused; none came after.
    assert (slow.copies, refused) == (1, 2)


def test_threads_that_hang_never_write_late_and_are_not_started_again(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = started(setup_for(tmp_path, [pool]), "off", load_timeout_ms=100)
    assert store(client, make_store(pool, HASHES, range(N))) == ("stored",)
    hung, go, over = threading.Event(), threading.Event(), threading.Event()
    real_open = DirectoryTier.open

    def slow_open(self: DirectoryTier, *arguments: object) -> object:
        hung.set()
        assert go.wait(10)
        try:
            return real_open(self, *arguments)  # type: ignore[arg-type]
        finally:
            over.set()

    monkeypatch.setattr(DirectoryTier, "open", slow_open)
    before = pool.memory.copy()
    client.submit_load(1, (make_run(pool, HASHES, range(8, 12)),))
    assert hung.wait(10)
    assert results_of(client) == [LoadResult(1, (0,), ("io_service",))]
    assert client.mode == "down"
    go.set()
    assert over.wait(10)
    time.sleep(0.1)
    assert (pool.memory == before).all()
    for _ in range(50):
        assert client.poll() == []
        time.sleep(0.002)
    assert (client.mode, client.counters["io_service_restarts"]) == ("down", 0)
    client.close()


def test_mapped_pages_add_their_distance() -> None:
    pages = np.arange(64, dtype=np.uint8)
    staging = np.zeros(32, dtype=np.uint8)
    iovecs = np.array([[8, 4], [16, 4]], dtype=np.uint64)
    mapped = MappedPages(delta=pages.ctypes.data)
    mapped.gather(iovecs, 1, staging.ctypes.data, 4, 16)
    assert staging.tolist() == [8, 9, 10, 11, *[0] * 12, 16, 17, 18, 19, *[0] * 12]
    staging += 100
    mapped.scatter(iovecs, 1, staging.ctypes.data, 4, 16)
    assert pages[8:12].tolist() == [108, 109, 110, 111]


def test_the_unused_backend_is_not_touched(monkeypatch: pytest.MonkeyPatch, pool: Pool, tmp_path: Path) -> None:
    monkeypatch.setattr(ProcessBackend, "__init__", lambda *_: pytest.fail("no child was asked for"))
    monkeypatch.setattr(EngineEnd, "send", lambda *_: pytest.fail("no child was asked for"))
    client = started(setup_for(tmp_path, [pool]), "off")
    assert store(client, make_store(pool, HASHES, range(N))) == ("stored",)
    client.close()
