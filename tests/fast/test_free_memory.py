"""Memory that a machine or a container does not have is refused before an engine starts with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from memkv_engines.doors.free_memory import require_memory
from memkv_engines.errors import ConfigError
from memkv_engines.limits import GIB


def machine(root: Path, free_kib: int, **group: str) -> Path:
    """A root with what the kernel says of the machine, and of the control group."""
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(f"MemTotal:       99999999 kB\nMemAvailable:   {free_kib} kB\n")
    (root / "sys/fs/cgroup").mkdir(parents=True)
    for name, text in group.items():
        (root / "sys/fs/cgroup" / name.replace("_", ".", 1)).write_text(text)
    return root


def test_the_machine_bounds(tmp_path: Path) -> None:
    root = machine(tmp_path, free_kib=4 << 20)
    require_memory("memory_bytes", 4 * GIB, root)
    with pytest.raises(ConfigError, match=r"memory_bytes=4294967297 \(4.0 GiB for each worker\), but 4.0 GiB .* less"):
        require_memory("memory_bytes", 4 * GIB + 1, root)


def test_the_container_bounds_and_gives_back_its_caches(tmp_path: Path) -> None:
    stat = f"anon 1\ninactive_file {GIB}\nactive_file 5\n"
    root = machine(tmp_path, 64 << 20, memory_max=f"{8 * GIB}\n", memory_current=f"{6 * GIB}\n", memory_stat=stat)
    require_memory("memory_bytes", 3 * GIB, root)
    with pytest.raises(ConfigError, match=r"3\.0 GiB of memory are free"):
        require_memory("memory_bytes", 3 * GIB + 1, root)


def test_a_group_without_a_limit_does_not_bound(tmp_path: Path) -> None:
    root = machine(tmp_path, 4 << 20, memory_max="max\n", memory_current=f"{6 * GIB}\n")
    require_memory("memory_bytes", 4 * GIB, root)


@pytest.mark.parametrize("told", ["", "MemAvailable: much kB\n", "MemAvailable: -5 kB\n", "MemAvailable: 5\n"])
def test_what_is_unknown_refuses_nothing(tmp_path: Path, told: str) -> None:
    machine(tmp_path, 0, memory_max="5", memory_current="less").joinpath("proc/meminfo").write_text(told)
    require_memory("memory_bytes", 1 << 60, tmp_path)
    require_memory("memory_bytes", 1 << 60, tmp_path / "nothing")


def test_this_machine_has_a_little() -> None:
    require_memory("memory_bytes", 1)
    with pytest.raises(ConfigError):
        require_memory("memory_bytes", 1 << 60)
