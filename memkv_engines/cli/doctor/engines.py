"""Which engines are here, and which of our doors fit them."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from memkv_engines.cli.doctor.finding import NOTE, OK, PROBLEM, Finding

AREA = "engines"
# Distribution, versions a door was run with, versions it was only checked against, what to set.
DOORS = (
    ("vllm", ("0.32",), ("0.33",), "--kv-transfer-config with kv_connector MemKVConnector"),
    ("sglang", ("0.5.23",), (), "--hicache-storage-backend dynamic with MemKVHiCache"),
    ("lmcache", ("0.5.6",), (), "--l2-adapter plugin with MemKVL2Adapter, or storage_plugins with MemKVStoragePlugin"),
)
NEEDED = ("numpy", "xxhash", "msgspec", "pyyaml")
LIBRARIES = (
    "torch",
    "cryptography",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "kvikio-cu12",
    "kvikio-cu13",
    "nixl-cu12",
    "nixl-cu13",
)


def version_of(distribution: str) -> str:
    """Version of an installed distribution, empty if there is none. Imports nothing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def check() -> Iterator[Finding]:
    """Python, our own needs, engines."""
    yield Finding(AREA, "python", OK, f"{platform.python_version()} ({sys.executable})")
    missing = [name for name in NEEDED if not version_of(name)]
    if missing:
        yield Finding(AREA, "memkv-engines", PROBLEM, f"lacks {', '.join(missing)}", next="pip install memkv-engines")
    else:
        yield Finding(AREA, "memkv-engines", OK, version_of("memkv-engines") or "used from its source folder")
    found = [finding for door in DOORS for finding in _door(*door)]
    yield from found
    if not found:
        yield Finding(
            AREA, "doors", NOTE, "no engine in this environment", next="run doctor with the engine's own Python"
        )
    others = [f"{name} {version_of(name)}" for name in LIBRARIES if version_of(name)]
    yield Finding(AREA, "libraries", OK, ", ".join(others) or "none of torch, cryptography, cupy, kvikio, nixl")


def _door(name: str, run: tuple[str, ...], checked: tuple[str, ...], option: str) -> Iterator[Finding]:
    version = version_of(name)
    if not version:
        return
    if _is_one_of(version, run):
        yield Finding(AREA, name, OK, version, "the door was tested with this version", f"start it with {option}")
    elif _is_one_of(version, checked):
        why = "the door was checked against this version's sources, not run with it"
        yield Finding(AREA, name, NOTE, version, why, f"try it, or install {name} {run[-1]}")
    else:
        known = ", ".join((*run, *checked))
        why = f"the door is untested with this version; tested: {known}"
        yield Finding(AREA, name, NOTE, version, why, f"install {name} {run[-1]}, or try it and tell us")


def _is_one_of(version: str, prefixes: tuple[str, ...]) -> bool:
    return any(version == prefix or version.startswith((f"{prefix}.", f"{prefix}+")) for prefix in prefixes)
