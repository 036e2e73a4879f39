"""Translates the PTX that a CUDA compiler emitted into C++ that runs on a CPU, lane by lane.

    python -m tests.kernels.ptx2c kernel.ptx kernel.cpp

Only the instructions that our kernels use are known. Anything else raises `PtxError`, so that no construct of a later
compiler is skipped silently. A lane runs until it ends or meets a warp shuffle (`simt_runtime.h` lets the lanes take
turns); `bar.sync` is not known. `ptx_runtime.h` models the bulk copy engine.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

from tests.kernels.ptx_syntax import (
    Module,
    PtxError,
    ctype,
    entries,
    operands_of,
    statements,
    unsigned,
    width,
    without_comments,
)

DYNAMIC_SHARED_AT = "STATIC_SHARED_BYTES"
BINARY = {"and": "&", "or": "|", "xor": "^"}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
MEMORY_MODIFIERS = {"nc", "cs", "v2", "v4", "L1::no_allocate"}
SPECIAL = {
    f"%{name}.{axis}": f"simt::thread().{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"
}


# ------------------------------------------------------------------------------------------------------ translation


class Kernel:
    """One kernel as a C++ struct: registers are members, `run` is the body, `pc` says where a shuffle stopped it."""

    def __init__(self, module: Module, name: str, parameters: str, body: str) -> None:
        self.module, self.name = module, name
        self.lines: list[str] = []
        self.registers: list[str] = []
        self.declared: set[str] = set()
        self.shared: dict[str, int] = {}
        self.shared_bytes = 0
        self.sites = 0
        self.opcodes: Counter[str] = Counter()
        self.parameters, self.parameter_bytes = self.read_parameters(parameters)
        for statement in statements(body):
            self.translate(statement)

    @staticmethod
    def read_parameters(text: str) -> tuple[dict[str, int], int]:
        """Offsets of the parameters, and their size together."""
        offsets, end = {}, 0
        for parameter in operands_of(text):
            found = re.match(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(\w+)(?:\[(\d+)\])?", parameter)
            if not found:
                raise PtxError(f"parameter {parameter!r}")
            size = int(found[4]) if found[4] else width(found[2]) // 8
            align = int(found[1] or size)
            end = -(-end // align) * align
            offsets[found[3]] = end
            end += size
        return offsets, end

    # ------------------------------------------------------------------------------------------------------ operands

    def value(self, operand: str, ptx_type: str | None = None) -> str:
        """C++ of an operand that is read, converted to `ptx_type` where one is given."""
        cast = f"({ctype(ptx_type)})" if ptx_type and ptx_type != "pred" else ""
        if operand in SPECIAL:
            return SPECIAL[operand]
        if operand.removeprefix("%") in self.declared:
            return f"{cast}r_{operand.removeprefix('%')}"
        if re.fullmatch(r"-?\d+", operand):
            return f"{cast}{operand}{'ll' if abs(int(operand)) < 1 << 63 else 'ull'}"
        if re.fullmatch(r"0[xX][0-9a-fA-F]+U?", operand):
            return f"{cast}{operand.rstrip('U')}ull"
        if operand in self.parameters:
            return f"{self.parameters[operand]}ull"
        if operand in self.module.constants:
            return f"{self.module.constants[operand]}ull"
        if operand in self.shared:
            return f"{self.shared[operand]}u"
        if operand in self.module.dynamic_shared:
            return DYNAMIC_SHARED_AT
        raise PtxError(f"operand {operand!r}")

    def address(self, operand: str, ptx_type: str = "u64") -> str:
        """C++ of an address such as `[%rd1+8]`."""
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not found:
            raise PtxError(f"address {operand!r}")
        return f"({ctype(ptx_type)})({self.value(found[1])} + ({ctype(ptx_type)}){found[2] or 0}ll)"

    # ---------------------------------------------------------------------------------------------------- statements

    def translate(self, statement: str) -> None:
        """Appends the C++ of one statement."""
        if statement in "{}":
            self.lines.append(statement)
        elif statement.endswith(":"):
            self.lines.append(statement.replace("$", "L_") + ";")
        elif statement.startswith(".reg"):
            self.declare_registers(statement)
        elif statement.startswith(".shared"):
            self.declare_shared(statement)
        elif not statement.startswith(".pragma"):
            self.lines.append(self.instruction(statement))

    def declare_registers(self, statement: str) -> None:
        """`.reg .b32 %r<9>;` makes members, `.reg .pred p;` of inline assembly a local."""
        found = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S)
        if not found:
            raise PtxError(statement)
        kind = "bool" if found[1] == "pred" else unsigned(found[1])
        for name in operands_of(found[2]):
            many = re.fullmatch(r"%(\w+?)<(\d+)>", name)
            if many:
                names = [f"{many[1]}{number}" for number in range(int(many[2]))]
                self.declared.update(names)
                self.registers.append(f"{kind} {', '.join(f'r_{name} = 0' for name in names)};")
            else:
                self.declared.add(name.lstrip("%"))
                self.lines.append(f"{kind} r_{name.lstrip('%')};")

    def declare_shared(self, statement: str) -> None:
        """`.shared .align 8 .b8 name[128];`"""
        found = re.fullmatch(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]", statement)
        if not found:
            raise PtxError(statement)
        align, size = int(found[1]), int(found[3])
        self.shared_bytes = -(-self.shared_bytes // align) * align
        self.shared[found[2]] = self.shared_bytes
        self.shared_bytes += size

    def instruction(self, statement: str) -> str:
        """C++ of one instruction with its guard."""
        found = re.fullmatch(r"(?:@(!?)(%?\w+)\s+)?([\w.:]+)\s*(.*)", statement, re.S)
        if not found:
            raise PtxError(statement)
        negated, guard, opcode, rest = found.groups()
        self.opcodes[opcode] += 1
        operands = operands_of(rest)
        operation, *modifiers = opcode.split(".")
        method = getattr(self, f"op_{operation}", None)
        code = method(opcode, modifiers, operands) if method else self.bulk(opcode, operands)
        if guard:
            if "case" in code:
                raise PtxError(f"a guarded shuffle: {statement}")
            code = f"if ({'!' if negated else ''}{self.value(guard)}) {{ {code} }}"
        return code

    def assign(self, target: str, expression: str) -> str:
        """C++ that writes a register; `_` takes what nobody wants."""
        if target == "_":
            return f"(void)({expression});"
        if target.removeprefix("%") not in self.declared:
            raise PtxError(f"target {target!r}")
        return f"{self.value(target)} = {expression};"

    # --------------------------------------------------------------------------------------------------- moving data

    def op_mov(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        kind = modifiers[-1]
        if o[0].startswith("{"):
            parts = operands_of(o[0].strip("{}"))
            bits = width(kind) // len(parts)
            source = self.value(o[1], kind)
            return " ".join(self.assign(part, f"({source}) >> {bits * i}") for i, part in enumerate(parts))
        if o[1].startswith("{"):
            parts = operands_of(o[1].strip("{}"))
            bits = width(kind) // len(parts)
            pieces = [f"(({ctype(kind)}){self.value(p, f'u{bits}')} << {bits * i})" for i, p in enumerate(parts)]
            return self.assign(o[0], " | ".join(pieces))
        return self.assign(o[0], self.value(o[1], kind))

    def op_cvta(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        # Global addresses are generic ones. Shared and constant ones are offsets, which must not become generic.
        if modifiers not in (["to", "global", "u64"], ["global", "u64"], ["to", "shared", "u64"], ["shared", "u64"]):
            raise PtxError(opcode)
        return self.assign(o[0], self.value(o[1]))

    def op_cvt(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        if len(modifiers) != 2:
            raise PtxError(opcode)
        return self.assign(o[0], f"({ctype(modifiers[0])}){self.value(o[1], modifiers[1])}")

    def op_ld(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        space, kind = modifiers[0], modifiers[-1]
        self.check_memory(opcode, modifiers)
        targets = operands_of(o[0].strip("{}"))
        at = self.address(o[1], "u32" if space == "shared" else "u64")
        step = width(kind) // 8
        if space == "global":
            pack = f"Pack<{ctype(kind)}, {len(targets)}>"
            parts = " ".join(self.assign(target, f"v_.e[{i}]") for i, target in enumerate(targets))
            return f"{{ const {pack} v_ = simt::load<{pack}>({at}); {parts} }}"
        call = {"param": f"param_load<{ctype(kind)}>", "const": f"constant_load<{ctype(kind)}>"}
        call["shared"] = f"shared_load<{ctype(kind)}>"
        first = "param, " if space == "param" else ""
        return " ".join(
            self.assign(target, f"{call[space]}({first}{at} + {i * step})") for i, target in enumerate(targets)
        )

    def op_st(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        space, kind = modifiers[0], modifiers[-1]
        self.check_memory(opcode, modifiers)
        sources = operands_of(o[1].strip("{}"))
        if space == "shared":
            step = width(kind) // 8
            return " ".join(
                f"shared_store<{ctype(kind)}>({self.address(o[0], 'u32')} + {i * step}, {self.value(source, kind)});"
                for i, source in enumerate(sources)
            )
        if space != "global":
            raise PtxError(opcode)
        pack = f"Pack<{ctype(kind)}, {len(sources)}>"
        values = ", ".join(self.value(source, kind) for source in sources)
        return f"simt::store({self.address(o[0])}, {pack}{{{{{values}}}}});"

    @staticmethod
    def check_memory(opcode: str, modifiers: list[str]) -> None:
        joined = ".".join(modifiers[1:-1])
        unknown = set(re.findall(r"L\d::\w+|\w+", joined)) - MEMORY_MODIFIERS
        if modifiers[0] not in ("param", "const", "shared", "global") or unknown:
            raise PtxError(opcode)

    def op_atom(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        if [m for m in modifiers if m not in ("relaxed", "gpu")] != ["global", "or", "b32"]:
            raise PtxError(opcode)
        return self.assign(o[0], f"simt::atomic_or({self.address(o[1])}, {self.value(o[2], 'u32')})")

    def op_red(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        if [m for m in modifiers if m not in ("relaxed", "gpu")] != ["global", "or", "b32"]:
            raise PtxError(opcode)
        return f"simt::atomic_or({self.address(o[0])}, {self.value(o[1], 'u32')});"

    # ---------------------------------------------------------------------------------------------------- arithmetic

    def op_add(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        return self.wrapping(opcode, modifiers, o, "+")

    def op_sub(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        return self.wrapping(opcode, modifiers, o, "-")

    def wrapping(self, opcode: str, modifiers: list[str], o: list[str], sign: str) -> str:
        if len(modifiers) != 1:
            raise PtxError(opcode)
        kind = unsigned(modifiers[0])
        return self.assign(o[0], f"({kind})(({kind}){self.value(o[1])} {sign} ({kind}){self.value(o[2])})")

    def op_mul(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        return self.assign(o[0], self.product(opcode, modifiers, o))

    def op_mad(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        return self.assign(o[0], f"{self.product(opcode, modifiers, o)} + {self.value(o[3])}")

    def product(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        part, kind = modifiers[0], modifiers[-1]
        if len(modifiers) != 2 or part not in ("lo", "wide", "hi"):
            raise PtxError(opcode)
        if part == "hi":
            if kind != "u64":
                raise PtxError(opcode)
            return f"multiply_high({self.value(o[1])}, {self.value(o[2], 'u64')})"
        if part == "wide":
            to = f"{'' if kind[0] == 's' else 'u'}int{2 * width(kind)}_t"
            return f"(u{to.lstrip('u')})(({to}){self.value(o[1], kind)} * ({to}){self.value(o[2], kind)})"
        to = unsigned(kind)
        return f"({to})(({to}){self.value(o[1])} * ({to}){self.value(o[2])})"

    def op_div(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        return self.assign(o[0], f"divide({self.value(o[1], modifiers[-1])}, {self.value(o[2], modifiers[-1])})")

    def op_rem(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        return self.assign(o[0], f"remainder({self.value(o[1], modifiers[-1])}, {self.value(o[2], modifiers[-1])})")

    def op_min(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        return self.assign(o[0], f"std::min({self.value(o[1], modifiers[-1])}, {self.value(o[2], modifiers[-1])})")

    def op_max(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        return self.assign(o[0], f"std::max({self.value(o[1], modifiers[-1])}, {self.value(o[2], modifiers[-1])})")

    def op_and(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        sign = BINARY[opcode.split(".")[0]]
        return self.assign(o[0], f"{self.value(o[1], modifiers[-1])} {sign} {self.value(o[2], modifiers[-1])}")

    op_or = op_xor = op_and

    def op_not(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        sign = "!" if modifiers[-1] == "pred" else "~"
        return self.assign(o[0], f"{sign}{self.value(o[1], modifiers[-1])}")

    def op_neg(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        kind = unsigned(modifiers[-1])
        return self.assign(o[0], f"({kind})(({kind})0 - ({kind}){self.value(o[1])})")

    def op_shl(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        kind, bits = unsigned(modifiers[-1]), width(modifiers[-1])
        by = self.value(o[2], "u32")
        return self.assign(o[0], f"{by} >= {bits} ? 0 : ({kind})(({kind}){self.value(o[1])} << ({by}))")

    def op_shr(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        kind, bits = ctype(modifiers[-1]), width(modifiers[-1])
        value, by = self.value(o[1], modifiers[-1]), self.value(o[2], "u32")
        beyond = f"({kind})(({value}) >> {bits - 1})" if modifiers[-1][0] == "s" else "0"
        return self.assign(o[0], f"{by} >= {bits} ? {beyond} : ({kind})(({value}) >> ({by}))")

    def op_shf(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        if modifiers not in (["l", "wrap", "b32"], ["r", "wrap", "b32"]):
            raise PtxError(opcode)
        call = "funnel_left" if modifiers[0] == "l" else "funnel_right"
        return self.assign(o[0], f"{call}({', '.join(self.value(part, 'u32') for part in o[1:])})")

    def op_prmt(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        if modifiers != ["b32"]:
            raise PtxError(opcode)
        return self.assign(o[0], f"permute({', '.join(self.value(part, 'u32') for part in o[1:])})")

    def op_bfi(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        kind = modifiers[-1]
        values = [self.value(o[1], kind), self.value(o[2], kind), self.value(o[3], "u32"), self.value(o[4], "u32")]
        return self.assign(o[0], f"insert_bits<{ctype(kind)}>({', '.join(values)})")

    def op_setp(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        if len(modifiers) != 2 or modifiers[0] not in COMPARE:
            raise PtxError(opcode)
        kind = modifiers[1]
        return self.assign(o[0], f"{self.value(o[1], kind)} {COMPARE[modifiers[0]]} {self.value(o[2], kind)}")

    def op_selp(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        kind = modifiers[-1]
        return self.assign(o[0], f"{self.value(o[3])} ? {self.value(o[1], kind)} : {self.value(o[2], kind)}")

    # --------------------------------------------------------------------------------------------------- control flow

    def op_bra(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        return f"goto {o[0].replace('$', 'L_')};"

    def op_ret(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        return "return true;"

    op_exit = op_ret

    def op_shfl(self, opcode: str, modifiers: list[str], o: list[str]) -> str:
        if modifiers != ["sync", "bfly", "b32"]:
            raise PtxError(opcode)
        self.sites += 1
        target, _, predicate = o[0].partition("|")
        ask = f"{{{self.sites}u, {self.value(o[2], 'u32')}, {self.value(o[1], 'u32')}, 0}}"
        take = self.assign(target, "(uint32_t)simt::collective(lane).result")
        took = self.assign(predicate, "true") if predicate else ""
        whole = f"whole_warp({self.value(o[3], 'u32')}, {self.value(o[4], 'u32')});"
        stop = f"simt::collective(lane) = {ask}; pc = {self.sites}; return false; case {self.sites}:;"
        return f"{whole} {stop} {take} {took}"

    # ------------------------------------------------------------------------------------------ the bulk copy engine

    def bulk(self, opcode: str, o: list[str]) -> str:
        """C++ of an instruction of the bulk copy engine; raises `PtxError` for any other."""
        match opcode:
            case "mbarrier.init.shared::cta.b64":
                return f"bulk.init({self.address(o[0], 'u32')}, {self.value(o[1], 'u32')});"
            case "mbarrier.arrive.expect_tx.shared::cta.b64" if o[0] == "_":
                return f"bulk.expect({self.address(o[1], 'u32')}, {self.value(o[2], 'u32')});"
            case "mbarrier.try_wait.parity.shared::cta.b64":
                return self.assign(o[0], f"bulk.try_wait({self.address(o[1], 'u32')}, {self.value(o[2], 'u32')})")
            case "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes":
                shared = [self.address(o[0], "u32"), self.address(o[3], "u32")]
                return f"bulk.load({shared[0]}, {self.address(o[1])}, {self.value(o[2], 'u32')}, {shared[1]});"
            case "cp.async.bulk.global.shared::cta.bulk_group":
                return f"bulk.store({self.address(o[0])}, {self.address(o[1], 'u32')}, {self.value(o[2], 'u32')});"
            case "cp.async.bulk.commit_group":
                return "bulk.commit();"
            case "cp.async.bulk.wait_group" | "cp.async.bulk.wait_group.read":
                return f"bulk.wait({self.value(o[0], 'u32')}, {str(opcode.endswith('read')).lower()});"
            case "fence.mbarrier_init.release.cluster":
                return "bulk.unfenced &= ~1u;"
            case "fence.proxy.async.shared::cta":
                return "bulk.unfenced &= ~2u;"
        raise PtxError(f"unknown instruction {opcode} {', '.join(o)}")

    def struct(self) -> list[str]:
        """The kernel as C++."""
        members = [f"  {line}" for line in self.registers]
        body = [f"    {line}" for line in self.lines]
        head = "  bool run(const uint8_t* param, uint32_t lane) { (void)param, (void)lane; switch (pc) { case 0:; {"
        load = (
            "  template <typename T> static T param_load(const uint8_t* param, uint64_t a) {"
            f" return read_space<T>(param, {self.parameter_bytes}, a, simt::PARAMETER_OUT_OF_BOUNDS); }}"
        )
        tail = ["  } } return true; }", "};"]
        return [f"struct Ptx_{self.name} {{", "  uint32_t pc = 0;", *members, load, head, *body, *tail]


def translate(ptx: str) -> tuple[str, Counter[str]]:
    """Translates a whole PTX file.

    Returns:
        C++ that exports what `simt_runtime.h` and `ptx_runtime.h` do, `memkv_launch` and `memkv_argument_bytes`; and
        how often each opcode occurs.

    Raises:
        PtxError: The PTX holds something unknown.
    """
    ptx = without_comments(ptx)
    module = Module.parse(ptx)
    kernels = [Kernel(module, *entry) for entry in entries(ptx)]
    image = ", ".join(map(str, module.image or [0]))
    out = ['#include "ptx_runtime.h"', f"alignas(16) static const uint8_t CONSTANTS[] = {{{image}}};"]
    out.append(
        "template <typename T> static T constant_load(uint64_t a) {"
        " return read_space<T>(CONSTANTS, sizeof CONSTANTS, a, simt::CONSTANT_OUT_OF_BOUNDS); }"
    )
    for kernel in kernels:
        out += kernel.struct()
    out.append("MEMKV_EXPORT int memkv_launch(const char* name, const void* args,")
    out.append("                              uint32_t grid, uint32_t block, uint64_t seed) {")
    for kernel in kernels:
        run = f"run_ptx<Ptx_{kernel.name}>(args, grid, block, seed)"
        out.append(f'  if (!std::strcmp(name, "{kernel.name}")) return {run};')
    out += ["  return -1;", "}", "MEMKV_EXPORT unsigned memkv_argument_bytes(const char* name) {"]
    for kernel in kernels:
        out.append(f'  if (!std::strcmp(name, "{kernel.name}")) return {kernel.parameter_bytes};')
    out += ["  return 0;", "}", ""]
    return "\n".join(out), sum((kernel.opcodes for kernel in kernels), Counter())


def main() -> int:
    """Translates a file and prints how many opcodes it met."""
    source, target = sys.argv[1:]
    text, opcodes = translate(Path(source).read_text())
    Path(target).write_text(text)
    print(f"{len(opcodes)} different opcodes, {opcodes.total()} instructions")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
