"""GPU, driver, GPUDirect Storage and NIXL: what is here, and why a path is not taken."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from memkv_engines.cli.doctor.engines import version_of
from memkv_engines.cli.doctor.finding import COMMAND_TIMEOUT_S, NOTE, OK, PROBLEM, Finding, Host

AREA = "gpu"
NOT_YET = "the GPU path was tested on a fake driver only so far: run `make test-gpu` in a checkout, and tell us"
GDS_OFF = "set gds=off, or mend the driver (gdscheck -p)"
GDS_NEXT = "only where the KV cache is in GPU memory: mend it, or leave gds=auto"
NIXL_MIN = (1, 5, 0)
# As limits.GPU_MIN_DRIVER; a test holds the two equal.
DRIVER_MIN = 12_000
# Asking imports numpy, and where GPUDirect might work it tries it.
CHOICE_TIMEOUT_S = 60.0


def check(host: Host, path: str = "") -> Iterator[Finding]:
    """GPU, what reads storage into it, and which transport would be taken for the tier's directory."""
    gpus = _gpus(host)
    yield from gpus
    library, version = _driver_library()
    yield library
    yield from _bindings(version)
    yield from _gds(host, has_gpu=bool(gpus) and gpus[0].verdict == OK)
    yield from _nixl(host)
    yield from _topology(host)
    yield from _choice(host, path)


def _gpus(host: Host) -> list[Finding]:
    query = "--query-gpu=name,driver_version,memory.total,pci.bus_id"
    lines = host.output("nvidia-smi", query, "--format=csv,noheader").splitlines()
    if not lines:
        kernel = host.text("proc/driver/nvidia/version")
        why = "the driver is loaded, but nvidia-smi does not answer" if kernel else "no NVIDIA driver is loaded"
        todo = "mend the driver" if kernel else "only if this host has a GPU: install the NVIDIA driver"
        return [Finding(AREA, "gpu", NOTE, "none", f"{why}: KV caches in CPU memory work", todo)]
    return [Finding(AREA, f"gpu {number}", OK, line, NOT_YET) for number, line in enumerate(lines)]


