"""`memkv-engines doctor`: prints wherever it is run, tells what is so, and leaves nothing behind."""

from __future__ import annotations

import ast
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from memkv_engines.cli import doctor, main
from memkv_engines.cli.doctor import engines, gpu, machine, storage
from memkv_engines.cli.doctor.finding import NOTE, OK, PROBLEM, Finding, Host, guarded
from memkv_engines.limits import GPU_MIN_DRIVER

ROOT = Path(__file__).resolve().parent.parent.parent


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    folder = tmp_path / "tier"
    folder.mkdir(mode=0o700)
    return folder


def test_it_needs_the_standard_library_only() -> None:
    for path in [*(ROOT / "memkv_engines/cli/doctor").glob("*.py"), ROOT / "memkv_engines/cli/main.py"]:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                own = name.startswith("memkv_engines.cli") or name == "memkv_engines.errors"
                assert own or name.split(".")[0] in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_whatever_is_not_well_says_what_to_do_next() -> None:
    """In the source, since no machine shows all of it."""
    for path in (ROOT / "memkv_engines/cli/doctor").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding"):
                continue
            verdict = node.args[2]
            has_next = len(node.args) >= 6 or any(keyword.arg == "next" for keyword in node.keywords)
            is_well = isinstance(verdict, ast.Name) and verdict.id == "OK"
            assert is_well or has_next, f"{path.name}:{node.lineno}: what to do about it is missing"


def test_it_prints_where_nothing_is_installed(tier: Path) -> None:
    """Without site-packages: our own dependencies are missing, which is a problem it names."""
    command = [sys.executable, "-S", "-E", "-m", "memkv_engines.cli.doctor", str(tier), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    assert done.returncode == 1, done.stderr
    findings = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert findings["memkv-engines"]["verdict"] == PROBLEM
    assert "numpy" in findings["memkv-engines"]["value"]
    assert {"python", "gpu", "cores", "file system", "write rate"} <= set(findings)


def test_the_command_prints_and_leaves_nothing(tier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main.main(["doctor", str(tier)])
    printed = capsys.readouterr().out
    assert str(tier) in printed
    assert "GB/s" in printed
    # Whether this machine has a problem is not for a test to say; that the exit code tells is.
    assert code == ("PROBLEM" in printed)
    assert list(tier.iterdir()) == []


def test_a_directory_that_is_not_there_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor", str(tmp_path / "nowhere"), "--json"]) == 1
    findings = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert findings["path"]["verdict"] == PROBLEM
    assert findings["path"]["next"]


def test_a_check_that_fails_is_a_finding() -> None:
    def check() -> Iterator[Finding]:
        yield Finding("area", "one", OK, "fine")
        raise RuntimeError("a bug of ours")

    (finding,) = guarded("area", check)
    assert finding.verdict == NOTE
    assert "RuntimeError: a bug of ours" in finding.value


# ------------------------------------------------------------------------------------------------------------- storage


def test_the_alignment_it_tells_is_taken(tier: Path) -> None:
    finding = storage._direct_io(tier)
    if finding.verdict != OK:
        pytest.skip(f"no direct I/O here: {finding.value}")
    with storage._scratch(tier, os.O_DIRECT) as (fd, path):
        memory, offset = storage._dio_align(path)
        if not offset:
            pytest.skip("the kernel does not tell")
        with pytest.raises(OSError, match="Invalid argument"):
            os.pwrite(fd, b"x" * (offset - 1), 0)
    assert f"{memory} B in memory" in finding.value


def test_direct_io_that_is_refused_is_said_with_its_reason(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: os.PathLike[str], flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    findings = by_name(storage.check(Host(), str(tier)))
    assert findings["direct I/O"].value == "refused: Invalid argument"
    assert "buffered" in findings["read rate"].value


@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        ("36 25 0:40 / {tier} rw - nfs4 server:/kv rw", "nfs4 on", "several hosts"),
        ("36 25 0:40 / {tier} rw - tmpfs tmpfs rw", "tmpfs on", "does not survive"),
        ("36 25 259:1 / {tier} rw - xfs /dev/nvme0n1 rw", "xfs on", ""),
    ],
)
def test_file_systems(line: str, kind: str, says: str, tier: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "proc/self").mkdir(parents=True)
    lines = ["22 1 8:1 / / rw - ext4 /dev/sda1 rw", line.format(tier=tier)]
    (root / "proc/self/mountinfo").write_text("\n".join(lines))
    finding = storage._file_system(Host(root), tier)
    assert finding.value.startswith(kind)
    assert says in finding.why


# ----------------------------------------------------------------------------------------------------- another machine


@pytest.fixture
def gpu_host(tmp_path: Path) -> Host:
    """A machine with two GPUs, as its files and commands tell."""
    root, programs = tmp_path / "root", tmp_path / "bin"
    for path, text in {
        "proc/driver/nvidia-fs/stats": "GDS Version: 1.14",
        "etc/cufile.json": '{ // comment\n "properties": { "allow_compat_mode": false } }',
        "sys/fs/cgroup/cpu.max": "50000 100000",
        "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    programs.mkdir()
    smi = programs / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "--query-gpu*) echo 'NVIDIA H100, 580.65, 80 GiB, 1B:00.0'; echo 'NVIDIA H100, 580.65, 80 GiB, 2B:00.0';;\n"
        "topo) printf '\\tGPU0\\tNIC0\\nGPU0\\t X \\tSYS\\n';;\n"
        "esac\n"
    )
    smi.chmod(0o755)
    return Host(root, {"PATH": f"{programs}:{os.environ['PATH']}"})


def test_a_machine_with_gpus(gpu_host: Host) -> None:
    findings = by_name(gpu.check(gpu_host))
    assert findings["gpu 0"].value.startswith("NVIDIA H100")
    assert "gpu 1" in findings
    assert "nvidia_fs" not in findings["GPUDirect Storage"].why
    assert "kvikio" in findings["GPUDirect Storage"].why
    assert findings["cufile.json"].value == "allow_compat_mode false"
    assert findings["PCIe distance"].value == "SYS"
    assert findings["PCIe distance"].verdict == NOTE


@pytest.mark.parametrize(("driver", "wrong"), [(12_040, {"cuda-bindings", "kvikio-cu13"}), (13_000, set()), (0, set())])
def test_libraries_for_a_later_cuda_than_the_drivers(
    driver: int, wrong: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"cuda-bindings": "13.0.1", "kvikio-cu13": "26.10.0", "nixl-cu12": "1.5.1"}
    monkeypatch.setattr(gpu, "version_of", lambda name: installed.get(name, ""))
    findings = by_name(gpu._bindings(driver))
    assert {name for name, finding in findings.items() if finding.verdict == NOTE} == wrong
    assert all("the driver offers 12" in findings[name].why for name in wrong)


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(version: object) -> None:
        version._obj.value = 11_080  # type: ignore[attr-defined]

    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda _: SimpleNamespace(cuDriverGetVersion=tell))
    finding, version = gpu._driver_library()
    assert (finding.verdict, finding.value, version) == (PROBLEM, "CUDA 11.8", 11_080)
    assert gpu.DRIVER_MIN == GPU_MIN_DRIVER


