"""The GIL trap: one load job while the engine's main thread is busy with Python, against the same load in peace.

A job of 36 chunks of 4 MiB goes through ``IoClient``, with the I/O service in a child process and on threads of this
process, from the page cache and cold by direct I/O. In peace the main thread waits for the answer; busy, it works in
slices of about 1 ms and polls between them, as an engine's step does. Bar, for the child process: the busy load takes
no longer than twice the load in peace or 50 ms more, whichever is greater. Also counted: the system calls on the
engine's thread per job, each of which releases and takes back the GIL.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import BUILD, drop_from_page_cache, environment, median, percentile, print_table, write_json
from memkv_engines.errors import MemKVError
from memkv_engines.offload import channel
from memkv_engines.offload.client import IoClient
from memkv_engines.offload.messages import GroupSpec, LoadRun, Setup, StoreChunk, TileSpec
from memkv_engines.offload.results import LoadResult

MODES = {"process": "on", "thread": "off"}
CACHES = {"page cache": "off", "cold, direct": "on"}
BLOCK_TOKENS = 32
BLOCKS_PER_CHUNK = 4
LAYERS = 32
SLICE_S = 0.001
NAMESPACE = bytes(range(32))
BAR_RATIO, BAR_MORE_MS = 2.0, 50.0


@dataclass(frozen=True)
class Size:
    """How much is loaded how often."""

    chunks: int
    chunk_bytes: int
    rounds: int


FULL = Size(chunks=36, chunk_bytes=4 << 20, rounds=9)
TINY = Size(chunks=4, chunk_bytes=256 << 10, rounds=2)


class Pages:
    """An engine's paged memory, layers outermost, room for the stored prompt and for its copy."""

    def __init__(self, size: Size) -> None:
        self.blocks = size.chunks * BLOCKS_PER_CHUNK
        block_bytes = size.chunk_bytes // BLOCKS_PER_CHUNK
        piece = block_bytes // (2 * LAYERS)
        pool = 2 * self.blocks
        self.memory = np.random.default_rng(1).integers(0, 256, (2 * LAYERS, pool, piece), dtype=np.uint8)
        base = self.memory.ctypes.data
        tiles = tuple(TileSpec(base + i * pool * piece, piece, piece) for i in range(2 * LAYERS))
        shard = (0, 8, 8, 0, LAYERS, LAYERS)
        self.spec = GroupSpec(0, shard, BLOCK_TOKENS, block_bytes, BLOCKS_PER_CHUNK, pool, tiles)
        self.hashes = [i.to_bytes(32, "little") for i in range(1, self.blocks + 1)]

    def chunk(self, number: int) -> StoreChunk:
        """One chunk of the prompt, from the first half of the pages."""
        blocks = range(number * BLOCKS_PER_CHUNK, (number + 1) * BLOCKS_PER_CHUNK)
        return StoreChunk(NAMESPACE, 0, blocks[0], 0, b"".join(self.hashes[b] for b in blocks), tuple(blocks))

    def run(self) -> LoadRun:
        """The whole prompt, into the second half."""
        ids = np.arange(self.blocks, 2 * self.blocks, dtype="<i4").tobytes()
        chunks = self.blocks // BLOCKS_PER_CHUNK
        return LoadRun(NAMESPACE, 0, BLOCKS_PER_CHUNK, chunks, 0, b"", 0, b"".join(self.hashes), ids)

    def wipe(self) -> None:
        """Forget the copy."""
        self.memory[:, self.blocks :] = 0

    def check(self) -> None:
        """The copy is there.

        Raises:
            RuntimeError: it is not.
        """
        if not (self.memory[:, self.blocks :] == self.memory[:, : self.blocks]).all():
            raise RuntimeError("the load did not bring back what was stored")


def wait_for(client: IoClient, between_polls: Callable[[], None]) -> None:
    """Poll until the load is answered.

    Raises:
        RuntimeError: it failed.
    """
    while not (results := client.poll()):
        between_polls()
    if not isinstance(results[0], LoadResult) or any(results[0].kinds):
        raise RuntimeError(f"the load failed: {results}")


def work() -> None:
    """About a millisecond of Python that never lets the GIL go by itself."""
    stop = time.perf_counter() + SLICE_S
    total = 0
    while time.perf_counter() < stop:
        for number in range(50):
            total += number * number


