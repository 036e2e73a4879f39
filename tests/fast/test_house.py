"""The rules of this repository that a reader can check with the eye, and therefore no one checks."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = "memkv_engines"
MODULE_LINES_MAX = 499

# From what may be imported by all to what imports all. Parts of one layer do not import each other, but for the pure
# modules, which may.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "limits", "config", "metrics", "log", "keys", "secret"}),
    frozenset({"chunk"}),
    frozenset({"gpu", "transports"}),
    frozenset({"tier"}),
    frozenset({"offload"}),
    frozenset({"doors"}),
    frozenset({"vllm", "sglang", "lmcache"}),
    frozenset({"cli"}),
)
LAYER_OF = {part: number for number, layer in enumerate(LAYERS) for part in layer}

# Where each heavy library may be imported, even inside a function: prefixes of dotted module names.
HEAVY = {
    "torch": ("doors", "vllm", "sglang", "lmcache"),
    "vllm": ("vllm",),
    "sglang": ("sglang",),
    "lmcache": ("lmcache",),
    "cryptography": ("chunk.protection",),
    "cupy": ("transports.gds",),
    "cuda": ("gpu",),
    "kvikio": ("transports.gds",),
    "nixl": ("transports.nixl",),
    "nixl_cu12": ("transports.nixl",),
    "numba": (),
}

TOP_LEVEL = {
    "memkv_engines",
    "kernels",
    "patches",
    "tests",
    "benchmarks",
    "pyproject.toml",
    "README.md",
    "Makefile",
    "CHANGELOG.md",
    "LICENSE",
    ".gitignore",
    ".ci",
}

# Assembled, so that this file passes its own test.
MACHINE_FOLDERS = ("work", "opt", "root", "home", "tmp/lab", "tmp/bash_jobs", "Users")
MACHINE_PATHS = (*(f"/{folder}/" for folder in MACHINE_FOLDERS), "../" + "shared")
REGISTRY_HOSTS = tuple(
    f"{name}.{domain}"
    for name, domain in (
        ("pypi", "org"),
        ("files.pythonhosted", "org"),
        ("download.pytorch", "org"),
        ("pypi.nvidia", "com"),
        ("registry.npmjs", "org"),
        ("deb.debian", "org"),
        ("proxy.golang", "org"),
        ("crates", "io"),
    )
)
# A name counts where it starts: a path after a space or a quote, but not the middle of `frame/work/` or `~/work/`.
FORBIDDEN_TEXT = re.compile(r"(?<![\w.}~*-])(" + "|".join(map(re.escape, (*MACHINE_PATHS, *REGISTRY_HOSTS))) + ")")


# ------------------------------------------------------------------------------------------------------ the checks


def imported_names(source: str, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yields line and absolute dotted name of everything a module imports, inside functions too.

    `from a import b` yields `a.b`, since b may be a module. Names given to `import_module` or `__import__` count.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def part_of(module: str) -> str:
    """Returns the part of the package that a dotted name belongs to: `memkv_engines.tier.stack` is of `tier`."""
    return module.split(".")[1] if "." in module else ""


def layer_problem(importer: str, imported: str) -> str | None:
    """Returns what is wrong with one part of the package importing another, if anything is."""
    if imported == importer or imported not in LAYER_OF:
        # Not a part: a name such as `__version__` that the package itself defines.
        return None
    if importer in ("", "__main__"):
        # The package's own `__init__` runs whenever anything in it is imported.
        allowed = importer == "__main__" or LAYER_OF[imported] == 0
        return None if allowed else f"the package itself imports {imported}"
    upper, lower = LAYER_OF[importer], LAYER_OF[imported]
    if upper > lower or upper == lower == 0:
        return None
    return f"{importer} imports {imported}, which is {'beside' if upper == lower else 'above'} it"


def heavy_problem(module: str, imported: str) -> str | None:
    """Returns what is wrong with a module importing a heavy library, if anything is."""
    library = imported.split(".")[0]
    if library not in HEAVY:
        return None
    inside = module.removeprefix(PACKAGE).lstrip(".")
    if any(inside.startswith(place) for place in HEAVY[library]):
        return None
    return f"imports {library}, allowed only in {', '.join(HEAVY[library]) or 'no module'}"


def import_problems(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Returns every broken import rule of one module, as `module:line: what`."""
    problems = []
    for line, imported in imported_names(source, module, is_package=is_package):
        if imported.split(".")[0] == PACKAGE:
            problem = layer_problem(part_of(module), part_of(imported))
        else:
            problem = heavy_problem(module, imported)
        if problem:
            problems.append(f"{module}:{line}: {problem}")
    return problems


def text_problems(text: str) -> list[str]:
    """Returns the machine paths and package-registry hosts that a text names."""
    return sorted({match.group() for match in FORBIDDEN_TEXT.finditer(text)})


# What waits for all streams of a device stops the engine. Assembled like the paths above.
DEVICE_WIDE = re.compile("|".join((r"cuCtx" + "Synchronize", r"cuda" + "DeviceSynchronize", r"cuda\.synch" + "ronize")))


