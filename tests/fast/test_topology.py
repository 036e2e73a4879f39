"""Distances between GPUs and drives, from texts as several machines print them.

Written after the documented formats of ``nvidia-smi topo -m`` and of sysfs; no such machine was at hand.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memkv_engines.transports import topology
from memkv_engines.transports.topology import DISTANCES, PciDevice, Topology, distance, parse_matrix, read_topology

# Eight GPUs on two sockets, two to a switch that they share with a network card.
TWO_SOCKETS = """
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tNV18\tNV18\tPXB\tSYS\t0-47,96-143\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tNV18\tPXB\tSYS\t0-47,96-143\t0\t\tN/A
GPU2\tNV18\tNV18\t X \tNV18\tSYS\tPIX\t48-95,144-191\t1\t\tN/A
GPU3\tNV18\tNV18\tNV18\t X \tSYS\tPIX\t48-95,144-191\t1\t\tN/A
NIC0\tPXB\tPXB\tSYS\tSYS\t X \tSYS
NIC1\tSYS\tSYS\tPIX\tPIX\tSYS\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  PIX  = Connection traversing at most a single PCIe bridge

NIC Legend:

  NIC0: mlx5_0
  NIC1: mlx5_1
"""

ONE_SWITCH = """
\tGPU0\tmlx5_0\tCPU Affinity\tNUMA Affinity
GPU0\t X \tPIX\t0-31\tN/A
mlx5_0\tPIX\t X
"""

NO_NICS = """
        GPU0    GPU1    CPU Affinity    NUMA Affinity
GPU0     X      NODE    0-31            N/A
GPU1    NODE     X      0-31            N/A
"""


def test_a_matrix_of_two_sockets() -> None:
    found = parse_matrix(TWO_SOCKETS)
    assert len(found.pairs) == 8
    assert found.pairs["GPU0", "NIC0"] == "PXB"
    assert found.pairs["GPU3", "NIC1"] == "PIX"
    assert found.worst() in [(f"GPU{g}", n, "SYS") for g, n in ((0, "NIC1"), (1, "NIC1"), (2, "NIC0"), (3, "NIC0"))]
    near, why = found.is_near()
    assert not near
    assert "across sockets (SYS)" in why


def test_a_matrix_of_one_switch() -> None:
    found = parse_matrix(ONE_SWITCH)
    assert found.pairs == {("GPU0", "mlx5_0"): "PIX"}
    assert found.is_near() == (True, "GPU0 and mlx5_0 are behind one PCIe switch (PIX)")


@pytest.mark.parametrize("text", [NO_NICS, "", "garbage", "GPU0 GPU1\n\n\x00", "Failed to initialize NVML"])
def test_a_matrix_that_says_nothing_of_cards(text: str) -> None:
    assert parse_matrix(text).pairs == {}
    assert parse_matrix(text).is_near()[0] is False


ROOT_0, ROOT_1 = "/sys/devices/pci0000:00", "/sys/devices/pci0000:80"
SWITCH = f"{ROOT_0}/0000:00:01.0/0000:01:00.0"
PLACES = {
    "gpu": (f"{SWITCH}/0000:02:00.0/0000:03:00.0", 0),
    "drive at the same switch": (f"{SWITCH}/0000:02:04.0/0000:04:00.0/nvme/nvme0/nvme0n1", 0),
    "drive at a switch below": (
        f"{SWITCH}/0000:02:08.0/0000:05:00.0/0000:06:00.0/0000:07:00.0/nvme/nvme1/nvme1n1",
        0,
    ),
    "drive at another root port": (f"{ROOT_0}/0000:00:03.0/0000:09:00.0/nvme/nvme2/nvme2n1", 0),
    "drive at another host bridge": ("/sys/devices/pci0000:40/0000:40:01.0/0000:41:00.0/nvme/nvme3/nvme3n1", 0),
    "drive at the other socket": (f"{ROOT_1}/0000:80:01.0/0000:81:00.0/nvme/nvme4/nvme4n1", 1),
    "drive without a node": ("/sys/devices/pci0000:40/0000:40:01.0/0000:41:00.0/nvme/nvme3/nvme3n1", -1),
    "drive of a multipath subsystem": ("/sys/devices/virtual/nvme-subsystem/nvme-subsys0/nvme5n1", -1),
}


def place(name: str) -> PciDevice:
    return PciDevice(name, *PLACES[name])


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("drive at the same switch", "PIX"),
        ("drive at a switch below", "PXB"),
        ("drive at another root port", "PHB"),
        ("drive at another host bridge", "NODE"),
        ("drive at the other socket", "SYS"),
        ("drive without a node", "SYS"),
        ("drive of a multipath subsystem", None),
    ],
)
def test_distances_from_paths(where: str, expected: str | None) -> None:
    assert distance(place("gpu"), place(where)) == expected
    assert distance(place(where), place("gpu")) == expected


def test_the_worst_pair_decides_for_the_host() -> None:
    near, far = place("drive at the same switch"), place("drive at the other socket")
    assert topology.topology_of([place("gpu")], [near]).is_near()[0]
    assert not topology.topology_of([place("gpu")], [near, far]).is_near()[0]
    assert topology.topology_of([place("gpu")], [near, place("drive of a multipath subsystem")]).pairs == {}
    assert topology.topology_of([], [near]).is_near() == (
        False,
        "how far the GPUs are from the tier's devices is not known",
    )


@pytest.mark.parametrize("worst", DISTANCES)
def test_only_switches_are_near(worst: str) -> None:
    assert Topology({("g", "a"): "PIX", ("g", "b"): worst}).is_near()[0] == (worst in ("PIX", "PXB"))


# --------------------------------------------------------------------------------------------------------------- sysfs


class Sysfs:
    """A tree as the kernel lays it out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.block = root / "sys/dev/block"
        self.block.mkdir(parents=True)

    def device(self, path: str, node: int = 0) -> Path:
        real = self.root / path.lstrip("/")
        real.mkdir(parents=True, exist_ok=True)
        bus_device = next(p for p in (real, *real.parents) if ":" in p.name)
        (bus_device / "numa_node").write_text(f"{node}\n")
        return real

    def gpu(self, path: str, node: int = 0) -> None:
        real = self.device(path, node)
        driver = self.root / "sys/bus/pci/drivers/nvidia"
        driver.mkdir(parents=True, exist_ok=True)
        (driver / real.name).symlink_to(real)
        (driver / "bind").touch()

    def number(self, folder: Path, block: Path) -> None:
        number = os.stat(folder).st_dev
        (self.block / f"{os.major(number)}:{os.minor(number)}").symlink_to(block)


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    sysfs = Sysfs(tmp_path / "root")
    sysfs.gpu(*PLACES["gpu"])
    return sysfs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if os.major(os.stat(tmp_path).st_dev) == 0:
        pytest.skip("the temporary folder is on no block device")
    return tmp_path


