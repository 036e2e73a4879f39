"""Our patches on copies of an installed engine's files. The installed files themselves are only read."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from memkv_engines.cli.patch import command
from memkv_engines.cli.patch.files import look, read_patch, write
from memkv_engines.cli.patch.installed import Installed, find_engines, patches_of


def patches_for(engine: str) -> tuple[Installed, list[Path]]:
    """The engine that runs these tests, and our patches for its version."""
    (installed,) = find_engines(engine, None)
    return installed, patches_of(engine)[installed.version]


def copy_of_files(engine: str, patches: list[Path], folder: Path) -> dict[Path, bytes]:
    """Copies what patches change, and the version, to a folder; returns what was copied."""
    installed = find_engines(engine, None)[0].folder
    wanted = {Path(part.path) for path in patches for part in read_patch(path, engine).files}
    copied = {}
    for relative in sorted(wanted | {Path(engine, "_version.py")}):
        copied[folder / relative] = (installed / relative).read_bytes()
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        (folder / relative).write_bytes(copied[folder / relative])
    return copied


def apply_and_take_back(engine: str, version: str, folder: Path) -> None:
    """Hold the command to it: every patch for this version applies, leaves valid Python, and comes off to the byte."""
    installed, paths = patches_for(engine)
    assert installed.version == version
    copied = copy_of_files(engine, paths, folder)
    assert command.run("check", engine, str(folder), as_json=False) == 0
    assert command.run("apply", engine, str(folder), as_json=False) == 0
    changed = [path for path, content in copied.items() if path.read_bytes() != content]
    assert len(changed) == len(copied) - 1, "all but the version"
    for path in changed:
        compile(path.read_bytes(), path, "exec")
    assert command.run("revert", engine, str(folder), as_json=False) == 0
    assert {path: path.read_bytes() for path in copied} == copied


@contextlib.contextmanager
def stock_and_patched(engine: str, name: str, folder: Path) -> Iterator[tuple[ModuleType, ModuleType]]:
    """The module that a patch changes, imported twice from copies beside the engine's own: as it is, and patched."""
    _, paths = patches_for(engine)
    (path,) = (path for path in paths if path.stem == name)
    patch = read_patch(path, engine)
    (part,) = patch.files
    modules = []
    for kind in ("stock", "patched"):
        copy_of_files(engine, [path], folder / kind)
        if kind == "patched":
            write(patch, folder / kind, reverse=False)
            assert look(patch, folder / kind) == ("applied", "")
        # A name in the same package, so that relative imports find the engine's modules.
        dotted = ".".join(part.path.with_suffix("").parts) + f"_{kind}"
        spec = importlib.util.spec_from_file_location(dotted, folder / kind / part.path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[dotted] = module
        modules.append(module)
        spec.loader.exec_module(module)
    try:
        yield modules[0], modules[1]
    finally:
        for module in modules:
            del sys.modules[module.__name__]
