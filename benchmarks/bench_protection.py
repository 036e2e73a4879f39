"""What do authenticated and encrypted chunks cost?

Engine pages go through the I/O service's own process to new files and back (gather, encrypt, digest, write; read,
verify, decrypt, scatter), page cache cold, with ``protection`` off, ``auth`` and ``encrypt``, interleaved over the
rounds of one run and in another order each round. Reported per way: GB/s, its time as a multiple of ``off`` (median
over the pairs of a round, 95% interval), and CPU seconds of the process per GB. Beside that what one core does in
memory: making a header (``seal``) and verifying blocks (``open``), without I/O and copies.

With the demo's result (``--demo build/demo.json``) also what the difference is in per cent of its restore's time to the
first token; its prompts are restored by the same process, in chunks of the same size.

Usage: ``python -m benchmarks.bench_protection [--directory DIR] [--rounds 15] [--json FILE] [--demo FILE]``
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.raw_limit import huge_buffer
from benchmarks.through_service import ServiceBench, Shape
from memkv_engines.chunk.codec import build_header, decode_header, verify_blocks
from memkv_engines.chunk.protection import Protection
from memkv_engines.errors import MemKVError
from memkv_engines.keys import ChunkKey, Namespace, Shard
from memkv_engines.limits import KIB, MIB
from memkv_engines.offload.messages import ProtectionSpec

KEY = bytes(range(1, 33))
WAYS: dict[str, ProtectionSpec | None] = {
    "off": None,
    "auth": ProtectionSpec(False, KEY),
    "encrypt": ProtectionSpec(True, KEY),
}
REFUSED = 3
"""Exit status where the file system takes no direct I/O."""


@dataclass
class Result:
    """All rounds of one way in one direction."""

    way: str
    direction: str
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    stolen: list[float] = field(default_factory=list)


# --------------------------------------------------------------------------------------------------------- measuring


def measure(services: dict[str, ServiceBench], rounds: int) -> list[Result]:
    """Run the rounds. Round 0 warms up and is not kept."""
    results = [Result(way, direction) for way in services for direction in ("store", "load")]
    order = random.Random(1)
    for round_ in range(rounds + 1):
        for way in order.sample(list(services), len(services)):
            steps = _both_ways(services[way])
            for result, (seconds, cpu_s, stolen) in zip((r for r in results if r.way == way), steps, strict=True):
                if round_:
                    result.seconds.append(seconds)
                    result.cpu_s.append(cpu_s)
                    result.stolen.append(stolen)
        print(f"round {round_} of {rounds}", file=sys.stderr)
    return results


def _both_ways(service: ServiceBench) -> list[tuple[float, float, float]]:
    steps = []
    try:
        for work in (service.write, service.read):
            cpu, ticks = service.cpu_s, harness.cpu_ticks()
            seconds = work()
            steps.append((seconds, service.cpu_s - cpu, harness.stolen_share(ticks, harness.cpu_ticks())))
            harness.drop_from_page_cache(service.chunk_files())
        service.check_loaded()
    finally:
        for path in service.chunk_files():
            path.unlink()
    return steps


def in_memory(chunk_bytes: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of one core per chunk: ``seal`` makes a header, ``open`` decodes it and verifies every block."""
    block_bytes = min(chunk_bytes, 512 * KIB)
    count = chunk_bytes // block_bytes
    hashes = [index.to_bytes(32, "little") for index in range(count)]
    key = ChunkKey(Namespace({"b": 1}).digest, hashes[0], hashes[-1], count, 0, Shard(0, 1, 1, 0, 1, 1))
    payload = huge_buffer(chunk_bytes, 1)
    guardians = {way: Protection(s.key, encrypt=s.encrypt) if s else None for way, s in WAYS.items()}
    seconds: dict[str, dict[str, list[float]]] = {way: {"seal": [], "open": []} for way in WAYS}
    for _ in range(rounds):
        for way, guardian in guardians.items():
            start = time.perf_counter()
            data = build_header(key, 16, block_bytes, hashes, 0, payload, guardian).encode()
            sealed = time.perf_counter()
            if verify_blocks(decode_header(data, guardian), 0, count, payload) is not None:
                raise RuntimeError("what was sealed does not open")
            seconds[way]["seal"].append(sealed - start)
            seconds[way]["open"].append(time.perf_counter() - sealed)
    return seconds


# --------------------------------------------------------------------------------------------------------- reporting


