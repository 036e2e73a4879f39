"""What of a hit lies in memory: against a walk over single blocks."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from memkv_engines.limits import KEY_BYTES
from memkv_engines.offload.lookup import GroupView, Hit, Run
from memkv_engines.offload.memory_level import resident_key
from memkv_engines.offload.residents import NOTHING, MemoryShare, memory_share
from tests.fast.samples import SHARD, chain, chain_hash

HASHES = chain(64)
FULL = GroupView(0, 16, 4, (SHARD,))
WINDOW = GroupView(1, 16, 4, (SHARD,), window_tokens=64)
OTHER = GroupView(2, 32, 2, (SHARD,))


def key(group: int, last_block: int) -> bytes:
    return resident_key(group, HASHES[last_block][:KEY_BYTES])


def whole(blocks: int, chunk_blocks: int) -> tuple[Run, ...]:
    return (Run(0, chunk_blocks, blocks // chunk_blocks, 0, b"", blocks),)


def test_a_leading_part_ends_at_the_first_chunk_that_is_elsewhere() -> None:
    hit = Hit(32 * 16, {0: whole(32, 4)})
    there = {key(0, block) for block in (3, 7, 15)}
    assert memory_share(hit, 0, [FULL], [HASHES], there) == MemoryShare(8 * 16, {0: 12})
    assert memory_share(hit, 6 * 16, [FULL], [HASHES], there) == MemoryShare(2 * 16, {0: 6})
    assert memory_share(hit, 9 * 16, [FULL], [HASHES], there) == MemoryShare(0, {0: 4})
    assert memory_share(hit, 0, [FULL], [HASHES], set()) == MemoryShare(0, {0: 0})
    assert NOTHING == MemoryShare()


def test_a_variant_is_known_by_its_own_last_block() -> None:
    beyond = chain_hash(0, "another prompt")[:KEY_BYTES]
    hit = Hit(7 * 16, {0: (Run(0, 4, 1, 0, b"", 4), Run(4, 4, 1, 0, beyond, 3))})
    there = {key(0, 3), resident_key(0, beyond)}
    assert memory_share(hit, 0, [FULL], [HASHES], there) == MemoryShare(7 * 16, {0: 7})


def test_every_group_must_have_it() -> None:
    hit = Hit(16 * 16, {0: whole(16, 4), 2: whole(8, 2)})
    there = {key(0, block) for block in (3, 7, 11, 15)} | {key(2, 1), key(2, 3)}
    hashes = [HASHES, HASHES]
    assert memory_share(hit, 0, [FULL, OTHER], hashes, there) == MemoryShare(8 * 16, {0: 16, 2: 4})


def test_with_a_window_it_is_all_or_no_leading_part() -> None:
    hit = Hit(16 * 16, {0: whole(16, 4), 1: (Run(12, 4, 1, 0, b"", 4),)})
    hashes = [HASHES, HASHES]
    everything = {key(0, block) for block in (3, 7, 11, 15)} | {key(1, 15)}
    assert memory_share(hit, 0, [FULL, WINDOW], hashes, everything) == MemoryShare(16 * 16, {0: 16, 1: 4})
    assert memory_share(hit, 0, [FULL, WINDOW], hashes, everything - {key(1, 15)}).leading_tokens == 0
    assert memory_share(hit, 0, [FULL, WINDOW], hashes, everything - {key(0, 15)}).leading_tokens == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=8),
    st.integers(0, 20),
    st.integers(0, 20),
)
def test_as_if_block_by_block(chunks: list[tuple[int, bool]], start: int, cut: int) -> None:
    """Chunks of any length, each in memory or not."""
    runs, there, resident, position = [], set(), [], 0
    for blocks, is_there in chunks:
        runs.append(Run(position, blocks, 1, 0, b"", blocks))
        position += blocks
        if is_there:
            there.add(key(0, position - 1))
        resident += [is_there] * blocks
    stop = max(1, position - cut)
    start = min(start, stop - 1)
    wanted = resident[start:stop]
    leading = wanted.index(False) if False in wanted else len(wanted)
    found = memory_share(Hit(stop * 16, {0: tuple(runs)}), start * 16, [FULL], [HASHES], there)
    assert found == MemoryShare(leading * 16, {0: sum(wanted)})
