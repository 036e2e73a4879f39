"""``memkv-engines tier verify`` and ``repair``: what they find, what they remove, and what they must not touch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memkv_engines.cli.tier import examine
from memkv_engines.limits import MAX_CHUNK_BYTES
from memkv_engines.tier.usage import NAME
from tests.fast.cli_tier_samples import AGES_AGO, BLOCK_BYTES, CHUNK_BYTES, ONE, TWO, Directory, Run, chunk, flip
from tests.fast.samples import make_name

ROOT = Path(__file__).resolve().parent.parent.parent


def swap(path: Path) -> None:
    """A right chunk, under another's name."""
    path.write_bytes(chunk(ONE, "prompt 1")[1])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "payload": (lambda path: flip(path, 4096 + 100), "damaged"),
    "last block": (lambda path: flip(path, 4096 + 2 * 8192 + BLOCK_BYTES - 1), "damaged"),
    "block table": (lambda path: flip(path, 512 + 40), "damaged"),
    "magic": (lambda path: flip(path, 0), "foreign"),
    "all zeros": (lambda path: path.write_bytes(bytes(CHUNK_BYTES)), "foreign"),
    "payload zeros": (lambda path: path.write_bytes(path.read_bytes()[:4096] + bytes(CHUNK_BYTES - 4096)), "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "truncated"),
    "half a header": (lambda path: os.truncate(path, 300), "truncated"),
    "half a payload": (lambda path: os.truncate(path, 4096 + 9000), "truncated"),
    "too long": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "foreign"),
    "huge": (lambda path: os.truncate(path, MAX_CHUNK_BYTES + 1), "foreign"),
    "another chunk": (swap, "foreign"),
}


def test_nothing_is_found_where_nothing_is_wrong(run: Run, directory: Directory) -> None:
    before = directory.files()
    flip(directory.path(0), 4096 + BLOCK_BYTES)  # Padding: no digest covers it, and no one reads it.
    for what in ("verify", "repair"):
        code, body = run(what)
        assert (code, body["findings"]) == (0, [])
        assert body["summary"]["chunks"] == 8
        assert body["summary"]["bytes"] == 8 * CHUNK_BYTES
    assert directory.files() == before
    assert "8 chunks" in run("verify", as_json=False)[1]


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_and_removed_and_nothing_else(run: Run, directory: Directory, what: str) -> None:
    damage, kind = DAMAGE[what]
    damage(directory.path(0))
    before = directory.files()
    code, body = run("verify")
    # A file that is shorter now is also less than was counted.
    assert (code, [found["kind"] for found in body["findings"] if found["kind"] != "usage"]) == (1, [kind])
    assert body["findings"][0]["place"] == str(directory.path(0).relative_to(directory.root))
    code, body = run("repair", "--dry-run")
    assert (code, body["findings"][0]["action"]) == (1, "would be repaired")
    assert directory.files() == before
    code, body = run("repair")
    assert (code, body["findings"][0]["action"]) == (0, "repaired")
    assert before - directory.files() == {str(directory.path(0).relative_to(directory.root))}
    assert run("verify")[0] == 0


def test_a_quick_look_reads_no_payload(run: Run, directory: Directory) -> None:
    flip(directory.path(0), 4096 + 100)
    flip(directory.path(1), 20)
    assert [found["place"][-200:] for found in run("verify", "--quick")[1]["findings"]] == [
        str(directory.path(1).relative_to(directory.root))[-200:]
    ]


def test_a_chunk_of_a_later_format_is_told_and_left(run: Run, directory: Directory) -> None:
    data = bytearray(directory.path(0).read_bytes())
    data[8] = 2
    directory.path(0).write_bytes(data)
    code, body = run("repair")
    assert (code, body["findings"][0]["kind"], body["findings"][0]["action"]) == (1, "version", "left")
    assert directory.path(0).exists()