def summary(results: Sequence[Result], total_bytes: int) -> list[dict[str, Any]]:
    """One row per way and direction."""
    off = {result.direction: result for result in results if result.way == "off"}
    return [
        {
            "way": result.way,
            "direction": result.direction,
            "gb_per_s": total_bytes / harness.median(result.seconds) / 1e9,
            "times_off": harness.median_of_pair_ratios(result.seconds, off[result.direction].seconds),
            "cpu_s_per_gb": harness.median(result.cpu_s) / total_bytes * 1e9,
            "seconds": result.seconds,
            "cpu_s": result.cpu_s,
            "stolen": result.stolen,
        }
        for result in results
    ]


def shares_of_restore(rows: Sequence[dict[str, Any]], total_bytes: int, demo: dict[str, Any]) -> dict[str, float]:
    """What loading takes longer than with ``off``, in per cent of the demo's time to first token of a restore."""
    prompt_bytes = demo["stored_bytes"] / len(demo["prompts"])
    seconds = {row["way"]: harness.median(row["seconds"]) / total_bytes for row in rows if row["direction"] == "load"}
    return {way: 100 * (s - seconds["off"]) * prompt_bytes / demo["restore_ttft_s"] for way, s in seconds.items()}


def show(record: dict[str, Any]) -> None:
    """Print the tables."""
    rows = [
        [
            f"{row['direction']}, {row['way']}",
            f"{row['gb_per_s']:.2f}",
            "{:.3f} [{:.3f}, {:.3f}]".format(*row["times_off"]),
            f"{row['cpu_s_per_gb']:.2f}",
        ]
        for row in record["results"]
    ]
    harness.print_table("Through the I/O process", ["", "GB/s", "time / off [95%]", "CPU s per GB"], rows)
    chunk_bytes = record["chunk_bytes"]
    cells = [
        [way, *(f"{chunk_bytes / harness.median(both[what]) / 1e9:.2f}" for what in ("seal", "open"))]
        for way, both in record["in_memory_s"].items()
    ]
    harness.print_table("One core, in memory, GB/s", ["", "seal", "open"], cells)
    for dtype, shares in record["share_of_restore_percent"].items():
        print(f"of the demo's restore ({dtype}):", ", ".join(f"{way} {share:+.1f}%" for way, share in shares.items()))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw every round's throughput."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        total = row["gb_per_s"] * harness.median(row["seconds"])
        points = [(float(number), total / seconds) for number, seconds in enumerate(row["seconds"], 1)]
        panels.setdefault(row["direction"], {})[row["way"]] = points
    harness.plot_lines(path, "Protected chunks through the I/O process", "round", "GB/s", panels)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.bench_protection", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--directory", type=Path, help="where to write; a folder in it is made and removed")
    parser.add_argument("--chunk-mib", type=int, default=4)
    parser.add_argument("--total-mib", type=int, default=256, help="payload per round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--demo", type=Path, help="JSON that the demo left")
    parser.add_argument("--json", type=Path, default=harness.BUILD / "protection.json")
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes, for the tests")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; ``REFUSED`` where the file system takes no direct I/O."""
    arguments = parse(argv)
    chunk_bytes, rounds, staging_bytes = arguments.chunk_mib * MIB, arguments.rounds, 256 * MIB
    count = max(1, arguments.total_mib // arguments.chunk_mib)
    if arguments.tiny:
        chunk_bytes, rounds, count, staging_bytes = 256 * KIB, 2, 4, 16 * MIB
    parent = arguments.directory or harness.BUILD
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-protection-", dir=parent) as scratch, ExitStack() as stack:
        where = harness.environment(Path(scratch))
        try:
            services = {
                way: stack.enter_context(
                    ServiceBench(
                        Path(scratch) / way,
                        Shape.of(count, chunk_bytes),
                        staging_bytes=staging_bytes,
                        protection=protection,
                    )
                )
                for way, protection in WAYS.items()
            }
        except MemKVError as error:
            print(f"it cannot be measured here: {error}", file=sys.stderr)
            return REFUSED
        results = measure(services, rounds)
        transport = services["off"].tier_name
    rows = summary(results, count * chunk_bytes)
    demo = json.loads(arguments.demo.read_text(encoding="utf-8")) if arguments.demo else {}
    restores = {"float32": demo, "bfloat16": demo.get("bf16", {})}
    record = {
        "benchmark": "protection",
        "tiny": arguments.tiny,
        "rounds": rounds,
        "chunk_bytes": chunk_bytes,
        "chunks": count,
        "transport": transport,
        "environment": where,
        "results": rows,
        "in_memory_s": in_memory(chunk_bytes, max(rounds, 3)),
        "share_of_restore_percent": {
            dtype: shares_of_restore(rows, count * chunk_bytes, body)
            for dtype, body in restores.items()
            if "restore_ttft_s" in body
        },
    }
    harness.write_json(record, arguments.json)
    plot(rows, arguments.json.with_suffix(".png"))
    show(record)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