def test_a_partition_of_a_drive(sysfs: Sysfs, folder: Path) -> None:
    disk = sysfs.device(*PLACES["drive at the same switch"])
    (disk / "nvme0n1p1").mkdir()
    (disk / "nvme0n1p1/partition").write_text("1")
    sysfs.number(folder, disk / "nvme0n1p1")
    assert read_topology(folder, sysfs.root).pairs == {("GPU 0000:03:00.0", "nvme0n1"): "PIX"}


def test_a_software_raid_over_two_drives(sysfs: Sysfs, folder: Path) -> None:
    disks = [sysfs.device(*PLACES[f"drive at {where}"]) for where in ("the same switch", "another root port")]
    raid = sysfs.root / "sys/devices/virtual/block/md0"
    (raid / "slaves").mkdir(parents=True)
    for disk in disks:
        (raid / "slaves" / disk.name).symlink_to(disk)
    sysfs.number(folder, raid)
    found = read_topology(folder, sysfs.root)
    assert found.pairs == {("GPU 0000:03:00.0", "nvme0n1"): "PIX", ("GPU 0000:03:00.0", "nvme2n1"): "PHB"}
    assert not found.is_near()[0]


def test_a_loop_among_devices_ends(sysfs: Sysfs, folder: Path) -> None:
    mapped = sysfs.root / "sys/devices/virtual/block/dm-0"
    (mapped / "slaves").mkdir(parents=True)
    (mapped / "slaves/dm-0").symlink_to(mapped)
    sysfs.number(folder, mapped)
    assert read_topology(folder, sysfs.root).pairs == {}


def test_nothing_is_known_of_a_folder_that_is_not_there(sysfs: Sysfs, tmp_path: Path) -> None:
    assert read_topology(tmp_path / "nowhere", sysfs.root).pairs == {}


def test_a_network_mount_goes_by_the_cards(sysfs: Sysfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology.os, "major", lambda _: 0)
    assert read_topology(tmp_path, sysfs.root, ONE_SWITCH).pairs == {("GPU0", "mlx5_0"): "PIX"}
    assert read_topology(tmp_path, sysfs.root).pairs == {}


def test_this_machine_can_be_asked(tmp_path: Path) -> None:
    read_topology(tmp_path)
