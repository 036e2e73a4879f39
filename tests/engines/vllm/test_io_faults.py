"""Trouble below the engine: full and small disks, no direct I/O, and I/O processes that die or hang."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.prompts import tokens_of
from tests.engines.vllm.scenario import MIB, Reports, Step, ask, misses, play_all, reset, settle, start

PROMPT_TOKENS = 1400
LAST_BLOCK = (PROMPT_TOKENS - 1) // 32 * 32
PROMPTS = [tokens_of(300 + number, PROMPT_TOKENS) for number in range(8)]
LOAD_TIMEOUT_S = 1.5
FENCE_TIMEOUT_S = 0.5
# For noise of a busy machine, not for the connector.
PATIENCE_S = 15.0
CHUNK_BYTES = 2 * MIB + 4096
WAYS = ("buffered", "shared memory", "threads")
SHARED_MEMORY = Path("/dev/shm")


def visit(tier: Path) -> list[Step]:
    return [start("tiny-llama", tier), ask("first visit", PROMPTS), settle(), reset()]


def disks(tier: Path, memory: Path) -> list[Step]:
    one = PROMPTS[:1]
    return [
        start("tiny-llama"),
        ask("cold", PROMPTS),
        # The disk fills up while the engine runs, in the middle of a file.
        start("tiny-llama", tier / "full"),
        {"do": "limit_files", "size_bytes": MIB},
        ask("full disk", PROMPTS[:2]),
        settle("full disk, later"),
        reset(),
        ask("full disk, again", PROMPTS[:2]),
        {"do": "limit_files", "size_bytes": -1},
        # A chunk too many.
        start("tiny-llama", tier / "small", capacity_bytes=2 * CHUNK_BYTES + MIB),
        ask("small tier", PROMPTS[:2]),
        settle("small tier, later"),
        reset(),
        ask("small tier, again", PROMPTS[:2]),
        # File systems and processes that cannot do what the connector would like best.
        start("tiny-llama", tier / "buffered", direct_io="off") | {"name": "recompute"},
        *restored("buffered", one),
        start("tiny-llama", memory),
        *restored("shared memory", one),
        start("tiny-llama", tier / "threads", io_process="off"),
        *restored("threads", one),
        # The user wants errors instead of recomputation.
        start("tiny-llama", tier / "fail", on_load_failure="fail") | {"name": "fail"},
        ask("first visit, fail", one),
        settle(),
        {"do": "chunks", "name": "chunks"},
        {"do": "damage", "how": "flip_payload", "of": "chunks"},
        reset(),
        ask("damaged, fail", one),
        ask("after, fail", PROMPTS[1:2]),
    ]


def restored(name: str, prompts: list[list[int]]) -> list[Step]:
    return [ask(f"first visit, {name}", prompts), settle(), reset(), ask(f"external hit, {name}", prompts)]


def strikes(tier: Path) -> list[Step]:
    timeouts = {"load_timeout_ms": int(LOAD_TIMEOUT_S * 1000), "fence_timeout_ms": int(FENCE_TIMEOUT_S * 1000)}
    back = [settle(), {"do": "await_service"}, reset()]
    return [
        start("tiny-llama", tier, **timeouts),
        ask("first visit", PROMPTS[:6]),
        settle(),
        reset(),
        {"do": "strike", "how": "kill"},
        ask("killed while idle", PROMPTS[:1]),
        {"do": "await_service", "name": "restarted"},
        reset(),
        ask("killed while idle, later", PROMPTS[:1]),
        # Stopped first, so that the load is certainly under way when the process dies.
        {"do": "strike", "how": "stop"},
        {"do": "strike", "how": "kill", "after_s": 0.7},
        ask("killed in a load", PROMPTS[1:2]),
        *back,
        ask("killed in a load, later", PROMPTS[1:2]),
        {"do": "strike", "how": "stop"},
        ask("hung in a load", PROMPTS[2:3]),
        *back,
        ask("hung in a load, later", PROMPTS[2:3]),
        {"do": "strike", "how": "stop"},
        ask("hung in a store", PROMPTS[6:7]),
        *back,
        ask("hung in a store, later", PROMPTS[6:7]),
        settle(),
        reset(),
        # It comes to itself again before anyone loses patience.
        {"do": "strike", "how": "stop"},
        {"do": "strike", "how": "continue", "after_s": 0.3},
        ask("held up", PROMPTS[3:4]),
    ]


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in memory where there is one, else on disk."""
    place = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else tmp_path_factory.mktemp("memory")
    with tempfile.TemporaryDirectory(prefix="memkv-", dir=place) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, memory: Path) -> Reports:
    folder = tmp_path_factory.mktemp("faults")
    first, second = play_all(disks(folder / "disks", memory), strikes(folder / "strikes"))
    return {**first, **second}


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("full disk", [0, 1]),
        ("full disk, again", [0, 1]),
        ("small tier", [0, 1]),
        ("small tier, again", [0, 1]),
        ("killed while idle", [0]),
        ("killed while idle, later", [0]),
        ("killed in a load", [1]),
        ("killed in a load, later", [1]),
        ("hung in a load", [2]),
        ("hung in a load, later", [2]),
        ("hung in a store", [6]),
        ("hung in a store, later", [6]),
        ("held up", [3]),
        *((f"first visit, {how}", [0]) for how in WAYS),
        *((f"external hit, {how}", [0]) for how in WAYS),
    ],
)
def test_tokens_are_right(runs: Reports, name: str, numbers: list[int]) -> None:
    assert runs[name]["tokens"] == [runs["cold"]["tokens"][number] for number in numbers]