def test_leftovers_are_collected_when_their_writer_must_be_dead(run: Run, directory: Directory) -> None:
    bucket = directory.path(0).parent
    for folder in (directory.root, bucket.parent, bucket):
        for text, when in ((".tmp-1-00", AGES_AGO), (".tmp-2-00", time.time()), (".tmp-3-00", time.time() + 10**6)):
            (folder / text).write_bytes(b"x")
            os.utime(folder / text, (when, when))
    code, body = run("repair")
    assert code == 0
    assert {found["kind"] for found in body["findings"]} == {"temporary"}
    assert len(body["findings"]) == 6
    assert [text for text in directory.files() if ".tmp" in text and ".tmp-2-00" not in text] == []
    assert directory.counted() == 8 * CHUNK_BYTES


def test_what_is_not_ours_stays_whatever_it_is_called(run: Run, directory: Directory, tmp_path: Path) -> None:
    name, _ = chunk(ONE, "another")
    bucket = directory.path(0).parent
    secret = tmp_path / "secret"
    secret.write_bytes(b"mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / name.text).write_bytes(b"mine")
    foreign = [
        directory.root / "notes.kv",
        directory.root / name.text,
        directory.root / ONE.folder / name.text,
        bucket / "\x1b[31mred.kv",
        bucket / os.fsdecode(b"\xff\xfe.kv"),
        bucket / (name.text + "~"),
        bucket / make_name(4, "misplaced").text,
    ]
    for path in foreign:
        path.write_bytes(b"mine")
        os.utime(path, (0, 0))
    links = [bucket / name.text, directory.root / ("0" * 32), directory.root / ONE.folder / "zzz", bucket / ".tmp-9"]
    for link, target in zip(links, (secret, elsewhere, elsewhere, secret), strict=True):
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(target)
    os.utime(bucket / ".tmp-9", (0, 0), follow_symlinks=False)
    planted = directory.root / ONE.folder / name.bucket
    planted.mkdir(exist_ok=True)
    os.mkfifo(planted / chunk(ONE, "another")[0].text)
    for command in (("verify",), ("repair",), ("evict", "--all"), ("stat",), ("ls",), ("ls", "--chunks")):
        run(*command)
    assert all(path.read_bytes() == b"mine" for path in (*foreign, secret, elsewhere / name.text))
    assert all(link.is_symlink() for link in links)
    assert directory.chunks(TWO) == 0
    assert run("stat")[1]["directories"][0]["foreign_files"] >= 5


def test_a_folder_in_the_place_of_a_chunk_or_a_bucket_is_harmless(run: Run, directory: Directory) -> None:
    directory.path(0).unlink()
    directory.path(0).mkdir()
    (directory.path(0) / "inside").write_bytes(b"mine")
    assert run("repair")[0] in (0, 1)
    assert run("evict", "--all")[0] == 0
    assert (directory.path(0) / "inside").read_bytes() == b"mine"


def test_a_chunk_of_another_user_is_told_and_left(run: Run, directory: Directory) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    os.chown(directory.path(0), 65_534, 65_534)
    code, body = run("repair")
    assert (code, body["findings"][0]["kind"], body["findings"][0]["action"]) == (1, "foreign", "left")
    assert directory.path(0).exists()
    # Where the directory is that user's, so are the chunks.
    os.chown(directory.root, 65_534, 65_534)
    assert run("repair")[0] == 0
    assert directory.path(0).exists()


def test_a_wrong_count_is_found_and_made_right(run: Run, directory: Directory) -> None:
    for content in (b"", b"x" * 32, (directory.root / NAME).read_bytes()[:-1] + b"\0"):
        (directory.root / NAME).write_bytes(content)
        code, body = run("verify")
        assert (code, [found["kind"] for found in body["findings"]]) == (1, ["usage"])
        assert run("repair")[0] == 0
        assert directory.counted() == 8 * CHUNK_BYTES
    (directory.root / NAME).unlink()
    assert run("repair")[0] == 0
    assert not (directory.root / NAME).exists(), "nobody counts here"


def test_damaged_records_are_told_and_left(run: Run, directory: Directory) -> None:
    (directory.root / ONE.folder / "policy.json").write_text("{")
    (directory.root / ONE.folder / "manifest.json").write_bytes(ONE.canonical_json + b" ")
    (directory.root / "quotas.json").write_text("[]")
    for what in ("verify", "repair"):
        code, body = run(what)
        assert (code, sorted(found["kind"] for found in body["findings"])) == (1, ["manifest", "policy", "policy"])
    for what in ("stat", "ls", "policy"):
        assert run(what)[0] == 1
        assert "cannot be used" in run(what, as_json=False)[1]


def test_a_folder_that_cannot_be_listed_is_a_finding(
    run: Run, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = directory.path(0).parent.name
    real = os.open

    def refuse(name: str, *rest: Any, **options: Any) -> int:
        if name == bucket:
            raise PermissionError(13, "Permission denied")
        return real(name, *rest, **options)

    monkeypatch.setattr("memkv_engines.tier.listing.os.open", refuse)
    code, body = run("verify")
    assert code == 1
    assert next(found for found in body["findings"] if found["kind"] == "unreadable")["why"] == "Permission denied"
    assert run("stat")[0] == 1


def test_a_chunk_that_cannot_be_read_is_a_finding_and_left(
    run: Run, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = directory.path(0).name
    real = os.open

    def refuse(name: str, *rest: Any, **options: Any) -> int:
        if name == text:
            raise OSError(5, "Input/output error")
        return real(name, *rest, **options)

    monkeypatch.setattr("memkv_engines.tier.check.os.open", refuse)
    code, body = run("repair")
    assert (code, body["findings"][0]["kind"], body["findings"][0]["action"]) == (1, "io_error", "left")
    assert directory.path(0).exists()


def test_it_works_beside_an_engine_that_writes(directory: Directory, run: Run) -> None:
    """A chunk that is rewritten between the look and the removal stays."""
    flip(directory.path(0), 20)
    data = chunk(ONE, "prompt 0")[1]
    real = examine.check_chunk

    def rewritten(entry: Any, *rest: Any, **options: Any) -> Any:
        try:
            return real(entry, *rest, **options)
        finally:
            if entry.place == f"{ONE.folder}/{directory.path(0).parent.name}":
                directory.path(0).with_suffix(".new").write_bytes(data)
                directory.path(0).with_suffix(".new").rename(directory.path(0))

    examine.check_chunk = rewritten  # type: ignore[assignment]
    try:
        code, body = run("repair")
    finally:
        examine.check_chunk = real
    assert (code, body["findings"][0]["action"]) == (1, "left")
    assert directory.path(0).read_bytes() == data


def test_memory_is_bounded_however_many_chunks_there_are(tmp_path: Path) -> None:
    """Ten thousand chunks and their findings: less than a megabyte more than for a few."""
    script = """
import contextlib, io, sys, tracemalloc
from memkv_engines.cli import main
from memkv_engines.cli.tier import examine, summary
class Sink(io.TextIOBase):
    def write(self, text): return len(text)
for what in (["verify"], ["ls", "--chunks"], ["stat"], ["evict", "--all", "--dry-run"]):
    tracemalloc.start()
    with contextlib.redirect_stdout(Sink()):
        main.main(["tier", *what, sys.argv[1], "--json"])
    print(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
"""
    peaks = []
    for count in (10, 5000):
        root = tmp_path / str(count)
        for number in range(count):
            name = make_name(4, f"p{number}")
            (root / ONE.folder / name.bucket).mkdir(parents=True, exist_ok=True)
            (root / ONE.folder / name.bucket / name.text).touch()
        done = subprocess.run(
            [sys.executable, "-c", script, str(root)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
        )
        peaks.append([int(line) for line in done.stdout.split()])
    assert len(peaks[0]) == len(peaks[1]) == 4
    assert all(many < few + 2_000_000 for few, many in zip(*peaks, strict=True)), peaks
