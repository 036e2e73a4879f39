"""What ``memkv-engines patch`` does and prints."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from memkv_engines.cli.patch.files import look, read_patch, write
from memkv_engines.cli.patch.installed import Installed, find_engines, patches_of


@dataclass
class Finding:
    """One patch and what became of it.

    Attributes:
        name: its file, without the ending.
        version: of the engine it is for.
        title: what it is about.
        state: ``applies``, ``applied``, ``conflicts`` or ``other version``.
        detail: why it conflicts: file and hunk.
    """

    name: str
    version: str
    title: str
    state: str
    detail: str = ""


def run(what: str, engine: str | None, target: str | None, *, as_json: bool, folder: Path | None = None) -> int:
    """Look at patches, apply them or take them back, and print what became of each.

    Args:
        what: ``check``, ``apply`` or ``revert``.
        engine: only this one, or None for those that are installed.
        target: the folder that holds the engine's package, or None for the running Python's.
        as_json: print one JSON document.
        folder: of the patches; None for the one that came with this package.

    Returns:
        0, or 1 where a patch conflicts.

    Raises:
        ConfigError: no engine, or its version is unknown.
        PatchError: a patch is damaged, or a file cannot be read or written. Patches before it in the list were done.
    """
    reports = [(installed, _handle(what, installed, folder)) for installed in find_engines(engine, target)]
    if as_json:
        print(json.dumps([_as_json(installed, findings) for installed, findings in reports], indent=2))
    else:
        for installed, findings in reports:
            _print(installed, findings)
    return int(any(finding.state == "conflicts" for _, findings in reports for finding in findings))


def _handle(what: str, installed: Installed, folder: Path | None) -> list[Finding]:
    # All are read before anything is written: a damaged patch stops the whole call.
    patches = [
        (version, path.stem, read_patch(path, installed.engine))
        for version, paths in patches_of(installed.engine, folder).items()
        for path in paths
    ]
    findings = []
    for version, name, patch in reversed(patches) if what == "revert" else patches:
        finding = Finding(name, version, patch.title, "other version")
        findings.append(finding)
        if version != installed.version:
            continue
        finding.state, finding.detail = look(patch, installed.folder)
        if (what, finding.state) in (("apply", "applies"), ("revert", "applied")):
            write(patch, installed.folder, reverse=what == "revert")
            finding.state = look(patch, installed.folder)[0]
    return sorted(findings, key=lambda finding: (finding.version, finding.name))


def _as_json(installed: Installed, findings: list[Finding]) -> dict[str, object]:
    return {
        "engine": installed.engine,
        "version": installed.version,
        "folder": str(installed.folder),
        "patches": [asdict(finding) for finding in findings],
    }


def _print(installed: Installed, findings: list[Finding]) -> None:
    print(f"{installed.engine} {installed.version} in {installed.folder}")
    own = [finding for finding in findings if finding.state != "other version"]
    width = max((len(finding.name) for finding in own), default=0)
    for finding in own:
        print(f"  {finding.name:{width}}  {finding.state:9}  {finding.title}")
        if finding.detail:
            print(f"  {'':{width}}  {finding.detail}")
    others = sorted({finding.version for finding in findings} - {finding.version for finding in own})
    if others:
        print(f"  patches for other versions, left alone: {', '.join(others)}")
    elif not own:
        print("  there are no patches for this engine")
