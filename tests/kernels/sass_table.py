"""What the machine code of each target looks like: functionally right code can still be slow, and only this shows it.

    python -m tests.kernels.sass_table

Columns: registers per thread; spilled bytes and local-memory instructions (must be none); the longest run of 128-bit
global loads without a store or a branch between them, which is how many are in flight; 128-bit stores.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels.build import CUBINS, compile_source
from tests.kernels.toolchain import toolchain

COPY_KERNELS = ("memkv_gather", "memkv_scatter")
DIGEST_KERNEL = "memkv_leaf_digests"
BULK_KERNELS = ("memkv_gather_bulk", "memkv_scatter_bulk")
BULK_FROM = 90

MIN_LOADS_IN_FLIGHT = 4
MAX_REGISTERS = {**dict.fromkeys((*COPY_KERNELS, DIGEST_KERNEL), 64), **dict.fromkeys(BULK_KERNELS, 48)}
"""At 64, a CTA of 512 threads takes half of an SM's 65,536 registers and leaves the engine's work the other half."""


@dataclass(frozen=True)
class Facts:
    """One kernel on one target.

    Attributes:
        target: Compute capability times ten.
        kernel: Its name.
        instructions: Instructions in all.
        registers: Registers per thread.
        spilled_bytes: What ptxas stores to and loads from local memory.
        local: Instructions that access local memory.
        loads_in_flight: The longest run of 128-bit global loads.
        wide_stores: 128-bit global stores.
        shuffles: Warp shuffles.
        bulk_copies: Instructions of the bulk copy engine.
    """

    target: int
    kernel: str
    instructions: int
    registers: int
    spilled_bytes: int
    local: int
    loads_in_flight: int
    wide_stores: int
    shuffles: int
    bulk_copies: int

    def problems(self) -> list[str]:
        """What the gate does not accept."""
        found = []
        if self.spilled_bytes or self.local:
            found.append(f"{self.spilled_bytes} B spilled, {self.local} local-memory instructions")
        if self.registers > MAX_REGISTERS[self.kernel]:
            found.append(f"{self.registers} registers, at most {MAX_REGISTERS[self.kernel]}")
        if self.kernel in BULK_KERNELS:
            if self.bulk_copies < 2:
                found.append(f"{self.bulk_copies} bulk copies, a load and a store are wanted")
        elif self.loads_in_flight < MIN_LOADS_IN_FLIGHT:
            found.append(f"{self.loads_in_flight} wide loads in flight, at least {MIN_LOADS_IN_FLIGHT}")
        if self.kernel in COPY_KERNELS and self.wide_stores < MIN_LOADS_IN_FLIGHT:
            found.append(f"{self.wide_stores} wide stores")
        return [f"sm_{self.target} {self.kernel}: {text}" for text in found]


def disassemble(cubin: bytes) -> dict[str, list[str]]:
    """Returns the instructions of every kernel in a cubin, guards included."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(cubin)
        command = [toolchain().nvdisasm, "-c", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\w+)", line)
        if section:
            current = kernels.setdefault(section[1], [])
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)
        if instruction:
            current.append(instruction[1])
    return kernels


def opcode(instruction: str) -> str:
    """The opcode without its guard."""
    return re.sub(r"^\{?\s*@!?U?P\w+\s+", "", instruction).split()[0]


def longest_run(opcodes: Sequence[str]) -> int:
    """The most 128-bit global loads with neither a store nor a branch between them."""
    best = run = 0
    for name in opcodes:
        if name.startswith("LDG") and ".128" in name:
            run += 1
            best = max(best, run)
        elif name.startswith(("STG", "BRA", "EXIT", "BSYNC", "RET", "CALL")):
            run = 0
    return best


def resources(log: str) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes of every kernel, from what `ptxas -v` prints."""
    found = {}
    for name, rest in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", log, re.S):
        spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", rest))
        registers = re.search(r"Used (\d+) registers", rest)
        found[name] = (int(registers[1]) if registers else 0, spilled)
    return found


@functools.cache
def facts_of(target: int, source: str | None = None) -> tuple[Facts, ...]:
    """Compiles for one target and looks at every kernel."""
    arguments = [f"-arch=sm_{target}", "-cubin", "-Xptxas", "-v"]
    cubin, log = compile_source(toolchain().nvcc, arguments, "kernels.cubin", source)
    used = resources(log)
    out = []
    for kernel, instructions in sorted(disassemble(cubin).items()):
        opcodes = [opcode(instruction) for instruction in instructions]
        registers, spilled = used[kernel]
        out.append(
            Facts(
                target=target,
                kernel=kernel,
                instructions=len(opcodes),
                registers=registers,
                spilled_bytes=spilled,
                local=sum(name.startswith(("LDL", "STL")) for name in opcodes),
                loads_in_flight=longest_run(opcodes),
                wide_stores=sum(name.startswith("STG") and ".128" in name for name in opcodes),
                shuffles=sum(name.startswith("SHFL") for name in opcodes),
                bulk_copies=sum(name.startswith("UBLKCP") for name in opcodes),
            )
        )
    return tuple(out)


def main() -> int:
    """Prints the table; returns 1 when the gate would not accept something."""
    print(f"nvcc {toolchain().version}")
    print(f"{'target':<7} {'kernel':<20} {'instr':>6} {'regs':>5} {'spill':>6} {'local':>6} {'LDG.128':>8}", end="")
    print(f" {'STG.128':>8} {'SHFL':>5} {'bulk':>5}")
    problems = []
    for target in CUBINS:
        for f in facts_of(target):
            print(f"sm_{f.target:<4} {f.kernel:<20} {f.instructions:>6} {f.registers:>5} {f.spilled_bytes:>6}", end="")
            print(f" {f.local:>6} {f.loads_in_flight:>8} {f.wide_stores:>8} {f.shuffles:>5} {f.bulk_copies:>5}")
            problems += f.problems()
    print("\n".join(problems) or "nothing that the gate would refuse")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
