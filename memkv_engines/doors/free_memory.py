"""Whether the machine has the memory that is asked for: the kernel would end an engine later, in the middle of work."""

from __future__ import annotations

import re
from pathlib import Path

from memkv_engines.errors import ConfigError
from memkv_engines.limits import GIB


def require_memory(key: str, wanted_bytes: int, root: Path = Path("/")) -> None:
    """Refuse what is larger than the memory that is free now; where that is unknown, nothing is refused.

    Args:
        key: of the configuration that asks for it.
        wanted_bytes: how much.
        root: of the file system that tells.

    Raises:
        ConfigError: less is free. Others may take what is free now: nothing is promised for later.
    """
    free_bytes = min(_free_on_machine(root), _free_in_group(root))
    if wanted_bytes > free_bytes:
        raise ConfigError(
            f"{key}={wanted_bytes} ({wanted_bytes / GIB:.1f} GiB for each worker), but {free_bytes / GIB:.1f} GiB of "
            f"memory are free: give {key} less, or the engine's host more"
        )


def _free_on_machine(root: Path) -> float:
    found = re.search(r"^MemAvailable:\s+(\d{1,15}) kB$", _text(root / "proc/meminfo"), re.ASCII | re.MULTILINE)
    return int(found[1]) * 1024 if found else float("inf")


def _free_in_group(root: Path) -> float:
    """Of the control group that a container sees as its root; what it can take back from caches counts as free."""
    group = root / "sys/fs/cgroup"
    limit, used = _text(group / "memory.max").strip(), _text(group / "memory.current").strip()
    if not (limit.isdecimal() and used.isdecimal()):
        return float("inf")
    cached = re.search(r"^inactive_file (\d{1,18})$", _text(group / "memory.stat"), re.ASCII | re.MULTILINE)
    return int(limit) - int(used) + (int(cached[1]) if cached else 0)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
