"""``memkv-engines patch``: the strict applier, writing all or nothing, and the command on made-up engines."""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from memkv_engines.cli import main
from memkv_engines.cli.patch import command, files
from memkv_engines.cli.patch.diff import change, parse
from memkv_engines.cli.patch.files import look, read_patch, write
from memkv_engines.cli.patch.installed import find_engines, patches_of
from memkv_engines.errors import ConfigError, PatchError
from memkv_engines.limits import MAX_PATCH_BYTES, MAX_PATCHED_FILE_BYTES

ROOT = Path(__file__).resolve().parent.parent.parent
OLD = b"".join(b"line %d\n" % number for number in range(40))
NEW = OLD.replace(b"line 5\n", b"LINE 5\n").replace(b"line 30\n", b"line 30\nline 30 b\n")


def lines_of(content: bytes) -> list[bytes]:
    """Lines with their ends; only a newline ends one."""
    *whole, last = content.split(b"\n")
    return [line + b"\n" for line in whole] + ([last] if last else [])


def diff(old: bytes, new: bytes, path: str = "vllm/core.py", context: int = 3) -> bytes:
    """A unified diff, made by the standard library."""

    made = difflib.diff_bytes(
        difflib.unified_diff, lines_of(old), lines_of(new), f"a/{path}".encode(), f"b/{path}".encode(), n=context
    )
    return b"".join(line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n" for line in made)


# --------------------------------------------------------------------------------------------------------- the applier

# Few different lines, so that the same ones are in many places; ends of line of all sorts.
LINES = st.lists(
    st.sampled_from([b"a\n", b"b\n", b"\n", b"c\r\n", b" d\n", b"\xff\n", b"--- x\n"]), min_size=1, max_size=30
)
CONTENT = st.builds(lambda lines, end: b"".join(lines) + end, LINES, st.sampled_from([b"", b"end"]))


@given(CONTENT, CONTENT, st.integers(1, 4))
def test_apply_then_revert_is_the_identity(old: bytes, new: bytes, context: int) -> None:
    assume(old != new)
    made = diff(old, new, context=context)
    try:
        patch = parse(b"title\n" + made, "p")
    except PatchError as error:
        # Where nothing is left on one side (`-1,n +0,0`), there is no line to hold on to.
        assert "no line to hold on to" in str(error)
        assert b" +0,0 @@" in made or b"@@ -0,0 " in made
        return
    (part,) = patch.files
    assert change(old, part) == new
    assert change(new, part, reverse=True) == old


@given(CONTENT, CONTENT, st.data())
def test_in_a_changed_file_exactly_the_named_lines_are_replaced_or_nothing(
    old: bytes, new: bytes, data: st.DataObject
) -> None:
    assume(old != new)
    try:
        (part,) = parse(b"title\n" + diff(old, new), "p").files
    except PatchError:
        return
    at = data.draw(st.integers(0, len(old) - 1))
    touched = old[:at] + data.draw(st.binary(max_size=3)) + old[at + 1 :]
    try:
        result = change(touched, part)
    except PatchError:
        return
    replaced = Counter(line for hunk in part.hunks for line in hunk.old)
    assert replaced <= Counter(lines_of(touched))
    added = Counter(line for hunk in part.hunks for line in hunk.new)
    assert Counter(lines_of(result)) == Counter(lines_of(touched)) - replaced + added


@given(st.binary(max_size=300))
def test_a_patch_of_any_bytes_is_parsed_or_refused(data: bytes) -> None:
    for start in (b"", b"--- a/vllm/x.py\n+++ b/vllm/x.py\n", b"--- a/vllm/x.py\n+++ b/vllm/x.py\n@@ -1 +1 @@\n"):
        try:
            parse(start + data, "p")
        except PatchError:
            pass


DAMAGEABLE = b"title\n\n" + diff(OLD, NEW)
# What is to be added can be anything: a patch has no checksum. All else is held against the file or against itself.
PLACES = [
    at
    for at in range(len(DAMAGEABLE))
    if not re.match(rb"\+(?!\+\+)", DAMAGEABLE[DAMAGEABLE.rfind(b"\n", 0, at) + 1 :][:3])
]


@given(st.sampled_from(PLACES), st.integers(0, 255))
def test_a_damaged_patch_is_refused_or_does_the_same(at: int, byte: int) -> None:
    damaged = DAMAGEABLE[:at] + bytes([byte]) + DAMAGEABLE[at + 1 :]
    try:
        result = change(OLD, parse(damaged, "p").files[0])
    except PatchError:
        return
    assert result == NEW


def test_a_hunk_that_other_patches_moved_is_found() -> None:
    (part,) = parse(b"t\n" + diff(OLD, NEW), "p").files
    assert change(b"first\n" + OLD, part) == b"first\n" + NEW
    assert change(b"first\n" + NEW, part, reverse=True) == b"first\n" + OLD


def test_a_hunk_that_fits_twice_and_not_at_its_line_is_refused() -> None:
    (part,) = parse(b"t\n" + diff(b"a\nb\n", b"a\nc\n"), "p").files
    with pytest.raises(PatchError, match=r"vllm/core\.py: hunk 1 \(@@ -1,2 \+1,2 @@\) does not match"):
        change(b"x\na\nb\na\nb\n", part)


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        (b"line 5", b"line Five", "hunk 1"),
        (b"line 31\n", b"line 31 \n", "hunk 2"),
        (b"line 8\n", b"", "hunk 1"),
        (b"line 28\n", b"line 28\r\n", "hunk 2"),
    ],
)
def test_no_fuzz(before: bytes, after: bytes, complaint: str) -> None:
    (part,) = parse(b"t\n" + diff(OLD, NEW), "p").files
    with pytest.raises(PatchError, match=complaint):
        change(OLD.replace(before, after), part)