def _driver_library() -> tuple[Finding, int]:
    """What was found, and the CUDA version that the driver offers, such as 13000; 0 without one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        cuda.cuDriverGetVersion(ctypes.byref(version))
    except OSError as error:
        todo = "only a KV cache in GPU memory needs it: install the NVIDIA driver"
        return Finding(AREA, "libcuda", NOTE, "cannot be loaded", str(error), todo), 0
    told = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    if version.value < DRIVER_MIN:
        why = f"CUDA {DRIVER_MIN // 1000} or later is needed: a KV cache in GPU memory is refused"
        return Finding(AREA, "libcuda", PROBLEM, told, why, "update the NVIDIA driver"), version.value
    return Finding(AREA, "libcuda", OK, told), version.value


def _bindings(driver: int) -> Iterator[Finding]:
    """The way to the driver, and which libraries are made for a later CUDA than the driver offers."""
    version = version_of("cuda-bindings")
    if not version:
        why = "KV caches in GPU memory need it"
        yield Finding(AREA, "cuda-bindings", NOTE, "not installed", why, "pip install 'memkv-engines[gpu]'")
    offered = driver // 1000
    majors = {"cuda-bindings": version.split(".")[0]}
    majors |= {f"{name}-cu{major}": major for name in ("kvikio", "nixl") for major in ("12", "13")}
    for name, major in majors.items():
        found = version_of(name)
        if found and offered and int(major) > offered:
            why = f"made for CUDA {major}, the driver offers {offered}"
            todo = f"take the one for CUDA {offered}, or update the NVIDIA driver"
            yield Finding(AREA, name, NOTE, found, why, todo)
        elif found and name == "cuda-bindings":
            yield Finding(AREA, name, OK, found)


def _gds(host: Host, *, has_gpu: bool) -> Iterator[Finding]:
    module = host.text("sys/module/nvidia_fs/version") or ("loaded" if host.text("proc/driver/nvidia-fs/stats") else "")
    kvikio = version_of("kvikio-cu12") or version_of("kvikio-cu13")
    cufile = bool(version_of("nvidia-cufile") or version_of("nvidia-cufile-cu12")) or _loads("libcufile.so.0")
    config = _cufile_config(host)
    missing = [
        text
        for text, is_there in (
            ("a GPU", has_gpu),
            ("the kernel module nvidia_fs", bool(module)),
            ("libcufile", cufile),
            ("the package kvikio", bool(kvikio)),
        )
        if not is_there
    ]
    if missing:
        yield Finding(AREA, "GPUDirect Storage", NOTE, "off", f"lacks {', '.join(missing)}", next=GDS_NEXT)
    else:
        yield Finding(AREA, "GPUDirect Storage", OK, "all its parts are here", "whether it is taken stands below")
    if config:
        yield Finding(AREA, "cufile.json", OK, config)


def _cufile_config(host: Host) -> str:
    path = host.environ.get("CUFILE_ENV_PATH_JSON", "etc/cufile.json").lstrip("/")
    # The file may hold comments, which the json module refuses.
    found = re.search(r'"allow_compat_mode"\s*:\s*(true|false)', host.text(path))
    return f"allow_compat_mode {found.group(1)}" if found else ""


def _nixl(host: Host) -> Iterator[Finding]:
    version = version_of("nixl-cu12") or version_of("nixl-cu13")
    if not version:
        yield Finding(AREA, "NIXL", NOTE, "not installed", next="only for transport=nixl: pip install nixl")
        return
    if tuple(int(part) for part in re.findall(r"\d{1,9}", version)[:3]) >= NIXL_MIN:
        yield Finding(AREA, "NIXL", OK, version, "transport=nixl can be used with the plugins that load")
    else:
        why = "transport=nixl is refused: 1.5.0 is the first that reports short reads"
        yield Finding(AREA, "NIXL", NOTE, version, why, "pip install -U nixl")
    for plugin in _nixl_plugins(host):
        reason = _why_not_loaded(plugin)
        name = plugin.stem.removeprefix("libplugin_")
        todo = f"only for nixl_plugin={name}: install what it lacks" if reason else ""
        yield Finding(AREA, name, NOTE if reason else OK, reason or "loads", next=todo)


def _nixl_plugins(host: Host) -> list[Path]:
    folder = host.environ.get("NIXL_PLUGIN_DIR")
    if folder:
        return sorted(Path(folder).glob("libplugin_*.so"))
    spec = importlib.util.find_spec("nixl_cu12") or importlib.util.find_spec("nixl_cu13")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    # Wheels hold the plugins twice; NIXL loads those below the hidden folder, and only there are their libraries.
    for pattern in (".{}*.libs/**/libplugin_*.so", "{}*.libs/**/libplugin_*.so"):
        found = sorted(plugin for place in places for plugin in place.parent.glob(pattern.format(place.name)))
        if found:
            return found
    return []


def _why_not_loaded(library: Path) -> str:
    """What the loader says against a library, asked in another process: a plugin may do anything when it is loaded."""
    program = "import ctypes, sys\ntry: ctypes.CDLL(sys.argv[1])\nexcept OSError as error: print(error)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, str(library)], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return "loading it does not end"
    return done.stdout.strip() or ("loading it kills the process" if done.returncode else "")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _choice(host: Host, path: str) -> Iterator[Finding]:
    """What the package itself would decide, asked in another process: it imports what this one may not."""
    command = [sys.executable, "-m", "memkv_engines.transports.select", path or "."]
    root = str(Path(__file__).resolve().parents[3])
    environ = {**host.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [host.environ.get("PYTHONPATH")])])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHOICE_TIMEOUT_S, env=environ)
        answers = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        yield Finding(
            AREA, "transport", NOTE, f"not decided after {CHOICE_TIMEOUT_S:.0f} s", "a driver may hang", GDS_OFF
        )
        return
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        yield Finding(AREA, "transport", NOTE, "cannot be told", last, "mend what stands above first")
        return
    if "error" in answers:
        yield Finding(AREA, "transport", PROBLEM, "the configuration is refused", answers["error"], "correct this key")
        return
    for medium in ("host", "gpu"):
        answer = answers[medium]
        name = f"transport ({medium} KV)"
        if "error" in answer:
            # A policy for GPUs is wrong for host memory only where there is a GPU to run on.
            todo = "only if an engine here has its KV cache there: change the key that is named"
            yield Finding(AREA, name, NOTE, "refused", answer["error"], todo)
        else:
            value = f"{answer['kind']}, staged in {answer['medium']} memory"
            yield Finding(AREA, name, OK, value, answer["reason"])


def _topology(host: Host) -> Iterator[Finding]:
    matrix = host.output("nvidia-smi", "topo", "-m")
    if not matrix:
        return
    worst = next((word for word in ("SYS", "NODE", "PHB", "PXB", "PIX") if re.search(rf"\b{word}\b", matrix)), "")
    verdicts = {
        "SYS": "some pairs cross the sockets: staging in host memory is likely faster between those",
        "NODE": "some pairs cross PCIe host bridges of one socket",
        "PHB": "some pairs go through the CPU's host bridge",
        "PXB": "every pair is behind PCIe switches",
        "PIX": "every pair is behind one PCIe switch",
    }
    near = worst in ("PXB", "PIX", "")
    todo = "" if near else "leave staging_medium=auto, which measures the way to the tier's own drives"
    yield Finding(AREA, "PCIe distance", OK if near else NOTE, worst, verdicts.get(worst, ""), todo)
