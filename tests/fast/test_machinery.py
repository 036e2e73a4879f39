"""The machinery around the tests: a gate that is over budget ends, and an environment is built when it must be."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

import pytest

from tests import run_gates
from tests.environments import build

STARTS_A_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(float(sys.argv[2]))
"""


def is_running(pid: int) -> bool:
    """Tells whether a process runs; a zombie, which waits for whoever inherited it, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def assert_ends(pid: int) -> None:
    """Waits a moment for a process that was killed to be gone."""
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)


def test_a_command_over_its_time_is_ended_with_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(run_gates.Timeout):
        run_gates.run([sys.executable, "-c", STARTS_A_CHILD, pid_file, "60"], timeout_s=2)
    assert_ends(int(pid_file.read_text()))


def test_a_command_that_ends_leaves_no_child_behind(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    assert run_gates.run([sys.executable, "-c", STARTS_A_CHILD, pid_file, "0"]) == 0
    assert_ends(int(pid_file.read_text()))


@pytest.mark.parametrize(
    ("source", "budget_s", "failure"),
    [
        ("def test_a(): pass", 60, None),
        ("def test_a(): assert False", 60, "pytest ended with code 1"),
        ("x = 1", 60, "pytest ended with code 5"),
        ("import pytest\n@pytest.mark.skip\ndef test_a(): pass", 60, "pytest ran no test"),
        ("import time\ndef test_a(): time.sleep(60)", 3, "over budget in pytest"),
    ],
)
def test_a_gate_passes_only_when_tests_ran_and_passed_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, budget_s: float, failure: str | None
) -> None:
    (tmp_path / "test_sample.py").write_text(source)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(run_gates, "REPORTS", tmp_path)
    monkeypatch.setattr(run_gates.build, "python_of", lambda _: Path(sys.executable))
    gate = run_gates.Gate("sample", "", budget_s, "dev", str(tmp_path))
    assert run_gates.run_gate(gate).failures == ((failure,) if failure else ())


class Builds:
    """An environment whose steps only note that they ran."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.fail = ""
        self.section = "dependencies = []"
        self.environment = build.Environment(
            "sample", (build.Step("base", self.base),), (build.Step("project", self.project),)
        )
        monkeypatch.setattr(build, "ROOT", folder)
        monkeypatch.setattr(build, "VENVS", folder / "venvs")
        monkeypatch.setattr(build, "LOGS", folder / "logs")
        monkeypatch.setattr(build, "ENVIRONMENTS", {"sample": self.environment})
        monkeypatch.setattr(build, "project_section", lambda: self.section)

    def base(self, venv: Path, log: Path) -> None:
        """Makes just enough for the venv to be found."""
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        (venv / "bin" / "python").touch()
        self.finish("base", log)

    def project(self, venv: Path, log: Path) -> None:
        """Does nothing more."""
        self.finish("project", log)

    def finish(self, step: str, log: Path) -> None:
        """Notes that a step ran; fails on demand, after writing to its log."""
        self.ran.append(step)
        log.write_text("No space left on device\n")
        if self.fail == step:
            raise build.BuildError("it broke")

    def build(self) -> list[str]:
        """Builds, and returns the steps that ran."""
        self.ran.clear()
        build.build("sample")
        return list(self.ran)


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds(tmp_path, monkeypatch)


def test_nothing_is_built_twice(builds: Builds) -> None:
    assert builds.build() == ["base", "project"]
    assert builds.build() == []


def test_a_change_of_dependencies_repeats_only_the_project_s_steps(builds: Builds) -> None:
    builds.build()
    builds.section = 'dependencies = ["more"]'
    assert builds.build() == ["project"]
    assert builds.build() == []


def test_a_failed_step_shows_its_log_and_a_remedy_and_is_repeated(builds: Builds) -> None:
    builds.fail = "project"
    with pytest.raises(build.BuildError, match=r"(?s)it broke.*No space left on device.*The disk is full"):
        builds.build()
    builds.fail = ""
    assert builds.build() == ["project"]
    assert builds.build() == []


def test_a_half_made_base_is_made_anew(builds: Builds) -> None:
    builds.fail = "base"
    with pytest.raises(build.BuildError):
        builds.build()
    builds.fail = ""
    assert builds.build() == ["base", "project"]


def test_an_environment_without_its_interpreter_is_made_anew(builds: Builds) -> None:
    builds.build()
    os.unlink(build.python_of(builds.environment.path))
    assert builds.build() == ["base", "project"]


def test_a_python_too_old_is_refused_before_anything_is_made(builds: Builds, monkeypatch: pytest.MonkeyPatch) -> None:
    too_new = dataclasses.replace(builds.environment, python_min=(3, 99))
    monkeypatch.setattr(build, "ENVIRONMENTS", {"sample": too_new})
    with pytest.raises(build.BuildError, match=r"needs Python 3\.99 or later"):
        builds.build()
    assert builds.ran == []