# ------------------------------------------------------------------------------------------------------- the files


def repository_files() -> list[Path]:
    """Returns the files that are or would be committed, relative to the root."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [Path(name) for name in sorted(set(listing.split("\0"))) if name and (ROOT / name).is_file()]


def package_modules() -> list[tuple[Path, str]]:
    """Returns path and dotted name of every module of the package."""
    found = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append((path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)))
    return found


def test_the_package_is_seen() -> None:
    parts = {part_of(module) for _, module in package_modules()}
    assert {"errors", "limits", "chunk", "tier"} <= parts


def test_every_part_has_a_layer() -> None:
    parts = {part_of(module) for _, module in package_modules()} - {"", "__main__"}
    assert parts <= LAYER_OF.keys(), f"not in any layer: {sorted(parts - LAYER_OF.keys())}"


def test_imports_point_one_way_and_heavy_libraries_stay_in_their_place() -> None:
    problems = []
    for path, module in package_modules():
        problems += import_problems(path.read_text(), module, is_package=path.name == "__init__.py")
    assert not problems, "\n".join(problems)


def test_no_machine_paths_and_no_registry_hosts() -> None:
    problems = []
    for path in repository_files():
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        problems += [f"{path}: {found}" for found in text_problems(text)]
    assert not problems, "\n".join(problems)


def test_nothing_waits_for_the_whole_device() -> None:
    found = [str(path) for path, _ in package_modules() if DEVICE_WIDE.search(path.read_text())]
    assert not found, found


def test_top_level_holds_only_what_belongs_there() -> None:
    extra = {path.parts[0] for path in repository_files()} - TOP_LEVEL
    assert not extra, f"belongs somewhere below: {sorted(extra)}"


def test_modules_stay_short() -> None:
    lengths = {
        str(path): len((ROOT / path).read_text().splitlines()) for path in repository_files() if path.suffix == ".py"
    }
    long = {path: length for path, length in lengths.items() if length > MODULE_LINES_MAX}
    assert not long, f"over {MODULE_LINES_MAX} lines: {long}"


# --------------------------------------------------------------------------------------- the checks themselves work


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("memkv_engines.chunk.codec", "from memkv_engines.tier import base", "tier, which is above"),
        ("memkv_engines.chunk.codec", "from ..tier.base import Tier", "tier, which is above"),
        ("memkv_engines.chunk.codec", "def f():\n    import memkv_engines.offload.job", "offload, which is above"),
        ("memkv_engines.chunk.codec", "from memkv_engines import tier", "tier, which is above"),
        ("memkv_engines.gpu.launcher", "from memkv_engines.transports import base", "transports, which is beside"),
        ("memkv_engines.vllm.worker", "from memkv_engines.sglang import hooks", "sglang, which is beside"),
        ("memkv_engines.errors", "from . import chunk", "chunk, which is above"),
        ("memkv_engines.offload.worker", "import importlib\nimportlib.import_module('torch')", "imports torch"),
        ("memkv_engines.offload.worker", "def f():\n    import torch.nn as nn", "imports torch"),
        ("memkv_engines.cli.main", "from vllm.config import VllmConfig", "imports vllm"),
        ("memkv_engines.transports.posix", "import kvikio", "imports kvikio"),
        ("memkv_engines.vllm.connector", "import numba", "allowed only in no module"),
        ("memkv_engines", "from memkv_engines.tier import base", "the package itself imports tier"),
    ],
)
def test_a_broken_import_rule_is_found(module: str, source: str, complaint: str) -> None:
    problems = import_problems(source, module, is_package=module == PACKAGE)
    assert len(problems) == 1
    assert complaint in problems[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("memkv_engines.tier.stack", "from memkv_engines.chunk import codec\nfrom .base import Tier"),
        ("memkv_engines.keys", "from memkv_engines.errors import KeyFault"),
        ("memkv_engines.vllm.worker", "import torch\nfrom vllm.config import VllmConfig"),
        ("memkv_engines.transports.gds", "def f():\n    import kvikio\n    import cupy"),
        ("memkv_engines.cli.main", "from memkv_engines import __version__\nfrom memkv_engines.vllm import plugin"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert import_problems(source, module) == []


def test_forbidden_text_is_found() -> None:
    for text in (*MACHINE_PATHS, *REGISTRY_HOSTS):
        assert text_problems(f"see {text}x"), text
        assert text_problems(f'"{text}x"'), text


def test_a_device_wide_wait_is_found() -> None:
    for name in ("cuCtx", "cudaDevice"):
        assert DEVICE_WIDE.search(f"driver.{name}Synchronize()")
    assert DEVICE_WIDE.search("torch.cuda.synch" + "ronize()")
    assert not DEVICE_WIDE.search("cuStreamSynchronize(stream)")


def test_ordinary_text_passes() -> None:
    ordinary = " ".join(f"frame{path} ~{path} $HOME{path}" for path in MACHINE_PATHS if path.startswith("/"))
    assert text_problems(f"{ordinary} /mnt/kv /tmp/kv https://github.com/vllm-project/vllm") == []
