"""The steps of scenarios for a real vLLM engine in this very process, see `engine_runner.py`.

`Player` knows what vLLM and the connector keep to themselves, so that the tests need not.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import resource
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import vllm
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import (
    ensure_kv_transfer_shutdown,
    get_kv_transfer_group,
    has_kv_transfer_group,
)
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from tests.engines.vllm import damage
from tests.engines.vllm.contention import Contention, Recomputation
from tests.engines.vllm.sabotage import Sabotage
from tests.faults.control import FAULTS, Injector, throttle

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 4096,
    "block_size": 32,
    "seed": 0,
    "disable_log_stats": False,
    "kv_cache_memory_bytes": 64 << 20,
}
CONNECTOR = {
    "kv_connector": "MemKVConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": "memkv_engines.vllm.connector",
}
OURS = "vllm:memkv_engines_"
COUNTED = {
    "vllm:external_prefix_cache_hits": "external",
    "vllm:prefix_cache_hits": "local",
    "vllm:num_preemptions": "preemptions",
}
PATIENCE_S = 60.0
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "continue": signal.SIGCONT}
NUDGE = [3, 5, 7]

Report = dict[str, Any]


class Player(Sabotage):
    """Plays steps; each public method is one. What a step returns is what it reports."""

    def __init__(self) -> None:
        self._llm: LLM | None = None
        self._tier: Path | None = None
        self._serial = 0
        self._listed: set[str] = set()
        self._adapters: dict[str, int] = {}
        self.reports: dict[str, Report] = {}
        self._timers: list[threading.Timer] = []
        self._injector: Injector | None = None

    # --- engines -------------------------------------------------------------

    def start(
        self,
        model: str,
        connector: dict[str, Any] | None = None,
        engine: dict[str, Any] | None = None,
        transfer: dict[str, Any] | None = None,
        force_async_scheduling: bool = False,
    ) -> Report:
        """Start an engine; a refusal is reported, not raised.

        Args:
            model: the model's folder.
            connector: the connector's extra config, None for an engine without one.
            engine: arguments of the engine that differ from `ENGINE`.
            transfer: arguments of the KV transfer configuration that differ from `CONNECTOR`.
            force_async_scheduling: switch on what vLLM's CPU platform switches off.
        """
        self.stop()
        arguments: dict[str, Any] = {**ENGINE, **(engine or {}), "model": model}
        if connector is not None:
            arguments["kv_transfer_config"] = KVTransferConfig(
                **{**CONNECTOR, **(transfer or {})}, kv_connector_extra_config=connector
            )
        self._tier = Path(connector["path"]) if connector and "path" in connector else None
        if force_async_scheduling:
            _force_async_scheduling()
        try:
            self._llm = LLM(**arguments)
        except Exception:
            # An engine that fails to start leaves its worker's connector behind; its process would end here.
            ensure_kv_transfer_shutdown()
            return {"error": traceback.format_exc()}
        config = self._llm.llm_engine.vllm_config
        return {
            "failure_policy": getattr(config.kv_transfer_config, "kv_load_failure_policy", None),
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
        }

    def stop(self) -> None:
        """End the engine as a server's shutdown does."""
        for timer in self._timers:
            timer.join()
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def fake_gpu(self, kernels: bool) -> None:
        """From here on engines keep their KV cache in what counts as device memory, see `fake_gpu.py`."""
        from tests.engines.fake_gpu import FakeGpu, under_vllm

        self._gpu = FakeGpu(kernels)
        under_vllm(self._gpu)

    def gpu_report(self) -> Report:
        """What the fake GPU's driver saw."""
        return self._gpu.report()

    def meet(self, folder: str, parties: int) -> None:
        """Wait until so many processes have come here."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"here-{os.getpid()}").touch()
        self._until(lambda: len(list(place.iterdir())) >= parties, "the others")

    # --- requests ------------------------------------------------------------

    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int = 12,
        together: bool = False,
        salt: str | None = None,
        lora: str | None = None,
    ) -> Report:
        """Answer prompts, one after the other or all together.

        Returns:
            Per prompt its tokens, cached tokens and finish reason; seconds and what was counted meanwhile.
        """
        before, started = self._counted(), time.monotonic()
        batches = [prompts] if together else [[prompt] for prompt in prompts]
        outputs = []
        for batch in batches:
            inputs = [{"prompt_token_ids": p} | ({"cache_salt": salt} if salt else {}) for p in batch]
            adapter = self._adapter(lora) if lora else None
            outputs += self._engine.generate(inputs, _greedy(max_tokens), use_tqdm=False, lora_request=adapter)
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "cached": [output.num_cached_tokens for output in outputs],
            "finish": [output.outputs[0].finish_reason for output in outputs],
            "seconds": time.monotonic() - started,
            "counted": self._since(before),
        }

    def converse(self, opening: list[int], messages: list[list[int]], max_tokens: int = 12) -> Report:
        """Hold a conversation: each turn's prompt is all that was said before and a new message.

        The engine's own prefix cache is emptied between turns.
        """
        history, turns = opening, []
        for message in messages:
            history = history + message
            turns.append({**self.generate([history], max_tokens), "prompt_tokens": len(history)})
            history = history + turns[-1]["tokens"][0]
            self.settle()
            self.reset()
        return {"turns": turns}

    def abort(self, prompt: list[int], at: int | str, rival: list[int] = (), freeze_s: float = 0.0) -> Report:
        """Send a request and abort it.

        Args:
            prompt: the request's prompt.
            at: how many tokens of it are computed by then, or "loading".
            rival: prompt of another request that waits for the pages of the first and is answered.
            freeze_s: how long the worker's I/O process stands still from just before the end.
        """
        before = self._counted()
        engine = self._engine.llm_engine
        request = self._send(prompt)

        def there() -> bool:
            engine.step()
            if at == "loading":
                return request.status.name == "WAITING_FOR_REMOTE_KVS"
            return bool(request.num_computed_tokens >= int(at))

        if rival:
            engine.step()
            self._send(rival)
        self._until(there, f"a request to be aborted at {at}")
        finished = request.is_finished()
        if freeze_s:
            self.strike("stop", whose="worker")
            self.strike("continue", after_s=freeze_s, whose="worker")
        engine.abort_request([f"sent-{self._serial - bool(rival)}"])
        tokens = []
        while rival and engine.has_unfinished_requests():
            tokens = [list(output.outputs[0].token_ids) for output in engine.step()] or tokens
        return {"finished": finished, "tokens": tokens, "counted": self._since(before)}

    def _send(self, prompt: list[int]) -> Any:
        """Add a request; returns what the scheduler knows of it."""
        self._serial += 1
        engine = self._engine.llm_engine
        requests = engine.engine_core.engine_core.scheduler.requests
        known = set(requests)
        engine.add_request(f"sent-{self._serial}", {"prompt_token_ids": prompt}, _greedy(12))
        (name,) = set(requests) - known
        return requests[name]

    def contend(self, rounds: int, seed: int, trace: str, **freezes: float) -> Report:
        """Let requests fight for pages until so many have ended; see `contention.py`, also for `freezes`."""
        before = self._counted()
        played = Contention(self._engine, seed, lambda: self._worker.child_pid, **freezes).play(rounds, Path(trace))
        self.settle()
        return {**played, "counted": self._since(before)}

    def recompute(self, tier: str, trace: str) -> Report:
        """Hold all that was stored against a computation of the same tokens; see `contention.py`."""
        return Recomputation(self._engine).compare(Path(tier), Path(trace))

    def settle(self) -> Report:
        """Step the engine until every store has been answered."""
        before = self._counted()

        def stored() -> bool:
            self._nudge()
            if not has_kv_transfer_group():
                return True
            return not (self._worker.pending_stores or self._scheduler.connector.has_pending_push_work())

        self._nudge()
        self._until(stored, "stores")
        # One more step carries the last answers to the scheduler and the counters to the metrics.
        self._nudge()
        return {"counted": self._since(before)}

    def idle(self) -> Report:
        """Step an engine without requests for as long as it asks for it, as the loop of its own process does."""
        before, steps = self._counted(), 0
        deadline = time.monotonic() + PATIENCE_S
        while self._scheduler.has_requests():
            self._engine.llm_engine.step()
            steps += 1
            if time.monotonic() > deadline:
                raise TimeoutError(f"an idle engine still wants steps after {PATIENCE_S:.0f} s")
        return {"steps": steps, "counted": self._since(before)}

    def reset(self, connector: bool = False) -> None:
        """Empty the engine's own prefix cache, once its requests have let go of it."""

        def done() -> bool:
            self._nudge()
            return bool(self._engine.reset_prefix_cache(reset_connector=connector))

        self._until(done, "the prefix cache to be reset")

    def nudge(self, seconds: float) -> Report:
        """Keep the engine stepping for a while."""
        before, deadline = self._counted(), time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._nudge()
            time.sleep(0.02)
        return {"counted": self._since(before)}

    # --- trouble -------------------------------------------------------------

    def chunks(self) -> Report:
        """The chunk files in the tier that no earlier report of this kind has listed."""
        files = [str(file) for file in damage.chunk_files(self._directory)]
        new = [file for file in files if file not in self._listed]
        self._listed.update(new)
        return {"files": new}

    def damage(self, how: str, of: str, which: int | str = 0, group: int = 0) -> None:
        """Damage chunks.

        Args:
            how: one of `damage.KINDS`.
            of: name of an earlier `chunks` report that lists them.
            which: number of the chunk in its prompt, or "all".
            group: KV group.
        """
        ours = damage.chunks_of_group([Path(file) for file in self.reports[of]["files"]], group)
        for file in ours if which == "all" else [ours[int(which)]]:
            damage.KINDS[how](file, self._directory)

    def copy(self, source: str, target: str) -> None:
        """Copy a file over what is in a folder."""
        shutil.copy(source, target)

    def strike(self, how: str, after_s: float = 0.0, whose: str = "both") -> None:
        """Send a signal to the connector's I/O processes, now or from a timer.

        Args:
            how: one of `SIGNALS`.
            after_s: seconds to wait, while the next steps are played.
            whose: "worker" (loads and stores), "scheduler" (look-ups) or "both".
        """
        pids = {"worker": self._worker.child_pid, "scheduler": self._prober.child_pid}

        def send() -> None:
            for side, pid in pids.items():
                if pid is not None and whose in (side, "both"):
                    os.kill(pid, SIGNALS[how])

        if not after_s:
            send()
            return
        timer = threading.Timer(after_s, send)
        self._timers.append(timer)
        timer.start()

    def environment(self, variables: dict[str, str]) -> None:
        """Set variables; the connector's I/O processes of later engines get them."""
        os.environ.update(variables)

    def arm(self, control: str, fault: str, seed: int, per_1024: int) -> None:
        """From now on things go wrong below the tier.

        Args:
            control: the control file that the environment names.
            fault: one of `FAULTS`.
            seed: of the choice of calls.
            per_1024: the chance of each call.
        """
        self.disarm()
        self._injector = Injector(self._directory, control=Path(control))
        self._injector.arm(FAULTS[fault], seed=seed, per_1024=per_1024)

    def throttle(self, control: str, mb_per_s: float) -> None:
        """From here on the tier is no faster than that, until `disarm`."""
        self.disarm()
        self._injector = Injector(self._directory, control=Path(control))
        self._injector.arm(throttle(mb_per_s))

    def disarm(self) -> Report:
        """Everything is well again; how often something went wrong."""
        injector, self._injector = self._injector, None
        if injector is None:
            return {"injected": 0}
        injected = injector.disarm()
        injector.close()
        return {"injected": injected}

    def limit_files(self, size_bytes: int) -> None:
        """Bound the size of files that the I/O processes may write, as a full disk would; -1 for no bound."""
        for client in (self._worker, self._prober):
            _, hard = resource.prlimit(client.child_pid, resource.RLIMIT_FSIZE)
            resource.prlimit(client.child_pid, resource.RLIMIT_FSIZE, (size_bytes, hard))

    def await_service(self) -> Report:
        """Step the engine until both its I/O processes run again."""
        before = self._counted()

        def back() -> bool:
            self._nudge()
            return self._worker.mode == self._prober.mode == "process"

        self._until(back, "the I/O service")
        self._nudge()
        return {"counted": self._since(before)}

    def call(
        self, target: str, config: dict[str, Any], version: str | None = None, environment: dict[str, str] | None = None
    ) -> Report:
        """Call one function of the connector as another vLLM would.

        Args:
            target: `module:function`, which takes the engine's configuration.
            config: what that configuration holds.
            version: vLLM's version, if not the true one.
            environment: variables to set.
        """
        module, _, function = target.partition(":")
        view = json.loads(json.dumps(config), object_hook=lambda fields: SimpleNamespace(**fields))
        with patch.object(vllm, "__version__", version or vllm.__version__), patch.dict(os.environ, environment or {}):
            try:
                return {"value": getattr(importlib.import_module(module), function)(view)}
            except Exception:
                return {"error": traceback.format_exc()}

    def resolve_layout(self, device_type: str, supported: list[str]) -> Report:
        """The KV cache layout that vLLM chooses with the connector on a device whose backend has these."""
        from vllm.v1.attention.backends.utils import resolve_kv_cache_layout

        # The real configuration of the engine, but for the layout that it has settled on already.
        config = copy.deepcopy(self._engine.llm_engine.vllm_config)
        config.cache_config.kv_cache_layout = None
        config.device_config = SimpleNamespace(device_type=device_type)
        return {"layout": resolve_kv_cache_layout(config, [supported]).name}

    # --- inside --------------------------------------------------------------

    @property
    def _engine(self) -> LLM:
        assert self._llm is not None, "no engine"
        return self._llm

    @property
    def _directory(self) -> Path:
        assert self._tier is not None, "no tier"
        return self._tier

    # What the connector keeps to itself: the ends of its two I/O processes.

    @property
    def _scheduler(self) -> Any:
        return self._engine.llm_engine.engine_core.engine_core.scheduler

    @property
    def _worker(self) -> Any:
        return get_kv_transfer_group()._worker._client

    @property
    def _prober(self) -> Any:
        return self._scheduler.connector._scheduler._client

    def _adapter(self, folder: str) -> LoRARequest:
        number = self._adapters.setdefault(folder, len(self._adapters) + 1)
        return LoRARequest(Path(folder).name, number, folder)

    def _nudge(self) -> None:
        """A request too short to be stored: it makes the engine step."""
        self._engine.generate([{"prompt_token_ids": NUDGE}], _greedy(2), use_tqdm=False)

    def _until(self, met: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not met():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {PATIENCE_S:.0f} s for {what}")
            time.sleep(0.02)

    def _counted(self) -> dict[str, int]:
        if self._llm is None:
            return {}
        found: dict[str, int] = {}
        for metric in self._llm.get_metrics():
            name = COUNTED.get(metric.name) or metric.name.removeprefix(OURS)
            if metric.name in COUNTED or metric.name.startswith(OURS):
                found[name] = found.get(name, 0) + int(getattr(metric, "value", 0))
        return found

    def _since(self, before: dict[str, int]) -> dict[str, int]:
        now = self._counted()
        return {name: value - before.get(name, 0) for name, value in now.items() if value != before.get(name, 0)}

    def play(self, steps: list[dict[str, Any]]) -> dict[str, Report]:
        """Play a scenario."""
        for step in steps:
            arguments = dict(step)
            name, method = arguments.pop("name", None), getattr(self, arguments.pop("do"))
            started = time.monotonic()
            report = method(**arguments)
            print(f"{time.monotonic() - started:7.2f} s  {step['do']} {name or ''}", flush=True)
            if name:
                self.reports[name] = report
        self.stop()
        return self.reports


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def _force_async_scheduling() -> None:
    platform = type(current_platform)
    check = platform.check_and_update_config.__func__

    def check_but_keep(cls: type, config: Any) -> None:
        check(cls, config)
        config.scheduler_config.async_scheduling = True

    platform.check_and_update_config = classmethod(check_but_keep)
