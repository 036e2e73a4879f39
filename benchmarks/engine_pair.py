"""Two engines that live at the same time, one with the connector and one without, asked in turns.

What disturbs the machine disturbs both alike, so their ratio holds where single runs scatter by a fifth.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.engine_run import Engine, EngineSpec

ALONE, CONNECTED = "recompute", "memkv"
SIDES = (ALONE, CONNECTED)
# vLLM's processes poll for a second after their last message; only then is a waiting engine out of the other's way.
SETTLE_S = 1.2
_IO_COMMAND = "memkv_engines.offload.process"


@dataclass(frozen=True)
class Usage:
    """What the processes of an engine have used.

    Attributes:
        engine_cpu_s: CPU seconds of vLLM's own processes.
        io_cpu_s: CPU seconds of the connector's I/O processes.
        io_write_bytes: Bytes that the I/O processes submitted to block devices, by the kernel's count.
    """

    engine_cpu_s: float
    io_cpu_s: float
    io_write_bytes: int

    def since(self, earlier: Usage) -> Usage:
        """Returns the difference to an earlier moment."""
        return Usage(
            self.engine_cpu_s - earlier.engine_cpu_s,
            self.io_cpu_s - earlier.io_cpu_s,
            self.io_write_bytes - earlier.io_write_bytes,
        )


def usage_of(engine: Engine) -> Usage:
    """Returns what an engine's processes have used since they started."""
    processes = engine.processes()
    io = [process for process in processes if _IO_COMMAND in process["command"]]
    own = [process for process in processes if _IO_COMMAND not in process["command"]]
    return Usage(
        sum(process["cpu_s"] for process in own),
        sum(process["cpu_s"] for process in io),
        sum(process["device_write_bytes"] for process in io),
    )


@contextmanager
def engine_pair(spec: EngineSpec, tier: Path, logs: Path, name: str, **connector: str) -> Iterator[dict[str, Engine]]:
    """Starts both engines at once and ends them afterwards.

    Args:
        spec: Of the engine without the connector.
        tier: The directory of the other one's tier.
        logs: Folder for the engines' output.
        name: Begins the logs' names.
        **connector: Further configuration of the connector.

    Yields:
        The engines by `SIDES`.
    """
    specs = {ALONE: spec, CONNECTED: replace(spec, connector={"path": str(tier), **connector})}
    with ExitStack() as stack:
        engines = {side: Engine(specs[side], logs / f"{name}-{side}.log") for side in SIDES}
        for engine in engines.values():
            stack.push(engine)
        for engine in engines.values():
            engine.wait_until_ready()
        yield engines


def settle() -> None:
    """Waits until the engine asked last stops polling."""
    time.sleep(SETTLE_S)
