"""In-process timers of what a restore costs inside SGLang, for ``demo_sglang``: written to a file, line by line.

Installed in the scheduler's process by ``tests/engines/sglang/engine_process.py`` where ``MEMKV_RESTORE_TIMERS`` names
a file. They wrap SGLang's own functions and so mean the same for every storage backend:

* ``prefetch``: from the call of ``prefetch_from_storage`` until the operation's pages are in the host pool (the return
  of the controller's ``_page_transfer``), threads and queues between them included;
* ``load_back``: ``start_loading``, in which pages are copied from the host pool to the device pool (on a CPU it returns
  when they are);
* ``lookup`` and ``load``: a linker's, which the scheduler's thread waits for.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "MEMKV_RESTORE_TIMERS"


_installed: list[Path] = []


def install_if_wanted() -> None:
    """Install the timers in this process, once, if the variable names a file."""
    path = os.environ.get(VARIABLE)
    if path and not _installed:
        _installed.append(Path(path))
        _install(Path(path))


def seconds_since(path: Path, offset: int) -> tuple[dict[str, float], int]:
    """Sums of what was written after an offset, by name, and the offset to go on from."""
    data = path.read_bytes() if path.exists() else b""
    sums: dict[str, float] = {}
    for line in data[offset:].splitlines():
        record = json.loads(line)
        sums[record["what"]] = sums.get(record["what"], 0.0) + record["s"]
    return sums, len(data)


def _install(path: Path) -> None:
    from sglang.srt.managers.cache_controller import HiCacheController
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    from memkv_engines.sglang.linker import MemKVCacheLinker

    started: dict[str, float] = {}

    def note(what: str, since: float) -> None:
        with path.open("a") as out:
            out.write(json.dumps({"what": what, "s": time.perf_counter() - since}) + "\n")

    def starts_prefetch(call: Callable[..., Any], cache: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        started.setdefault(str(request.rid), time.perf_counter())
        return call(cache, request, *args, **kwargs)

    def ends_prefetch(call: Callable[..., Any], controller: Any, operation: Any) -> Any:
        result = call(controller, operation)
        note("prefetch", started.pop(str(operation.request_id)))
        return result

    def timed(what: str) -> Callable[..., Any]:
        def around(call: Callable[..., Any], owner: Any, *args: Any, **kwargs: Any) -> Any:
            since = time.perf_counter()
            result = call(owner, *args, **kwargs)
            # -1: there was nothing to load.
            if not (what == "load_back" and result == -1):
                note(what, since)
            return result

        return around

    _wrap(UnifiedRadixCache, "prefetch_from_storage", starts_prefetch)
    _wrap(HybridCacheController, "_page_transfer", ends_prefetch)
    _wrap(HiCacheController, "start_loading", timed("load_back"))
    _wrap(MemKVCacheLinker, "lookup", timed("lookup"))
    _wrap(MemKVCacheLinker, "load", timed("load"))


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    call = getattr(owner, name)

    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(call, *args, **kwargs)

    setattr(owner, name, wrapped)
