"""``tier evict``: remove chunks on demand, with all the counts of engines that run beside it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from memkv_engines.cli.tier.examine import upkeep_of
from memkv_engines.cli.tier.place import Root, check_named, chosen, open_roots
from memkv_engines.cli.tier.printing import human_size, plain
from memkv_engines.errors import ConfigError, TierError
from memkv_engines.tier import listing
from memkv_engines.tier.listing import Entry
from memkv_engines.tier.policy import policy_of
from memkv_engines.tier.quotas import tenant_of


def evict(arguments: argparse.Namespace) -> int:
    """Remove; 1 if some of what was asked for stays."""
    asked = (arguments.namespace, arguments.all, arguments.tenant is not None, arguments.older_than is not None)
    if not any((*asked, arguments.unused_for is not None, arguments.down_to is not None)):
        raise ConfigError("say what: --namespace, --tenant, --older-than, --unused-for, --down-to or --all")
    summary: dict[str, Any] = {"removed_chunks": 0, "freed_bytes": 0, "dry_run": arguments.dry_run, "left": []}
    with open_roots(arguments.path) as roots:
        check_named(roots, arguments.namespace)
        keep_bytes = arguments.down_to // len(roots) if arguments.down_to is not None else None
        for root in roots:
            _evict_from(root, arguments, keep_bytes, summary)
    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        done = "would remove" if arguments.dry_run else "removed"
        print(f"{done} {summary['removed_chunks']:,} chunks, {human_size(summary['freed_bytes'])}")
        for text in summary["left"]:
            print(plain(f"left: {text}"))
    return 1 if summary["left"] else 0


def _evict_from(root: Root, arguments: argparse.Namespace, keep_bytes: int | None, summary: dict[str, Any]) -> None:
    folders = []
    for folder in chosen(root, arguments.namespace):
        if arguments.tenant is not None and tenant_of(root.fd, folder) != arguments.tenant:
            continue
        if policy_of(root.fd, folder).pinned and not arguments.pinned:
            summary["left"].append(f"{root.path}: namespace {folder} is pinned (--pinned removes it all the same)")
            continue
        folders.append(folder)
    wanted = _condition(arguments)
    free_bytes = None
    if keep_bytes is not None:
        held = sum(e.info.st_size for f in folders for e in listing.chunks(root.fd, f, root.note) if wanted(e))
        free_bytes = max(0, held - keep_bytes)
    try:
        removed, freed = upkeep_of(root).evict_some(folders, free_bytes, wanted, dry_run=arguments.dry_run)
    except TierError as error:
        summary["left"].append(f"{root.path}: {error}")
        return
    summary["removed_chunks"] += removed
    summary["freed_bytes"] += freed
    summary["left"] += [f"{root.path}: {place}: {why}" for place, why in root.unread]


def _condition(arguments: argparse.Namespace) -> Callable[[Entry], bool]:
    now_ns = time.time_ns()
    older_ns, unused_ns = (
        now_ns - age * 10**9 if age is not None else None for age in (arguments.older_than, arguments.unused_for)
    )

    def wanted(entry: Entry) -> bool:
        chunk = entry.chunk()
        return (older_ns is None or chunk.written_ns <= older_ns) and (
            unused_ns is None or chunk.last_use_ns <= unused_ns
        )

    return wanted
