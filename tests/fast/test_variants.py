"""Chunks known by their first block, and sets that forget."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.limits import KEY_BYTES, MAX_VARIANTS_EXAMINED
from memkv_engines.offload import variants
from memkv_engines.offload.variants import ExpiringSet, VariantTable
from tests.fast.samples import chain, chain_hash
from tests.fast.test_index import Clock

OWN = chain(6)


def test_variants_of_a_block_newest_first() -> None:
    table = VariantTable(60)
    table.add(0, OWN[:3], OWN[2], 3, 0)
    table.add(0, [OWN[0], *chain(2, "b")], chain_hash(1, "b"), 3, 0)
    assert [v.last for v in table.at(0, OWN[0])] == [chain_hash(1, "b")[:KEY_BYTES], OWN[2][:KEY_BYTES]]
    table.add(0, OWN[:3], OWN[2], 3, 0)  # told again: newest, and still one
    assert [v.last for v in table.at(0, OWN[0])] == [OWN[2][:KEY_BYTES], chain_hash(1, "b")[:KEY_BYTES]]
    assert table.at(1, OWN[0]) == table.at(0, OWN[1]) == []
    table.remove(0, OWN[0], OWN[2])
    table.remove(0, OWN[5], OWN[2])
    assert [v.block_count for v in table.at(0, OWN[0])] == [3]
    table.clear()
    assert table.at(0, OWN[0]) == []


def test_shared_blocks_are_those_of_the_prompt() -> None:
    table = VariantTable(60)
    table.add(0, OWN[1:5], OWN[4], 4, 0)
    (variant,) = table.at(0, OWN[1])
    assert variant.shared_blocks(OWN, 1) == 4
    assert variant.shared_blocks(OWN[:3], 1) == 2
    assert variant.shared_blocks([*OWN[:2], *chain(4, "b")], 1) == 1
    assert variant.shared_blocks(OWN, 2) == 0
    assert variant.shared_blocks(OWN, 6) == 0


def test_variants_expire_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "MAX_KNOWN_VARIANTS", 5)
    clock = Clock()
    table = VariantTable(60, clock)
    for number in range(MAX_VARIANTS_EXAMINED + 4):
        table.add(0, OWN[:1], chain_hash(number, "last"), 2, 0)
    assert len(table.at(0, OWN[0])) == MAX_VARIANTS_EXAMINED
    for block in OWN:
        table.add(0, [block], block, 1, 0)
    assert [bool(table.at(0, b)) for b in OWN] == [False, True, True, True, True, True]
    table.add(0, OWN[1:2], OWN[1], 1, 0)  # told again: others go first
    table.add(0, chain(1, "z"), chain_hash(0, "z"), 1, 0)
    assert [bool(table.at(0, b)) for b in OWN] == [False, True, False, True, True, True]
    clock.now += 61
    assert table.at(0, OWN[5]) == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 1), st.sampled_from("aaaaaaaaaaaaaaarrrc")),
        max_size=120,
    )
)
def test_the_hashes_kept_are_bounded_and_counted(steps: list[tuple[int, int, int, str]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "MAX_VARIANT_HASH_BYTES", 12 * 32)
        table = VariantTable(60)
        for first, blocks, which, what in steps:
            hashes = [OWN[first], *chain(blocks - 1, str(which))]
            if what == "a":
                table.add(0, hashes, hashes[-1], blocks, 0)
                assert table.at(0, OWN[first]), "what was learned last stays"
            elif what == "r":
                table.remove(0, OWN[first], hashes[-1])
            else:
                table.clear()
            kept = sum(len(v.hashes) for block in OWN for v in table.at(0, block))
            assert kept == table._hash_bytes <= 12 * 32


def test_a_set_forgets_in_time_and_when_full() -> None:
    clock = Clock()
    known = ExpiringSet(10, 3, clock)
    known.add(0, OWN[0])
    assert (0, OWN[0]) in known
    assert (0, OWN[0][:KEY_BYTES] + bytes(16)) in known
    assert (1, OWN[0]) not in known
    clock.now += 9
    known.add(0, OWN[1])
    clock.now += 2
    assert (0, OWN[0]) not in known
    assert (0, OWN[1]) in known
    for block in OWN[2:5]:
        known.add(0, block)
    assert [(0, b) in known for b in OWN[1:5]] == [False, True, True, True]
    known.discard(0, OWN[4])
    known.discard(0, OWN[5])
    assert (0, OWN[4]) not in known
    known.clear()
    assert (0, OWN[3]) not in known
