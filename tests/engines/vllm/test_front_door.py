"""The way a user comes in: `vllm serve` with `--kv-transfer-config`, the `openai` client, a restart, `/metrics`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.environments.engine_env import ROOT, engine_env
from tests.environments.models import ensure_model

MODEL_NAME = "tiny"
BLOCK_SIZE = 32
# The smallest there is: 16 blocks of the tiny model, so that the prompts below fill more than one chunk.
CHUNK_TARGET_BYTES = 2 << 20
CHUNK_TOKENS = 512
READY_TIMEOUT_S = 240.0
STORE_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 40.0
PORT_ATTEMPTS = 3
LOG_TAIL_CHARS = 6000

# One token a character: about 1,700 tokens each, and different from the first block on.
COMPLETION_PROMPT = "Once upon a time there was a cache that forgot nothing. " * 30
CHAT_PROMPT = "Which of these stories is about a page that came back from disk? " * 26


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: Its root.
        log: Where its output goes.
    """

    url: str
    log: Path

    def get(self, path: str, timeout_s: float = 5.0) -> str:
        """Returns the body of a page."""
        with urllib.request.urlopen(self.url + path, timeout=timeout_s) as answer:
            body: bytes = answer.read()
        return body.decode()

    def counter(self, name: str) -> float:
        """Returns a counter of `/metrics`, summed over its labels.

        Raises:
            KeyError: The server has no such counter.
        """
        lines = [line for line in self.get("/metrics").splitlines() if line.split("{")[0].split(" ")[0] == name]
        if not lines:
            raise KeyError(name)
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def answers(self) -> dict[str, str]:
        """Asks for a completion and for a chat answer, greedily."""
        from openai import OpenAI

        with OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120, max_retries=0) as client:
            completion = client.completions.create(
                model=MODEL_NAME, prompt=COMPLETION_PROMPT, max_tokens=16, temperature=0
            )
            chat = client.chat.completions.create(
                model=MODEL_NAME,
                messages=[{"role": "user", "content": CHAT_PROMPT}],
                max_tokens=16,
                temperature=0,
            )
        assert completion.usage is not None
        assert completion.usage.prompt_tokens > 2 * CHUNK_TOKENS
        return {"completion": completion.choices[0].text, "chat": chat.choices[0].message.content or ""}


class PortTaken(Exception):
    """Another process took the port between our look and the server's start."""


def free_port() -> int:
    """Returns a port that nobody listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def serve(connector: dict[str, Any], log: Path) -> Iterator[Server]:
    """Runs `vllm serve`; on the way out ends it and everything it started, and prints its log if the test failed."""
    for attempt in range(PORT_ATTEMPTS):
        try:
            with _serve_once(connector, log, free_port()) as server:
                yield server
                return
        except PortTaken:
            if attempt == PORT_ATTEMPTS - 1:
                raise


@contextmanager
def _serve_once(connector: dict[str, Any], log: Path, port: int) -> Iterator[Server]:
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(ensure_model("tiny-llama"))),
        *("--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096", "--block-size", str(BLOCK_SIZE)),
        *("--kv-cache-memory-bytes", str(64 << 20), "--kv-transfer-config", json.dumps(connector)),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=engine_env(OMP_NUM_THREADS="1"),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log)
    try:
        _wait_until_ready(process, server)
        yield server
    except BaseException:
        print(f"--- end of the server's log\n{log.read_text(errors='replace')[-LOG_TAIL_CHARS:]}\n---")
        raise
    finally:
        _end(process)


def _wait_until_ready(process: subprocess.Popen[bytes], server: Server) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            if "address already in use" in server.log.read_text(errors="replace").lower():
                raise PortTaken
            pytest.fail(f"the server ended with code {process.returncode} before it was ready")
        with suppress(OSError, urllib.error.URLError):
            server.get("/health", timeout_s=1.0)
            return
        time.sleep(0.25)
    pytest.fail(f"the server was not ready after {READY_TIMEOUT_S:.0f} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        # Whatever outlived the server's own process.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def chunks_in(tier: Path, at_least: int) -> list[Path]:
    """Returns the chunks in a tier's directory, once there are enough or the time is up."""
    deadline = time.monotonic() + STORE_TIMEOUT_S
    while True:
        found = sorted(tier.glob("*/*/*.kv"))
        if len(found) >= at_least or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(2 * (READY_TIMEOUT_S + STOP_TIMEOUT_S) + 120)
def test_a_served_prompt_comes_back_after_a_restart(tmp_path: Path) -> None:
    tier = tmp_path / "tier"
    settings = {
        "kv_connector": "MemKVConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"path": str(tier), "chunk_target_bytes": CHUNK_TARGET_BYTES},
    }
    by_module = {**settings, "kv_connector_module_path": "memkv_engines.vllm.connector"}

    with serve(by_module, tmp_path / "first.log") as server:
        first = server.answers()
        # Three full chunks and a tail of each prompt.
        assert len(chunks_in(tier, at_least=6)) >= 6
        assert server.counter("vllm:external_prefix_cache_hits_total") == 0

    # The second server finds the connector by the name that the package's entry point registered.
    with serve(settings, tmp_path / "second.log") as server:
        second = server.answers()
        hits = server.counter("vllm:external_prefix_cache_hits_total")
        assert server.counter("vllm:memkv_engines_load_chunks_total") > 0

    assert second == first
    assert hits >= 2 * 3 * CHUNK_TOKENS
