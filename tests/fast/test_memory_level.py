"""The level of memory: slots change places and are never lost, who is pinned stays, the least recently used goes."""

from __future__ import annotations

from collections import OrderedDict

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from memkv_engines.keys import ChunkName
from memkv_engines.limits import NOTE_USE_EVERY_S
from memkv_engines.offload.memory_level import Held, MemoryLevel, resident_key
from memkv_engines.offload.residents import RankResidents, Residents
from memkv_engines.offload.staging import Slot
from tests.fast.clocks import Clock
from tests.fast.samples import make_name

NAMES = [make_name(prompt=prompt) for prompt in "abcdefg"]
FOLDERS = ["one", "other"]
BYTES = 64


def slot(index: int) -> Slot:
    return Slot(index, memoryview(bytearray(BYTES)), index)


def level_of(slots: int, notes: list[ChunkName] | None = None, clock: Clock | None = None) -> MemoryLevel:
    told = notes if notes is not None else []
    level = MemoryLevel(lambda folder, name: told.append(name), clock or Clock())
    for index in range(slots):
        level.add(slot(index))
    return level


def here(level: MemoryLevel) -> list[ChunkName]:
    """What is there; asking does not count as use."""
    return [name for _, name in level._held]


def test_a_chunk_keeps_its_slot_and_another_one_comes_back() -> None:
    level, own = level_of(2), slot(9)
    other = level.swap("one", NAMES[0], own, BYTES, used=False)
    assert other is not own
    held = level.pin("one", NAMES[0])
    assert held is not None and (held.slot, held.object_bytes, held.folder, held.name) == (own, BYTES, "one", NAMES[0])
    assert level.pin("other", NAMES[0]) is None and level.pin("one", NAMES[1]) is None


def test_the_least_recently_used_goes_first_and_who_is_pinned_stays() -> None:
    level = level_of(3)
    for number, name in enumerate(NAMES[:3]):
        level.swap("one", name, slot(10 + number), BYTES, used=False)
    first, second = level.pin("one", NAMES[0]), level.pin("one", NAMES[1])
    assert first is not None and second is not None
    level.unpin(first)
    level.swap("one", NAMES[3], slot(13), BYTES, used=False)
    assert here(level) == [NAMES[0], NAMES[1], NAMES[3]], "the only one that was not used"
    level.swap("one", NAMES[4], slot(14), BYTES, used=False)
    assert here(level) == [NAMES[1], NAMES[3], NAMES[4]], "the second one is in use"
    third, fourth = level.pin("one", NAMES[3]), level.pin("one", NAMES[4])
    own = slot(15)
    assert third and fourth and level.swap("one", NAMES[5], own, BYTES, used=False) is own, "all are in use"


def test_without_slots_nothing_stays() -> None:
    level, own = level_of(0), slot(9)
    assert level.swap("one", NAMES[0], own, BYTES, used=False) is own
    assert level.pin("one", NAMES[0]) is None and level.take_changes() == ((), ())


def test_a_chunk_that_is_stored_anew_replaces_what_was_there_but_not_under_a_reader() -> None:
    level = level_of(2)
    level.swap("one", NAMES[0], slot(10), BYTES, used=False)
    anew, later = slot(11), slot(12)
    assert level.swap("one", NAMES[0], anew, BYTES, used=False) is not anew
    held = level.pin("one", NAMES[0])
    assert held is not None and held.slot is anew
    assert level.swap("one", NAMES[0], later, BYTES, used=False) is later


def test_who_reads_what_is_dropped_may_go_on_and_gives_the_slot_back() -> None:
    level = level_of(1)
    own = slot(10)
    level.swap("one", NAMES[0], own, BYTES, used=False)
    held = level.pin("one", NAMES[0])
    assert held is not None
    level.drop("one", NAMES[0])
    level.drop("one", NAMES[1])
    other = slot(11)
    assert level.pin("one", NAMES[0]) is None and level.swap("one", NAMES[1], other, BYTES, used=False) is other
    level.unpin(held)
    assert level.swap("one", NAMES[1], other, BYTES, used=False) is own


