"""``tier verify`` and ``tier repair``: every finding is printed when it is made, so a directory may hold any number."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass

from memkv_engines.chunk.protection import Protection
from memkv_engines.cli.tier.place import Root, check_named, chosen, open_roots
from memkv_engines.cli.tier.printing import JsonRows, Progress, human_size, plain, progress
from memkv_engines.errors import (
    ChunkError,
    ChunkForeign,
    ChunkMissing,
    ConfigError,
    MemKVError,
    TierError,
    TransportError,
)
from memkv_engines.offload.loading import REMOVABLE_KINDS
from memkv_engines.secret import read_key_file
from memkv_engines.tier import listing
from memkv_engines.tier.check import check_chunk
from memkv_engines.tier.eviction import OFF
from memkv_engines.tier.folders import Folder
from memkv_engines.tier.listing import Entry
from memkv_engines.tier.policy import load_policy, load_quotas
from memkv_engines.tier.quotas import TenantAccounts
from memkv_engines.tier.records import MANIFEST, is_leftover, read_manifest
from memkv_engines.tier.upkeep import Upkeep
from memkv_engines.tier.usage import NAME, UsageFile, read_count

_USAGE_SLACK_SHARE = 0.05


@dataclass(frozen=True)
class Finding:
    """Something wrong.

    Attributes:
        place: relative to the directory.
        kind: as in the counters of misses, or ``temporary``, ``unreadable``, ``manifest``, ``policy``, ``usage``.
        why: in words.
        entry: the file that ``repair`` removes, None where it removes none.
    """

    place: str
    kind: str
    why: str
    entry: Entry | None = None


def verify(arguments: argparse.Namespace) -> int:
    """Look; 1 if there are findings."""
    return _examine(arguments)


def repair(arguments: argparse.Namespace) -> int:
    """Look and mend; 1 if findings are left."""
    return _examine(arguments)


def _examine(arguments: argparse.Namespace) -> int:
    # Before anything is printed: a key that cannot be used is a wrong call.
    arguments.protection = _protection(arguments.key_file)
    with open_roots(arguments.path) as roots, JsonRows("findings", on=arguments.json) as rows:
        check_named(roots, arguments.namespace)
        summary = {"chunks": 0, "bytes": 0, "authenticated": 0, "digests_only": 0}
        summary |= {"findings": 0, "repaired": 0, "freed_bytes": 0}
        with progress(_expected_bytes(roots)) as bar:
            for root in roots:
                _examine_root(root, arguments, rows, summary, bar)
        rows.summary = summary
    left = summary["findings"] - summary["repaired"]
    if not arguments.json:
        line = f"{summary['chunks']} chunks, {human_size(summary['bytes'])}, {summary['findings']} findings"
        if arguments.repair:
            line += f", {summary['repaired']} repaired, {human_size(summary['freed_bytes'])} freed"
        print(f"{line}{' (dry run)' if arguments.dry_run else ''}")
        if summary["authenticated"]:
            print(f"{summary['authenticated']} of them are authentic")
        if summary["digests_only"]:
            why = "are of another key" if arguments.key_file else "need --key-file"
            print(f"{summary['digests_only']} are protected: digests checked only, their MACs {why}")
    return 1 if left else 0


def _protection(key_file: str | None) -> Protection | None:
    if key_file is None:
        return None
    # It reads what is encrypted and what is not.
    return Protection(read_key_file(key_file, "--key-file").reveal(), encrypt=False)


def _examine_root(
    root: Root, arguments: argparse.Namespace, rows: JsonRows, summary: dict[str, int], bar: Progress
) -> None:
    upkeep = upkeep_of(root) if arguments.repair and not arguments.dry_run else None
    for finding in _findings(root, arguments, summary, bar):
        summary["findings"] += 1
        action, freed = _mend(root, finding, upkeep, dry_run=arguments.repair and arguments.dry_run)
        summary["repaired"] += action == "repaired"
        summary["freed_bytes"] += freed
        row = {"directory": root.path, "place": finding.place, "kind": finding.kind, "why": finding.why}
        rows.add({**row, "action": action} if arguments.repair else row)
        if not arguments.json:
            done = f" -> {action}" if arguments.repair else ""
            print(plain(f"{finding.kind}: {finding.place} ({finding.why}){done}"))


def _mend(root: Root, finding: Finding, upkeep: Upkeep | None, *, dry_run: bool) -> tuple[str, int]:
    """What was done about a finding, and the bytes that became free."""
    mendable = finding.entry is not None or finding.kind == "usage"
    if upkeep is None:
        return ("would be repaired" if dry_run and mendable else "left"), 0
    try:
        if finding.kind == "usage":
            upkeep.scan(collect=False)
            return "repaired", 0
        entry = finding.entry
        if entry is None or not _unchanged(entry):
            return "left", 0
        upkeep.remove(entry)
        root.held_bytes -= entry.info.st_size if entry.name is not None else 0
    except TierError as error:
        return f"left: {error}", 0
    return "repaired", finding.entry.info.st_size if finding.entry is not None else 0


def _unchanged(entry: Entry) -> bool:
    """Whether the file is still the one that was examined: an engine may have written it anew."""
    try:
        now = os.stat(entry.text, dir_fd=entry.dir_fd, follow_symlinks=False)
    except OSError:
        return False
    return (now.st_ino, now.st_mtime_ns, now.st_size) == (entry.info.st_ino, entry.info.st_mtime_ns, entry.info.st_size)


def _findings(root: Root, arguments: argparse.Namespace, summary: dict[str, int], bar: Progress) -> Iterator[Finding]:
    folders = chosen(root, arguments.namespace)
    if not arguments.namespace:
        yield from filter(None, map(_leftover, listing.root_temporaries(root.fd, root.note)))
        yield from _record_findings(root)
    for folder in folders:
        yield from _namespace_findings(root, folder)
        key_id = _key_id_of(root, folder)
        for entry in listing.files(root.fd, folder, root.note):
            finding = _leftover(entry) if entry.is_temporary else None
            if entry.name is not None:
                summary["chunks"] += 1
                summary["bytes"] += entry.info.st_size
                root.held_bytes += entry.info.st_size
                finding = _chunk_finding(root, entry, bar, arguments, key_id, summary)
            if finding is not None:
                yield finding
    for place, why in root.unread:
        yield Finding(place, "unreadable", why)
    if not arguments.namespace:
        yield from _usage_findings(root)


def _leftover(entry: Entry) -> Finding | None:
    if not is_leftover(entry.info):
        return None
    return Finding(f"{entry.place}/{entry.text}", "temporary", "left by a writer that ended early", entry)


def _chunk_finding(
    root: Root, entry: Entry, bar: Progress, arguments: argparse.Namespace, key_id: bytes, summary: dict[str, int]
) -> Finding | None:
    place = f"{entry.place}/{entry.text}"
    try:
        header = check_chunk(
            entry,
            root.owners,
            payload=not arguments.quick,
            key_id=key_id,
            protection=arguments.protection,
            on_bytes=bar.bytes,
        )
        if header.seal is not None:
            summary["authenticated" if header.guard else "digests_only"] += 1
    except ChunkMissing:
        return None  # Evicted meanwhile.
    except ChunkError as error:
        ours = error.kind in REMOVABLE_KINDS and entry.info.st_uid in root.owners
        return Finding(place, error.kind, str(error), entry if ours else None)
    except TransportError as error:
        return Finding(place, "io_error", str(error))
    return None


def _record_findings(root: Root) -> Iterator[Finding]:
    try:
        load_quotas(root.fd)
    except ConfigError as error:
        yield Finding("quotas.json", "policy", str(error))


def _namespace_findings(root: Root, folder: str) -> Iterator[Finding]:
    try:
        load_policy(root.fd, folder)
    except ConfigError as error:
        yield Finding(f"{folder}/policy.json", "policy", str(error))
    try:
        namespace = Folder(folder, root.fd)
        read_manifest(namespace.fd, folder)
    except (ChunkForeign, OSError) as error:
        yield Finding(f"{folder}/{MANIFEST}", "manifest", str(error))


def _key_id_of(root: Root, folder: str) -> bytes:
    """The key that a namespace is protected with, as its manifest says; empty for none, or without a manifest."""
    try:
        namespace = Folder(folder, root.fd)
        manifest = read_manifest(namespace.fd, folder) or {}
        protection = manifest.get("protection")
        return bytes.fromhex(str(protection["key_id"])) if isinstance(protection, dict) else b""
    except (ChunkForeign, OSError, KeyError, ValueError):
        return b""


def _usage_findings(root: Root) -> Iterator[Finding]:
    held_bytes = root.held_bytes
    try:
        count = read_count(root.fd)
    except (ChunkForeign, OSError) as error:
        yield Finding(NAME, "unreadable", str(error))
        return
    if count is None:
        return
    if not count.corrections:
        yield Finding(NAME, "usage", "damaged, or no engine has counted yet")
    elif abs(count.used_bytes - held_bytes) > _USAGE_SLACK_SHARE * max(count.used_bytes, held_bytes):
        yield Finding(NAME, "usage", f"{count.used_bytes} B are counted, {held_bytes} B are held")


def upkeep_of(root: Root) -> Upkeep:
    """What removes files here and keeps the counts right, where there are any."""
    # Opening the file would make it, and none is needed where nobody counts.
    try:
        counted = read_count(root.fd) is not None
    except (ChunkForeign, OSError):
        counted = False
    usage = UsageFile(root.fd) if counted else None
    return Upkeep(root.fd, usage, TenantAccounts(root.fd), 0, OFF)


def _expected_bytes(roots: list[Root]) -> int | None:
    total = 0
    for root in roots:
        try:
            count = read_count(root.fd)
        except (ChunkForeign, OSError, MemKVError):
            return None
        if count is None or not count.corrections:
            return None
        total += count.used_bytes
    return total
