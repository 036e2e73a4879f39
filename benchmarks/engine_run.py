"""A vLLM engine in a process of its own, driven over a pipe.

A measurement needs fresh processes (a restart is one of the things measured) and a driver that can act between two
prompts, for example drop the page cache. `Engine` starts this module as a child, which builds the engine and answers
one JSON request a line. The engine's own log goes to a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from tests.environments.engine_env import ROOT, engine_env

CONNECTOR = "MemKVConnector"
CONNECTOR_MODULE = "memkv_engines.vllm.connector"
# Names the socket of a process that has imported vLLM and forks engines (`tests/engines/vllm/engine_runner.py`), for
# tests, which start many. A user's engines, and those that are measured, import it themselves.
FORKS_FROM = "MEMKV_FORK_ENGINES_FROM"
STOP_TIMEOUT_S = 60.0
LOG_TAIL_LINES = 40
LOG_LINE_CHARS = 400


class EngineFailed(Exception):
    """The engine's process ended or refused a request; the message holds the end of its log."""


@dataclass(frozen=True)
class EngineSpec:
    """What kind of engine to start.

    Attributes:
        model: The model's folder.
        dtype: Of the weights and the KV cache.
        threads: `VLLM_CPU_OMP_THREADS_BIND`, such as `auto` or `0-1`.
        arguments: Further arguments of `vllm.LLM`.
        connector: The connector's own configuration; None for an engine without one.
        environment: Further variables of the process.
        kv_transfer: `kv_transfer_config` of another connector than ours; None for ours or none.
        python: The interpreter, for an engine in another environment; by default this one.
        answer_timeout_s: Seconds after which an engine that has not started or not answered is killed; None waits for
            ever.
    """

    model: str
    dtype: str
    threads: str = "auto"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    connector: Mapping[str, Any] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    kv_transfer: Mapping[str, Any] | None = None
    python: str = sys.executable
    answer_timeout_s: float | None = None

    def llm_arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments of `vllm.LLM`."""
        arguments: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "enforce_eager": True,
            "seed": 0,
            # Without statistics the engine does not report the time to the first token.
            "disable_log_stats": False,
            **self.arguments,
        }
        if self.connector is not None:
            arguments["kv_transfer_config"] = {
                "kv_connector": CONNECTOR,
                "kv_connector_module_path": CONNECTOR_MODULE,
                "kv_role": "kv_both",
                "kv_connector_extra_config": dict(self.connector),
            }
        elif self.kv_transfer is not None:
            arguments["kv_transfer_config"] = {"kv_role": "kv_both", **self.kv_transfer}
        return arguments


@dataclass(frozen=True)
class Answer:
    """What became of one prompt.

    Attributes:
        tokens: Generated token ids.
        text: The same as text.
        prompt_tokens: Length of the prompt.
        cached_tokens: Prompt tokens that were not computed, local and external hits together.
        ttft_s: From the request's arrival to its first token, as vLLM measures it.
        e2e_s: From the request's arrival to its last token.
    """

    tokens: tuple[int, ...]
    text: str
    prompt_tokens: int
    cached_tokens: int
    ttft_s: float
    e2e_s: float


@dataclass(frozen=True)
class Batch:
    """What became of prompts that were submitted together.

    Attributes:
        answers: One per prompt, in order.
        wall_s: From submission to the last token.
        external_tokens: Prompt tokens that came from the connector.
    """

    answers: tuple[Answer, ...]
    wall_s: float
    external_tokens: int


class Engine:
    """An engine process; use it as a context manager, which waits until it is ready and ends it afterwards.

    It starts at construction, so that several can start at once.

    Args:
        spec: What to start.
        log: Where the engine's output goes; overwritten.
    """

    def __init__(self, spec: EngineSpec, log: Path) -> None:
        self._log = log
        self._timeout_s = spec.answer_timeout_s
        self._is_late = False
        log.parent.mkdir(parents=True, exist_ok=True)
        request_read, request_write = os.pipe()
        answer_read, answer_write = os.pipe()
        started = time.monotonic()
        with log.open("w") as output:
            self._process = _start(spec, request_read, answer_write, output)
        os.close(request_read)
        os.close(answer_write)
        self._requests: IO[str] = os.fdopen(request_write, "w")
        self._answers: IO[str] = os.fdopen(answer_read)
        self._started, self.start_s = started, 0.0
        self._send("start", arguments=spec.llm_arguments())

    def wait_until_ready(self) -> None:
        """Waits until the engine can be asked; `start_s` is then the time from the process's start.

        Raises:
            EngineFailed: It could not be built.
        """
        self._receive("start")
        self.start_s = time.monotonic() - self._started

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, *, stop_at_end: bool = False) -> Batch:
        """Runs prompts greedily, all submitted at once.

        Args:
            prompts: Token ids.
            max_tokens: Tokens to generate for each.
            stop_at_end: Stop at the model's end token instead of generating exactly `max_tokens`.
        """
        body = self._call(
            "generate", prompts=[list(p) for p in prompts], max_tokens=max_tokens, ignore_eos=not stop_at_end
        )
        answers = tuple(Answer(**{**answer, "tokens": tuple(answer["tokens"])}) for answer in body["answers"])
        return Batch(answers, body["wall_s"], body["external_tokens"])

    def ask(self, prompt: Sequence[int], max_tokens: int) -> tuple[Answer, int]:
        """Runs one prompt; returns its answer and how many of its tokens came from the connector."""
        batch = self.generate([prompt], max_tokens)
        return batch.answers[0], batch.external_tokens

    @property
    def pid(self) -> int:
        """The process that has all others of the engine as descendants, in a session of its own."""
        return self._process.pid

    def try_reset_prefix_cache(self, *, connector: bool = False) -> bool:
        """Makes the engine forget its local prefix cache, and with `connector` what its connector forgets then.

        Returns:
            Whether it did; it refuses while blocks are in use, also by stores of requests that were answered.
        """
        return bool(self._call("reset_prefix_cache", connector=connector)["done"])

    def reset_prefix_cache(self) -> None:
        """Makes the engine forget its local prefix cache, and only that.

        Raises:
            EngineFailed: It refused.
        """
        if not self.try_reset_prefix_cache():
            raise EngineFailed("the engine refused to reset its prefix cache: requests are still running")

    def metrics(self) -> dict[str, float]:
        """Returns the engine's counters and gauges, summed over their labels."""
        return dict(self._call("metrics")["values"])

    def processes(self) -> list[dict[str, Any]]:
        """Returns pid, role, CPU seconds and bytes submitted to devices of every process of the engine."""
        return list(self._call("processes")["processes"])

    def close(self) -> None:
        """Ends the engine once it has answered what it was asked, and everything it started."""
        for pipe in (self._requests, self._answers):
            with contextlib.suppress(OSError):
                pipe.close()
        self._wait_and_end()

    def abort(self) -> None:
        """Ends the engine in the middle of whatever it does, and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            # Orderly still: a killed engine leaves its shared memory behind.
            self._process.terminate()
        self._wait_and_end()

    def _wait_and_end(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _call(self, command: str, **parameters: Any) -> dict[str, Any]:
        self._send(command, **parameters)
        return self._receive(command)

    def _send(self, command: str, **parameters: Any) -> None:
        # A process that ended cannot be written to; reading then tells.
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps({"command": command, **parameters}) + "\n")
            self._requests.flush()

    def _receive(self, command: str) -> dict[str, Any]:
        with self._deadline():
            line = self._answers.readline()
        if not line:
            ended = f"no answer to {command!r} within {self._timeout_s} s: killed" if self._is_late else ""
            raise EngineFailed(f"{ended or f'the engine ended during {command!r}'}\n{tail_of(self._log)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(f"{command!r} failed: {answer['error']}\n{tail_of(self._log)}")
        return answer

    @contextlib.contextmanager
    def _deadline(self) -> Iterator[None]:
        """Kills an engine that is late, so that reading its answer ends."""
        if self._timeout_s is None:
            yield
            return

        def kill() -> None:
            self._is_late = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

        timer = threading.Timer(self._timeout_s, kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def __enter__(self) -> Engine:
        try:
            self.wait_until_ready()
        except BaseException:
            self.abort()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class Process(Protocol):
    """An engine's process, the leader of a session of its own."""

    @property
    def pid(self) -> int: ...

    def wait(self, timeout: float | None = None) -> Any:
        """Waits for its end; raises `subprocess.TimeoutExpired`."""

    def terminate(self) -> None:
        """Asks it to end."""


