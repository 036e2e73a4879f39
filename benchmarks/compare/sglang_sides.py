"""SGLang's contestants: without storage, with its own file backend, and with both of our doors."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.compare.names import FILE, HICACHE, LINKER, NO_STORAGE
from benchmarks.compare.side import Reply, Result, Side, SideFailed
from tests.engines.sglang.engines import Engine, hicache, linker, memkv_extra
from tests.engines.sglang.forked_engines import ForkedEngine

SOURCES = ("device", "host", "storage")
START_TIMEOUT_S = 480.0
SETTING_UP_S = 60.0

DESCRIPTIONS = {
    NO_STORAGE: "SGLang with its radix cache in the device pool and nothing else",
    FILE: "SGLang's hierarchical cache with its own `file` backend, which verifies nothing",
    HICACHE: "SGLang's hierarchical cache with MemKVHiCache",
    LINKER: "SGLang with MemKVCacheLinker: no host pool; SGLang counts what it brings as `host`",
}


class SglangSide(Side):
    """An SGLang engine, asked for one prompt at a time and for one token, so that the time is that to the first token.

    Args:
        name: A key of `DESCRIPTIONS`.
        model: A model's name.
        arguments: Of the engine, beside those of its storage.
        folder: Where it stores.
        log: Where its output goes.
        light: Forked from a process that has imported SGLang, with one thread.
    """

    def __init__(
        self, name: str, model: str, arguments: Mapping[str, Any], folder: Path | None, log: Path, *, light: bool
    ) -> None:
        self.name, self.what, self.folder = name, DESCRIPTIONS[name], folder
        self._model, self._log, self._light = model, log, light
        self._arguments = {**storage_arguments(name, folder, "off" if light else "on"), **arguments}
        # An engine ends with the thread that started it. A forked one is started by the main thread instead.
        self._starter = ThreadPoolExecutor(1)
        self._starting: Future[Engine] | None = None if light else self._starter.submit(self._start)
        self._engine: Engine | None = None

    def wait_until_ready(self) -> None:
        """See `Side`."""
        try:
            self._engine = self._starting.result(START_TIMEOUT_S + SETTING_UP_S) if self._starting else self._start()
        except Exception as error:
            raise SideFailed(str(error)) from error

    def ask(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Result:
        """See `Side`."""
        replies, hits = [], dict.fromkeys(SOURCES, 0)
        started = time.perf_counter()
        for prompt in prompts:
            since = time.perf_counter()
            try:
                answer = self._running().generate(list(prompt), max_tokens)
            except AssertionError as error:
                raise SideFailed(str(error)) from error
            replies.append(Reply(tuple(answer.tokens), len(prompt), time.perf_counter() - since))
            for source in SOURCES:
                hits[source] += int(answer.details.get(source, 0))
        return Result(tuple(replies), time.perf_counter() - started, hits)

    def forget(self) -> None:
        """See `Side`."""
        try:
            self._running().flush()
        except AssertionError as error:
            raise SideFailed(str(error)) from error

    def pids(self) -> list[int]:
        """See `Side`."""
        return [self._running().root]

    def close(self) -> None:
        """See `Side`."""
        try:
            if self._starting and not self._engine:
                self._engine = self._starting.result(START_TIMEOUT_S)
            if self._engine:
                self._engine.shutdown()
        finally:
            self._starter.shutdown(wait=False)

    def _start(self) -> Engine:
        if self._light:
            return ForkedEngine(self._model, log=self._log, **self._arguments)
        # Tests give an engine one thread; here recomputing gets every core.
        env = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
        return Engine(self._model, log=self._log, env=env, timeout_s=START_TIMEOUT_S, **self._arguments)

    def _running(self) -> Engine:
        assert self._engine is not None, "used before it was ready"
        return self._engine


def storage_arguments(name: str, folder: Path | None, cost_gate: str) -> dict[str, Any]:
    """Returns the engine's arguments for one kind of storage."""
    if folder is None:
        return {}
    if name == FILE:
        return hicache("file", file_storage_path=str(folder))
    if name == LINKER:
        return linker(folder, cost_gate=cost_gate)
    return hicache("dynamic", **memkv_extra(folder, cost_gate=cost_gate))
