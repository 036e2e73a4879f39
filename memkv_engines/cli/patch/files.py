"""Patches and the engine's files: what fits, and writing all of a patch or nothing.

A file is replaced by a rename and keeps its owner and mode. A copy that shares the old file (installers link files of
several environments together) is therefore not touched.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path, PurePosixPath

from memkv_engines.cli.patch.diff import FilePatch, Patch, change, parse
from memkv_engines.errors import PatchError
from memkv_engines.limits import MAX_PATCH_BYTES, MAX_PATCHED_FILE_BYTES


def read_patch(path: Path, engine: str) -> Patch:
    """Read and parse a patch that may change the files of one engine only.

    Raises:
        PatchError: it cannot be read, is damaged, or names another package's file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PATCH_BYTES + 1)
    except OSError as error:
        raise PatchError(f"patch {path.name}: {error.strerror}") from error
    patch = parse(data, path.name)
    for part in patch.files:
        if part.path.parts[0] != engine:
            raise PatchError(f"patch {path.name}: {part.path} is not a file of {engine}")
    return patch


def look(patch: Patch, folder: Path) -> tuple[str, str]:
    """What can be done with a patch: ``applies``, ``applied`` or ``conflicts``, and why it conflicts.

    Raises:
        PatchError: a file cannot be read.
    """
    before = {file.path: _read(folder, file.path) for file in patch.files}
    if any(content is None for content in before.values()):
        missing = next(path for path, content in before.items() if content is None)
        return "conflicts", f"{missing} is not there"
    problem = ""
    # Taking back goes first: where both would match, applying once more would do it twice.
    for state, reverse in (("applied", True), ("applies", False)):
        try:
            for file in patch.files:
                change(before[file.path] or b"", file, reverse=reverse)
            return state, ""
        except PatchError as error:
            problem = str(error)
    return "conflicts", problem


def write(patch: Patch, folder: Path, *, reverse: bool) -> None:
    """Apply a patch, or take it back: all of its files or none.

    Raises:
        PatchError: it does not fit or cannot be written; every file is as it was.
    """
    contents = [(file, _read_there(folder, file)) for file in patch.files]
    changed = [(folder / file.path, old, change(old, file, reverse=reverse)) for file, old in contents]
    staged: list[tuple[Path, Path, Path]] = []
    try:
        # What would be put back lies ready before the first file is replaced: going back needs no room on the device.
        for path, old, new in changed:
            staged.append((path, _stage(path, new), _stage(path, old)))
        _replace(staged)
    except OSError as error:
        raise PatchError(f"cannot write {error.filename}: {error.strerror}; every file is as it was") from error
    finally:
        for _, *temporaries in staged:
            for temporary in temporaries:
                temporary.unlink(missing_ok=True)


def _replace(staged: list[tuple[Path, Path, Path]]) -> None:
    replaced: list[tuple[Path, Path]] = []
    try:
        for path, after, before in staged:
            os.replace(after, path)
            replaced.append((path, before))
    except OSError:
        for path, before in replaced:
            os.replace(before, path)
        raise


def _stage(path: Path, content: bytes) -> Path:
    """A file beside another, with its owner, its mode and this content."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        facts, made = path.stat(), os.stat(name)
        if (facts.st_uid, facts.st_gid) != (made.st_uid, made.st_gid):
            os.chown(name, facts.st_uid, facts.st_gid)
        os.chmod(name, stat.S_IMODE(facts.st_mode))
    except OSError:
        os.unlink(name)
        raise
    return Path(name)


def _read_there(folder: Path, file: FilePatch) -> bytes:
    content = _read(folder, file.path)
    if content is None:
        raise PatchError(f"{file.path} is not there")
    return content


def _read(folder: Path, relative: PurePosixPath) -> bytes | None:
    """A regular file's content, None where there is none.

    Raises:
        PatchError: it cannot be read, is too large, or a link on its way leads elsewhere.
    """
    path = folder / relative
    try:
        if path.resolve() != folder.resolve() / relative:
            raise PatchError(f"{relative} is a link to elsewhere, or in a folder that is: it is left alone")
        facts = path.lstat()
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_PATCHED_FILE_BYTES:
            raise PatchError(f"{relative} is no regular file of at most {MAX_PATCHED_FILE_BYTES} bytes")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise PatchError(f"cannot read {relative}: {error.strerror}") from error
