"""Unified diffs, taken strictly: each line that a hunk names is in the file to the byte, or nothing is done. No I/O.

A hunk belongs at the line it names. Where its lines are not there (another patch has moved them), it belongs at the one
place that has them all; two such places are a conflict. Hunks without a line to hold on to are refused, and so are
files that are made, removed or renamed: our patches change files that a release has.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from memkv_engines.errors import PatchError
from memkv_engines.limits import MAX_PATCH_BYTES

_LINE = re.compile(rb"[^\n]*\n|[^\n]+")
_HUNK = re.compile(rb"@@ -(\d{1,9})(?:,(\d{1,9}))? \+(\d{1,9})(?:,(\d{1,9}))? @@[^\n]*\n")
_NO_NEWLINE = b"\\ No newline at end of file"
_BETWEEN_FILES = (b"diff --git ", b"index ")


@dataclass(frozen=True)
class Hunk:
    """Consecutive lines, before and after, each with its newline.

    Attributes:
        header: the ``@@`` line, for messages.
        old_start: index of the first line before, from 0.
        new_start: the same after.
        old: the lines before.
        new: the lines after.
    """

    header: str
    old_start: int
    new_start: int
    old: tuple[bytes, ...]
    new: tuple[bytes, ...]


@dataclass(frozen=True)
class FilePatch:
    """The hunks of one file, in order; the path is relative and stays below where it starts."""

    path: PurePosixPath
    hunks: tuple[Hunk, ...]


@dataclass(frozen=True)
class Patch:
    """A parsed patch; the title is its first line."""

    title: str
    files: tuple[FilePatch, ...]


def parse(data: bytes, name: str) -> Patch:
    """Parse a patch.

    Args:
        data: the patch: some lines of text, then files.
        name: what to call it in messages.

    Raises:
        PatchError: it is damaged, too large, names a path that leads elsewhere, or does more than change files.
    """
    if len(data) > MAX_PATCH_BYTES:
        raise PatchError(f"patch {name}: {len(data)} bytes, at most {MAX_PATCH_BYTES} are taken")
    lines: list[bytes] = _LINE.findall(data)
    at = next((i for i, line in enumerate(lines) if line.startswith(b"--- ")), len(lines))
    title = lines[0].decode("utf-8", "replace").strip() if at else ""
    files: list[FilePatch] = []
    while at < len(lines):
        if lines[at].startswith(_BETWEEN_FILES):
            at += 1
            continue
        path, at = _parse_path(lines, at, name)
        hunks: list[Hunk] = []
        while at < len(lines) and lines[at].startswith(b"@@"):
            hunk, at = _parse_hunk(lines, at, name)
            hunks.append(hunk)
        files.append(FilePatch(path, _in_order(hunks, path, name)))
    if not files:
        raise PatchError(f"patch {name}: it changes no file")
    if len({file.path for file in files}) < len(files):
        raise PatchError(f"patch {name}: a file is named twice")
    return Patch(title, tuple(files))


def change(content: bytes, file: FilePatch, *, reverse: bool = False) -> bytes:
    """Apply the hunks of one file to its content, or take them back.

    Raises:
        PatchError: a hunk's lines are not there, or are there more than once; names file and hunk.
    """
    lines: list[bytes] = _LINE.findall(content)
    changed: list[bytes] = []
    done = 0
    for number, hunk in enumerate(file.hunks, 1):
        old, new, stated = hunk.old, hunk.new, hunk.old_start
        if reverse:
            old, new, stated = new, old, hunk.new_start
        place = _find(lines, old, stated, done)
        if place is None:
            raise PatchError(
                f"{file.path}: hunk {number} ({hunk.header}) does not match: the file is not the one this patch is for"
            )
        changed += lines[done:place]
        changed += new
        done = place + len(old)
    changed += lines[done:]
    if any(not line.endswith(b"\n") for line in changed[:-1]):
        raise PatchError(f"{file.path}: a line would lose its end")
    return b"".join(changed)


def _find(lines: list[bytes], wanted: tuple[bytes, ...], stated: int, start: int) -> int | None:
    """Where the lines are, at or after ``start``: at the stated index, else in the only place there is."""

    def here(index: int) -> bool:
        return lines[index] == wanted[0] and tuple(lines[index : index + len(wanted)]) == wanted

    if start <= stated < len(lines) and here(stated):
        return stated
    places = [index for index in range(start, len(lines) - len(wanted) + 1) if here(index)]
    return places[0] if len(places) == 1 else None


def _parse_path(lines: list[bytes], at: int, name: str) -> tuple[PurePosixPath, int]:
    if at + 1 >= len(lines) or not lines[at].startswith(b"--- ") or not lines[at + 1].startswith(b"+++ "):
        raise PatchError(f"patch {name}: line {at + 1} is neither a file nor a hunk")
    old, new = (_path(lines[at + i], prefix, name) for i, prefix in enumerate(("a", "b")))
    if old != new:
        raise PatchError(f"patch {name}: it renames {old} to {new}; only changes are taken")
    return old, at + 2


def _path(line: bytes, prefix: str, name: str) -> PurePosixPath:
    try:
        text = line[4:].decode("ascii").split("\t")[0].rstrip("\n")
    except UnicodeDecodeError:
        text = ""
    parts = text.split("/")
    plain = all(part not in ("", ".", "..") and re.fullmatch(r"[\w.+-]+", part, re.ASCII) for part in parts)
    if len(parts) < 3 or parts[0] != prefix or not plain:
        raise PatchError(f"patch {name}: {line[4:].rstrip()!r} is no path of a file below {prefix}/")
    return PurePosixPath(*parts[1:])


def _parse_hunk(lines: list[bytes], at: int, name: str) -> tuple[Hunk, int]:
    match = _HUNK.fullmatch(lines[at])
    if match is None:
        raise PatchError(f"patch {name}: line {at + 1} is no hunk header")
    header = lines[at].decode("utf-8", "replace").split(" @@")[0] + " @@"
    old_start, old_count, new_start, new_count = (1 if part is None else int(part) for part in match.groups())
    old: list[bytes] = []
    new: list[bytes] = []
    at += 1
    while at < len(lines) and (len(old) < old_count or len(new) < new_count or lines[at].startswith(_NO_NEWLINE)):
        kind, line = lines[at][:1], lines[at][1:]
        sides = {b" ": (old, new), b"-": (old,), b"+": (new,), b"\\": ()}.get(kind)
        if sides is None:
            break
        if kind == b"\\":
            _cut_newline(lines[at - 1][:1], old, new)
        for side in sides:
            side.append(line)
        at += 1
    if (len(old), len(new)) != (old_count, new_count):
        raise PatchError(
            f"patch {name}: hunk {header} has {len(old)} and {len(new)} lines instead of {old_count} and {new_count}"
        )
    if not old or not new or old_start < 1 or new_start < 1:
        raise PatchError(f"patch {name}: hunk {header} has no line to hold on to")
    return Hunk(header, old_start - 1, new_start - 1, tuple(old), tuple(new)), at


def _cut_newline(kind: bytes, old: list[bytes], new: list[bytes]) -> None:
    """The line just read is its file's last and has no newline."""
    if kind in (b" ", b"-") and old:
        old[-1] = old[-1].removesuffix(b"\n")
    if kind in (b" ", b"+") and new:
        new[-1] = new[-1].removesuffix(b"\n")


def _in_order(hunks: list[Hunk], path: PurePosixPath, name: str) -> tuple[Hunk, ...]:
    if not hunks:
        raise PatchError(f"patch {name}: no hunk for {path}")
    for before, after in itertools.pairwise(hunks):
        between = after.old_start - before.old_start - len(before.old)
        if between < 0 or between != after.new_start - before.new_start - len(before.new):
            raise PatchError(f"patch {name}: hunk {after.header} of {path} does not fit the one before it")
    if hunks[0].old_start != hunks[0].new_start:
        raise PatchError(f"patch {name}: hunk {hunks[0].header} of {path} starts at two different lines")
    return tuple(hunks)