HUNK = "@@ -1,2 +1,2 @@\n a\n-b\n+c\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "changes no file"),
        ("only words\n", "changes no file"),
        ("--- a/vllm/x.py\n", "neither a file nor a hunk"),
        ("--- a/vllm/x.py\n+++ b/vllm/x.py\n", "no hunk for"),
        ("--- a/vllm/x.py\n+++ b/vllm/y.py\n" + HUNK, "renames"),
        ("--- /dev/null\n+++ b/vllm/x.py\n" + HUNK, "no path of a file"),
        ("--- a/vllm/x.py\n+++ b/vllm/x.py\n@@ -1,3 +1,2 @@\n a\n-b\n+c\n", "instead of 3 and 2"),
        ("--- a/vllm/x.py\n+++ b/vllm/x.py\n@@ -1,2 +1,2 @@\n a\n-b\n", "instead of 2 and 2"),
        ("--- a/vllm/x.py\n+++ b/vllm/x.py\n@@ -0,0 +1 @@\n+c\n", "no line to hold on to"),
        ("--- a/vllm/x.py\n+++ b/vllm/x.py\n@@ one @@\n a\n", "no hunk header"),
        ("--- a/vllm/x.py\n+++ b/vllm/x.py\n@@ -1,2 +9,2 @@\n a\n-b\n+c\n", "two different lines"),
        ("--- a/vllm/x.py\n+++ b/vllm/x.py\n" + HUNK + HUNK, "does not fit the one before"),
        ("--- a/vllm/x.py\n+++ b/vllm/x.py\n" + HUNK + "trailing words\n", "neither a file nor a hunk"),
        (("--- a/vllm/x.py\n+++ b/vllm/x.py\n" + HUNK) * 2, "named twice"),
    ],
)
def test_a_malformed_patch_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(PatchError, match=complaint):
        parse(text.encode(), "0001-x.patch")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "a/../../etc/passwd",
        "a/vllm/../../x",
        "a//x",
        "a/./x",
        "a/vllm\\x",
        '"a/vllm/x"',
        "a/",
        "a/vllm/é",
        "vllm/x",
    ],
)
def test_a_hostile_path_is_refused(path: str) -> None:
    other = "b" + path[1:] if path.startswith("a/") else path
    with pytest.raises(PatchError, match="no path of a file"):
        parse(f"--- {path}\n+++ {other}\n{HUNK}".encode(), "p")


