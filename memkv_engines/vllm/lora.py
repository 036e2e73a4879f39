"""Namespaces of LoRA adapters.

vLLM's block hash holds an adapter's name and path, not its content: an adapter retrained in place would hit the old
one's KV after a restart. So requests with an adapter use a namespace of their own, with a fingerprint of its files.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from memkv_engines.errors import IdentityError
from memkv_engines.keys import Namespace
from memkv_engines.limits import MIB

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".json")
_HASHED_EACH_END_BYTES = 1 * MIB
_MAX_ADAPTERS_REMEMBERED = 4096


class AdapterNamespaces:
    """Maps a request's adapter to its namespace; remembers each adapter it has seen.

    Args:
        base: namespace of requests without an adapter.
    """

    def __init__(self, base: Namespace) -> None:
        self._base = base
        self._known: dict[tuple[str, int, str], Future[Namespace]] = {}
        # Files are read on a thread of its own: the scheduler never touches a file system.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="memkv-adapter")

    def of(self, lora_request: Any) -> Namespace | None:
        """The namespace for a request, or None while its adapter's files are being read: ask again. Never blocks."""
        if lora_request is None:
            return self._base
        key = (str(lora_request.lora_name), int(lora_request.lora_int_id), str(lora_request.lora_path))
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MAX_ADAPTERS_REMEMBERED:
                self._known.clear()
            known = self._known[key] = self._reader.submit(self._namespace, key[0], key[2])
        return known.result() if known.done() else None

    def close(self) -> None:
        """End the thread."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _namespace(self, name: str, path: str) -> Namespace:
        return self._base.derive(lora_name=name, lora=adapter_fingerprint(path))


def adapter_fingerprint(path: str) -> str:
    """Digest of an adapter's files: names, sizes and the first and last MiB of each.

    An adapter whose files cannot be read (an identifier on a hub, say) gets a random fingerprint: it is cached
    within this process only.
    """
    digest = hashlib.sha256()
    try:
        folder = Path(path)
        files = sorted(f for f in folder.iterdir() if f.suffix in _WEIGHT_SUFFIXES)
        if not files:
            raise IdentityError(f"no adapter files in {path}")
        for file in files:
            digest.update(f"{file.name}:{file.stat().st_size}:".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(_HASHED_EACH_END_BYTES))
                stream.seek(max(0, file.stat().st_size - _HASHED_EACH_END_BYTES))
                digest.update(stream.read(_HASHED_EACH_END_BYTES))
    except (OSError, IdentityError):
        digest.update(os.urandom(32))
    return digest.hexdigest()
