"""How far GPUs and the drives or network cards of a tier are from each other, in the words of ``nvidia-smi topo``.

Pure functions over texts and paths; ``read_topology`` collects them. Standard library only.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DISTANCES = ("PIX", "PXB", "PHB", "NODE", "SYS")
"""From near to far."""
MEANING = {
    "PIX": "behind one PCIe switch",
    "PXB": "behind PCIe switches",
    "PHB": "through the CPU's host bridge",
    "NODE": "across host bridges of one socket",
    "SYS": "across sockets",
}
_NEAR = ("PIX", "PXB")
_MAX_DEPTH = 8


@dataclass(frozen=True)
class PciDevice:
    """A device in sysfs: its name, its real path below ``/sys/devices``, and its NUMA node (-1: not told)."""

    name: str
    path: str
    numa_node: int = -1


@dataclass(frozen=True)
class Topology:
    """Distance of each GPU to each device of the tier; empty where nothing is known."""

    pairs: Mapping[tuple[str, str], str]

    def worst(self) -> tuple[str, str, str] | None:
        """GPU, device and distance of the pair that is furthest apart; None if no pair is known."""
        if not self.pairs:
            return None
        (gpu, device), distance = max(self.pairs.items(), key=lambda pair: DISTANCES.index(pair[1]))
        return gpu, device, distance

    def is_near(self) -> tuple[bool, str]:
        """Whether transfers between GPUs and devices stay behind PCIe switches, for all pairs, and why it is so.

        One answer for the host: ranks that disagreed would need both kinds of staging, and share the tier's devices.
        Beyond a switch a direct transfer crosses the CPU, where many root complexes are slower than a copy through host
        memory. Which are not was not measured on a GPU yet; ``staging_medium`` overrides.
        """
        worst = self.worst()
        if worst is None:
            return False, "how far the GPUs are from the tier's devices is not known"
        gpu, device, distance = worst
        return distance in _NEAR, f"{gpu} and {device} are {MEANING[distance]} ({distance})"


def parse_matrix(text: str) -> Topology:
    """Distances of GPUs to network cards from what ``nvidia-smi topo -m`` prints; what is not known is skipped."""
    columns: list[str] = []
    pairs: dict[tuple[str, str], str] = {}
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        words = line.split()
        if not columns:
            columns = [word for word in words if re.fullmatch(r"(GPU|NIC)\d+|mlx\S+", word)]
        elif words and re.fullmatch(r"GPU\d+", words[0]):
            for column, distance in zip(columns, words[1:], strict=False):
                if not column.startswith("GPU") and distance in DISTANCES:
                    pairs[words[0], column] = distance
    return Topology(pairs)


def distance(one: PciDevice, other: PciDevice) -> str | None:
    """Distance of two devices from their paths; None if one of them is no PCI device."""
    mine, theirs = _bridges(one.path), _bridges(other.path)
    if not mine or not theirs:
        return None
    if mine[0] != theirs[0]:
        same_socket = one.numa_node == other.numa_node and one.numa_node >= 0
        return "NODE" if same_socket else "SYS"
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine, theirs, strict=False)))
    if shared == 1:
        return "PHB"
    # What lies below the last bridge they share: with one switch, a downstream port and the device on either side.
    crossed = len(mine) + len(theirs) - 2 * shared
    return "PIX" if crossed <= 4 else "PXB"


def _bridges(path: str) -> list[str]:
    """Root, bridges and device of a path such as ``/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/nvme/nvme0``."""
    found = re.search(r"/(pci[0-9a-f]{4}:[0-9a-f]{2})((?:/[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f])+)", path)
    return [found.group(1), *found.group(2).strip("/").split("/")] if found else []


def topology_of(gpus: Sequence[PciDevice], devices: Sequence[PciDevice]) -> Topology:
    """Distances of all pairs; empty if one of them cannot be told, since the worst is what counts."""
    pairs: dict[tuple[str, str], str] = {}
    for gpu in gpus:
        for device in devices:
            found = distance(gpu, device)
            if found is None:
                return Topology({})
            pairs[gpu.name, device.name] = found
    return Topology(pairs)


def read_topology(folder: str | Path, root: Path = Path("/"), matrix: str = "") -> Topology:
    """Distances between this host's GPUs and what a folder lies on.

    Args:
        folder: the tier's directory.
        root: of the file system that holds ``sys``.
        matrix: what ``nvidia-smi topo -m`` prints, for a folder on no local block device: then network cards count.
    """
    gpus = [
        _pci_device(f"GPU {entry.name}", entry)
        for entry in sorted((root / "sys/bus/pci/drivers/nvidia").glob("[0-9a-f]*:*:*.*"))
    ]
    try:
        number = os.stat(folder).st_dev
    except OSError:
        return Topology({})
    if os.major(number) == 0:
        return parse_matrix(matrix)
    disks = _disks(root, root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}")
    return topology_of(gpus, [_pci_device(disk.name, disk) for disk in disks])


def _disks(root: Path, block: Path, depth: int = 0) -> list[Path]:
    """The disks below a block device: through partitions, device mapper and software RAID."""
    real = block.resolve()
    if depth > _MAX_DEPTH or not real.exists():
        return []
    if (real / "partition").exists():
        return _disks(root, real.parent, depth + 1)
    slaves = sorted((real / "slaves").glob("*"))
    return [disk for slave in slaves for disk in _disks(root, slave, depth + 1)] if slaves else [real]


def _pci_device(name: str, entry: Path) -> PciDevice:
    real = entry.resolve()
    for folder in (real, *real.parents):
        try:
            node = int((folder / "numa_node").read_text())
        except (OSError, ValueError):
            continue
        return PciDevice(name, str(real), node)
    return PciDevice(name, str(real))
