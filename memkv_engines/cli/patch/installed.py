"""Which engines are installed, in which version, and which patches we have for them. Nothing is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from memkv_engines.cli.patch import ENGINES
from memkv_engines.errors import ConfigError, PatchError

_PACKAGE = Path(__file__).resolve().parents[2]
# In an installed package, in a checkout.
_FOLDERS = (_PACKAGE / "patches", _PACKAGE.parent / "patches")
_VERSION = re.compile(r"^__version__ = (?:version = )?['\"]([^'\"]{1,100})['\"]", re.MULTILINE)


@dataclass(frozen=True)
class Installed:
    """An engine on this machine.

    Attributes:
        engine: its package's name.
        version: public version, without what a build adds (``+cpu``).
        folder: what holds the package: paths in patches start here.
    """

    engine: str
    version: str
    folder: Path


def find_engines(engine: str | None, target: str | None) -> list[Installed]:
    """The engines to look at.

    Args:
        engine: only this one; None for all that are there.
        target: the folder that holds the packages; None for where the running Python finds them.

    Raises:
        ConfigError: there is none, or its version is unknown.
    """
    found = []
    for name in [engine] if engine else ENGINES:
        folder = Path(target).absolute() if target is not None else _folder_of(name)
        if folder is not None and (folder / name).is_dir():
            found.append(Installed(name, _version_of(name, folder), folder))
    if not found:
        where = target or "this Python's path"
        raise ConfigError(
            f"no {engine or ' and no '.join(ENGINES)} in {where}: run this in the engine's environment, or name the "
            "folder that holds its package with --target"
        )
    return found


def patches_of(engine: str, folder: Path | None = None) -> dict[str, list[Path]]:
    """Our patches for one engine: version to files, in the order in which they are applied.

    Args:
        engine: the package's name.
        folder: of all patches; None for the one that came with this package.

    Raises:
        PatchError: they did not come with this package.
    """
    root = folder or next((place for place in _FOLDERS if place.is_dir()), None)
    if root is None:
        raise PatchError("the patches are not beside this package: install it anew")
    versions = sorted((root / engine).iterdir()) if (root / engine).is_dir() else []
    return {version.name: sorted(version.glob("*.patch")) for version in versions if version.is_dir()}


def _folder_of(engine: str) -> Path | None:
    spec = importlib.util.find_spec(engine)  # of a top-level name: looks for it, does not run it
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent.parent


def _version_of(engine: str, folder: Path) -> str:
    try:
        written = (folder / engine / "_version.py").read_text(encoding="utf-8", errors="replace")
    except OSError:
        written = ""
    match = _VERSION.search(written)
    if match:
        return match[1].split("+")[0]
    for distribution in importlib.metadata.distributions(name=engine, path=[str(folder)]):
        return distribution.version.split("+")[0]
    raise ConfigError(f"cannot tell the version of the {engine} in {folder}: no _version.py and no metadata there")
