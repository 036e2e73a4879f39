"""Real SGLang engines on a CPU for tests, each in processes of its own, of which nothing is left when it ends.

    cache = hicache("file", file_storage_path=str(folder))
    with Engine("tiny-sg-llama", log=tmp_path / "engine.log", **cache) as engine:
        cold = engine.generate(tokens_of(seed=1, length=600))
        engine.flush()
        again = engine.generate(tokens_of(seed=1, length=600))
        assert again.from_storage and again.tokens == cold.tokens

Importing SGLang and starting an engine costs far more than answering: start one, ask it often, and start another only
where a fresh process is the point. Tests start a `ForkedEngine` (`forked_engines.py`), which comes in a few seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from tests.environments.engine_env import ROOT, engine_env, sglang_settings
from tests.environments.sglang_models import ensure_model

START_TIMEOUT_S = 240.0
ANSWER_TIMEOUT_S = 120.0
FLUSH_TIMEOUT_S = 60.0
END_TIMEOUT_S = 30.0
POLL_S = 0.1
LOG_TAIL_CHARS = 8000
SHARED_MEMORY = Path("/dev/shm")

# As it was before a test imports SGLang, which sets variables: an engine's environment does not depend on tests before.
OWN_ENVIRONMENT = dict(os.environ)

PAGE_TOKENS = 16
# Far above what rounding does to a log-probability here, and far below what wrong KV does.
TOLERANCE = 1e-3
ENGINE_DEFAULTS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    # In float32 a cold prompt and a restored one give the same tokens; bf16 rounds differently for different lengths.
    "dtype": "float32",
    "page_size": PAGE_TOKENS,
    "max_total_tokens": 4096,
    "context_length": 2048,
    "mem_fraction_static": 0.2,
    "random_seed": 1,
    "enable_cache_report": True,
    "log_level": "info",
}
HICACHE_DEFAULTS: dict[str, Any] = {
    "enable_hierarchical_cache": True,
    "hicache_ratio": 2.0,
    "hicache_write_policy": "write_through",
    # Without this a request starts with what has arrived when its turn comes, on a busy machine with nothing.
    "hicache_storage_prefetch_policy": "wait_complete",
    "hicache_io_backend": "direct",
    "hicache_mem_layout": "page_first_direct",
}


def hicache(
    backend: str | None = None, *, options: Mapping[str, Any] | None = None, **extra_config: Any
) -> dict[str, Any]:
    """Returns the engine's arguments for a hierarchical cache.

    Args:
        backend: A storage backend's name (`file`, `dynamic`, ...), or None for a cache without storage.
        options: Arguments of the engine that replace the defaults, such as `hicache_mem_layout`.
        **extra_config: The backend's configuration; `dynamic` needs `backend_name`, `module_path` and `class_name`.
    """
    storage = {}
    if backend is not None:
        storage = {
            "hicache_storage_backend": backend,
            "hicache_storage_backend_extra_config": json.dumps(extra_config),
        }
    return {**HICACHE_DEFAULTS, **storage, **(options or {})}


def memkv_extra(tier: Path, **keys: Any) -> dict[str, Any]:
    """Returns the extra configuration of our backend, for `hicache("dynamic", ...)`; `keys` add to it or replace.

    The cost gate is off: a small model often recomputes faster than a busy machine loads (`test_cost_gate.py`).
    """
    return {
        "cost_gate": "off",
        "backend_name": "memkv_engines",
        "module_path": "memkv_engines.sglang.hicache",
        "class_name": "MemKVHiCache",
        "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": True,
        "path": str(tier),
        **keys,
    }


def linker(tier: Path, **keys: Any) -> dict[str, Any]:
    """Returns the engine's arguments for our linker, which needs no hierarchical cache; gate as in `memkv_extra`."""
    return {
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": {
            "linker": "MemKVCacheLinker",
            "linker_module_path": "memkv_engines.sglang.linker",
            "linker_extra_config": {"cost_gate": "off", "path": str(tier), **keys},
        },
    }


def is_same(answer: Answer, other: Answer) -> bool:
    """Tells whether two answers agree, but for rounding."""
    return answer.tokens == other.tokens and all(
        abs(one - another) <= TOLERANCE for one, another in zip(answer.logprobs, other.logprobs, strict=True)
    )


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Waits for a condition.

    Raises:
        AssertionError: It was not met in time; the message says what was waited for.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(POLL_S)


@dataclass(frozen=True)
class Answer:
    """What an engine answered.

    Attributes:
        tokens: The tokens it generated, greedily.
        logprobs: The log-probability of each.
        cached: How many tokens of the prompt were not computed.
        details: Where those came from: `device`, `host`, `storage`, and the name of the `storage_backend`.
    """

    tokens: list[int]
    logprobs: list[float]
    cached: int
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def from_storage(self) -> int:
        """How many tokens of the prompt came from storage."""
        return int(self.details.get("storage", 0))


# -------------------------------------------------------------------------------------- processes and what they leave


