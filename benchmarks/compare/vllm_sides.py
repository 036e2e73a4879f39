"""vLLM's contestants: without a cache, with its own caches, with LMCache's, and with ours."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.compare.lmcache_server import LMCacheServer
from benchmarks.compare.names import (
    LMCACHE_FS,
    LMCACHE_MEMKV,
    MEMKV,
    MEMKV_MEMORY,
    NATIVE,
    NO_CACHE,
    PREFIX_CACHE,
    THROTTLED,
)
from benchmarks.compare.side import Reply, Result, Side, SideFailed
from benchmarks.engine_run import Engine, EngineFailed, EngineSpec
from tests.environments.engine_env import ROOT
from tests.faults.control import Injector, throttle

THROTTLE_MB_PER_S = 50
LMCACHE_PYTHON = ROOT / ".venvs" / "lmcache" / "bin" / "python"
RESET_TRIES = 10
RESET_PAUSE_S = 0.3
# Too short to be stored.
FLUSH_PROMPT = tuple(range(8))

DESCRIPTIONS = {
    NO_CACHE: "vLLM with prefix caching off",
    PREFIX_CACHE: "vLLM with its own prefix cache and no connector",
    NATIVE: "vLLM's OffloadingConnector, TieringOffloadingSpec and fs tier; the copies between KV cache and primary "
    "tier, which stock vLLM has for GPUs only, by benchmarks/compare/vllm_cpu_offload.py",
    LMCACHE_FS: "LMCacheMPConnector and `lmcache server` with its own fs adapter as second level",
    LMCACHE_MEMKV: "the same with our adapter as second level",
    MEMKV: "MemKVConnector",
    MEMKV_MEMORY: "MemKVConnector with `memory_bytes`: with its staging as much memory before its disk as the peers "
    "have; not asked for what has to come from the disk",
    THROTTLED: "MemKVConnector on the same directory, whose reads are slowed down to 50 MB/s; asked only for what "
    "`memkv` stored",
}


class VllmSide(Side):
    """A vLLM engine.

    Args:
        name: A key of `DESCRIPTIONS`.
        spec: The engine, without a connector.
        folder: Where it stores.
        log: Where the engine's output goes.
    """

    def __init__(self, name: str, spec: EngineSpec, folder: Path | None, log: Path) -> None:
        self.name, self.what, self.folder = name, DESCRIPTIONS[name], folder
        self._engine = Engine(spec, log)
        self._reset_connector = False
        # Without a prefix cache there is nothing to reset.
        self._resets = bool(spec.arguments.get("enable_prefix_caching"))

    def wait_until_ready(self) -> None:
        """See `Side`."""
        try:
            self._engine.wait_until_ready()
        except EngineFailed as error:
            raise SideFailed(str(error)) from error

    def ask(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Result:
        """See `Side`."""
        try:
            batch = self._engine.generate(prompts, max_tokens)
        except EngineFailed as error:
            raise SideFailed(str(error)) from error
        replies = tuple(Reply(answer.tokens, answer.prompt_tokens, answer.ttft_s) for answer in batch.answers)
        cached = sum(answer.cached_tokens for answer in batch.answers)
        hits = {"prefix cache": cached - batch.external_tokens, "connector": batch.external_tokens}
        return Result(replies, batch.wall_s, hits)

    def forget(self) -> None:
        """See `Side`."""
        if not self._resets:
            return
        try:
            for _ in range(RESET_TRIES):
                if self._engine.try_reset_prefix_cache(connector=self._reset_connector):
                    return
                # Blocks are in use until their stores have ended, which an engine learns in its next step.
                self._engine.generate([FLUSH_PROMPT], 1)
                time.sleep(RESET_PAUSE_S)
        except EngineFailed as error:
            raise SideFailed(str(error)) from error
        raise SideFailed("the engine does not empty its cache: blocks stay in use")

    def pids(self) -> list[int]:
        """See `Side`."""
        return [self._engine.pid]

    def close(self) -> None:
        """See `Side`."""
        self._engine.close()


class NativeSide(VllmSide):
    """vLLM's own offloading to a directory."""

    def __init__(self, spec: EngineSpec, folder: Path, log: Path, dram_bytes: int) -> None:
        extra = {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "benchmarks.compare.vllm_cpu_offload",
            "cpu_bytes_to_use": dram_bytes,
            "secondary_tiers": [{"type": "fs", "root_dir": str(folder)}],
        }
        transfer = {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": extra}
        super().__init__(NATIVE, replace(spec, kv_transfer=transfer), folder, log)
        # It empties the primary tier and leaves the secondary ones alone.
        self._reset_connector = True


class MemKVSide(VllmSide):
    """Ours.

    Args:
        name: A key of `DESCRIPTIONS`.
        spec: The engine, without a connector.
        folder: Where it stores.
        log: Where the engine's output goes.
        extra: Further settings of the connector.
    """

    def __init__(self, name: str, spec: EngineSpec, folder: Path, log: Path, **extra: Any) -> None:
        super().__init__(name, replace(spec, connector={"path": str(folder), **extra}), folder, log)

    def ask(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Result:
        """See `Side`."""
        earlier_s = self._loaded_s()
        result = super().ask(prompts, max_tokens)
        return replace(result, load_s=self._loaded_s() - earlier_s)

    def _loaded_s(self) -> float:
        try:
            # Not `get`: a counter of another name must not be a load that takes no time.
            return self._engine.metrics()["vllm:memkv_engines_load_microseconds"] / 1e6
        except EngineFailed as error:
            raise SideFailed(str(error)) from error


class MemorySide(MemKVSide):
    """Ours with a level of memory.

    Args:
        spec: The engine, without a connector.
        folder: Where it stores.
        log: Where the engine's output goes.
        dram_bytes: Memory before the disk, staging included.
        staging_bytes: What is staged in.
        extra: Further settings of the connector.
    """

    keeps_memory = True

    def __init__(
        self, spec: EngineSpec, folder: Path, log: Path, dram_bytes: int, staging_bytes: int, **extra: Any
    ) -> None:
        memory = {"staging_bytes": staging_bytes, "memory_bytes": dram_bytes - staging_bytes}
        super().__init__(MEMKV_MEMORY, spec, folder, log, **{**extra, **memory})


class ThrottledSide(MemKVSide):
    """Ours on another side's directory, slowed down."""

    only_loads = True

    def __init__(self, spec: EngineSpec, folder: Path, log: Path, **extra: Any) -> None:
        self._injector = Injector(folder)
        slowed = replace(spec, environment={**spec.environment, **self._injector.environment()})
        try:
            super().__init__(THROTTLED, slowed, folder, log, store=False, **extra)
        except BaseException:
            self._injector.close()
            raise

    def wait_until_ready(self) -> None:
        """See `Side`; only what comes after its start is slow."""
        super().wait_until_ready()
        self._injector.arm(throttle(THROTTLE_MB_PER_S))

    def close(self) -> None:
        """See `Side`."""
        super().close()
        self._injector.close()


def fs_adapter(folder: Path) -> dict[str, Any]:
    """Returns LMCache's own second level on a directory."""
    return {"type": "fs", "base_path": str(folder)}


def memkv_adapter(folder: Path) -> dict[str, Any]:
    """Returns ours."""
    return {
        "type": "plugin",
        "module_path": "memkv_engines.lmcache.l2_adapter",
        "class_name": "MemKVL2Adapter",
        "adapter_params": {"path": str(folder), "weights_id": "benchmark"},
    }


class LMCacheSide(Side):
    """vLLM with LMCache, which has a server of its own.

    Args:
        name: `LMCACHE_FS` or `LMCACHE_MEMKV`.
        spec: The engine, without a connector.
        adapter: The server's second level.
        folder: Where that stores.
        log: Where the engine's output goes; the server's goes beside it.
        dram_bytes: Memory of the first level.
    """

    def __init__(
        self, name: str, spec: EngineSpec, adapter: Mapping[str, Any], folder: Path, log: Path, dram_bytes: int
    ) -> None:
        self.name, self.what, self.folder = name, DESCRIPTIONS[name], folder
        self._log = log
        self._spec = spec
        self._engine: VllmSide | None = None
        if not LMCACHE_PYTHON.exists():
            raise SideFailed("there is no environment with LMCache: build it with `make env-lmcache`")
        self._server = LMCacheServer(LMCACHE_PYTHON, adapter, dram_bytes, log.with_suffix(".server.log"))

    def prepare(self) -> None:
        """See `Side`; the engine can start only when the server answers."""
        self._server.wait_until_ready()
        extra = {
            "lmcache.mp.host": "tcp://localhost",
            "lmcache.mp.port": self._server.port,
            # The server copies out of shared memory, the faster of its ways on a CPU; the connector would take another.
            "lmcache.mp.mp_transfer_mode": "lmcache_driven",
        }
        transfer = {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_module_path": "benchmarks.compare.lmcache_on_cpu",
            "kv_connector_extra_config": extra,
        }
        environment = {**self._spec.environment, "PYTHONHASHSEED": "0"}
        spec = replace(self._spec, kv_transfer=transfer, environment=environment, python=str(LMCACHE_PYTHON))
        self._engine = VllmSide(self.name, spec, self.folder, self._log)

    def wait_until_ready(self) -> None:
        """See `Side`."""
        self._started().wait_until_ready()

    def ask(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Result:
        """See `Side`."""
        return self._started().ask(prompts, max_tokens)

    def forget(self) -> None:
        """See `Side`."""
        self._started().forget()
        self._server.forget()

    def pids(self) -> list[int]:
        """See `Side`."""
        return [self._server.pid, *(self._engine.pids() if self._engine else [])]

    def close(self) -> None:
        """See `Side`."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._server.close)
            if self._engine:
                stack.callback(self._engine.close)

    def _started(self) -> VllmSide:
        assert self._engine is not None, "used before it was prepared"
        return self._engine
