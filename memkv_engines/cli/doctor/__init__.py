"""``memkv-engines doctor``: what is here, which paths work, why others do not, and what to do next.

Standard library only: it must print where everything else is broken.
"""

from __future__ import annotations

import json

from memkv_engines.cli.doctor import engines, gpu, machine, storage
from memkv_engines.cli.doctor.finding import NOTE, PROBLEM, Finding, Host, guarded

__all__ = ["examine", "render", "run"]

_MARKS = {NOTE: "  note", PROBLEM: "  PROBLEM"}


def examine(path: str, host: Host | None = None) -> list[Finding]:
    """Look at everything. Blocks for some seconds; writes and removes scratch files in the tier's directory.

    Args:
        path: the tier's directory, or several with commas between; empty to leave it out.
        host: where to look.
    """
    host = host or Host()
    findings = [
        *guarded(engines.AREA, engines.check),
        *guarded(gpu.AREA, lambda: gpu.check(host, path)),
        *guarded(machine.AREA, lambda: machine.check(host)),
    ]
    for part in path.split(","):
        findings += guarded(storage.AREA, lambda part=part: storage.check(host, part.strip()))  # type: ignore[misc]
    return findings


def render(findings: list[Finding]) -> str:
    """The report as text."""
    lines, area = list[str](), ""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        if finding.area != area:
            area = finding.area
            lines += ["", area]
        lines.append(f"  {finding.name:<{width}}  {finding.value}{_MARKS.get(finding.verdict, '')}")
        lines += [f"  {'':<{width}}    {text}" for text in (finding.why, finding.next and f"-> {finding.next}") if text]
    problems = sum(finding.verdict == PROBLEM for finding in findings)
    return "\n".join([*lines[1:], "", f"{problems} problems" if problems else "no problems"])


def run(path: str, *, as_json: bool) -> int:
    """Print the report; 1 if it holds a problem."""
    findings = examine(path)
    print(json.dumps([finding.as_dict() for finding in findings], indent=2) if as_json else render(findings))
    return int(any(finding.verdict == PROBLEM for finding in findings))
