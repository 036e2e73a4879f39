"""The server as users start it: attach our storage at run time, answer from it, clear it, detach it."""

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
from pathlib import Path
from typing import Any

import pytest

from tests.engines.prompts import tokens_of
from tests.engines.sglang.engines import PAGE_TOKENS, memkv_extra, session_pids, wait_until
from tests.environments.engine_env import ROOT, engine_env, sglang_settings
from tests.environments.sglang_models import ensure_model

PROMPT = tokens_of(5, 600)
KEY = "an-admin-key"


class Server:
    """A running `sglang.launch_server`."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        options = {
            "--model-path": str(ensure_model("tiny-sg-llama")),
            "--device": "cpu",
            "--attention-backend": "torch_native",
            "--sampling-backend": "pytorch",
            "--dtype": "float32",
            "--max-total-tokens": "4096",
            "--context-length": "2048",
            "--mem-fraction-static": "0.2",
            "--page-size": str(PAGE_TOKENS),
            "--hicache-ratio": "2",
            "--hicache-io-backend": "direct",
            "--hicache-mem-layout": "page_first_direct",
            "--hicache-storage-prefetch-policy": "wait_complete",
            "--admin-api-key": KEY,
            "--host": "127.0.0.1",
            "--port": str(self._port),
        }
        switches = ["--disable-cuda-graph", "--enable-hierarchical-cache", "--enable-cache-report"]
        arguments = [text for pair in options.items() for text in pair]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sglang.launch_server", *arguments, *switches],
                stdout=output,
                stderr=output,
                env=engine_env(**sglang_settings(), OMP_NUM_THREADS="1"),
                cwd=ROOT,
                start_new_session=True,
            )

    def wait(self, log: Path) -> None:
        """Until it answers."""

        def ready() -> bool:
            assert self.process.poll() is None, log.read_text(errors="replace")[-4000:]
            try:
                self.call("GET", "/health")
            except (OSError, urllib.error.URLError):
                return False
            return True

        wait_until(ready, "the server answers", 240)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> str:
        """One request; the text of the answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return str(answer.read().decode())

    def generate(self) -> tuple[list[int], int]:
        """Answer the prompt; tokens, and how many of the prompt's came from storage."""
        sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        answer = json.loads(self.call("POST", "/generate", {"input_ids": PROMPT, "sampling_params": sampling}))
        details = answer["meta_info"].get("cached_tokens_details") or {}
        return answer["output_ids"], int(details.get("storage", 0))

    def flush(self) -> None:
        """Empty device and host cache."""
        deadline = time.monotonic() + 60
        while True:
            try:
                self.call("POST", "/flush_cache?timeout=20")
                return
            except urllib.error.HTTPError:
                assert time.monotonic() < deadline, "the cache cannot be flushed"
                time.sleep(0.2)

    def end(self) -> None:
        """End it with everything it started."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            pass
        for pid in session_pids(self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    log = tmp_path / "server.log"
    made = Server(log)
    try:
        made.wait(log)
        yield made
    finally:
        made.end()


def attach(server: Server, tier: Path, **keys: Any) -> str:
    config = memkv_extra(tier, probe_timeout_ms=20_000, **keys)
    body = {
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config_json": json.dumps(config),
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_write_policy": "write_through",
    }
    try:
        return server.call("PUT", "/hicache/storage-backend", body)
    except urllib.error.HTTPError as error:
        return error.read().decode()


def test_attach_clear_and_detach(server: Server, tmp_path: Path) -> None:
    tier = tmp_path / "tier"
    cold, from_storage = server.generate()
    assert from_storage == 0
    # What cannot work is refused with the reason, and the server goes on.
    assert "pass_prefix_keys" in attach(server, tier, hicache_storage_pass_prefix_keys=False)
    server.flush()
    assert "rror" not in attach(server, tier)
    assert server.generate()[0] == cold
    wait_until(lambda: bool(list(tier.rglob("*.kv"))), "the prompt is stored")
    server.flush()
    tokens, from_storage = server.generate()
    assert (tokens, from_storage >= len(PROMPT) - PAGE_TOKENS) == (cold, True)
    server.call("POST", "/hicache/storage-backend/clear")
    assert not list(tier.rglob("*.kv"))
    server.flush()
    assert server.generate() == (cold, 0)
    server.flush()
    server.call("DELETE", "/hicache/storage-backend")
    children = [p for p in session_pids(server.process.pid) if _is_io_process(p)]
    assert children == [], "the I/O process outlived the detachment"
    assert server.generate() == (cold, 0)


def _is_io_process(pid: int) -> bool:
    try:
        return b"memkv_engines.offload.process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