def test_a_full_disk_costs_only_the_stores(runs: Reports) -> None:
    counted = [runs[name]["counted"] for name in ("full disk", "full disk, later")]
    assert sum(c.get("store_full", 0) for c in counted) == 6
    assert not any(c.get("store_chunks", 0) for c in counted)
    assert (runs["full disk, again"]["cached"], misses(runs["full disk, again"])) == ([0, 0], {})


def test_a_tier_takes_no_more_than_its_capacity(runs: Reports) -> None:
    counted = [runs[name]["counted"] for name in ("small tier", "small tier, later")]
    assert sum(c.get("store_full", 0) for c in counted) >= 3
    assert 1 <= sum(c.get("store_chunks", 0) for c in counted) <= 3
    assert sum(c.get("store_bytes", 0) for c in counted) <= 2 * CHUNK_BYTES + MIB
    assert misses(runs["small tier, again"]) == {}


@pytest.mark.parametrize("how", WAYS)
def test_other_ways_of_moving_bytes_hit_as_well(runs: Reports, how: str) -> None:
    run = runs[f"external hit, {how}"]
    assert (run["cached"], run["counted"]["external"], misses(run)) == ([LAST_BLOCK], LAST_BLOCK, {})


def test_a_dead_io_process_is_started_again(runs: Reports) -> None:
    started = sum(runs[name]["counted"].get("io_service_restarts", 0) for name in ("killed while idle", "restarted"))
    assert started == 2, "one process of the worker, one of the scheduler"
    assert runs["killed while idle, later"]["cached"] == [LAST_BLOCK]


@pytest.mark.parametrize("how", ["killed in a load", "hung in a load"])
def test_a_load_that_is_lost_is_recomputed(runs: Reports, how: str) -> None:
    assert set(misses(runs[how])) == {"miss_io_service"}
    assert runs[how]["counted"]["load_jobs_failed"] == 1
    assert runs[how]["seconds"] < LOAD_TIMEOUT_S + PATIENCE_S
    # Nothing was wrong with the chunks.
    assert (runs[f"{how}, later"]["cached"], misses(runs[f"{how}, later"])) == ([LAST_BLOCK], {})


def test_a_hung_store_holds_the_engine_up_for_the_fence_only(runs: Reports) -> None:
    run = runs["hung in a store"]
    assert run["counted"]["store_failed"] >= 1
    assert run["counted"]["gather_microseconds"] >= FENCE_TIMEOUT_S * 1e6
    assert run["counted"]["gather_microseconds"] < (FENCE_TIMEOUT_S + PATIENCE_S) * 1e6
    assert runs["hung in a store, later"]["cached"] == [0]


def test_a_short_hang_costs_only_time(runs: Reports) -> None:
    assert (runs["held up"]["cached"], misses(runs["held up"])) == ([LAST_BLOCK], {})


def test_recomputation_is_the_default(runs: Reports) -> None:
    assert runs["recompute"]["failure_policy"] == "recompute"


def test_errors_instead_of_recomputation_if_wanted(runs: Reports) -> None:
    assert runs["fail"]["failure_policy"] == "fail"
    assert runs["damaged, fail"]["finish"] == ["error"]
    assert misses(runs["damaged, fail"]) == {"miss_damaged": 1}
    assert runs["after, fail"]["tokens"] == [runs["cold"]["tokens"][1]]