def test_the_tier_is_told_of_uses_now_and_then() -> None:
    clock, notes = Clock(), list[ChunkName]()
    level = level_of(2, notes, clock)
    level.swap("one", NAMES[0], slot(10), BYTES, used=False)
    level.swap("one", NAMES[1], slot(11), BYTES, used=True)
    for _ in range(3):
        for name in NAMES[:2]:
            held = level.pin("one", name)
            assert held is not None
            level.unpin(held)
    assert notes == [NAMES[0]], "the other one was just read from the tier"
    clock.now += NOTE_USE_EVERY_S
    for name in NAMES[:2]:
        assert level.pin("one", name) is not None
    assert notes == [NAMES[0], *NAMES[:2]]


def test_news_of_several_ranks() -> None:
    a, b = resident_key(0, NAMES[0].last), resident_key(1, NAMES[0].last)
    ranks, both = [Residents(), Residents()], RankResidents(2)
    ranks[0].take_news([a, b], [])
    ranks[1].take_news([a], [b])
    for rank in ranks:
        both.take_changes(rank.take_changes())
    assert a in both and b not in both and b in ranks[0] and b not in ranks[1] and len(ranks[0]) == 2
    ranks[0].take_news([a], [])
    assert ranks[0].take_changes() == {}, "it was there"
    ranks[0].take_news([], [a])
    ranks[0].take_news([a], [])
    assert ranks[0].take_changes() == {}, "it came back before anybody asked"
    ranks[0].clear()
    both.take_changes(ranks[0].take_changes())
    assert a not in both and len(ranks[0]) == 0
    ranks[1].clear()
    both.take_changes(ranks[1].take_changes())
    assert len(both) == 0


class Machine(RuleBasedStateMachine):
    """Against an ordered dictionary."""

    pinned = Bundle("pinned")
    place = st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES))

    @initialize(slots=st.integers(0, 4))
    def begin(self, slots: int) -> None:
        self.level = level_of(slots)
        self.slots = {id(s): s for s in self.level._free}
        self.model: OrderedDict[tuple[str, ChunkName], Slot] = OrderedDict()
        self.pins: dict[int, int] = {}
        self.news, self.spare = Residents(), 100

    @rule(place=place, used=st.booleans())
    def swap(self, place: tuple[str, ChunkName], used: bool) -> None:
        self.spare += 1
        own = slot(self.spare)
        back = self.level.swap(*place, own, BYTES, used=used)
        if back is own:
            known = self.model.get(place)
            busy = [s for s in self.slots.values() if self.pins.get(id(s))]
            assert (known is not None and self.pins.get(id(known))) or len(busy) == len(self.slots)
            return
        assert not self.pins.get(id(back)), "a slot that somebody reads was given away"
        gone = self.model.pop(place, None)
        if gone is None and back in self.model.values():
            oldest = next(p for p, s in self.model.items() if not self.pins.get(id(s)))
            assert self.model.pop(oldest) is back, "another one was used longer ago"
        self.model[place] = own
        del self.slots[id(back)]
        self.slots[id(own)] = own

    @rule(target=pinned, place=place)
    def pin(self, place: tuple[str, ChunkName]) -> Held | None:
        held = self.level.pin(*place)
        assert (held.slot if held else None) is self.model.get(place)
        if held is not None:
            self.model.move_to_end(place)
            self.pins[id(held.slot)] = self.pins.get(id(held.slot), 0) + 1
        return held

    @rule(held=consumes(pinned))
    def unpin(self, held: Held | None) -> None:
        if held is not None:
            self.level.unpin(held)
            self.pins[id(held.slot)] -= 1

    @rule(place=place)
    def drop(self, place: tuple[str, ChunkName]) -> None:
        self.level.drop(*place)
        self.model.pop(place, None)

    @rule()
    def read_news(self) -> None:
        self.news.take_news(*self.level.take_changes())
        # A chunk of two namespaces has one key, and is told to be gone when the first of them goes.
        assert {k for k in map(_key, self.model)} >= self.news._keys

    @invariant()
    def no_slot_is_lost_or_has_two_uses(self) -> None:
        level = self.level
        held, free = [h.slot for h in level._held.values()], level._free
        out = [s for s in self.slots.values() if self.pins.get(id(s)) and s not in held]
        assert sorted(map(id, [*held, *free, *out])) == sorted(self.slots)
        assert [h for h in level._held] == list(self.model) and len(level) == len(self.model)
        assert all(self.model[place] is h.slot for place, h in level._held.items())


def _key(place: tuple[str, ChunkName]) -> bytes:
    return resident_key(place[1].group, place[1].last)


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase
