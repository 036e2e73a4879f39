"""Requests that fight for pages in a real vLLM, and the recomputation of all that was stored meanwhile.

`Contention` runs in an engine with the connector and a KV pool that is far too small: requests with overlapping
prefixes are preempted, aborted at any moment, or finish. It notes every request's tokens and block hashes.
`Recomputation` runs in an engine without the connector, computes the same tokens alone, each prompt in one step, and
holds every block of every chunk in the tier against the pages that came of it. It reads those pages with torch: none of
our own code that moves pages.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm import LLM, SamplingParams
from vllm.v1.kv_cache_interface import group_kernel_blocks

from memkv_engines.chunk.codec import ChunkHeader, decode_header, verify_blocks
from tests.engines.vllm import damage

# Most prompts are short and grow, so that pages run out under way; some fill a chunk of 512 tokens.
PROMPT_TOKENS = (40, 170, 600)
LONG_SHARE = 0.2
OWN_TOKENS = 90
DOCUMENTS = 10
ANSWER_TOKENS = (2, 64)
ABORT_PER_STEP = 0.12
# The others have not begun, or were preempted.
ABORT_RUNNING_SHARE = 0.8
IN_FLIGHT = 12
# What a block's values may differ by between a prompt computed in one step and alone, and the same tokens computed
# piece by piece and beside others. Another token's values differ by more than 1000 times as much (`closest_foreign`).
TOLERANCE = 1e-3

Report = dict[str, Any]


@dataclass
class Ended:
    """A request that has ended.

    Attributes:
        tokens: of prompt and answer.
        prompt_tokens: how many of them are the prompt's.
        hashes: chain hashes of its blocks, hexadecimal.
        how: `finished`, or `aborted` and the status it had.
    """

    tokens: list[int]
    prompt_tokens: int
    hashes: list[str]
    how: str


@dataclass
class Contention:
    """Keeps an engine under pressure.

    Args:
        llm: with the connector.
        seed: of prompts, lengths, and moments.
        freeze_pid: gives the I/O process that is stopped now and then for a moment, so that gathers are late; None
            where there is none.
        freeze_s: for how long.
        freeze_per_step: how likely it is that it is stopped before a step.
    """

    llm: LLM
    seed: int
    freeze_pid: Callable[[], int | None]
    freeze_s: float = 0.02
    freeze_per_step: float = 0.05
    ended: list[Ended] = field(default_factory=list)
    steps: int = 0
    freezes: int = 0

    def __post_init__(self) -> None:
        self._choice = random.Random(self.seed)
        self._engine = self.llm.llm_engine
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._documents = [self._tokens(PROMPT_TOKENS[-1]) for _ in range(DOCUMENTS)]
        self._running: dict[str, Any] = {}
        self._sent = 0

    def play(self, rounds: int, trace: Path) -> Report:
        """Have so many requests end, one way or another; their tokens and hashes are written to `trace`."""
        while len(self.ended) < rounds:
            while len(self._running) < IN_FLIGHT and self._sent < rounds:
                self._send()
            if self._choice.random() < self.freeze_per_step:
                self._freeze()
            self._step()
            if self._running and self._choice.random() < ABORT_PER_STEP:
                self._abort(self._victim())
        trace.write_text(json.dumps([vars(ended) for ended in self.ended]))
        ways: dict[str, int] = {}
        for ended in self.ended:
            ways[ended.how] = ways.get(ended.how, 0) + 1
        return {"rounds": len(self.ended), "ways": ways, "steps": self.steps, "freezes": self.freezes}

    def _tokens(self, count: int) -> list[int]:
        return [self._choice.randrange(4, 260) for _ in range(count)]

    def _send(self) -> None:
        document = self._choice.choice(self._documents)
        long = self._choice.random() < LONG_SHARE
        shared = document[: self._choice.randrange(*(PROMPT_TOKENS[1:] if long else PROMPT_TOKENS[:2]))]
        prompt = shared + self._tokens(self._choice.choice((0, self._choice.randrange(OWN_TOKENS))))
        answer = self._choice.randint(*ANSWER_TOKENS)
        name = f"contender-{self._sent}"
        self._sent += 1
        known = set(self._scheduler.requests)
        sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
        self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        (inner,) = set(self._scheduler.requests) - known
        self._running[name] = self._scheduler.requests[inner]

    def _step(self) -> None:
        self.steps += 1
        for output in self._engine.step():
            if output.finished and output.request_id in self._running:
                self._note(output.request_id, "finished")

    def _victim(self) -> str:
        runs = [name for name, request in self._running.items() if request.status.name == "RUNNING"]
        return self._choice.choice(
            runs if runs and self._choice.random() < ABORT_RUNNING_SHARE else list(self._running)
        )

    def _abort(self, name: str) -> None:
        status = self._running[name].status.name.lower()
        self._engine.abort_request([name])
        self._note(name, f"aborted, {status}")

    def _note(self, name: str, how: str) -> None:
        request = self._running.pop(name)
        hashes = [bytes(block).hex() for block in request.block_hashes]
        self.ended.append(Ended(list(request.all_token_ids), request.num_prompt_tokens, hashes, how))

    def _freeze(self) -> None:
        pid = self.freeze_pid()
        if pid is None:
            return
        self.freezes += 1
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(self.freeze_s, lambda: os.kill(pid, signal.SIGCONT)).start()


class Recomputation:
    """Computes what was stored once more.

    Args:
        llm: without connector and without prefix caching, and with room for the longest request in a step.
    """

    def __init__(self, llm: LLM) -> None:
        self._engine = llm.llm_engine
        core = self._engine.engine_core.engine_core
        self._scheduler = core.scheduler
        runner = core.model_executor.driver_worker.worker.model_runner
        groups = runner.kv_cache_config.kv_cache_groups
        assert len(groups) == 1, "one KV group"
        context = runner.compilation_config.static_forward_context
        self._layers = []
        for layer in groups[0].layer_names:
            blocks = group_kernel_blocks(context[layer].kv_cache, runner.kv_cache_config.num_blocks)
            assert blocks[0].is_contiguous(), "a block of a layer is one piece"
            self._layers.append(blocks)
        self._block_tokens = int(groups[0].kv_cache_spec.block_size)
        self._sent = 0

    def compare(self, tier: Path, trace: Path) -> Report:
        """Hold every chunk below `tier` against a computation of its tokens, and answers against the likeliest tokens.

        Returns:
            Counts; `contaminated` is what must be 0 (`examples` says where), `worst_difference` the largest difference
            among blocks that are right, `closest_foreign` the smallest between a block and that of another prompt.
        """
        ended = [Ended(**fields) for fields in json.loads(trace.read_text())]
        place = {h: (r, i) for r, request in reversed(list(enumerate(ended))) for i, h in enumerate(request.hashes)}
        found = _Findings()
        wanted: dict[int, list[tuple[Path, int, ChunkHeader, int]]] = {}
        for path in damage.chunk_files(tier):
            found.chunks += 1
            header = decode_header(path.read_bytes()[: 1 << 20])
            for number, block in enumerate(header.blocks):
                known = place.get(block.chain_hash.hex())
                if known is None:
                    found.bad(path, f"block {number} belongs to no request")
                else:
                    wanted.setdefault(known[0], []).append((path, number, header, known[1]))
        for number, request in enumerate(ended):
            blocks = wanted.get(number, [])
            if not blocks and request.how != "finished":
                continue
            pages, answer = self._compute(request)
            found.tokens += len(request.tokens) - request.prompt_tokens
            found.wrong_tokens += answer
            for path, block, header, index in blocks:
                found.take(path, block, _difference(path, header, block, pages[index]))
            found.distance(pages)
        return found.report()

    def _compute(self, request: Ended) -> tuple[npt.NDArray[np.float32], int]:
        """Pages of the request's whole blocks, and how many tokens of its answer are not the likeliest."""
        self._sent += 1
        known = set(self._scheduler.requests)
        sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False, prompt_logprobs=1)
        name = f"again-{self._sent}"
        self._engine.add_request(name, {"prompt_token_ids": request.tokens}, sampling)
        (inner,) = set(self._scheduler.requests) - known
        (output,) = self._engine.step()
        likeliest = output.prompt_logprobs
        (ids,) = self._scheduler.kv_cache_manager.get_block_ids(inner)
        whole = ids[: len(request.tokens) // self._block_tokens]
        pages = np.concatenate([blocks[whole].flatten(1).float().numpy() for blocks in self._layers], axis=1)
        self._engine.abort_request([name])
        return pages, sum(
            _is_unlikely(likeliest[position], request.tokens[position])
            for position in range(request.prompt_tokens, len(request.tokens))
        )


def _is_unlikely(logprobs: dict[int, Any], token: int) -> bool:
    """Whether another token is likelier by more than a rounding error."""
    return bool(max(entry.logprob for entry in logprobs.values()) - logprobs[token].logprob > 1e-3)


def _difference(path: Path, header: ChunkHeader, block: int, expected: npt.NDArray[np.float32]) -> float:
    """The largest difference of a stored block from what it should be; infinite where its own digest is wrong."""
    geometry = header.geometry
    with path.open("rb") as file:
        file.seek(geometry.block_offset(block))
        data = file.read(geometry.block_stride_bytes)
    if header.blocks[block].present and verify_blocks(header, block, block + 1, memoryview(data)) is not None:
        return float("inf")
    stored = np.frombuffer(data[: geometry.block_bytes], dtype=np.float32)
    if stored.shape != expected.shape or not np.isfinite(stored).all():
        return float("inf")
    return float(np.abs(stored - expected).max())


class _Findings:
    def __init__(self) -> None:
        self.chunks = self.blocks = self.tokens = self.wrong_tokens = 0
        self._contaminated: dict[Path, str] = {}
        self._worst, self._closest = 0.0, float("inf")

    def bad(self, path: Path, why: str) -> None:
        self._contaminated.setdefault(path, why)

    def take(self, path: Path, block: int, difference: float) -> None:
        self.blocks += 1
        if difference > TOLERANCE:
            self.bad(path, f"block {block} differs by {difference:.3g}")
        else:
            self._worst = max(self._worst, difference)

    def distance(self, pages: npt.NDArray[np.float32]) -> None:
        """How far contamination would be at least: blocks that follow each other, as if one took the other's place."""
        for first, second in itertools.pairwise(pages):
            self._closest = min(self._closest, float(np.abs(first - second).max()))

    def report(self) -> Report:
        examples = [f"{path.name}: {why}" for path, why in list(self._contaminated.items())[:5]]
        return {
            "chunks": self.chunks,
            "blocks": self.blocks,
            "contaminated": len(self._contaminated),
            "examples": examples,
            "worst_difference": self._worst,
            "closest_foreign": self._closest,
            "answer_tokens": self.tokens,
            "wrong_tokens": self.wrong_tokens,
        }
