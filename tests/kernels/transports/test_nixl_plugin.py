"""A storage plugin that is compiled here, loaded by the real NIXL; and its declarations, held against the wheel."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memkv_engines.limits import ALIGN_BYTES
from memkv_engines.transports.files import address_of
from memkv_engines.transports.nixl_install import plugin_folders
from tests.fake_cuda.build import ROOT
from tests.fast.samples import aligned, noise
from tests.fast.transport_contract import blank
from tests.kernels.transports.nixl_plugin.build import HERE, PLUGIN, PROBE, compiled, plugin_folder

VIRTUAL_FUNCTIONS = 27


class _Symbol(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def virtual_functions(library: Path, engine: str) -> list[str]:
    """The mangled names in an engine's table of virtual functions, in order, with its class's name taken out."""
    loaded = ctypes.CDLL(str(library))
    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    table = (ctypes.c_void_p * (2 + VIRTUAL_FUNCTIONS)).in_dll(loaded, f"_ZTV{len(engine)}{engine}")
    names = []
    for address in table[2:]:
        found = _Symbol()
        assert dladdr(address, ctypes.byref(found)) and found.name, "a function that is not exported"
        assert found.address == address
        name = re.sub(rf"({len(engine)}{engine}|17nixlBackendEngine)", "*", found.name.decode(), count=1)
        names.append(name.replace("D1Ev", "D2Ev"))
    return names


@pytest.fixture(scope="module")
def posix() -> Path:
    (folder,) = plugin_folders()
    return folder / "libplugin_POSIX.so"


def test_the_declarations_have_the_virtual_functions_of_the_wheels_own_engine(posix: Path) -> None:
    ours, theirs = virtual_functions(compiled(PLUGIN), "VendorEngine"), virtual_functions(posix, "nixlPosixEngine")
    assert len(set(theirs)) == VIRTUAL_FUNCTIONS
    assert ours == theirs


def test_the_table_ends_where_the_wheels_does(posix: Path) -> None:
    for library, engine in ((compiled(PLUGIN), "VendorEngine"), (posix, "nixlPosixEngine")):
        listing = subprocess.run(["nm", "-DS", str(library)], capture_output=True, text=True, check=True).stdout
        (line,) = [line for line in listing.splitlines() if line.endswith(f" _ZTV{len(engine)}{engine}")]
        assert int(line.split()[1], 16) == 8 * (2 + VIRTUAL_FUNCTIONS)


def test_the_wheels_own_engine_works_through_the_declarations(posix: Path) -> None:
    """What lies where in the engine and in what is passed to it; a wrong layout crashes, so it is a child that asks."""
    program = (
        "import ctypes, os, sys\n"
        "from tests.kernels.transports import test_nixl_plugin as this\n"
        "this.drive_posix(*sys.argv[1:])\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(compiled(PROBE)), str(posix)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "as declared\n"), done.stderr


def drive_posix(probe: str, plugin: str) -> None:
    """In the child: bytes there and back through the wheel's engine."""
    ask = ctypes.CDLL(probe).nixl_abi_problem
    ask.restype = ctypes.c_char_p
    ask.argtypes = [ctypes.c_char_p, *[ctypes.c_void_p] * 2, ctypes.c_size_t, ctypes.c_int, ctypes.c_size_t]
    size, offset = 3 * ALIGN_BYTES, 2 * ALIGN_BYTES
    source, target = aligned(noise(size)), blank(size)
    fd = os.memfd_create("nixl-abi")
    problem = ask(plugin.encode(), address_of(source), address_of(target), size, fd, offset)
    assert not problem, problem
    assert target == noise(size)
    assert os.pread(fd, size + 1, offset) == noise(size)
    print("as declared")


def test_a_plugin_of_ones_own_keeps_the_contract_and_may_fail_in_every_way(tmp_path: Path) -> None:
    """The suite's own tests are listed by `python -m pytest -v tests/kernels/transports/nixl_plugin/vendor_suite.py`
    with NIXL_PLUGIN_DIR at what `plugin_folder` made."""
    plugins = plugin_folder(tmp_path / "plugins")
    command = [sys.executable, "-m", "pytest", "-q", "--basetemp", str(tmp_path / "suite"), HERE / "vendor_suite.py"]
    environ = {**os.environ, "NIXL_PLUGIN_DIR": str(plugins), "NIXL_LOG_LEVEL": "FATAL", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environ, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d\d passed", done.stdout)
    assert "skipped" not in done.stdout
