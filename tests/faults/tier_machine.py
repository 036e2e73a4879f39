"""A directory tier under faults, several handles at a time, against a model that is never wrong.

    python -m tests.faults.tier_machine --seed 1 --examples 50

What is read back and verified is the chunk that was stored, or the read ends in one of the package's own errors. What
was stored while nothing went wrong is found, until something goes wrong with it. No other error leaves the tier.
Runs in a process of its own that has the fault injector loaded, and prints rows as JSON.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from memkv_engines.chunk import codec
from memkv_engines.chunk.codec import Geometry, build_header, decode_header
from memkv_engines.errors import ChunkDamaged, ChunkError, ChunkMissing, MemKVError
from memkv_engines.keys import ChunkKey, ChunkName
from memkv_engines.tier import directory
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.transports.posix import BUFFERED, DIRECT, ModeReport
from tests.fast.samples import NAMESPACE, SHARD, aligned, chain, noise
from tests.faults.control import DELAY, FAULTS, KILL, RENAME, ROOT, UNLINK, Fault, Injector
from tests.faults.rows import CONTROL, Row, as_json, from_json

DEADLINE_S = 5.0
BLOCK_BYTES, BLOCK_TOKENS = 4000, 16
FOLDER = NAMESPACE.folder
# A call that never returns belongs to who can be killed: the pipelines and the engines.
TRIED = [f for f in FAULTS.values() if f.action != KILL and not (f.action == DELAY and f.delay_ms > 1000)]
HANDLES: tuple[dict[str, Any], ...] = (
    {},
    {"capacity_bytes": 60_000, "eviction": "segmented_lru"},
    {"capacity_bytes": 60_000, "eviction": "off", "read_only": True},
)


def made(prompt: str, blocks: int) -> tuple[ChunkName, list[bytes], bytes]:
    """A chunk: its name, its blocks' hashes and its bytes. They follow from the name, as KV follows from a prompt."""
    hashes = chain(blocks, prompt)
    key = ChunkKey(NAMESPACE.digest, hashes[0], hashes[-1], blocks, 0, SHARD)
    payload = noise(Geometry(blocks, BLOCK_BYTES, BLOCK_TOKENS).payload_bytes, hash_of(prompt, blocks))
    header = build_header(key, BLOCK_TOKENS, BLOCK_BYTES, hashes, 0, memoryview(payload))
    return key.name, hashes, header.encode() + payload


def hash_of(prompt: str, blocks: int) -> int:
    return ord(prompt) * 100 + blocks


CHUNKS = [made(prompt, blocks) for prompt in "abc" for blocks in (1, 2)]
chunks = st.integers(0, len(CHUNKS) - 1)
handles = st.integers(0, len(HANDLES) - 1)