def session_pids(session: int) -> list[int]:
    """Returns the processes of a session that still run; a zombie does not."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, _, of_session = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
                if int(of_session) == session and state != "Z":
                    found.append(int(entry.name))
    return found


def shared_memory_of(pids: list[int]) -> set[int]:
    """Returns the inodes of the files in shared memory that processes have mapped.

    Not their names: a semaphore is made under another one than it goes by.
    """
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            found |= {int(line.split()[4]) for line in lines if f"{SHARED_MEMORY}/" in line}
    return found


class Started(Protocol):
    """An engine's process, which leads a session of its own: the part of `subprocess.Popen` that an `Engine` uses."""

    pid: int
    stdin: IO[bytes] | None
    stdout: IO[bytes] | None

    def wait(self, timeout: float | None = None) -> object:
        """Waits for its end.

        Raises:
            subprocess.TimeoutExpired: It has not ended in time.
        """


def env_of_engines(**overrides: str) -> dict[str, str]:
    """Returns the complete environment of an engine's processes."""
    return engine_env(OWN_ENVIRONMENT, **{**sglang_settings(), "OMP_NUM_THREADS": "1", **overrides})


class Engine:
    """A running engine; `shutdown` ends it, as does leaving the `with` block."""

    def __init__(
        self,
        model: str,
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        timeout_s: float = START_TIMEOUT_S,
        **more: Any,
    ) -> None:
        """Starts an engine and waits until it answers.

        Args:
            model: A small model's name.
            log: Where everything it prints goes.
            env: Variables for its processes, in addition to those of every engine.
            timeout_s: Seconds it may take to start.
            **more: Arguments of `sglang.Engine`, over `ENGINE_DEFAULTS`.

        Raises:
            AssertionError: It did not start.
        """
        self.arguments = {"model_path": str(ensure_model(model)), **ENGINE_DEFAULTS, **more}
        self.log = log
        self._shared_memory: set[int] = set()
        self._unread = b""
        self.start_s = 0.0
        # SGLang's sockets lie in the temporary folder and stay there; their names must be short.
        self._folder = tempfile.mkdtemp(prefix="memkv-sg-")
        started = time.monotonic()
        with log.open("ab") as output:
            self._process = self._start(env_of_engines(**{"TMPDIR": self._folder, **(env or {})}), output)
        try:
            self._order(self.arguments, timeout_s)
        except BaseException:
            self.shutdown()
            raise
        self.start_s = time.monotonic() - started
        self._note_shared_memory()

    def generate(self, input_ids: list[int], max_new_tokens: int = 12, salt: str = "") -> Answer:
        """Answers a prompt greedily, with exactly `max_new_tokens` tokens; with a cache salt, if one is given."""
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        return Answer(**self._order({"do": "generate", "input_ids": input_ids, "sampling": sampling, "salt": salt}))

    def flush(self, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """Empties the device's and the host's cache, so that only storage knows prompts answered before.

        SGLang refuses while copies or stores are under way, and is asked again until it agrees.
        """
        wait_until(lambda: bool(self._order({"do": "flush"})["success"]), "the cache is flushed", timeout_s)

    def shutdown(self) -> None:
        """Ends the engine and whatever it started, and removes what that leaves behind."""
        self._note_shared_memory()
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        wait_until(lambda: not self.pids(), "every process of the engine has ended")
        for path in self.shared_memory():
            path.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def root(self) -> int:
        """The process that all others of the engine share their session with."""
        return self._process.pid

    def pids(self) -> list[int]:
        """Returns the engine's processes that run."""
        return session_pids(self._process.pid)

    def shared_memory(self) -> list[Path]:
        """Returns the files in shared memory that the engine has or had mapped and that still exist."""
        found = []
        for path in SHARED_MEMORY.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino in self._shared_memory:
                    found.append(path)
        return found

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _start(self, env: Mapping[str, str], output: IO[bytes]) -> Started:
        """Returns a new process in this environment; what it prints goes to `output`."""
        return subprocess.Popen(
            [sys.executable, "-m", "tests.engines.sglang.engine_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env=env,
            cwd=ROOT,
            start_new_session=True,
        )

    def _note_shared_memory(self) -> None:
        self._shared_memory |= shared_memory_of(self.pids())

    def _order(self, order: Mapping[str, Any], timeout_s: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        """Sends a line and returns the answer to it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        line = self._line(timeout_s)
        assert line, f"the engine gave no answer within {timeout_s:.0f} s, or died:\n{self._log_tail()}"
        answer: dict[str, Any] = json.loads(line)
        assert "error" not in answer, f"{answer['error']}\n{self._log_tail()}"
        return answer

    def _line(self, timeout_s: float) -> bytes:
        """Returns the next line, or nothing where none comes in time or the engine is gone."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                left = deadline - time.monotonic()
                # Only while it starts, since a process that dies then can no longer be asked: asking costs 10 ms of
                # CPU and the lock of the engine's memory, which is not to be part of what is measured.
                starting = not self.start_s
                if not ready.select(min(left, POLL_S) if starting else left):
                    if time.monotonic() > deadline:
                        return b""
                    if starting:
                        self._note_shared_memory()
                    continue
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    return b""
                self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-LOG_TAIL_CHARS:]
