"""One thing the doctor found, and the rule that a check may fail but never stops the others."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

OK, NOTE, PROBLEM = "ok", "note", "problem"
COMMAND_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Finding:
    """What was looked at, what it is, and what follows from it.

    Attributes:
        area: group in the report.
        name: what was looked at.
        verdict: ``ok``, ``note`` (worth knowing) or ``problem`` (something wanted does not work).
        value: what was found.
        why: what it means, if that does not go without saying.
        next: what to do about it, empty if nothing.
    """

    area: str
    name: str
    verdict: str
    value: str
    why: str = ""
    next: str = ""

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Host:
    """Where a check looks; tests put another machine in its place.

    Attributes:
        root: of the file system that holds ``proc``, ``sys`` and ``etc``.
        environ: variables.
    """

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def text(self, path: str) -> str:
        """Content of a file under the root, stripped; empty if it cannot be read."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return ""

    def output(self, *command: str) -> str:
        """Standard output of a command, stripped; empty if there is no such command, it fails or takes too long."""
        program = shutil.which(command[0], path=self.environ.get("PATH", ""))
        if program is None:
            return ""
        try:
            done = subprocess.run(
                [program, *command[1:]], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""


def guarded(area: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Findings of a check; one that fails is a finding too: a report with a gap is better than none."""
    try:
        return list(check())
    except Exception as error:
        return [Finding(area, "check", NOTE, f"failed: {type(error).__name__}: {error}", next="please report this")]