def _start(spec: EngineSpec, requests: int, answers: int, output: IO[str]) -> Process:
    overrides = {"VLLM_CPU_OMP_THREADS_BIND": spec.threads, "PYTHONUNBUFFERED": "1", **spec.environment}
    environment = engine_env(None, **overrides)
    parent = environment.get(FORKS_FROM)
    if parent and spec.python == sys.executable:
        from tests.engines.vllm.forked_process import forked

        return forked(parent, environment, [requests, answers, output.fileno()])
    return subprocess.Popen(
        [spec.python, "-m", "benchmarks.engine_run", str(requests), str(answers)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=(requests, answers),
        # The engine has children of its own; one group ends them together.
        start_new_session=True,
    )


def tail_of(log: Path, lines: int = LOG_TAIL_LINES) -> str:
    """Returns the end of a log, with its path."""
    try:
        text = log.read_text(errors="replace")
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join([f"--- end of {log}", *(line[:LOG_LINE_CHARS] for line in text.splitlines()[-lines:]), "---"])


# ------------------------------------------------------------------------------------------------ inside the child


def _serve(requests: IO[str], answers: IO[str]) -> None:
    """Answers requests until there are no more."""
    session: _Session | None = None
    for line in requests:
        request = json.loads(line)
        command = request.pop("command")
        try:
            if command == "start":
                session = _Session(request["arguments"])
                body: dict[str, Any] = {}
            else:
                body = getattr(session, command)(**request)
        except Exception as error:
            body = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(body) + "\n")
        answers.flush()
    if session is not None:
        session.close()