class TierMachine(RuleBasedStateMachine):
    """Does everything to a directory through several handles while things go wrong below them."""

    rows: ClassVar[dict[str, Row]] = {}
    is_control: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._scratch = tempfile.TemporaryDirectory()
        root = Path(self._scratch.name) / "kv"
        self.injector = Injector.of_this_process(root)
        self._tiers: list[DirectoryTier | None] = [None] * len(HANDLES)
        # Chunks that are whole and in place as far as anyone can know.
        self._sure: set[int] = set()
        self._fault: Fault | None = None
        self._root = root
        for number in range(len(HANDLES)):
            self._reopen(number)

    # --- faults --------------------------------------------------------------

    @rule(
        fault=st.sampled_from(TRIED),
        seed=st.integers(0, 1 << 20),
        skip=st.integers(0, 2),
        budget=st.sampled_from([1, 3, 1000]),
        number=handles,
        some=st.lists(chunks, min_size=1, max_size=3),
    )
    def arm(self, fault: Fault, seed: int, skip: int, budget: int, number: int, some: list[int]) -> None:
        """Things go wrong, beginning with what is done here at once."""
        self._settle()
        self._fault = fault
        self.injector.arm(fault, seed=seed, skip=skip, budget=budget)
        self._row.rounds += 1
        for which in some:
            self.put(0, which, True)
            self.get(number, which)
            self.put(1, which, False)

    @rule()
    def disarm(self) -> None:
        self._settle()

    def _settle(self) -> None:
        if self._fault is not None:
            self._row.injected += self.injector.disarm()
            self._fault = None

    @property
    def _row(self) -> Row:
        assert self._fault is not None
        return self.rows.setdefault(self._fault.name, Row(self._fault.name, "tier", deadline_s=DEADLINE_S))

    def _try(self, action: Callable[[], Any]) -> tuple[Any, bool]:
        """What an action returned, or the error of ours it ended with, and whether anything went wrong below it."""
        before, started = self.injector.injected, time.monotonic()
        try:
            result = action()
        except MemKVError as error:
            result = error
        went_wrong = self.injector.injected > before
        if self._fault is not None:
            told = isinstance(result, ChunkError) or (went_wrong and isinstance(result, MemKVError))
            self._row.detected += told and (went_wrong or not isinstance(result, ChunkMissing))
            self._row.longest_wait_s = max(self._row.longest_wait_s, time.monotonic() - started)
        if went_wrong:
            assert self._fault is not None
            if self._fault.spoils or self._fault.operations & (RENAME | UNLINK):
                # Any chunk may have been hit, not the one at hand alone.
                self._sure.clear()
        return result, went_wrong

    # --- the tier ------------------------------------------------------------

    @rule(number=handles)
    def reopen(self, number: int) -> None:
        tier, self._tiers[number] = self._tiers[number], None
        if tier is not None:
            self._try(tier.close)
        self._reopen(number)

    def _reopen(self, number: int) -> None:
        # Timing the device at every start would be nearly all this does.
        mode = DIRECT if number else BUFFERED
        with mock.patch.object(directory, "probe_modes", lambda *_: ModeReport(mode, "not probed", {}, {})):
            tier, went_wrong = self._try(lambda: DirectoryTier(self._root, **HANDLES[number]))
        assert isinstance(tier, DirectoryTier) or went_wrong, tier
        self._tiers[number] = tier if isinstance(tier, DirectoryTier) else None

    def _tier(self, number: int) -> DirectoryTier | None:
        if self._tiers[number] is None:
            self._reopen(number)
        return self._tiers[number]

    @rule(number=handles, which=chunks, replace=st.booleans())
    def put(self, number: int, which: int, replace: bool) -> None:
        tier = self._tier(number)
        if tier is None:
            return
        name, _, data = CHUNKS[which]
        result, went_wrong = self._try(lambda: tier.put(FOLDER, name, [aligned(data)], replace=replace))
        if isinstance(result, MemKVError):
            # What was there before stays: a file is replaced whole or not at all.
            return
        if result.already_present:
            return
        assert result.written_bytes == len(data)
        if not (went_wrong and self._fault is not None and self._fault.spoils):
            self._sure.add(which)

    @rule(number=handles, which=chunks)
    def get(self, number: int, which: int) -> None:
        tier = self._tier(number)
        if tier is None:
            return
        result, went_wrong = self._try(lambda: verified(tier, which))
        if isinstance(result, bytes):
            right = result == CHUNKS[which][2]
            if self._fault is not None:
                self._row.wrong_tokens += not right
            assert right or self.is_control, "bytes that were verified are wrong"
        else:
            assert went_wrong or which not in self._sure, f"a chunk that is there is not found: {result!r}"

    @rule(number=handles, which=chunks)
    def remove(self, number: int, which: int) -> None:
        tier = self._tier(number)
        if tier is not None:
            result, _ = self._try(lambda: tier.remove(FOLDER, CHUNKS[which][0]))
            if result is not False or not HANDLES[number].get("read_only"):
                self._sure.discard(which)

    @rule(number=handles)
    def look(self, number: int) -> None:
        tier = self._tier(number)
        if tier is None:
            return
        names = [name for name, _, _ in CHUNKS]
        listed, went_wrong = self._try(lambda: list(tier.names(FOLDER)))
        there, too = self._try(lambda: tier.exists(FOLDER, names))
        for which in self._sure:
            assert went_wrong or names[which] in listed, f"not listed: {listed!r}"
            assert too or there[which]
            name = names[which]
            found, here = self._try(lambda name=name: tier.variants(FOLDER, name.first, 0, SHARD.text))
            assert here or name in found

    @rule(number=handles)
    def keep_house(self, number: int) -> None:
        tier = self._tier(number)
        if tier is not None:
            self._try(tier.scan)
            self._try(tier.used_bytes)
            self._try(lambda: tier.write_manifest(NAMESPACE))

    @precondition(lambda self: self._tiers[1] is not None)
    @rule()
    def evict(self) -> None:
        tier = self._tiers[1]
        assert tier is not None
        freed, went_wrong = self._try(tier.evict)
        if freed or went_wrong:
            self._sure.clear()

    def teardown(self) -> None:
        self._settle()
        for tier in self._tiers:
            if tier is not None:
                tier.close()
        self.injector.close()
        self._scratch.cleanup()


