"""Which NIXL is installed, whether it may be used, and why a plugin of it does not load."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

MIN_VERSION = (1, 5, 0)
# What NIXL's own plugins have at the head of their tables.
PLUGIN_API_VERSION = 1
DISTRIBUTIONS = ("nixl-cu13", "nixl-cu12", "nixl")


def installed_version() -> str:
    """Version of the installed NIXL, empty if there is none. Imports nothing."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def why_unusable(version: str) -> str:
    """What speaks against a version of NIXL, empty for nothing."""
    if not version:
        return "NIXL is not installed: pip install nixl[cu13] (or --no-deps nixl nixl-cu13, where torch is not wanted)"
    if tuple(int(part) for part in re.findall(r"\d{1,9}", version)[:3]) < MIN_VERSION:
        return f"NIXL {version} reports short reads as done, with stale bytes behind them: install 1.5.0 or later"
    return ""


def plugin_folders() -> list[Path]:
    """Where NIXL looks for plugins: ``NIXL_PLUGIN_DIR`` alone if it is set, else beside the installed wheel."""
    folder = os.environ.get("NIXL_PLUGIN_DIR")
    if folder:
        return [Path(folder)]
    for name in DISTRIBUTIONS:
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue
        # Wheels hold the plugins twice; NIXL loads those below the hidden folder, and only there are their libraries.
        wanted = [f for f in files if f.name.startswith("libplugin_")]
        hidden = [f for f in wanted if f.parts[0].startswith(".")]
        folders = {Path(str(f.locate())).parent for f in hidden or wanted}
        if folders:
            return sorted(folders)
    return []


def why_missing(plugin: str, available: Sequence[str]) -> str:
    """Why a plugin cannot be used: there is no such file, or the loader's own words against it. Loads the library."""
    for folder in plugin_folders():
        path = folder / f"libplugin_{plugin}.so"
        if path.is_file():
            try:
                return _why_not_started(ctypes.CDLL(str(path)))
            except OSError as error:
                return str(error)
    where = ", ".join(map(str, plugin_folders())) or "no folder"
    return f"no libplugin_{plugin}.so in {where}; there are {', '.join(sorted(available))}"


def _why_not_started(library: ctypes.CDLL) -> str:
    """What NIXL had against a plugin that can be loaded; asks it as NIXL just did, for its table of functions."""
    if not hasattr(library, "nixl_plugin_init"):
        return "it is no plugin of NIXL: it has no nixl_plugin_init"
    library.nixl_plugin_init.restype = ctypes.POINTER(ctypes.c_int)
    table = library.nixl_plugin_init()
    if table and table[0] != PLUGIN_API_VERSION:
        return f"it has plugin API version {table[0]}, and NIXL {installed_version()} takes another"
    return "it loads, and refuses to start"