class _Session:
    """The engine and the requests it answers; every method is a command."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        transfer = arguments.pop("kv_transfer_config", None)
        if transfer is not None:
            arguments["kv_transfer_config"] = KVTransferConfig(**transfer)
        self._llm = LLM(**arguments)

    def generate(self, prompts: list[list[int]], max_tokens: int, ignore_eos: bool) -> dict[str, Any]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos)
        external_before = self._external_tokens()
        started = time.perf_counter()
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        wall_s = time.perf_counter() - started
        return {
            "answers": [_answer_of(output) for output in outputs],
            "wall_s": wall_s,
            "external_tokens": self._external_tokens() - external_before,
        }

    def reset_prefix_cache(self, connector: bool) -> dict[str, Any]:
        return {"done": self._llm.reset_prefix_cache(reset_connector=connector)}

    def metrics(self) -> dict[str, Any]:
        values: dict[str, float] = {}
        for metric in self._llm.get_metrics():
            value = getattr(metric, "value", None)
            if isinstance(value, (int, float)):
                values[metric.name] = values.get(metric.name, 0) + value
        return {"values": values}

    def processes(self) -> dict[str, Any]:
        import psutil

        own = psutil.Process()
        return {"processes": [_usage_of(process) for process in (own, *own.children(recursive=True))]}

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _external_tokens(self) -> int:
        return int(self.metrics()["values"].get("vllm:external_prefix_cache_hits", 0))


def _answer_of(output: Any) -> dict[str, Any]:
    completion, stats = output.outputs[0], output.metrics
    return {
        "tokens": list(completion.token_ids),
        "text": completion.text,
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.num_cached_tokens or 0,
        "ttft_s": stats.first_token_latency,
        # The engine's clock starts later than the request's arrival, but its differences are right.
        "e2e_s": stats.first_token_latency + stats.last_token_ts - stats.first_token_ts,
    }


def _usage_of(process: Any) -> dict[str, Any]:
    with process.oneshot():
        cpu, io = process.cpu_times(), process.io_counters()
        return {
            "pid": process.pid,
            "parent": process.ppid(),
            "command": " ".join(process.cmdline()) or process.name(),
            "cpu_s": cpu.user + cpu.system,
            "device_read_bytes": io.read_bytes,
            "device_write_bytes": io.write_bytes,
        }


@contextlib.contextmanager
def _ends_with_parent() -> Iterator[None]:
    """Turns SIGTERM into an orderly end, so that the engine's own children are ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    yield


def serve(request_descriptor: int, answer_descriptor: int) -> None:
    """Builds an engine and answers requests until their pipe is closed."""
    with _ends_with_parent(), os.fdopen(request_descriptor) as requests, os.fdopen(answer_descriptor, "w") as answers:
        _serve(requests, answers)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
