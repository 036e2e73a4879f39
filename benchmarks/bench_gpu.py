"""Gather and scatter on a GPU: GB/s against what the device, torch and the copy engine do; and what they cost a decode.

Four tables:

1. *Device side*: the gather kernel into a device slot (and scatter out of it), beside a plain device copy of the same
   bytes and, where torch is installed, one ``index_select`` per layer.
2. *To the host*: the mover's whole way into pinned memory, beside one contiguous copy (the link's limit) and
   ``cuMemcpyBatchAsync`` of every tile.
3. *Budget*: a loop of kernels that reads HBM as a decode step does, alone and beside stores, for several numbers of
   CTAs: by how much the loop slows down, and what the stores carry.
4. *Storage*: chunks between device memory and files through our GDS transport, beside `gdsio` (`gpu_storage.py`).

What a machine cannot do has a row that says why. Times are of CUDA events on the device for 1 and 3 and of the host's
clock for 2 and 4, medians over rounds. Bars: gather at least 80% of the plain device copy's rate or twice the link's,
whichever is less; the loop no more than 3% slower at the default budget; GPUDirect at least 90% of `gdsio`. Not
measured on a GPU yet: no figure exists."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_pool import GpuPool, Layout, torch_or_none
from benchmarks.gpu_storage import Job, failed_shares, storage_rows
from benchmarks.harness import BUILD, environment, median, print_table, write_json
from memkv_engines.errors import GpuError, GpuUnavailable
from memkv_engines.gpu.mover import DeviceMover
from memkv_engines.limits import GPU_COPY_CTAS, MIB

NO_DEVICE = 3
LAYOUTS = (
    Layout("split K/V, 32 layers, 16 KiB tiles", tiles=64, tile_bytes=16384),
    Layout("split K/V, 32 layers, 4 KiB tiles", tiles=64, tile_bytes=4096),
    Layout("MLA, 61 layers, 18 KiB tiles", tiles=61, tile_bytes=18432),
    Layout("split K/V, 80 layers, 32 KiB tiles", tiles=160, tile_bytes=32768),
    Layout("one tile a block, 1 MiB", tiles=1, tile_bytes=1 << 20),
)
BUDGETS = (1, 2, 4, 8, 16, 32)
MAX_SLOWDOWN = 0.03
TORCH = "torch index per layer"


@dataclass(frozen=True)
class Size:
    """How much and how often."""

    chunk_bytes: int
    num_blocks: int
    rounds: int
    storage: Job


FULL = Size(4 * MIB, num_blocks=512, rounds=50, storage=Job(threads=8, chunks=64, chunk_bytes=4 * MIB, rounds=5))
TINY = Size(2 * MIB, num_blocks=32, rounds=3, storage=Job(threads=2, chunks=2, chunk_bytes=2 * MIB, rounds=1))


def seconds_on_device(pool: GpuPool, work: Callable[[], None], rounds: int) -> float:
    """Median seconds of what ``work`` queues on the pool's stream, between two events."""
    return median([pool.timed(work) for _ in range(rounds)])


def device_side(pool: GpuPool, mover: DeviceMover, layout: Layout, size: Size) -> list[dict[str, Any]]:
    """Table 1."""
    ids = pool.blocks_of(size.chunk_bytes)
    moved = len(ids) * layout.block_bytes
    slot = mover.acquire_slot()
    assert slot is not None, "a fresh mover has slots"

    def through(way: Callable[[], Any]) -> Callable[[], None]:
        def work() -> None:
            # The pool's stream waits for ours, so the event behind it is behind the kernel as well.
            way().hold(pool.stream)

        return work

    ways: dict[str, Callable[[], None]] = {
        "gather": through(lambda: mover.gather_to_device(0, ids, slot, 0, after_stream=pool.stream)),
        "scatter": through(lambda: mover.scatter_from_device(0, slot, 0, ids, after_stream=pool.stream)),
        "plain device copy": lambda: pool.copy_on_device(slot.address, moved),
    }
    torch = torch_or_none()
    if torch is not None:
        ways[TORCH] = pool.torch_index(torch, ids)
    rows: list[dict[str, Any]] = []
    for name, work in ways.items():
        work()
        mover.poll()
        rate = moved / seconds_on_device(pool, work, size.rounds) / 1e9
        rows.append({"layout": layout.name, "way": name, "gb_per_s": rate})
        while mover.poll():
            time.sleep(1e-4)
    mover.release_slot(slot)
    if torch is None:
        rows.append({"layout": layout.name, "way": TORCH, "absent": "torch is not installed, or sees no CUDA device"})
    return rows


def to_the_host(pool: GpuPool, mover: DeviceMover, layout: Layout, size: Size) -> list[dict[str, Any]]:
    """Table 2: several chunks in flight, as in service."""
    ids = pool.blocks_of(size.chunk_bytes)
    moved = len(ids) * layout.block_bytes
    chunks = 16

    def run(submit: Callable[[int], Any]) -> float:
        started = time.perf_counter()
        tickets = []
        for number in range(chunks):
            ticket = submit(pool.host_place(number))
            while ticket is None:
                mover.poll()
                ticket = submit(pool.host_place(number))
            tickets.append(ticket)
        for ticket in tickets:
            ticket.wait(10)
        return chunks * moved / (time.perf_counter() - started) / 1e9

    ways: dict[str, Callable[[], float]] = {
        "store": lambda: run(lambda place: mover.gather(0, ids, place, after_stream=pool.stream)),
        "load": lambda: run(lambda place: mover.scatter(0, place, ids, after_stream=pool.stream)),
        "one contiguous copy": lambda: pool.link_gb_per_s(chunks, moved),
        "cuMemcpyBatchAsync per tile": lambda: pool.batch_gb_per_s(chunks, ids),
    }
    rows: list[dict[str, Any]] = []
    for name, work in ways.items():
        try:
            work()
            rows.append({"layout": layout.name, "way": name, "gb_per_s": median([work() for _ in range(size.rounds)])})
        except GpuError as error:
            rows.append({"layout": layout.name, "way": name, "absent": str(error)})
    return rows


