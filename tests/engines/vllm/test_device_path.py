"""The path for KV caches on a GPU, in a real vLLM whose KV cache counts as device memory of the fake CUDA driver.

What is shipped runs as it is: mover, launches, streams and events, pinned staging, I/O process; the kernels are run
from their source as C++ (that their PTX does the same is shown by `tests/kernels`); see `tests/engines/fake_gpu.py`.
Nothing here was run on a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.prompts import tokens_of
from tests.engines.vllm.scenario import MIB, Reports, Step, ask, misses, play, play_all, reset, settle, start

pytest.importorskip("cuda.bindings.driver", reason="the environment lacks cuda-bindings: build it again")

GPU_REPORT: Step = {"do": "gpu_report", "name": "gpu"}
# A window of tiny-gemma3 is shorter than what a chunk of 2 MiB holds, so that not every length comes back as a whole.
PROMPTS = [tokens_of(51, 900), tokens_of(52, 900)]
# So few pages that the second prompt overwrites those of the first.
SMALL = {"kv_cache_memory_bytes": 5 * MIB, "max_model_len": 1024}


# A model, and whether its blocks go through kernels or, being large, through the copy engine.
CASES = {
    "kernels": ("tiny-llama", True),
    "copy engine": ("tiny-llama", False),
    "kernels, several KV groups": ("tiny-gemma3", True),
}


class Case:
    """Scenarios of one case."""

    def __init__(self, kind: str, kernels: bool, folder: Path) -> None:
        self.kind, self.kernels = kind, kernels
        self._gpu: Step = {"do": "fake_gpu", "kernels": kernels}
        self._tier, self._other = folder / "tier", folder / "damaged"

    def cold(self) -> list[Step]:
        return [start(self.kind), ask("cold", PROMPTS)]

    def visit(self) -> list[Step]:
        engine = SMALL if self.kind == "tiny-llama" else {}
        return [
            self._gpu,
            start(self.kind, self._tier, engine=engine),
            ask("first visit", PROMPTS),
            settle("stored"),
            reset(),
            ask("external hit", PROMPTS),
            GPU_REPORT,
        ]

    def restart(self) -> list[Step]:
        return [self._gpu, start(self.kind, self._tier), ask("restart", PROMPTS), GPU_REPORT]

    def restart_without_gpu(self) -> list[Step]:
        return [start(self.kind, self._tier), ask("restart", PROMPTS)]

    def damaged(self) -> list[Step]:
        return [
            self._gpu,
            start(self.kind, self._other),
            ask("first visit", PROMPTS[:1]),
            settle(),
            reset(),
            {"do": "chunks", "name": "chunks"},
            {"do": "damage", "how": "flip_payload", "of": "chunks"},
            ask("damaged", PROMPTS[:1]),
            settle(),
            reset(),
            ask("mended", PROMPTS[:1]),
            GPU_REPORT,
        ]

    def play(self) -> dict[str, Reports]:
        cold, visited = play_all(self.cold(), self.visit())
        again, plain, hurt = play_all(self.restart(), self.restart_without_gpu(), self.damaged())
        return {"cold": cold, "visited": visited, "again": again, "plain": plain, "hurt": hurt}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(*CASES[request.param], tmp_path_factory.mktemp("device"))


@pytest.fixture(scope="module")
def runs(case: Case) -> dict[str, Reports]:
    return case.play()


def test_tokens_are_those_of_an_engine_without_connector(runs: dict[str, Reports]) -> None:
    cold = runs["cold"]["cold"]["tokens"]
    for run, name in (("visited", "first visit"), ("visited", "external hit"), ("again", "restart")):
        assert runs[run][name]["tokens"] == cold, name
        assert misses(runs[run][name]) == {}


def test_prompts_come_back_from_the_tier(runs: dict[str, Reports]) -> None:
    for run, name in (("visited", "external hit"), ("again", "restart")):
        assert all(cached >= 0.9 * len(p) for cached, p in zip(runs[run][name]["cached"], PROMPTS, strict=True)), name


def test_what_a_gpu_stored_is_what_a_cpu_stores(runs: dict[str, Reports]) -> None:
    """The bytes of a chunk do not depend on the way they took: another engine without the fake GPU reads them."""
    plain = runs["plain"]["restart"]
    assert plain["tokens"] == runs["cold"]["cold"]["tokens"]
    assert plain["cached"] == runs["again"]["restart"]["cached"]


def test_a_flipped_bit_is_a_counted_miss(runs: dict[str, Reports]) -> None:
    cold, hurt = runs["cold"]["cold"]["tokens"][:1], runs["hurt"]
    assert hurt["damaged"]["tokens"] == cold and hurt["mended"]["tokens"] == cold
    assert hurt["damaged"]["counted"]["miss_damaged"] >= 1
    assert misses(hurt["mended"]) == {}


def test_the_driver_saw_the_work_and_nothing_wrong(case: Case, runs: dict[str, Reports]) -> None:
    for run in ("visited", "again", "hurt"):
        report = runs[run]["gpu"]
        assert report["violations"] == []
        assert (report["launches"] > 0) == case.kernels
        assert report["calls"]["cuMemHostRegister"] >= 1 and report["calls"]["cuStreamWaitEvent"] > 0
        assert "cuCtxSynchronize" not in report["calls"]


LAYOUTS = {
    "wish granted": ("cuda", ["LBNHC", "LBHNC", "BLHNC"], "BLHNC"),
    "wish refused": ("cuda", ["LBNHC", "LBHNC"], "LBNHC"),
    "no wish on a CPU": ("cpu", ["LBHNC", "BLHNC"], "LBHNC"),
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    steps: list[Step] = [start("tiny-llama", tmp_path_factory.mktemp("layouts"))]
    for name, (device, supported, _) in LAYOUTS.items():
        steps.append({"do": "resolve_layout", "name": name, "device_type": device, "supported": supported})
    return play(*steps)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_gpu_is_asked_for_whole_blocks_in_one_piece(layouts: Reports, name: str) -> None:
    assert layouts[name]["layout"] == LAYOUTS[name][2]
