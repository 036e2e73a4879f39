"""What stops an engine before it serves: each with a message that names the key, its value and the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines.prompts import tokens_of
from tests.engines.vllm.scenario import Reports, Step, ask, play, start

PROMPT = tokens_of(800, 100)
WEAK = ("xxhash", "xxhash_cbor", "builtin")
PARALLEL = ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size")


def refused(name: str, step: Step) -> Step:
    return {**step, "name": name}


def hashes(name: str, algorithm: str, version: str | None = None, **environment: str) -> Step:
    config = {"cache_config": {"prefix_caching_hash_algo": algorithm}}
    return call(name, "memkv_engines.vllm.compat:hash_identity", config, version=version, environment=environment)


def call(name: str, target: str, config: dict[str, Any], **more: Any) -> Step:
    return {"do": "call", "name": name, "target": target, "config": config, **more}


def with_config(config: dict[str, Any]) -> Step:
    return {**start("tiny-llama"), "connector": config}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    folder = tmp_path_factory.mktemp("refusals")
    (folder / "file").write_text("not a folder")
    return play(
        *(hashes(f"hash {algorithm}", algorithm) for algorithm in ("sha256", "sha256_cbor", *WEAK)),
        hashes("random seed", "sha256", version="0.28.1"),
        hashes("fixed seed", "sha256", version="0.28.1", PYTHONHASHSEED="7"),
        *(
            call(name, "memkv_engines.vllm.geometry:reject_unsupported", {"parallel_config": {name: 2}})
            for name in PARALLEL
        ),
        refused("unknown key", with_config({"path": str(folder / "tier"), "chunk_target_byte": 4 << 20})),
        refused("no path", with_config({})),
        refused("below a file", start("tiny-llama", folder / "file" / "tier")),
        refused("bad value", start("tiny-llama", folder / "tier", on_load_failure="retry")),
        refused("weak hash", start("tiny-llama", folder / "tier", engine={"prefix_caching_hash_algo": "xxhash"})),
        # A refusal leaves nothing behind that keeps the next engine from starting.
        start("tiny-llama", folder / "tier"),
        ask("after all", [PROMPT]),
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unknown key", ["'chunk_target_byte'", "did you mean 'chunk_target_bytes'"]),
        ("no path", ["'path' is missing", "MEMKV_ENGINES_PATH"]),
        ("below a file", ["path='", "file/tier", "Not a directory", "Give a directory"]),
        ("bad value", ["'on_load_failure'", "'retry'", "one of ['recompute', 'fail']"]),
        ("weak hash", ["prefix_caching_hash_algo='xxhash'", "sha256_cbor"]),
    ],
)
def test_an_engine_refuses_to_start(runs: Reports, name: str, said: list[str]) -> None:
    error = runs[name]["error"]
    assert all(words in error for words in said), error


def test_an_engine_starts_after_refusals(runs: Reports) -> None:
    assert len(runs["after all"]["tokens"][0]) == 12


@pytest.mark.parametrize("algorithm", WEAK)
def test_a_hash_that_collides_is_refused(runs: Reports, algorithm: str) -> None:
    error = runs[f"hash {algorithm}"]["error"]
    assert "IdentityError" in error
    assert f"prefix_caching_hash_algo='{algorithm}'" in error
    assert "--prefix-caching-hash-algo sha256_cbor" in error


def test_a_random_hash_seed_is_refused(runs: Reports) -> None:
    assert "set PYTHONHASHSEED" in runs["random seed"]["error"]
    assert runs["fixed seed"]["value"]["hash_seed"] == "7"


def test_hashes_of_another_kind_have_another_identity(runs: Reports) -> None:
    pickled, portable = runs["hash sha256"]["value"], runs["hash sha256_cbor"]["value"]
    assert "python_minor" in pickled
    assert "python_minor" not in portable
    assert pickled["hash_algorithm"] != portable["hash_algorithm"]


@pytest.mark.parametrize("name", PARALLEL)
def test_a_way_to_split_the_model_without_names_for_its_parts_is_refused(runs: Reports, name: str) -> None:
    assert f"{name}=2 is not supported" in runs[name]["error"]