def test_a_patch_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "0001-x.patch"
    path.write_bytes(b"x" * (MAX_PATCH_BYTES + 1))
    with pytest.raises(PatchError, match="at most"):
        read_patch(path, "vllm")


# --------------------------------------------------------------------------------------------------- a made-up engine


class Made:
    """A folder with a made-up vLLM 9.1.0, and one with patches for it."""

    def __init__(self, root: Path) -> None:
        self.site, self.patches = root / "site", root / "patches"
        (self.site / "vllm").mkdir(parents=True)
        (self.site / "vllm" / "__init__.py").write_text("raise SystemExit('the engine was imported')\n")
        (self.site / "vllm" / "_version.py").write_text("__version__ = version = '9.1.0+cpu'\n")
        self.one, self.two = self.site / "vllm" / "core.py", self.site / "vllm" / "more.py"
        self.one.write_bytes(OLD)
        self.two.write_bytes(OLD)
        self.add("0001-both", b"Both files\n\nwhy\n" + diff(OLD, NEW) + diff(OLD, NEW, "vllm/more.py"))
        self.add("0002-also", b"The first once more\n" + diff(OLD, OLD.replace(b"line 16\n", b"")))

    def add(self, name: str, data: bytes, version: str = "9.1.0") -> None:
        folder = self.patches / "vllm" / version
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.patch").write_bytes(data)

    def run(self, what: str, *, engine: str | None = None, as_json: bool = False) -> int:
        return command.run(what, engine, str(self.site), as_json=as_json, folder=self.patches)

    def states(self, capsys: pytest.CaptureFixture[str], what: str = "check") -> tuple[int, dict[str, str]]:
        capsys.readouterr()
        code = self.run(what, as_json=True)
        (report,) = json.loads(capsys.readouterr().out)
        return code, {patch["name"]: patch["state"] for patch in report["patches"]}

    def leftovers(self) -> list[str]:
        known = {"__init__.py", "_version.py", "core.py", "more.py"}
        return sorted(path.name for path in (self.site / "vllm").iterdir() if path.name not in known)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def test_check_apply_revert(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.one.chmod(0o640)
    assert made.states(capsys) == (0, {"0001-both": "applies", "0002-also": "applies"})
    assert (made.one.read_bytes(), made.two.read_bytes()) == (OLD, OLD)
    assert made.states(capsys, "apply") == (0, {"0001-both": "applied", "0002-also": "applied"})
    assert made.one.read_bytes() == NEW.replace(b"line 16\n", b"")
    assert made.two.read_bytes() == NEW
    assert stat.S_IMODE(made.one.stat().st_mode) == 0o640
    assert made.states(capsys, "apply") == (0, {"0001-both": "applied", "0002-also": "applied"})
    assert made.one.read_bytes() == NEW.replace(b"line 16\n", b"")
    assert made.states(capsys, "revert") == (0, {"0001-both": "applies", "0002-also": "applies"})
    assert (made.one.read_bytes(), made.two.read_bytes()) == (OLD, OLD)
    assert made.leftovers() == []


def test_a_file_that_differs_gets_nothing_of_its_patch(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    mine = OLD.replace(b"line 31\n", b"my line\n")
    made.two.write_bytes(mine)
    code, states = made.states(capsys, "apply")
    assert (code, states) == (1, {"0001-both": "conflicts", "0002-also": "applied"})
    assert made.one.read_bytes() == OLD.replace(b"line 16\n", b"")
    assert made.two.read_bytes() == mine
    assert made.run("check") == 1
    told = capsys.readouterr().out
    assert "vllm/more.py: hunk 2 (@@ -29,6 +29,7 @@) does not match" in told


def test_half_a_patch_is_a_conflict(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.one.write_bytes(NEW)
    assert made.states(capsys, "apply")[1]["0001-both"] == "conflicts"
    assert made.states(capsys, "revert")[1]["0001-both"] == "conflicts"
    assert made.two.read_bytes() == OLD


def test_a_missing_file_is_a_conflict(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.two.unlink()
    assert made.states(capsys, "apply")[1]["0001-both"] == "conflicts"
    assert not made.two.exists()


def test_another_version_is_left_alone(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    (made.site / "vllm" / "_version.py").write_text("__version__ = '9.2.0'\n")
    assert made.states(capsys, "apply") == (0, {"0001-both": "other version", "0002-also": "other version"})
    assert made.one.read_bytes() == OLD
    made.run("check")
    assert "other versions, left alone: 9.1.0" in capsys.readouterr().out


def test_a_damaged_patch_stops_the_call_before_anything_is_written(made: Made) -> None:
    made.add("0003-damaged", b"title\n" + diff(OLD, NEW)[:-30])
    with pytest.raises(PatchError, match=r"0003-damaged\.patch"):
        made.run("apply")
    assert (made.one.read_bytes(), made.two.read_bytes()) == (OLD, OLD)


def test_a_patch_for_another_package_is_refused(made: Made) -> None:
    made.add("0003-other", b"title\n" + diff(OLD, NEW, "torch/core.py"))
    with pytest.raises(PatchError, match=r"torch/core\.py is not a file of vllm"):
        made.run("check")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_out_of_the_package_is_left_alone(made: Made, tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "core.py").write_bytes(OLD)
    if kind == "file":
        made.one.unlink()
        made.one.symlink_to(outside / "core.py")
    else:
        made.add("0001-both", b"title\n" + diff(OLD, NEW, "vllm/sub/core.py"))
        (made.site / "vllm" / "sub").symlink_to(outside)
    with pytest.raises(PatchError, match="link to elsewhere"):
        made.run("apply")
    assert (outside / "core.py").read_bytes() == OLD


def test_what_shares_the_file_is_not_touched(made: Made, tmp_path: Path) -> None:
    """Installers link one cached file into several environments."""
    os.link(made.one, tmp_path / "cached.py")
    assert made.run("apply") == 0
    assert made.one.read_bytes() != OLD
    assert (tmp_path / "cached.py").read_bytes() == OLD


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_keeps_its_owner(made: Made) -> None:
    os.chown(made.one, 4321, 4322)
    assert made.run("apply") == 0
    assert (made.one.stat().st_uid, made.one.stat().st_gid) == (4321, 4322)


def test_neither_a_directory_nor_a_huge_file_is_read(made: Made) -> None:
    made.two.unlink()
    made.two.mkdir()
    with pytest.raises(PatchError, match="no regular file"):
        made.run("check")
    made.two.rmdir()
    with made.two.open("wb") as file:
        file.truncate(MAX_PATCHED_FILE_BYTES + 1)
    with pytest.raises(PatchError, match="no regular file"):
        made.run("check")


@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_write_that_fails_leaves_every_file_as_it_was(
    made: Made, monkeypatch: pytest.MonkeyPatch, fails_at: int, reverse: bool
) -> None:
    patch = read_patch(made.patches / "vllm" / "9.1.0" / "0001-both.patch", "vllm")
    if reverse:
        write(patch, made.site, reverse=False)
    before = (made.one.read_bytes(), made.two.read_bytes())
    calls: list[object] = []
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(PatchError, match="every file is as it was"):
        write(patch, made.site, reverse=reverse)
    assert len(calls) == (1 if fails_at == 1 else 3), "the second has failed, the first was put back"
    assert (made.one.read_bytes(), made.two.read_bytes()) == before
    assert made.leftovers() == []


def test_no_room_for_the_second_file_writes_nothing(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = read_patch(made.patches / "vllm" / "9.1.0" / "0001-both.patch", "vllm")
    stage: Callable[[Path, bytes], Path] = files._stage

    def full(path: Path, content: bytes) -> Path:
        if path == made.two:
            raise OSError(28, "No space left on device", str(path))
        return stage(path, content)

    monkeypatch.setattr(files, "_stage", full)
    with pytest.raises(PatchError, match="No space left"):
        write(patch, made.site, reverse=False)
    assert (made.one.read_bytes(), made.two.read_bytes()) == (OLD, OLD)
    assert made.leftovers() == []


# -------------------------------------------------------------------------------------------- engines and the command


def test_the_version_may_come_from_metadata(made: Made) -> None:
    (made.site / "vllm" / "_version.py").unlink()
    with pytest.raises(ConfigError, match="cannot tell the version"):
        find_engines("vllm", str(made.site))
    info = made.site / "vllm-9.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.1.0+cu13\n")
    assert [found.version for found in find_engines(None, str(made.site))] == ["9.1.0"]


def test_the_running_python_finds_the_engine_without_importing_it(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(made.site)
    assert command.run("check", "vllm", None, as_json=True, folder=made.patches) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["engine"], report["version"], report["folder"]) == ("vllm", "9.1.0", str(made.site))
    assert "vllm" not in sys.modules


def test_the_command_line(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Ours are for other versions: nothing is touched, whatever is asked for.
    for what in ([], ["--check"], ["--apply"], ["--revert"]):
        assert main.main(["patch", *what, "--target", str(made.site)]) == 0
        assert "other versions, left alone" in capsys.readouterr().out
    assert made.one.read_bytes() == OLD
    assert main.main(["patch", "--target", str(tmp_path / "none")]) == 2
    assert "--target" in capsys.readouterr().err
    assert main.main(["patch", "--engine", "sglang", "--target", str(made.site)]) == 2
    for wrong in (["--apply", "--revert"], ["--engine", "torch"]):
        with pytest.raises(SystemExit) as stopped:
            main.main(["patch", *wrong])
        assert stopped.value.code == 2


def test_no_heavy_import(made: Made) -> None:
    code = (
        "import sys; from memkv_engines.cli import main; code = main.main(sys.argv[1:]); "
        "print(sorted({'numpy', 'torch', 'vllm', 'msgspec'} & sys.modules.keys())); sys.exit(code)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "patch", "--target", str(made.site)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (0, "[]"), ended.stderr


# ----------------------------------------------------------------------------------------------------- our own patches

OURS = [(engine, path) for engine in ("vllm", "sglang") for paths in patches_of(engine).values() for path in paths]


@pytest.mark.parametrize(("engine", "path"), OURS, ids=[path.stem for _, path in OURS])
def test_our_patches_are_well_formed_and_described(engine: str, path: Path) -> None:
    patch = read_patch(path, engine)
    assert 20 <= len(patch.title) <= 100
    described = (ROOT / "patches" / "README.md").read_text()
    assert f"{engine}/{path.parent.name}/{path.stem}" in described


def test_our_patches_are_there_and_numbered() -> None:
    assert len(OURS) >= 5
    for engine in ("vllm", "sglang"):
        for paths in patches_of(engine).values():
            assert [int(path.name[:4]) for path in paths] == list(range(1, len(paths) + 1))


def test_the_wheel_takes_them_along() -> None:
    assert '"patches" = "memkv_engines/patches"' in (ROOT / "pyproject.toml").read_text()


def test_a_package_without_its_patches_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from memkv_engines.cli.patch import installed

    monkeypatch.setattr(installed, "_FOLDERS", (tmp_path / "none",))
    with pytest.raises(PatchError, match="install it anew"):
        patches_of("vllm")


def test_look_prefers_applied(made: Made) -> None:
    """A line added between equal ones: both directions match, and a second application would add another."""
    once, twice = b"x\n" * 8, b"x\n" * 9
    made.one.write_bytes(twice)
    made.add("0003-more", b"title\n" + diff(once, twice))
    patch = read_patch(made.patches / "vllm" / "9.1.0" / "0003-more.patch", "vllm")
    assert look(patch, made.site) == ("applied", "")
