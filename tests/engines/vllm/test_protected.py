"""Encrypted chunks in a real engine: same tokens after a restart, and after somebody without the key wrote the tier."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.prompts import tokens_of
from tests.engines.vllm.scenario import Reports, Step, ask, misses, play_all, reset, settle, start

PROMPT = tokens_of(900, 1400)
LAST_BLOCK = 1399 // 32 * 32
KEYS = {
    "key": "5f1c" + "0123456789abcdef" * 3 + "90817263544f",
    "other": "a1b2" + "fedcba9876543210" * 3 + "0f1e2d3c4b5a",
}


def question(name: str) -> Step:
    return ask(name, [PROMPT])


def planted(name: str) -> list[Step]:
    return [{"do": "damage", "how": "plant", "of": f"chunks of {name}", "which": "all"}, reset()]


def with_a_key(folder: Path) -> list[Step]:
    files = {name: folder / name for name in KEYS}
    for name, path in files.items():
        path.touch(0o600)
        path.write_text(KEYS[name])
    tier, encrypted = folder / "tier", {"protection": "encrypt", "protection_key_file": str(files["key"])}
    return [
        start("tiny-llama"),
        question("cold"),
        start("tiny-llama", tier, **encrypted),
        *(question("first visit"), settle(), {"do": "chunks", "name": "chunks of encrypted"}),
        start("tiny-llama", tier, **encrypted),
        question("after a restart"),
        *planted("encrypted"),
        *(question("planted"), settle(), reset()),
        # A chunk behind the first bad one is noticed when it is the first.
        *(question("planted, once more"), settle(), reset()),
        question("written again"),
        start("tiny-llama", tier, **{**encrypted, "protection_key_file": str(files["other"])}),
        question("another key"),
        start("tiny-llama", tier),
        question("no key"),
    ]


def without_a_key(folder: Path) -> list[Step]:
    """What the key is for."""
    return [
        start("tiny-llama", folder / "tier"),
        *(question("unprotected"), settle(), {"do": "chunks", "name": "chunks of unprotected"}),
        *planted("unprotected"),
        question("believed"),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    folders = [tmp_path_factory.mktemp(name) for name in ("with", "without")]
    protected, plain = play_all(with_a_key(folders[0]), without_a_key(folders[1]))
    return {**protected, **plain}


@pytest.mark.parametrize("name", ["after a restart", "written again"])
def test_an_encrypted_prompt_comes_back(runs: Reports, name: str) -> None:
    assert runs[name]["tokens"] == runs["cold"]["tokens"]
    assert runs[name]["cached"] == [LAST_BLOCK]
    assert misses(runs[name]) == {}


def test_what_was_written_without_the_key_is_recomputed(runs: Reports) -> None:
    assert runs["planted"]["tokens"] == runs["planted, once more"]["tokens"] == runs["cold"]["tokens"]
    assert runs["planted"]["cached"] == [0]
    # The full chunks are one run, the tail is another.
    assert misses(runs["planted"]) == {"miss_unauthenticated": 2}


def test_without_a_key_it_is_believed(runs: Reports) -> None:
    assert runs["believed"]["cached"] == [LAST_BLOCK]
    assert runs["believed"]["tokens"] != runs["cold"]["tokens"]


@pytest.mark.parametrize("name", ["another key", "no key"])
def test_other_keys_are_other_namespaces(runs: Reports, name: str) -> None:
    assert runs[name]["tokens"] == runs["cold"]["tokens"]
    assert runs[name]["cached"] == [0]
    assert misses(runs[name]) == {}