def budget(layout: Layout, size: Size, ctas: int) -> dict[str, Any]:
    """One row of table 3."""
    with GpuPool(layout, size.num_blocks) as pool, mover_over(pool, size, ctas) as mover:
        ids = pool.blocks_of(size.chunk_bytes)
        alone = seconds_on_device(pool, pool.decode_step, size.rounds)
        stored = 0

        def beside() -> None:
            nonlocal stored
            if mover.gather(0, ids, pool.host_place(stored), after_stream=pool.idle_stream) is not None:
                stored += 1
            pool.decode_step()
            mover.poll()

        started = time.perf_counter()
        together = seconds_on_device(pool, beside, size.rounds)
        elapsed_s = time.perf_counter() - started
        return {
            "ctas": ctas,
            "step_alone_us": alone * 1e6,
            "slowdown": together / alone - 1,
            "stores_gb_per_s": stored * len(ids) * layout.block_bytes / elapsed_s / 1e9,
        }


@contextmanager
def mover_over(pool: GpuPool, size: Size, ctas: int = GPU_COPY_CTAS) -> Iterator[DeviceMover]:
    """A mover over a pool, closed at the end."""
    mover = DeviceMover(0, slot_bytes=2 * size.chunk_bytes, slots=8, copy_ctas=ctas)
    try:
        mover.register_host(*pool.host_region)
        mover.add_group(0, pool.layout)
        yield mover
    finally:
        mover.close()


def failed_bars(
    device: Sequence[dict[str, Any]], host: Sequence[dict[str, Any]], sweep: Sequence[dict[str, Any]]
) -> list[str]:
    """Which bars do not hold."""
    rate = {(row["layout"], row["way"]): row["gb_per_s"] for row in (*device, *host) if "gb_per_s" in row}
    failed = []
    for layout in {row["layout"] for row in device}:
        bar = min(0.8 * rate[layout, "plain device copy"], 2 * rate[layout, "one contiguous copy"])
        for way in ("gather", "scatter"):
            if rate[layout, way] < bar:
                failed.append(f"{layout}: {way} {rate[layout, way]:.0f} GB/s, the bar is {bar:.0f}")
    for row in sweep:
        if row["ctas"] == GPU_COPY_CTAS and row["slowdown"] > MAX_SLOWDOWN:
            failed.append(f"{row['ctas']} CTAs slow a decode step down by {row['slowdown']:.1%}")
    return failed


def show(
    device: Sequence[dict[str, Any]],
    host: Sequence[dict[str, Any]],
    sweep: Sequence[dict[str, Any]],
    storage: Sequence[dict[str, Any]],
) -> None:
    """Print the four tables."""
    for title, key, rows in (
        ("device side", "layout", device),
        ("to the host", "layout", host),
        ("storage", "do", storage),
    ):
        cells = [
            (row[key], row["way"], f"{row['gb_per_s']:.1f}" if "gb_per_s" in row else f"absent: {row['absent']}")
            for row in rows
        ]
        print_table(title, (key, "way", "GB/s"), cells)
    cells = [
        (str(row["ctas"]), f"{row['step_alone_us']:.0f}", f"{row['slowdown']:.1%}", f"{row['stores_gb_per_s']:.1f}")
        for row in sweep
    ]
    print_table("beside a decode-like loop", ("CTAs", "step alone us", "slower by", "stores GB/s"), cells)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it; returns 0, 1 when a bar does not hold, 3 without a device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="as small as possible: shows that it runs, judges nothing")
    parser.add_argument("--path", type=Path, default=BUILD, help="a directory on the drive, for the table of storage")
    parser.add_argument("--json", type=Path, default=BUILD / "gpu.json", help="where the result goes")
    options = parser.parse_args(arguments)
    size = TINY if options.tiny else FULL
    device, host = [], []
    try:
        for layout in LAYOUTS:
            with GpuPool(layout, size.num_blocks) as pool, mover_over(pool, size) as mover:
                device += device_side(pool, mover, layout, size)
                host += to_the_host(pool, mover, layout, size)
        options.path.mkdir(parents=True, exist_ok=True)
        with GpuPool(LAYOUTS[0], size.num_blocks) as pool, mover_over(pool, size) as mover:
            storage = storage_rows(mover, options.path, size.storage)
        sweep = [budget(LAYOUTS[0], size, ctas) for ctas in BUDGETS]
    except GpuUnavailable as error:
        print(f"nothing was measured: {error}", file=sys.stderr)
        return NO_DEVICE
    show(device, host, sweep, storage)
    record = {
        "environment": environment(options.path),
        "device": device,
        "host": host,
        "budget": sweep,
        "storage": storage,
    }
    write_json(record, options.json)
    failed = [] if options.tiny else [*failed_bars(device, host, sweep), *failed_shares(storage)]
    for line in failed:
        print(f"bar not met: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