def measure(mode: str, caches: str, size: Size, folder: Path) -> dict[str, Any]:
    """Loads in peace and beside a busy main thread, in turns."""
    pages = Pages(size)
    root = folder / f"{mode}-{CACHES[caches]}"
    setup = Setup(str(root), CACHES[caches], 0, False, 4, 256 << 20, (pages.spec,))
    client = IoClient(setup, io_process=MODES[mode])
    client.start()
    try:
        store_all(client, pages, size)
        files = list(root.rglob("*.kv"))
        if len(files) != size.chunks:
            raise RuntimeError(f"{len(files)} files for {size.chunks} chunks")
        times: dict[str, list[float]] = {"peace": [], "busy": []}
        for _ in range(size.rounds + 1):
            for kind, results in times.items():
                pages.wipe()
                if caches != "page cache":
                    drop_from_page_cache(files)
                results.append(load_once(client, pages, busy=kind == "busy"))
                pages.check()
        calls = count_calls(client, pages) if mode == "process" else None
        transport = client.ready.tier_name
    finally:
        client.close()
    # The first round finds everything else cold, too.
    peace, busy = ([seconds * 1000 for seconds in times[k][1:]] for k in ("peace", "busy"))
    bar_ms = max(BAR_RATIO * median(peace), median(peace) + BAR_MORE_MS)
    return {
        "mode": mode,
        "caches": caches,
        "transport": transport,
        "peace_ms": [round(v, 2) for v in peace],
        "busy_ms": [round(v, 2) for v in busy],
        "peace_median_ms": round(median(peace), 2),
        "busy_median_ms": round(median(busy), 2),
        "busy_p90_ms": round(percentile(busy, 90), 2),
        "ratio": round(median(busy) / median(peace), 2),
        "difference_ms": round(median(busy) - median(peace), 2),
        "bar_ms": round(bar_ms, 2),
        "passed": median(busy) <= bar_ms,
        "system_calls_per_job": calls,
    }


def store_all(client: IoClient, pages: Pages, size: Size) -> None:
    """Store the prompt, chunk by chunk."""
    for number in range(size.chunks):
        client.submit_store(number, (pages.chunk(number),))
        client.fence()
        deadline = time.monotonic() + 60
        while not (results := client.poll()):
            if time.monotonic() > deadline:
                raise RuntimeError("a store was not answered")
            client.wait(0.01)
        if getattr(results[0], "outcomes", ()) != ("stored",):
            raise RuntimeError(f"not stored: {results}")


def load_once(client: IoClient, pages: Pages, *, busy: bool) -> float:
    """Seconds of one load job, from submission to the poll that returns its answer."""
    run = pages.run()
    start = time.perf_counter()
    client.submit_load(1, (run,))
    wait_for(client, work if busy else lambda: client.wait(0.05))
    return time.perf_counter() - start


class CountingSocket:
    """Stands before the engine's socket and counts its system calls by name."""

    def __init__(self, real: Any, calls: Counter[str]) -> None:
        self._real, self._calls = real, calls

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._real, name)
        if name not in ("send", "recv"):
            return method

        def counted(*arguments: Any) -> Any:
            self._calls[name] += 1
            return method(*arguments)

        return counted


def count_calls(client: IoClient, pages: Pages) -> dict[str, Any]:
    """System calls on the engine's thread: for a job's submission, for an empty poll, and for the poll that answers."""
    end = client._backend._end  # type: ignore[union-attr]
    assert isinstance(end, channel.EngineEnd)
    calls: Counter[str] = Counter()
    real, end._sock = end._sock, CountingSocket(end._sock, calls)  # type: ignore[assignment]
    try:
        client.poll()
        empty = dict(calls)
        calls.clear()
        client.submit_load(1, (pages.run(),))
        submit = dict(calls)
        client.wait(60)  # so that one poll finds the answer
        calls.clear()
        results = client.poll()
        answer = dict(calls)
    finally:
        end._sock = real
    return {"submit": submit, "empty_poll": empty, "answering_poll": answer, "answered": len(results)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if the child process misses the bar."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds instead of a minute; the bar does not apply")
    parser.add_argument("--dir", default=None, help="where to put the tier (a disk, for the cold rows)")
    parser.add_argument("--out", default=str(BUILD / "bench_gil.json"), help="where the JSON goes")
    options = parser.parse_args(argv)
    size = TINY if options.tiny else FULL
    results, skipped = [], []
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.dir or BUILD) as folder:
        where = environment(Path(folder))
        for caches in CACHES:
            for mode in MODES:
                try:
                    results.append(measure(mode, caches, size, Path(folder)))
                except MemKVError as error:
                    skipped.append(f"{mode}, {caches}: {error}")
    record = {
        "benchmark": "gil",
        "tiny": options.tiny,
        "chunks": size.chunks,
        "chunk_bytes": size.chunk_bytes,
        "environment": where,
        "switch_interval_s": sys.getswitchinterval(),
        "results": results,
        "skipped": skipped,
    }
    path = write_json(record, Path(options.out))
    rows = [
        [
            f"{r['mode']}, {r['caches']}",
            f"{r['peace_median_ms']:.1f}",
            f"{r['busy_median_ms']:.1f}",
            f"{r['ratio']:.2f}",
            f"{r['difference_ms']:+.1f}",
            f"{r['bar_ms']:.1f}",
            "-" if options.tiny or r["mode"] != "process" else "pass" if r["passed"] else "FAIL",
        ]
        for r in results
    ]
    title = f"one load job of {size.chunks} chunks of {size.chunk_bytes >> 10} KiB, milliseconds, {size.rounds} rounds"
    print_table(title, ["", "in peace", "busy", "ratio", "more", "bar", ""], rows)
    for r in results:
        if r["system_calls_per_job"]:
            calls = r["system_calls_per_job"]
            print(f"system calls on the engine's thread ({r['caches']}): {calls}")
    for line in skipped:
        print(f"skipped: {line}")
    print(f"written to {path}")
    return 0 if options.tiny or all(r["passed"] for r in results if r["mode"] == "process") else 1


if __name__ == "__main__":
    sys.exit(main())
