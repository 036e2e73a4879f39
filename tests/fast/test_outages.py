"""Outages of the tier: services on trial, look-ups and stores that hang, directories that vanish or are replaced."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from memkv_engines.errors import TierUnavailable
from memkv_engines.limits import MAX_DYING_SERVICES, PROBE_SILENCE_S
from memkv_engines.offload import backends, client, process
from memkv_engines.offload.blocking import BlockingClient
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.messages import Probe, ProbeDone
from memkv_engines.offload.places import Watch, mount_point, still_there
from memkv_engines.offload.results import LoadResult, StoreResult
from tests.fast.io_samples import (
    BLOCKS_PER_CHUNK,
    Pool,
    block_outermost,
    load,
    make_run,
    make_store,
    quick_folder,
    results_of,
    setup_for,
    started,
    store,
    until,
)
from tests.fast.samples import NAMESPACE, SHARD, chain

N = BLOCKS_PER_CHUNK
HASHES = chain(N, "outage")
TRIAL_S, PATIENCE_S = 0.3, 3.0


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SERVICE_RESTART_BACKOFF_S", 0.05)
    monkeypatch.setattr(client, "TRIAL_LOAD_S", TRIAL_S)


@pytest.fixture
def root() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder / "kv"


@pytest.fixture
def pool() -> Pool:
    return block_outermost(0, 64, 16 * 1024)


@pytest.fixture
def running(pool: Pool, root: Path) -> Iterator[IoClient]:
    """A client with a child process and one stored chunk."""
    made = started(setup_for(root, [pool]), "on", load_timeout_ms=1500, store_silence_s=1)
    assert store(made, make_store(pool, HASHES, range(N))) == ("stored",)
    yield made
    made.close()


def stop(client: IoClient) -> int:
    assert client.child_pid is not None
    os.kill(client.child_pid, signal.SIGSTOP)
    return client.child_pid


def back(client: IoClient) -> None:
    until(lambda: client.poll() == [] and client.mode == "process")


def look(number: int = 1) -> Probe:
    return Probe(number, NAMESPACE.digest, 0, N, 0, 0, b"".join(HASHES), (SHARD.as_tuple(),))


# ------------------------------------------------------------------------------------------------------------- on trial


def test_a_service_that_came_back_has_one_load_at_a_time_until_it_answers(running: IoClient, pool: Pool) -> None:
    os.kill(stop(running), signal.SIGKILL)
    until(lambda: running.poll() == [] and running.mode == "down")
    back(running)
    stop(running)  # It hangs again, and so does its trial.
    started_at = time.monotonic()
    for job in (1, 2, 3):
        running.submit_load(job, (make_run(pool, HASHES, range(8, 12)),))
    # Only the first of them was sent; the others are misses at once.
    assert running.poll() == [LoadResult(job, (0,), ("io_service",)) for job in (2, 3)]
    assert results_of(running) == [LoadResult(1, (0,), ("io_service",))]
    assert TRIAL_S <= time.monotonic() - started_at < 1.4, "the deadline of a trial is short"
    back(running)
    assert load(running, make_run(pool, HASHES, range(8, 12))).kinds == ("",)
    # From now on as many as one likes.
    for job in (4, 5, 6):
        running.submit_load(job, (make_run(pool, HASHES, range(8, 12)),))
    assert {r.job_id for r in results_of(running, 3) if isinstance(r, LoadResult) and r.kinds == ("",)} == {4, 5, 6}


def test_the_trial_of_a_large_load_has_longer(running: IoClient, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TRIAL_LOAD_BYTES_PER_S", 2 * N * pool.block_bytes)
    os.kill(stop(running), signal.SIGKILL)
    until(lambda: running.poll() == [] and running.mode == "down")
    back(running)
    stop(running)
    started_at = time.monotonic()
    running.submit_load(1, (make_run(pool, HASHES, range(8, 12)),))
    results_of(running)
    assert time.monotonic() - started_at >= TRIAL_S + 0.5


def test_no_process_is_added_to_many_that_cannot_die(running: IoClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that hangs holds killed processes, with their memory."""
    held = [SimpleNamespace(poll=lambda: None) for _ in range(MAX_DYING_SERVICES)]
    monkeypatch.setattr(backends, "_unreaped", held)
    os.kill(stop(running), signal.SIGKILL)
    until(lambda: running.poll() == [] and running.mode == "down")
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        assert running.poll() == []
    assert running.counters["io_service_restarts"] == 0
    held[0].poll = lambda: 0
    back(running)


# ------------------------------------------------------------------------------------------------- look-ups and stores


def test_a_service_that_answers_no_look_up_is_started_again(running: IoClient) -> None:
    old = stop(running)
    running.submit_probe(look())
    until(lambda: running.poll() == [] and running.mode == "down")
    back(running)
    assert running.child_pid != old
    running.submit_probe(look(2))
    (answer,) = results_of(running)
    assert isinstance(answer, ProbeDone) and answer.segments


def test_a_service_that_finishes_no_store_is_started_again(running: IoClient, pool: Pool) -> None:
    stop(running)
    running.submit_store(5, (make_store(pool, chain(N, "other"), range(N)),))
    start = time.monotonic()
    assert results_of(running) == [StoreResult(5, ("failed",))]
    assert 1.0 <= time.monotonic() - start < PATIENCE_S
    back(running)
    assert store(running, make_store(pool, chain(N, "other"), range(N))) == ("stored",)


