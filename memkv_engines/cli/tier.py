"""Reading a tier directory from outside an engine; never writes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from memkv_engines.chunk.codec import decode_header, verify_blocks
from memkv_engines.errors import ChunkDamaged, ChunkError, ChunkForeign, ChunkTruncated, MemKVError
from memkv_engines.keys import ChunkName, namespace_folder
from memkv_engines.limits import MAX_MANIFEST_BYTES
from memkv_engines.tier.directory import DirectoryTier

_PROGRESS_EVERY_S = 1.0


def stat_tier(path: str) -> list[dict[str, Any]]:
    """Per namespace: folder name, chunks, bytes and what its manifest says it stands for."""
    tier = DirectoryTier(path, read_only=True, direct_io="off")
    try:
        return [_stat_namespace(tier, folder) for folder in _folders(path)]
    finally:
        tier.close()


def verify_tier(path: str, *, progress: bool) -> dict[str, Any]:
    """Read every chunk and check every digest.

    Args:
        path: tier directory.
        progress: print a line a second to standard error.
    """
    tier = DirectoryTier(path, read_only=True, direct_io="off")
    chunks = total = 0
    damaged: list[dict[str, str]] = []
    shown = time.monotonic()
    try:
        for folder in _folders(path):
            for name in tier.names(folder):
                chunks += 1
                try:
                    total += _verify_chunk(tier, folder, name)
                except MemKVError as error:
                    kind = error.kind if isinstance(error, ChunkError) else "io_error"
                    damaged.append({"namespace": folder, "name": name.text, "kind": kind, "why": str(error)})
                if progress and time.monotonic() - shown > _PROGRESS_EVERY_S:
                    shown = time.monotonic()
                    print(f"{chunks} chunks, {total / 2**20:,.0f} MiB", file=sys.stderr)
    finally:
        tier.close()
    return {"chunks": chunks, "bytes": total, "damaged": damaged}


def _folders(path: str) -> list[str]:
    return sorted(p.name for p in Path(path).iterdir() if p.is_dir() and not p.is_symlink())


def _stat_namespace(tier: DirectoryTier, folder: str) -> dict[str, Any]:
    chunks = total = 0
    for name in tier.names(folder):
        try:
            with tier.open(folder, name) as reader:
                total += reader.object_bytes
                chunks += 1
        except MemKVError:
            continue
    return {"namespace": folder, "chunks": chunks, "bytes": total, "identity": _identity(tier.root / folder)}


def _identity(folder: Path) -> str:
    try:
        with (folder / "manifest.json").open("rb") as stream:
            body = json.loads(stream.read(MAX_MANIFEST_BYTES))
        return ", ".join(f"{k}={body[k]}" for k in ("engine", "dtype", "kv_cache_dtype", "tenant") if k in body)
    except (OSError, ValueError, TypeError):
        return "(no manifest)"


def _verify_chunk(tier: DirectoryTier, folder: str, name: ChunkName) -> int:
    with tier.open(folder, name) as reader:
        view = memoryview(bytearray(reader.object_bytes))
        reader.read([view], 0)
    header = decode_header(view)
    geometry = header.geometry
    if geometry.object_bytes > view.nbytes:
        raise ChunkTruncated(f"{view.nbytes} B instead of {geometry.object_bytes} B")
    if header.key.name != name or namespace_folder(header.key.namespace_digest) != folder:
        raise ChunkForeign("the header does not match the name")
    present = view[geometry.block_offset(header.key.holes) : geometry.object_bytes]
    bad = verify_blocks(header, header.key.holes, geometry.block_count, present)
    if bad is not None:
        raise ChunkDamaged(f"block {bad} does not match its digest")
    return view.nbytes
