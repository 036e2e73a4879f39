"""Namespaces of LoRA adapters.

vLLM's block hash holds an adapter's name and path, not its content: an adapter retrained in place would hit the old
one's KV after a restart. So requests with an adapter use a namespace of their own, with a fingerprint of its files.
"""

from __future__ import annotations

import hashlib
import os
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
        self._known: dict[tuple[str, int, str], Namespace] = {}

    def of(self, lora_request: Any) -> Namespace:
        """The namespace for a request.

        The first request of an adapter reads its files' ends (a few milliseconds on the calling thread, once per
        adapter and process).
        """
        if lora_request is None:
            return self._base
        key = (str(lora_request.lora_name), int(lora_request.lora_int_id), str(lora_request.lora_path))
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MAX_ADAPTERS_REMEMBERED:
                self._known.clear()
            known = self._known[key] = self._base.derive(lora_name=key[0], lora=adapter_fingerprint(key[2]))
        return known


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
