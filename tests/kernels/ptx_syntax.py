"""The text of PTX taken apart: declarations, kernels, statements, operands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


class PtxError(Exception):
    """PTX that the translator does not know; the message quotes it."""


def ctype(ptx_type: str) -> str:
    """The C++ type of a PTX type such as `s32` or `pred`."""
    if ptx_type == "pred":
        return "bool"
    found = re.fullmatch(r"([usb])(8|16|32|64)", ptx_type)
    if not found:
        raise PtxError(f"type .{ptx_type}")
    return f"{'' if found[1] == 's' else 'u'}int{found[2]}_t"


def unsigned(ptx_type: str) -> str:
    """The unsigned C++ type of the same width: PTX integers wrap."""
    return ctype("u" + ptx_type[1:])


def width(ptx_type: str) -> int:
    """Bits of a PTX type."""
    return int(ptx_type[1:])


# ---------------------------------------------------------------------------------------------------------- parsing


def without_comments(ptx: str) -> str:
    """PTX without comments and debug lines."""
    return re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", ptx), flags=re.S)


def entries(ptx: str) -> Iterator[tuple[str, str, str]]:
    """Yields name, parameter list and body of every kernel."""
    for found in re.finditer(r"\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{", ptx):
        depth, at = 1, found.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(ptx[at], 0)
            at += 1
        yield found[1], found[2], ptx[found.end() : at - 1]


def statements(body: str) -> Iterator[str]:
    """Yields `{`, `}`, `label:` and instructions; the braces of vector operands stay inside an instruction."""
    current = ""
    for at, character in enumerate(body):
        if character == ";":
            yield current.strip()
            current = ""
        elif character in "{}" and not current.strip():
            yield character
            current = ""
        elif character == ":" and re.fullmatch(r"\s*[$\w]+", current) and body[at + 1] != ":":
            yield current.strip() + ":"
            current = ""
        else:
            current += character
    if current.strip():
        raise PtxError(f"text after the last statement: {current.strip()!r}")


def operands_of(text: str) -> list[str]:
    """Splits operands at the commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


@dataclass
class Module:
    """What is declared outside the kernels.

    Attributes:
        constants: Offset of each `.const` array in the constant image.
        image: The bytes of all `.const` arrays.
        dynamic_shared: Names of `.extern .shared` arrays.
    """

    constants: dict[str, int] = field(default_factory=dict)
    image: list[int] = field(default_factory=list)
    dynamic_shared: set[str] = field(default_factory=set)

    @classmethod
    def parse(cls, ptx: str) -> Module:
        """Reads the declarations; raises `PtxError` for a kind it does not know."""
        module = cls()
        outside = ptx
        for _, _, body in entries(ptx):
            outside = outside.replace(body, "")
        for found in re.finditer(r"^\s*(?:\.visible\s+|\.weak\s+)*\.(const|global|shared|func)\b[^;]*;", outside, re.M):
            array = re.search(r"\.const\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]\s*=\s*\{([^}]*)\}", found[0])
            if not array:
                raise PtxError(f"declaration {found[0][:80]!r}")
            align, name, size, values = int(array[1]), array[2], int(array[3]), array[4]
            module.image += [0] * (-len(module.image) % align)
            module.constants[name] = len(module.image)
            data = [int(value) & 255 for value in values.split(",")]
            module.image += data + [0] * (size - len(data))
        module.dynamic_shared = set(re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]", outside))
        return module