def test_a_machine_without(tmp_path: Path) -> None:
    findings = by_name(gpu.check(Host(tmp_path, {"PATH": ""})))
    assert findings["gpu"].value == "none"
    assert "a GPU, the kernel module nvidia_fs" in findings["GPUDirect Storage"].why
    assert "PCIe distance" not in findings


def test_the_transport_that_would_be_taken_is_told_with_its_reason(tier: Path) -> None:
    findings = by_name(gpu.check(Host(), str(tier)))
    assert findings["transport (host KV)"].value == "posix, staged in host memory"
    assert "host memory" in findings["transport (host KV)"].why
    assert "lacks" in findings["transport (gpu KV)"].why or findings["transport (gpu KV)"].value.startswith("gds/")


@pytest.mark.parametrize(
    ("environ", "name", "verdict", "says"),
    [
        ({"MEMKV_ENGINES_GDS": "on"}, "transport (host KV)", NOTE, "KV caches in GPU memory"),
        ({"MEMKV_ENGINES_TRANSPORT": "posix"}, "transport (gpu KV)", OK, "transport=posix"),
        ({"MEMKV_ENGINES_TRANSPORT": "rdma"}, "transport", PROBLEM, "give one of"),
        ({"PYTHONPATH": "nowhere", "PYTHONSAFEPATH": "1"}, "transport (host KV)", OK, "host memory"),
    ],
)
def test_the_configuration_decides_what_is_told(
    environ: dict[str, str], name: str, verdict: str, says: str, tier: Path
) -> None:
    finding = by_name(gpu.check(Host(environ={**os.environ, **environ}), str(tier)))[name]
    assert finding.verdict == verdict
    assert says in finding.why


def test_a_decision_that_cannot_be_made_does_not_stop_the_report(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.sys, "executable", "/bin/false")
    assert by_name(gpu.check(Host(), str(tier)))["transport"].value == "cannot be told"


def test_plugins_of_nixl_are_each_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("nixl_cu13", "nixl_cu13.libs/nixl", ".nixl_cu13.mesonpy.libs/plugins", "other.libs/x"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "libplugin_GDS.so").write_bytes(b"no library")
    (tmp_path / "nixl_cu13.libs/nixl/libplugin_TWICE.so").write_bytes(b"only where NIXL does not look")
    (tmp_path / "nixl_cu13/__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(gpu, "version_of", lambda name: "1.4.1" if name == "nixl-cu13" else "")
    found = list(gpu._nixl(Host(environ={})))
    assert [finding.name for finding in found] == ["NIXL", "GDS"]
    assert "1.5.0 is the first" in found[0].why
    assert found[1].verdict == NOTE


def test_a_container_with_half_a_core_and_no_huge_pages(gpu_host: Host) -> None:
    findings = by_name(machine.check(gpu_host))
    assert "may use 0.5" in findings["cores"].value
    assert findings["transparent huge pages"].verdict == PROBLEM
    assert findings["transparent huge pages"].next


def test_a_library_that_cannot_be_loaded_is_told_with_the_loaders_words(tmp_path: Path) -> None:
    plugin = tmp_path / "libplugin_GDS.so"
    plugin.write_bytes(b"no library")
    assert "too short" in gpu._why_not_loaded(plugin) or "invalid ELF" in gpu._why_not_loaded(plugin)


@pytest.mark.parametrize(
    ("version", "verdict", "says"),
    [("0.32.1", OK, "tested"), ("0.33.0", NOTE, "not run"), ("0.35.0", NOTE, "untested"), ("0.3", NOTE, "untested")],
)
def test_versions_of_engines(version: str, verdict: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "version_of", lambda name: version if name == "vllm" else "")
    finding = by_name(engines.check())["vllm"]
    assert finding.verdict == verdict
    assert says in finding.why


def test_the_report_shows_what_to_do_next() -> None:
    text = doctor.render([Finding("a", "thing", PROBLEM, "broken", "because", "mend it")])
    assert "PROBLEM" in text
    assert "-> mend it" in text
    assert text.endswith("1 problems")