def verified(tier: DirectoryTier, which: int) -> bytes:
    """A chunk as a load takes it: read, held against what was asked for, every block verified."""
    name, hashes, data = CHUNKS[which]
    geometry = Geometry(len(hashes), BLOCK_BYTES, BLOCK_TOKENS)
    with tier.open(FOLDER, name) as reader:
        view = aligned(b"\x5a" * geometry.object_bytes)
        if reader.object_bytes != geometry.object_bytes:
            raise ChunkDamaged("another size")
        reader.read([view], 0)
    header = decode_header(view)
    codec.check_header(header, NAMESPACE.digest, name, geometry, hashes)
    if codec.verify_blocks(header, 0, len(hashes), view[geometry.header_bytes :]) is not None:
        raise ChunkDamaged("a block is wrong")
    found = bytearray(view)
    for index in range(len(hashes)):
        # No digest covers padding, and nobody reads it.
        end = geometry.block_offset(index) + geometry.block_stride_bytes
        padding = geometry.block_stride_bytes - geometry.block_bytes
        found[end - padding : end] = data[end - padding : end]
    return bytes(found)


def run(seed: int, examples: int, steps: int = 40, *, verified: bool = True) -> list[Row]:
    """Run the machine in a process with the fault injector; what every fault did.

    Without verification it counts wrong bytes instead of failing, and there is one row, the control's.

    Raises:
        AssertionError: the tier broke its promise; the message says by which steps.
    """
    with Injector(Path("nowhere")) as injector:
        arguments = [f"--seed={seed}", f"--examples={examples}", f"--steps={steps}", *["--control"] * (not verified)]
        done = subprocess.run(
            [sys.executable, "-m", "tests.faults.tier_machine", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), **injector.environment(verified=verified)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, (
        f"the tier broke its promise (seed {seed}):\n{done.stdout[-4000:]}{done.stderr[-8000:]}"
    )
    rows = from_json(done.stdout)
    if verified:
        return rows
    control = Row(CONTROL, "tier", deadline_s=DEADLINE_S)
    for row in rows:
        control.add(row)
    return [control]


def main() -> int:
    """Run the machine in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=50)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--control", action="store_true", help="count wrong bytes instead of failing")
    arguments = parser.parse_args()
    TierMachine.is_control = arguments.control
    hypothesis.seed(arguments.seed)(TierMachine)
    run_state_machine_as_test(
        TierMachine,
        settings=settings(
            max_examples=arguments.examples,
            stateful_step_count=arguments.steps,
            deadline=None,
            database=None,
            # Looking for a shorter example takes minutes; the seed repeats this one.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(as_json(row for row in TierMachine.rows.values() if row.injected))
    return 0


if __name__ == "__main__":
    sys.exit(main())