def test_stores_that_are_held_up_by_loads_are_not_overdue(running: IoClient, pool: Pool) -> None:
    running._store_silence_s = 0.0
    running.submit_load(1, (make_run(pool, HASHES, range(8, 12)),))
    running.submit_store(2, (make_store(pool, chain(N, "other"), range(N)),))
    assert running._overdue(time.monotonic() + 1.0) == ""
    running._loads.clear()
    assert running._overdue(time.monotonic() + 1.0)


def test_waiting_callers_lose_one_deadline_to_a_tier_that_hangs(root: Path, pool: Pool) -> None:
    inner = IoClient(setup_for(root, [pool]), io_process="on")
    calls = BlockingClient(inner)
    calls.start()
    assert calls.store([make_store(pool, HASHES, range(N))]).outcomes == ("stored",)
    assert calls.probe(look(), 5.0)
    pid = stop(inner)
    start = time.monotonic()
    assert [calls.probe(look(), 0.3) for _ in range(20)] == [()] * 20
    assert 0.3 <= time.monotonic() - start < 0.6 < PROBE_SILENCE_S
    assert calls.counters()["probe_timeouts"] == 1
    os.kill(pid, signal.SIGCONT)
    # The late answer is a sign of life: nobody waits for the pause to be over.
    until(lambda: calls.probe(look(), 5.0), timeout_s=PROBE_SILENCE_S)
    calls.close()


# ---------------------------------------------------------------------------------------------------------------- start


def test_an_engine_starts_without_storage_where_the_tier_hangs(
    root: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SERVICE_START_TIMEOUT_S", 0.4)
    hung = []

    def hang(self: backends.ProcessBackend) -> list[object]:
        hung.append(self.pid)
        return []

    with monkeypatch.context() as silent:
        silent.setattr(backends.ProcessBackend, "receive", hang)
        made = started(setup_for(root, [pool]), "auto")
    assert (made.mode, len(set(hung))) == ("down", 1), "threads would have hung for ever"
    made.submit_load(1, (make_run(pool, HASHES, range(8, 12)),))
    assert made.poll() == [LoadResult(1, (0,), ("io_service",))]
    monkeypatch.setattr(client, "SERVICE_START_TIMEOUT_S", 20.0)
    back(made)
    assert store(made, make_store(pool, HASHES, range(N))) == ("stored",)
    made.close()


# ------------------------------------------------------------------------------------------------------- the directory


def test_a_directory_that_vanished_is_not_made_anew(running: IoClient, pool: Pool, root: Path) -> None:
    aside = root.with_name("aside")
    root.rename(aside)
    until(lambda: running.poll() == [] and running.mode == "down")
    restarts = running.counters["io_service_restarts"]
    until(lambda: running.poll() == [] and running.counters["io_service_restarts"] > restarts + 1)
    assert not root.exists(), "what is written there would fill whatever lies below a mount"
    assert running.mode == "down"
    aside.rename(root)
    back(running)
    assert load(running, make_run(pool, HASHES, range(8, 12))).kinds == ("",)


def test_another_directory_at_the_same_path_is_taken_over(running: IoClient, pool: Pool, root: Path) -> None:
    pid = running.child_pid
    root.rename(root.with_name("aside"))
    root.mkdir()
    until(lambda: running.poll() == [] and running.child_pid not in (pid, None))
    assert load(running, make_run(pool, HASHES, range(8, 12))).kinds == ("missing",)
    assert store(running, make_store(pool, HASHES, range(N))) == ("stored",)
    assert list(root.rglob("*.kv"))


def test_the_folder_below_a_mount_that_is_gone_is_refused(root: Path, pool: Pool) -> None:
    root.mkdir()
    setup = setup_for(root, [pool], mount_points=("/mnt/of/before",))
    with pytest.raises(TierUnavailable, match="mounted at /mnt/of/before"):
        process.open_tier(setup)
    process.open_tier(setup_for(root, [pool], mount_points=(mount_point(str(root)),))).close()


def test_mount_points() -> None:
    assert mount_point("/proc/self") == "/proc"
    assert mount_point("/") == "/"
    assert mount_point("/nothing/is/here") == ""


def test_of_several_directories_those_that_are_there_go_on(root: Path) -> None:
    one, other, later = (str(root / name) for name in ("one", "other", "later"))
    for path in (one, other):
        os.makedirs(path)
    assert still_there([one, other, later], ()) == [one, other, later], "the first start makes them"
    mounted = [mount_point(one), mount_point(other), ""]
    watch = Watch([one, other, later], mounted)
    assert not watch.changed
    os.rename(other, other + "-aside")
    assert watch.changed and still_there([one, other, later], mounted) == [one]
    watch = Watch([one, other, later], mounted)
    os.makedirs(later)
    assert watch.changed and still_there([one, other, later], mounted) == [one, later]
    os.rename(one, one + "-aside")
    os.rename(later, later + "-aside")
    with pytest.raises(TierUnavailable, match="is gone"):
        still_there([one, other, later], mounted)
