"""Which transport moves the bytes, and where they are staged: decided once per host, with its reason.

``decide`` is a pure function of the policy, of what is installed and of the topology. ``python -m
memkv_engines.transports.select FOLDER [KEY=VALUE ...]`` prints its answer as JSON, for ``doctor``, with the
configuration that environment and configuration file give.

The scheduler's I/O process only reads headers: it always uses posix.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memkv_engines.config import Config, load_config, split_paths
from memkv_engines.errors import ConfigError, MemKVError
from memkv_engines.limits import ALIGN_BYTES, GDS_PROBE_TIMEOUT_S
from memkv_engines.transports import gds as gds_module
from memkv_engines.transports import nixl_install
from memkv_engines.transports.base import FileTransport
from memkv_engines.transports.files import prove
from memkv_engines.transports.gds import COMPAT, GPUDIRECT, GdsTransport
from memkv_engines.transports.nixl import GDS_PLUGINS, POSIX, NixlTransport
from memkv_engines.transports.posix import DIRECT, PosixTransport
from memkv_engines.transports.topology import Topology, read_topology

HOST, GPU = "host", "gpu"


@dataclass(frozen=True)
class Policy:
    """What the user wants; the keys of the same names."""

    transport: str = "auto"
    gds: str = "auto"
    nixl_plugin: str = POSIX
    staging_medium: str = "auto"
    protection: str = "off"

    @classmethod
    def of(cls, config: Config) -> Policy:
        """What a configuration wants."""
        return cls(**dataclasses.asdict(config.transport), protection=config.protection.protection)


@dataclass(frozen=True)
class Facts:
    """What this host has.

    Attributes:
        gpudirect_lacks: what GPUDirect Storage lacks here, empty for nothing.
        kvikio: its version, empty if it is not installed.
        nixl_lacks: why NIXL may not be used, empty for nothing.
        topology: distances between GPUs and the tier's devices.
    """

    gpudirect_lacks: tuple[str, ...] = ()
    kvikio: str = ""
    nixl_lacks: str = ""
    topology: Topology = dataclasses.field(default_factory=lambda: Topology({}))


@dataclass(frozen=True)
class Decision:
    """What is taken: ``kind`` is ``posix``, ``nixl``, ``gds/gpudirect`` or ``gds/compat``; ``medium`` host or gpu."""

    kind: str
    medium: str
    reason: str


def decide(policy: Policy, facts: Facts, *, on_gpu: bool) -> Decision:
    """Choose a transport and the medium of staging memory.

    Args:
        policy: what the user wants.
        facts: what there is.
        on_gpu: whether the engine's pages are in GPU memory.

    Raises:
        ConfigError: what was asked for is not to be had, or contradicts itself; says what is missing and what to do.
    """
    _check_contradictions(policy)
    medium, why = _medium(policy, facts, on_gpu=on_gpu)
    if policy.transport == "nixl":
        if facts.nixl_lacks:
            raise ConfigError(f"transport=nixl: {facts.nixl_lacks}; or set transport=posix")
        return Decision("nixl", medium, f"transport=nixl with nixl_plugin={policy.nixl_plugin}; {why}")
    if medium == GPU:
        return Decision(GPUDIRECT, GPU, why)
    if policy.transport == "gds":
        if not facts.kvikio:
            raise ConfigError("transport=gds: kvikio is not installed: pip install kvikio-cu13, or set transport=posix")
        return Decision(COMPAT, HOST, f"transport=gds, which for host memory is kvikio's compatibility path; {why}")
    if policy.transport == "posix":
        return Decision("posix", HOST, f"transport=posix; {why}")
    return Decision("posix", HOST, f"transport=auto is posix for host memory (NIXL was no faster); {why}")


def _check_contradictions(policy: Policy) -> None:
    by_nixl = policy.transport == "nixl" and policy.nixl_plugin in GDS_PLUGINS
    if policy.gds == "on" and not by_nixl and policy.transport not in ("auto", "gds"):
        raise ConfigError(f"gds=on contradicts transport={policy.transport}: set transport=auto, or gds=auto")
    if policy.gds == "on" and policy.staging_medium == HOST:
        raise ConfigError("gds=on contradicts staging_medium=host: set staging_medium=auto, or gds=auto")
    if policy.gds == "off" and (policy.transport == "gds" or by_nixl):
        what = f"nixl_plugin={policy.nixl_plugin}" if by_nixl else "transport=gds"
        raise ConfigError(f"gds=off contradicts {what}: set gds=auto, or transport=posix")


def _medium(policy: Policy, facts: Facts, *, on_gpu: bool) -> tuple[str, str]:
    lacks = "; ".join(facts.gpudirect_lacks)
    asked = next(
        (
            f"{key}={value}"
            for key, value in (("gds", "on"), ("staging_medium", "gpu"))
            if getattr(policy, key) == value
        ),
        "",
    )
    if asked and (lacks or not on_gpu):
        lacks = "; ".join(filter(None, [lacks, "" if on_gpu else "KV caches in GPU memory"]))
        raise ConfigError(f"{asked}, but GPUDirect Storage lacks {lacks}. Set gds=auto and staging_medium=auto")
    if asked and policy.staging_medium == GPU and policy.gds == "off":
        raise ConfigError("staging_medium=gpu contradicts gds=off: set gds=auto, or staging_medium=host")
    if asked and (policy.transport == "posix" or (policy.transport, policy.nixl_plugin) == ("nixl", POSIX)):
        raise ConfigError(f"{asked}: transport={policy.transport} cannot move GPU memory; set transport=auto")
    if asked and policy.protection != "off":
        raise ConfigError(
            f"{asked}, but with protection={policy.protection} blocks pass the host, where they are authenticated: set "
            "gds=auto and staging_medium=auto, or protection=off"
        )
    if not on_gpu:
        return HOST, "the KV cache is in host memory"
    if asked:
        return GPU, asked
    if policy.protection != "off":
        return HOST, f"staged in host memory: protection={policy.protection} authenticates blocks there"
    if policy.staging_medium == HOST or policy.gds == "off" or policy.transport == "posix":
        return HOST, "staging in host memory was asked for"
    if policy.transport == "nixl" and policy.nixl_plugin == POSIX:
        return HOST, "NIXL's POSIX plugin moves host memory only"
    if lacks:
        return HOST, f"staged in host memory: GPUDirect Storage lacks {lacks}"
    near, why = facts.topology.is_near()
    return (GPU, f"GPUDirect: {why}") if near else (HOST, f"staged in host memory: {why}")


def facts_of(folder: str | Path, root: Path = Path("/")) -> Facts:
    """What this host has. Blocking: where files promise GPUDirect, it is tried in a process of its own."""
    lacks = tuple(gds_module.what_gpudirect_lacks(root))
    if not lacks:
        lacks = tuple(filter(None, [_try_gpudirect(folder)]))
    return Facts(
        gpudirect_lacks=lacks,
        kvikio=gds_module.installed_version(),
        nixl_lacks=nixl_install.why_unusable(nixl_install.installed_version()),
        topology=read_topology(folder, root, _topology_matrix()),
    )


def together(facts: Sequence[Facts]) -> Facts:
    """What holds for several directories at once: what one of them lacks is lacking, the furthest device counts."""
    lacks = tuple(dict.fromkeys(lack for one in facts for lack in one.gpudirect_lacks))
    pairs = {pair: distance for one in facts for pair, distance in one.topology.pairs.items()}
    known = all(one.topology.pairs for one in facts)
    return dataclasses.replace(facts[0], gpudirect_lacks=lacks, topology=Topology(pairs if known else {}))


def _topology_matrix() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, "topo", "-m"], capture_output=True, text=True, timeout=15.0, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _try_gpudirect(folder: str | Path) -> str:
    """Open a file in the folder on the direct path, in another process, which may hang or crash in a driver."""
    command = [sys.executable, "-m", "memkv_engines.transports.select", "--try-gpudirect", str(folder)]
    # The child must import this very package, also where the engine found it through sys.path manipulation.
    ours = str(Path(__file__).resolve().parents[2])
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([ours, *filter(None, [os.environ.get("PYTHONPATH")])])}
    environ["PYTHONSAFEPATH"] = "1"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=GDS_PROBE_TIMEOUT_S, check=False, env=environ
        )
    except subprocess.TimeoutExpired:
        return f"a cuFile driver that answers within {GDS_PROBE_TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return ""
    return f"a working path to {folder} ({(done.stdout or done.stderr).strip()[-400:]})"


# ------------------------------------------------------------------------------------------------------------- opening


@dataclass(frozen=True)
class TransportPlan:
    """Makes the transport that was decided on, for a tier that knows its directory and its mode."""

    policy: Policy
    decision: Decision
    threads: int = 8

    @property
    def reason(self) -> str:
        """Why this transport."""
        return self.decision.reason

    def open(self, mode: str, dir_fd: int | None) -> FileTransport[Any]:
        """Make the transport, and prove it in the directory where one may write there.

        Args:
            mode: ``direct``, ``dontcache`` or ``buffered``; only posix knows the second, others take it for the third.
            dir_fd: descriptor of the tier's directory; None for a read-only tier.

        Raises:
            ConfigError: it does not work here.
        """
        transport = self._make(mode)
        if dir_fd is None or isinstance(transport, PosixTransport):  # posix was proved when its mode was chosen
            return transport
        pages = memoryview(mmap.mmap(-1, 2 * ALIGN_BYTES))
        pages[:ALIGN_BYTES] = os.urandom(ALIGN_BYTES)
        try:
            prove(transport, dir_fd, [pages[:ALIGN_BYTES], pages[ALIGN_BYTES:]])
        except (MemKVError, OSError) as error:
            transport.close()
            raise ConfigError(
                f"{transport.name} does not work in the tier's directory: {error}. Set transport=posix"
            ) from error
        return transport

    def _make(self, mode: str) -> FileTransport[Any]:
        direct, medium = mode == DIRECT, self.decision.medium
        if self.decision.kind == "posix":
            return PosixTransport(mode)
        if self.decision.kind == "nixl":
            nixl = NixlTransport(self.policy.nixl_plugin, direct=direct)
            if medium == GPU and not nixl.moves_device_memory:
                nixl.close()
                raise ConfigError(f"nixl_plugin={self.policy.nixl_plugin} cannot move GPU memory: set transport=auto")
            return nixl
        return GdsTransport(gpudirect=self.decision.kind == GPUDIRECT, direct=direct, threads=self.threads)


def plan(policy: Policy, *folders: str | Path, on_gpu: bool = False, threads: int = 8) -> TransportPlan:
    """Decide and plan, once for all folders; errors as in ``decide``.

    Where there is nothing to find out, nothing is looked at. Of several folders those that are not there do not count:
    a drive that is lost is not what the others cannot do.
    """
    plain = not on_gpu and policy.transport in ("auto", "posix") and policy.gds != "on"
    if plain and policy.staging_medium != GPU:
        return TransportPlan(policy, decide(policy, Facts(), on_gpu=on_gpu), threads)
    there = [folder for folder in folders if os.path.isdir(folder)] or folders[:1]
    facts = together([facts_of(folder) for folder in there])
    return TransportPlan(policy, decide(policy, facts, on_gpu=on_gpu), threads)


def main(argv: list[str]) -> int:
    """Print what would be chosen for KV caches in host memory, and for KV caches in GPU memory, as JSON."""
    if argv[1:2] == ["--try-gpudirect"]:
        try:
            fd = os.open(argv[2], os.O_RDONLY | os.O_DIRECTORY)
            transport = TransportPlan(Policy(), Decision(GPUDIRECT, GPU, "")).open(DIRECT, fd)
        except (MemKVError, OSError) as error:
            print(error)
            return 1
        transport.close()
        return 0
    try:
        config = load_config({"path": argv[1], **dict(word.split("=", 1) for word in argv[2:])})
    except ConfigError as error:
        print(json.dumps({"error": str(error)}))
        return 1
    policy = Policy.of(config)
    facts = together([facts_of(folder) for folder in split_paths(config.tier.path)])
    answers: dict[str, Any] = {"gpudirect_lacks": facts.gpudirect_lacks, "nixl_lacks": facts.nixl_lacks}
    for name, on_gpu in ((HOST, False), (GPU, True)):
        try:
            answers[name] = dataclasses.asdict(decide(policy, facts, on_gpu=on_gpu))
        except ConfigError as error:
            answers[name] = {"error": str(error)}
    print(json.dumps(answers))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
