"""What a request of 100,000 tokens costs the engine's scheduler thread: ``PrefixLookup.ask`` with a warm index.

The index holds a million chunks, the prompt's full chunks and a tail among them. Every measurement asks for another
prompt, whose hash objects have just been built, as the engine's are. The answer must be the whole prompt, with no
probe sent. Time is counted twice: CPU time of the thread, which the bars apply to since other programs do not change
it, and wall time. The rows "cold caches" sweep 64 MiB before each request, as a model's step would.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.harness import BUILD, ROOT, environment, median, percentile, print_table, write_json
from memkv_engines.keys import Shard
from memkv_engines.limits import HASH_BYTES, KEY_BYTES
from memkv_engines.metrics import Counters
from memkv_engines.offload.lookup import GroupView, PrefixLookup
from memkv_engines.offload.messages import Probe, ProbeDone, Segment

BLOCK_TOKENS = 16
BARS_US = {2: 500.0, 16: 150.0}
_SWEEP_BYTES = 64 << 20
_BATCH = 1 << 16


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    tokens: int
    entries: int
    requests: int


FULL = Size(tokens=100_000, entries=1_000_000, requests=64)
TINY = Size(tokens=4_000, entries=20_000, requests=4)


def prompt_bytes(number: int, blocks: int) -> bytes:
    """The chain hashes of an imagined prompt, joined; the same for the same number."""
    return hashlib.shake_128(number.to_bytes(8, "little")).digest(blocks * HASH_BYTES)


def hash_objects(joined: bytes) -> list[bytes]:
    """One new object per hash."""
    return [joined[i : i + HASH_BYTES] for i in range(0, len(joined), HASH_BYTES)]


def make_lookup(blocks_per_chunk: int, entries: int, probes: list[Probe]) -> PrefixLookup:
    """A look-up over one full-attention group with an empty index."""
    return PrefixLookup(
        [GroupView(0, BLOCK_TOKENS, blocks_per_chunk, (Shard(0, 8, 8, 0, 32, 32),))],
        align_tokens=BLOCK_TOKENS,
        index_entries=entries,
        hit_ttl_s=3600.0,
        miss_ttl_s=2.0,
        probe_timeout_s=0.25,
        send=probes.append,
        counters=Counters(),
    )


def learn_prompts(lookup: PrefixLookup, probes: list[Probe], prompts: Sequence[bytes], blocks_per_chunk: int) -> None:
    """Make the look-up know every full chunk and the tail of the prompts, as the prober of a restarted engine does."""
    for number, joined in enumerate(prompts):
        own = hash_objects(joined)
        lookup.ask(f"warm-up {number}", [own], 0, bytes(32))
        probe = probes.pop()
        segments = []
        for start in range(0, len(own), blocks_per_chunk):
            part = own[start : start + blocks_per_chunk]
            segments.append(Segment(start, part[-1][:KEY_BYTES], len(part), 0, len(part)))
        lookup.take_probe(ProbeDone(probe.probe_id, tuple(segments), 1))
        lookup.forget_request(f"warm-up {number}")


def fill(lookup: PrefixLookup, count: int, blocks_per_chunk: int) -> None:
    """Chunks of other prompts."""
    for start in range(0, count, _BATCH):
        batch = min(_BATCH, count - start)
        noise = os.urandom(batch * KEY_BYTES)
        lasts = [noise[i : i + KEY_BYTES] for i in range(0, len(noise), KEY_BYTES)]
        lookup.index.insert(lasts, [blocks_per_chunk] * batch, [0] * batch, 0)


def measure(blocks_per_chunk: int, size: Size) -> dict[str, Any]:
    """Ask for every prompt once with warm and once with cold caches."""
    # One block more than the tokens need, so that the prompt ends in a tail whatever the chunk length.
    blocks = size.tokens // BLOCK_TOKENS
    blocks += blocks % blocks_per_chunk == 0
    prompts = [prompt_bytes(n, blocks) for n in range(size.requests)]
    probes: list[Probe] = []
    lookup = make_lookup(blocks_per_chunk, size.entries, probes)
    fill(lookup, size.entries - size.requests * (blocks // blocks_per_chunk), blocks_per_chunk)
    learn_prompts(lookup, probes, prompts, blocks_per_chunk)
    sweep = np.zeros(_SWEEP_BYTES, dtype=np.uint8)
    times: dict[str, list[tuple[float, float]]] = {"built": [], "cold": []}
    for caches, results in times.items():
        for number, joined in enumerate(prompts):
            own = hash_objects(joined)
            if caches == "cold":
                sweep += 1
            results.append(ask_once(lookup, f"{caches}-{number}", own))
    if probes:
        raise RuntimeError("the index was not warm: a probe was sent")
    cpu = [c for c, _ in times["built"]]
    return {
        "blocks_per_chunk": blocks_per_chunk,
        "prompt_blocks": blocks,
        "chunks_per_prompt": blocks // blocks_per_chunk + 1,
        "index_entries": len(lookup.index),
        "requests": size.requests,
        "thread_cpu_us": summary(cpu),
        "wall_us": summary([w for _, w in times["built"]]),
        "cold_caches_thread_cpu_us": summary([c for c, _ in times["cold"]]),
        "cold_caches_wall_us": summary([w for _, w in times["cold"]]),
        "bar_us": BARS_US[blocks_per_chunk],
        "passed": median(cpu) <= BARS_US[blocks_per_chunk],
    }


def ask_once(lookup: PrefixLookup, request_id: str, own: Sequence[bytes]) -> tuple[float, float]:
    """Microseconds of one request: CPU time of this thread, wall time."""
    namespace = bytes(32)
    wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
    hit = lookup.ask(request_id, [own], 0, namespace)
    cpu, wall = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
    lookup.forget_request(request_id)
    if hit is None or hit.tokens != len(own) * BLOCK_TOKENS:
        raise RuntimeError(f"the whole prompt is stored, but the answer is {hit and hit.tokens}")
    return cpu / 1000, wall / 1000


def summary(values_us: Sequence[float]) -> dict[str, float]:
    """Median and 90th percentile."""
    return {"median": round(median(values_us), 1), "p90": round(percentile(values_us, 90), 1)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds instead of a minute; the bars do not apply")
    parser.add_argument("--out", default=str(BUILD / "bench_lookup.json"), help="where the JSON goes")
    options = parser.parse_args(argv)
    size = TINY if options.tiny else FULL
    results = [measure(blocks_per_chunk, size) for blocks_per_chunk in BARS_US]
    record = {"benchmark": "lookup", "tiny": options.tiny, "environment": environment(ROOT), "results": results}
    path = write_json(record, type(BUILD)(options.out))
    rows = []
    for r in results:
        for caches, prefix in (("as built", ""), ("cold caches", "cold_caches_")):
            cpu, wall = r[f"{prefix}thread_cpu_us"], r[f"{prefix}wall_us"]
            verdict = "-" if options.tiny or prefix else "pass" if r["passed"] else "FAIL"
            numbers = (cpu["median"], cpu["p90"], wall["median"], wall["p90"], r["bar_us"])
            rows.append([f"{r['blocks_per_chunk']}, {caches}", *(f"{n:.0f}" for n in numbers), verdict])
    title = f"microseconds per request of {size.tokens:,} tokens, index of {size.entries:,} chunks; bar: CPU median"
    print_table(title, ["blocks a chunk", "CPU", "p90", "wall", "p90", "bar", ""], rows)
    print(f"written to {path}")
    return 0 if options.tiny or all(r["passed"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
