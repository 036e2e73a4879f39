"""``memkv-engines tier evict``, ``stat``, ``ls`` and ``policy``, and what all of them do about a wrong call."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memkv_engines.cli import main
from memkv_engines.cli.tier import duration, size
from memkv_engines.tier import upkeep
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.eviction import Chooser
from memkv_engines.tier.policy import Quotas, save_quotas
from tests.fast.cli_tier_samples import BLOCK_TOKENS, BLOCKS, CHUNK_BYTES, ONE, TWO, Directory, Run, chunk, flip

ROOT = Path(__file__).resolve().parent.parent.parent


# ----------------------------------------------------------------------------------------------------------- evict


def test_a_namespace_is_evicted_and_the_count_follows(run: Run, directory: Directory) -> None:
    code, body = run("evict", "--namespace", TWO.folder[:8], "--dry-run")
    assert (code, body["removed_chunks"], body["freed_bytes"]) == (0, 3, 3 * CHUNK_BYTES)
    assert (directory.chunks(), directory.chunks(TWO)) == (5, 3)
    code, body = run("evict", "--namespace", TWO.folder[:8])
    assert (code, body["removed_chunks"], body["freed_bytes"]) == (0, 3, 3 * CHUNK_BYTES)
    assert (directory.chunks(), directory.chunks(TWO)) == (5, 0)
    assert directory.counted() == 5 * CHUNK_BYTES
    assert (directory.root / TWO.folder / "manifest.json").exists(), "an engine may be using it"


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (("--tenant", "t"), (0, 3)),
        (("--tenant", "nobody"), (5, 3)),
        (("--all",), (0, 0)),
        (("--older-than", "1s"), (0, 0)),
        (("--older-than", "10000000w"), (5, 3)),
        (("--unused-for", "1s", "--tenant", "u"), (5, 0)),
        (("--down-to", str(6 * CHUNK_BYTES)), (4, 2)),
        (("--down-to", str(6 * CHUNK_BYTES - 1)), (3, 2)),
        (("--down-to", "0", "--namespace", TWO.folder), (5, 0)),
        (("--down-to", "1T"), (5, 3)),
    ],
)
def test_conditions_narrow_each_other(
    run: Run, directory: Directory, options: tuple[str, ...], left: tuple[int, int]
) -> None:
    before = directory.files()
    dry = run("evict", *options, "--dry-run")[1]
    assert directory.files() == before
    code, body = run("evict", *options)
    assert code == 0
    assert (directory.chunks(), directory.chunks(TWO)) == left
    assert (dry["removed_chunks"], dry["freed_bytes"]) == (body["removed_chunks"], body["freed_bytes"])
    assert body["removed_chunks"] == 8 - sum(left)
    assert directory.counted() == sum(left) * CHUNK_BYTES


def test_what_was_used_last_stays(run: Run, directory: Directory) -> None:
    tier = DirectoryTier(directory.root, direct_io="off")
    name, _ = chunk(ONE, "prompt 0")
    tier.open(ONE.folder, name).close()
    tier.close()
    run("evict", "--down-to", str(CHUNK_BYTES))
    assert [path.name for path in directory.root.rglob("*.kv")] == [name.text]


def test_more_is_evicted_than_one_round_holds(run: Run, directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "Chooser", functools.partial(Chooser, most=2))
    code, body = run("evict", "--down-to", "0")
    assert (code, body["removed_chunks"], directory.chunks()) == (0, 8, 0)


def test_pinned_namespaces_stay_unless_it_is_said_twice(run: Run, directory: Directory) -> None:
    assert run("policy", "--namespace", ONE.folder, "--pin")[0] == 0
    code, body = run("evict", "--all")
    assert (code, len(body["left"]), body["removed_chunks"]) == (1, 1, 3)
    assert directory.chunks() == 5
    assert run("evict", "--all", "--pinned")[0] == 0
    assert directory.chunks() == 0


def test_a_tenants_count_follows(run: Run, directory: Directory) -> None:
    fd = os.open(directory.root, os.O_RDONLY)
    save_quotas(fd, Quotas({"t": 100 * CHUNK_BYTES}))
    tier = DirectoryTier(directory.root, direct_io="off", capacity_bytes=100 * CHUNK_BYTES)
    tier.evict(recount=True)
    account = tier._accounts.of(ONE.folder)
    assert account is not None and account.usage.count().used_bytes == 5 * CHUNK_BYTES
    run("evict", "--namespace", ONE.folder)
    assert account.usage.count().used_bytes == 0
    tier.close()
    os.close(fd)


# ----------------------------------------------------------------------------------------------------- stat, ls, policy


def test_what_a_directory_holds(run: Run, directory: Directory) -> None:
    code, body = run("stat")
    found = body["directories"][0]
    assert code == 0
    assert (found["namespaces"], found["chunks"], found["bytes"]) == (2, 8, 8 * CHUNK_BYTES)
    assert found["counted_bytes"] == 8 * CHUNK_BYTES
    assert found["tenants"]["t"] == {"bytes": 5 * CHUNK_BYTES, "quota_bytes": 0}
    assert "8 chunks" in run("stat", as_json=False)[1]


def test_namespaces_with_tokens_and_last_use(run: Run, directory: Directory) -> None:
    tier = DirectoryTier(directory.root, direct_io="off")
    tier.open(TWO.folder, chunk(TWO, "prompt 1")[0]).close()
    tier.close()
    code, body = run("ls")
    rows = {row["namespace"]: row for row in body["namespaces"]}
    assert code == 0
    assert rows[ONE.folder]["tokens"] == 5 * BLOCKS * BLOCK_TOKENS
    assert (rows[ONE.folder]["chunks"], rows[ONE.folder]["loaded_chunks"], rows[ONE.folder]["tenant"]) == (5, 0, "t")
    assert rows[ONE.folder]["last_use_ns"] == 10**18 + 4 * 10**9
    assert rows[ONE.folder]["stands_for"] == {"model": "one"}
    assert rows[TWO.folder]["loaded_chunks"] == 1
    assert time.time_ns() - rows[TWO.folder]["last_use_ns"] < 60 * 10**9
    text = run("ls", as_json=False)[1]
    assert "model=one" in text and f"{5 * BLOCKS * BLOCK_TOKENS:,}" in text
    assert [row["namespace"] for row in run("ls", "--namespace", TWO.folder[:6])[1]["namespaces"]] == [TWO.folder]


def test_tokens_come_from_a_header_that_can_be_believed(run: Run, directory: Directory) -> None:
    for number in range(5):
        flip(directory.path(number), 20)
    rows = {row["namespace"]: row for row in run("ls")[1]["namespaces"]}
    assert rows[ONE.folder]["tokens"] is None
    assert "?" in run("ls", as_json=False)[1]


def test_chunks_one_by_one(run: Run, directory: Directory) -> None:
    code, body = run("ls", "--chunks", "--namespace", ONE.folder)
    assert (code, len(body["chunks"])) == (0, 5)
    assert {row["bytes"] for row in body["chunks"]} == {CHUNK_BYTES}
    assert len(run("ls", "--chunks", as_json=False)[1].splitlines()) == 8


def test_an_empty_directory_holds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("stat", "ls", "verify", "repair", "policy"):
        assert main.main(["tier", what, str(tmp_path)]) == 0
    assert "no namespaces" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_policies_are_set_shown_and_lifted(run: Run, directory: Directory) -> None:
    code, body = run("policy", "--namespace", ONE.folder[:5], "--pin", "--priority", "7", "--ttl", "2h")
    assert code == 0
    assert body["directories"][0]["namespaces"] == {ONE.folder: {"pinned": True, "priority": 7, "ttl_s": 7200}}
    run("policy", "--namespace", ONE.folder, "--unpin", "--ttl", "off")
    run("policy", "--tenant", "t", "--quota", "10M")
    body = run("policy")[1]["directories"][0]
    assert body["namespaces"] == {ONE.folder: {"pinned": False, "priority": 7, "ttl_s": 0}}
    assert body["quotas"] == {"t": 10 << 20}
    assert "priority 7" in run("ls", as_json=False)[1]
    assert run("stat")[1]["directories"][0]["tenants"]["t"]["quota_bytes"] == 10 << 20
    run("policy", "--tenant", "t", "--quota", "off")
    assert run("policy")[1]["directories"][0]["quotas"] == {}


def test_a_damaged_policy_is_written_anew(run: Run, directory: Directory) -> None:
    (directory.root / ONE.folder / "policy.json").write_text("{")
    (directory.root / "quotas.json").write_text("{")
    assert run("policy")[0] == 1
    run("policy", "--namespace", ONE.folder, "--priority", "-1")
    run("policy", "--tenant", "t", "--quota", "1G")
    assert run("policy")[0] == 0


def test_a_quota_is_shared_out_over_directories(
    directory: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "second").mkdir()
    both = f"{directory.root},{tmp_path / 'second'}"
    assert main.main(["tier", "policy", both, "--tenant", "t", "--quota", "10G", "--json"]) == 0
    bodies = json.loads(capsys.readouterr().out)["directories"]
    assert [body["quotas"] for body in bodies] == [{"t": 5 << 30}] * 2
    assert main.main(["tier", "stat", both, "--json"]) == 0
    assert [body["chunks"] for body in json.loads(capsys.readouterr().out)["directories"]] == [8, 0]


# ------------------------------------------------------------------------------------------------- calls that are wrong


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "nowhere/at/all"],
        ["stat", "nowhere/at/all"],
        ["verify", ""],
        ["evict", "{root}"],
        ["evict", "{root}", "--namespace", "zzz"],
        ["ls", "{root}", "--namespace", ""],
        ["verify", "{file}"],
        ["policy", "{root}", "--pin"],
        ["policy", "{root}", "--tenant", "t"],
        ["policy", "{root}", "--quota", "1G"],
        ["policy", "{root}", "--namespace", ONE.folder, "--priority", "1000"],
        ["policy", "{root}", "--namespace", "zz", "--pin"],
    ],
)
def test_a_wrong_call_ends_with_two_and_says_why(
    directory: Directory, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    before = directory.files()
    filled = [text.format(root=directory.root, file=tmp_path / "file") for text in arguments]
    assert main.main(["tier", *filled]) == 2
    assert capsys.readouterr().err.startswith("memkv-engines: ")
    assert directory.files() == before


def test_a_prefix_of_several_namespaces_is_refused(directory: Directory, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("ab" + "0" * 30, "ab" + "1" * 30):
        (directory.root / folder).mkdir()
    assert main.main(["tier", "evict", str(directory.root), "--namespace", "ab"]) == 2
    assert "give more of it" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["stat", "ls", "verify", "repair", "evict", "policy"])
def test_help_tells_the_exit_codes(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["tier", what, "--help"])
    assert ended.value.code == 0
    assert "Exit codes: 0" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "value"), [("10", 10), ("1k", 1024), ("2GiB", 2 << 30), ("3 TB", 3 << 40), ("0", 0)])
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("15m", 900), ("7d", 604_800), ("2w", 1_209_600)])
def test_ages(text: str, value: int) -> None:
    assert duration(text) == value


@pytest.mark.parametrize("text", ["", "off", "10x", "-1", "1.5G", "x", "\N{ARABIC-INDIC DIGIT ONE}k"])
def test_other_sizes_and_ages_are_refused(text: str, directory: Directory) -> None:
    for option in ("--down-to", "--older-than"):
        with pytest.raises(SystemExit) as ended:
            main.main(["tier", "evict", str(directory.root), f"{option}={text}"])
        assert ended.value.code == 2


def test_a_reader_that_has_had_enough_is_no_error(directory: Directory) -> None:
    command = [sys.executable, "-m", "memkv_engines.cli.main", "tier", "ls", "--chunks", str(directory.root)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    os.close(writer)
    assert done.stderr == ""
