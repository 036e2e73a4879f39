"""``tier stat`` and ``tier ls``: what a directory holds. Lists, and reads one header for each group of a namespace."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from typing import Any

from memkv_engines.cli.tier.place import Root, check_named, chosen, open_roots
from memkv_engines.cli.tier.printing import JsonRows, human_age, human_size, plain, table
from memkv_engines.errors import ChunkForeign, ConfigError, MemKVError
from memkv_engines.tier import listing
from memkv_engines.tier.check import check_chunk
from memkv_engines.tier.folders import Folder
from memkv_engines.tier.listing import Entry
from memkv_engines.tier.policy import NamespacePolicy, Quotas, load_policy, load_quotas
from memkv_engines.tier.records import is_leftover, read_manifest
from memkv_engines.tier.usage import read_count

_MAX_SHARDS_TOLD = 4096
_HEADERS_TRIED = 8
_SHOWN = ("engine", "model", "dtype", "kv_cache_dtype", "lora_name")


@dataclass
class Totals:
    """What a namespace holds."""

    folder: str
    chunks: int = 0
    bytes: int = 0
    loaded_chunks: int = 0
    oldest_ns: int = 0
    last_use_ns: int = 0
    leftovers: int = 0
    foreign_files: int = 0
    # Blocks of each group and shard, and tokens of a block in each group.
    blocks: dict[tuple[int, str], int] = field(default_factory=dict)
    block_tokens: dict[int, int] = field(default_factory=dict)
    tries: dict[int, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int | None:
        """Tokens of the group and shard that has most of them, since all hold parts of the same ones."""
        known = [count * self.block_tokens.get(group, 0) for (group, _), count in self.blocks.items()]
        return max(known, default=0) or (None if known else 0)


def stat(arguments: argparse.Namespace) -> int:
    """Totals of each directory; 1 if something could not be read."""
    with open_roots(arguments.path) as roots, JsonRows("directories", on=arguments.json) as rows:
        bodies = []
        for root in roots:
            bodies.append(_stat_root(root))
            rows.add(bodies[-1])
    for body in bodies if not arguments.json else ():
        _print_stat(body)
    return int(any(body["warnings"] for body in bodies))


def ls(arguments: argparse.Namespace) -> int:
    """One row for each namespace, or each chunk; 1 if something could not be read."""
    warnings: list[str] = []
    lines: list[tuple[str, ...]] = [
        ("NAMESPACE", "CHUNKS", "SIZE", "TOKENS", "LOADED", "LAST USE", "POLICY", "STANDS FOR")
    ]
    with open_roots(arguments.path) as roots:
        check_named(roots, arguments.namespace)
        with JsonRows("chunks" if arguments.chunks else "namespaces", on=arguments.json) as rows:
            for root in roots:
                for folder in chosen(root, arguments.namespace):
                    if arguments.chunks:
                        _list_chunks(root, folder, rows, as_text=not arguments.json)
                        continue
                    row = _namespace_row(root, folder, warnings)
                    rows.add(row)
                    if not arguments.json:
                        lines.append(_as_line(row))
                warnings += [f"{place}: {why}" for place, why in root.unread]
            rows.summary = {"warnings": warnings}
    if not arguments.json and not arguments.chunks:
        print(table(lines) if len(lines) > 1 else "no namespaces")
    if not arguments.json:
        for warning in warnings:
            print(plain(f"warning: {warning}"))
    return int(bool(warnings))


def _namespace_row(root: Root, folder: str, warnings: list[str]) -> dict[str, Any]:
    totals = _total(root, folder)
    manifest = _manifest(root, folder, warnings)
    policy = _policy(root, folder, warnings)
    return {
        "directory": root.path,
        "namespace": folder,
        "chunks": totals.chunks,
        "bytes": totals.bytes,
        "tokens": totals.tokens,
        "loaded_chunks": totals.loaded_chunks,
        "oldest_ns": totals.oldest_ns,
        "last_use_ns": totals.last_use_ns,
        "tenant": manifest.get("tenant"),
        "stands_for": {key: manifest[key] for key in _SHOWN if key in manifest},
        "pinned": policy.pinned,
        "priority": policy.priority,
        "ttl_s": policy.ttl_s,
    }


def _as_line(row: dict[str, Any]) -> tuple[str, ...]:
    share = f"{100 * row['loaded_chunks'] / row['chunks']:.0f}%" if row["chunks"] else "-"
    stands_for = ", ".join(f"{key}={value}" for key, value in row["stands_for"].items())
    tenant = f"tenant={row['tenant']}, " if row["tenant"] else ""
    return (
        row["namespace"],
        f"{row['chunks']:,}",
        human_size(row["bytes"]),
        "?" if row["tokens"] is None else f"{row['tokens']:,}",
        share,
        human_age(row["last_use_ns"]),
        policy_text(NamespacePolicy(row["pinned"], row["priority"], row["ttl_s"])),
        plain(f"{tenant}{stands_for}")[:200] or "(no manifest)",
    )


def policy_text(policy: NamespacePolicy) -> str:
    """A policy in few words; ``-`` for the default."""
    parts = ["pinned"] * policy.pinned
    parts += [f"priority {policy.priority}"] if policy.priority else []
    parts += [f"ttl {policy.ttl_s} s"] if policy.ttl_s else []
    return ", ".join(parts) or "-"


def _list_chunks(root: Root, folder: str, rows: JsonRows, *, as_text: bool) -> None:
    for entry in listing.chunks(root.fd, folder, root.note):
        assert entry.name is not None
        chunk = entry.chunk()
        if as_text:
            print(f"{entry.place}/{entry.text}  {human_size(chunk.size_bytes)}  {human_age(chunk.last_use_ns)}")
        rows.add(
            {
                "directory": root.path,
                "place": f"{entry.place}/{entry.text}",
                "bytes": chunk.size_bytes,
                "blocks": entry.name.block_count - entry.name.holes,
                "group": entry.name.group,
                "shard": entry.name.shard_text,
                "written_ns": chunk.written_ns,
                "loaded_ns": chunk.used_ns if chunk.was_read else None,
            }
        )


def _stat_root(root: Root) -> dict[str, Any]:
    warnings: list[str] = []
    quotas = _quotas(root, warnings)
    tenants = {tenant: {"bytes": 0, "quota_bytes": quota} for tenant, quota in quotas.tenants.items()}
    body = {"chunks": 0, "bytes": 0, "loaded_chunks": 0, "leftovers": 0, "foreign_files": 0}
    body["leftovers"] = sum(1 for entry in listing.root_temporaries(root.fd, root.note) if is_leftover(entry.info))
    folders = chosen(root, [])
    for folder in folders:
        totals = _total(root, folder, tokens=False)
        for key in body:
            body[key] += getattr(totals, key)
        tenant = _manifest(root, folder, warnings).get("tenant")
        if isinstance(tenant, str):
            tenants.setdefault(tenant, {"bytes": 0, "quota_bytes": 0})["bytes"] += totals.bytes
        _policy(root, folder, warnings)
    free = os.fstatvfs(root.fd)
    warnings += [f"{place}: {why}" for place, why in root.unread]
    return {
        "directory": root.path,
        "namespaces": len(folders),
        **body,
        "counted_bytes": _counted(root, warnings),
        "free_bytes": free.f_bavail * free.f_frsize,
        "tenants": tenants,
        "warnings": warnings,
    }


def _print_stat(body: dict[str, Any]) -> None:
    print(f"{plain(body['directory'])}: {body['namespaces']} namespaces, {body['chunks']:,} chunks, ", end="")
    print(f"{human_size(body['bytes'])}, {human_size(body['free_bytes'])} free on the device")
    counted = body["counted_bytes"]
    print(f"  counted by engines: {'no' if counted is None else human_size(counted)}")
    print(f"  loaded since they were written: {body['loaded_chunks']:,} chunks")
    print(f"  leftovers of writers: {body['leftovers']}; files that are not ours: {body['foreign_files']}")
    for tenant, held in sorted(body["tenants"].items()):
        quota = f" of {human_size(held['quota_bytes'])}" if held["quota_bytes"] else ""
        print(f"  tenant {plain(tenant)!r}: {human_size(held['bytes'])}{quota}")
    for warning in body["warnings"]:
        print(plain(f"  warning: {warning}"))


def _total(root: Root, folder: str, *, tokens: bool = True) -> Totals:
    totals = Totals(folder)
    for entry in listing.files(root.fd, folder, root.note):
        if entry.name is None:
            totals.leftovers += entry.is_temporary and is_leftover(entry.info)
            totals.foreign_files += not entry.is_temporary
            continue
        chunk = entry.chunk()
        totals.chunks += 1
        totals.bytes += chunk.size_bytes
        totals.loaded_chunks += chunk.was_read
        totals.oldest_ns = min(totals.oldest_ns or chunk.written_ns, chunk.written_ns)
        totals.last_use_ns = max(totals.last_use_ns, chunk.last_use_ns)
        if tokens:
            _count_blocks(root, totals, entry)
    return totals


def _count_blocks(root: Root, totals: Totals, entry: Entry) -> None:
    assert entry.name is not None
    group = entry.name.group
    key = (group, entry.name.shard_text)
    if key not in totals.blocks and len(totals.blocks) >= _MAX_SHARDS_TOLD:
        return
    totals.blocks[key] = totals.blocks.get(key, 0) + entry.name.block_count - entry.name.holes
    if group in totals.block_tokens or totals.tries.get(group, 0) >= _HEADERS_TRIED:
        return
    totals.tries[group] = totals.tries.get(group, 0) + 1
    try:
        totals.block_tokens[group] = check_chunk(entry, root.owners, payload=False).geometry.block_tokens
    except MemKVError:
        pass  # Another chunk of the group may tell.


def _manifest(root: Root, folder: str, warnings: list[str]) -> dict[str, object]:
    try:
        namespace = Folder(folder, root.fd)
        return read_manifest(namespace.fd, folder) or {}
    except (ChunkForeign, OSError) as error:
        warnings.append(str(error))
        return {}


def _policy(root: Root, folder: str, warnings: list[str]) -> NamespacePolicy:
    try:
        return load_policy(root.fd, folder)
    except ConfigError as error:
        warnings.append(str(error))
        return NamespacePolicy()


def _quotas(root: Root, warnings: list[str]) -> Quotas:
    try:
        return load_quotas(root.fd)
    except ConfigError as error:
        warnings.append(str(error))
        return Quotas()


def _counted(root: Root, warnings: list[str]) -> int | None:
    try:
        count = read_count(root.fd)
    except (ChunkForeign, OSError) as error:
        warnings.append(str(error))
        return None
    return count.used_bytes if count is not None else None
