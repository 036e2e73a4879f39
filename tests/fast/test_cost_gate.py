"""The cost gate against a world whose tier and engine have known speeds."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.limits import (
    COLD_LOAD_S,
    FORGET_LOAD_S,
    MIN_TRIAL_TOKENS,
    NEGLIGIBLE_LOAD_S,
    OVERDUE_SLACK_S,
    STOP_FLOOR_S,
    STOP_MARGIN,
    TRIAL_DUTY,
    TRIAL_PAUSE_S,
    TRIAL_SHARE,
)
from memkv_engines.offload.cost_gate import Candidate, CostGate, Verdict
from tests.fast.clocks import Clock

TOKEN_BYTES = 100_000
MB = 1_000_000
CHUNK_TOKENS, READERS = 64, 4
LOADS = ("faster", "negligible", "unmeasured")
MEMORY_MB_PER_S = 20_000.0


class World:
    """An engine and a tier. Every request loads what the gate says and recomputes the rest.

    Args:
        mb_per_s: the tier's bandwidth.
        latency_s: what each load takes besides.
        tokens_per_s: prefill, before attention.
        quadratic_s: of each pair of tokens.
    """

    def __init__(
        self, mb_per_s: float, *, latency_s: float = 0.0, tokens_per_s: float = 5000.0, quadratic_s: float = 1e-8
    ) -> None:
        self.clock = Clock()
        self.gate = CostGate(enabled=True, clock=self.clock)
        self.mb_per_s, self.latency_s = mb_per_s, latency_s
        self.tokens_per_s, self.quadratic_s = tokens_per_s, quadratic_s
        self.memory_mb_per_s = MEMORY_MB_PER_S
        self.noise = lambda: 1.0

    def prefill_s(self, start: int, stop: int) -> float:
        return (stop - start) / self.tokens_per_s + self.quadratic_s * (stop**2 - start**2) / 2

    def load_s(self, tokens: int) -> float:
        return self.latency_s + tokens * TOKEN_BYTES / (self.mb_per_s * MB)

    def prefill(self, start: int, stop: int) -> float:
        """In steps of 2048 tokens, of which a later one takes longer: it has more tokens to look at."""
        noise = self.noise()
        for first in range(start, stop, 2048):
            last = min(stop, first + 2048)
            self.gate.observe_prefill([(first, last)], self.prefill_s(first, last) * noise)
        seconds = self.prefill_s(start, stop) * noise
        self.clock.now += seconds
        return seconds

    def warm_up(self) -> None:
        self.prefill(0, 8192)

    def load(self, candidate: Candidate) -> tuple[int, float]:
        """As the I/O service does it: stopped when it is seen to be slow, but what is being read is finished."""
        ticket = self.gate.load_began(candidate)
        read = candidate.tokens - candidate.memory_tokens
        seconds = self.load_s(read) * self.noise() if read else 0.0
        if ticket.stop_s and seconds > ticket.stop_s:
            read = min(read, READERS * CHUNK_TOKENS)
            seconds = self.load_s(read)
        seconds += self.memory_s(candidate.memory_tokens)
        self.clock.now += seconds
        tokens = candidate.memory_tokens + read
        self.gate.load_ended(
            ticket,
            read * TOKEN_BYTES,
            seconds,
            memory_bytes=candidate.memory_tokens * TOKEN_BYTES,
            stopped=tokens < candidate.tokens,
        )
        return tokens, seconds

    def memory_s(self, tokens: int) -> float:
        return tokens * TOKEN_BYTES / (self.memory_mb_per_s * MB)

    def request(self, start: int, stop: int, memory_tokens: int = 0) -> tuple[Verdict, float]:
        """Verdict, and the time to the first token."""
        hit = Candidate(start, stop, (stop - start) * TOKEN_BYTES, memory_tokens, memory_tokens * TOKEN_BYTES)
        verdict = self.gate.judge(hit, 16)
        seconds, loaded = 0.0, 0
        if verdict.tokens:
            loaded, seconds = self.load(hit.leading(verdict.tokens))
        return verdict, seconds + self.prefill(start + loaded, stop)


hits = st.integers(0, 30_000).flatmap(lambda start: st.tuples(st.just(start), st.integers(start + 300, start + 30_000)))
speeds = st.floats(5, 20_000)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.floats(0.1, 1e4), st.floats(1e-6, 1), st.floats(0, 1e-4), hits)
def test_no_leading_part_is_better_than_all_and_nothing(
    latency_s: float, bytes_per_ms: float, per_token_s: float, per_pair_s: float, hit: tuple[int, int]
) -> None:
    start, stop = hit

    def first_token_s(split: int) -> float:
        load = latency_s + (split - start) / bytes_per_ms if split > start else 0.0
        return load + (stop - split) * per_token_s + per_pair_s * (stop**2 - split**2) / 2

    ends = min(first_token_s(start), first_token_s(stop))
    assert all(first_token_s(split) >= ends * (1 - 1e-9) for split in range(start, stop, max(1, (stop - start) // 50)))


@settings(max_examples=60, deadline=None)
@given(speeds, st.floats(0, 0.5), st.lists(hits, min_size=3, max_size=12))
def test_what_is_predicted_to_be_slower_is_never_chosen(
    mb_per_s: float, latency_s: float, requests: list[tuple[int, int]]
) -> None:
    world = World(mb_per_s, latency_s=latency_s)
    world.warm_up()
    for start, stop in requests:
        hit = Candidate(start, stop, (stop - start) * TOKEN_BYTES)
        load_s, worth_s = world.gate._load.seconds(hit.size_bytes), world.gate._prefill.seconds(start, stop)
        verdict, _ = world.request(start, stop)
        if verdict.reason == "faster":
            assert load_s <= worth_s
        elif verdict.reason == "negligible":
            assert load_s <= NEGLIGIBLE_LOAD_S
        elif verdict.reason != "unmeasured":
            assert load_s > 0.8 * worth_s
            assert verdict.tokens in (0, stop - start) or verdict.reason == "trial"


@settings(max_examples=60, deadline=None)
@given(speeds, st.lists(hits, min_size=2, max_size=12))
def test_no_request_is_much_slower_than_recomputing(mb_per_s: float, requests: list[tuple[int, int]]) -> None:
    """The first load of all may cost what is read at once; all others no more than a trial."""
    world = World(mb_per_s)
    world.warm_up()
    first_chunks_s = world.load_s(READERS * CHUNK_TOKENS)
    for number, (start, stop) in enumerate(requests):
        recompute_s = world.prefill_s(start, stop)
        verdict, seconds = world.request(start, stop)
        slack_s = NEGLIGIBLE_LOAD_S if number else max(first_chunks_s, STOP_FLOOR_S)
        if verdict.reason == "trial":
            slack_s = max(TRIAL_SHARE * recompute_s, world.load_s(MIN_TRIAL_TOKENS + 16)) + NEGLIGIBLE_LOAD_S
        assert seconds <= STOP_MARGIN * recompute_s + slack_s


@settings(max_examples=60, deadline=None)
@given(speeds, speeds, hits)
def test_a_faster_tier_is_not_loaded_from_less(one: float, other: float, hit: tuple[int, int]) -> None:
    tokens = []
    for mb_per_s in sorted((one, other)):
        world = World(mb_per_s)
        world.warm_up()
        world.gate.load_ended(world.gate.load_began(Candidate(0, 1000, 100 * MB)), 100 * MB, 100 / mb_per_s)
        world.gate._next_trial = float("inf")
        tokens.append(world.gate.judge(Candidate(*hit, (hit[1] - hit[0]) * TOKEN_BYTES)).tokens)
    assert tokens[0] <= tokens[1]


def test_a_normal_tier_is_loaded_from_in_full() -> None:
    world = World(1200)
    verdicts = [world.request(0, stop)[0] for stop in (6000, 500, 30_000, 6000)]
    assert [v.tokens for v in verdicts] == [6000, 500, 30_000, 6000]
    assert {v.reason for v in verdicts} <= set(LOADS)


def test_a_slow_tier_costs_its_first_load_alone() -> None:
    world = World(50)
    world.warm_up()
    recompute_s = world.prefill_s(0, 6000)
    assert world.load_s(6000) > 5 * recompute_s
    verdict, seconds = world.request(0, 6000)
    assert verdict.reason == "unmeasured"
    assert seconds < recompute_s + world.load_s(READERS * CHUNK_TOKENS)
    for _ in range(20):
        verdict, seconds = world.request(0, 6000)
        if verdict.reason == "trial":
            assert verdict.tokens == MIN_TRIAL_TOKENS
        else:
            assert (verdict, seconds) == (Verdict(0, "slower"), pytest.approx(recompute_s))
    assert world.gate.counters["gate_slower"] > 10


def test_a_process_that_has_prefilled_nothing_yet_assumes_a_rate() -> None:
    world = World(50)
    stop_s = world.gate.load_began(Candidate(0, 10_000, 1000 * MB)).stop_s
    assert STOP_MARGIN * COLD_LOAD_S < stop_s < world.load_s(10_000) / 2


def test_one_bad_minute_is_not_for_ever() -> None:
    world = World(2000)
    world.warm_up()
    for _ in range(5):
        assert world.request(0, 6000)[0].tokens == 6000
    world.mb_per_s = 10
    assert world.request(0, 6000)[0].tokens == 6000
    assert world.request(0, 6000)[0].tokens == 0, "one load that was stopped is enough"
    late = sum(world.request(0, 6000)[1] - world.prefill_s(0, 6000) for _ in range(40))
    assert late < 3 * world.load_s(READERS * CHUNK_TOKENS) + 0.1 * 40 * world.prefill_s(0, 6000)
    assert world.request(0, 6000)[0].tokens < 6000
    world.mb_per_s = 2000
    began, verdict = world.clock.now, Verdict(0, "")
    while verdict.tokens < 6000:
        verdict, _ = world.request(0, 6000)
        assert world.clock.now - began < 60
    for _ in range(20):
        assert world.request(0, 6000)[0].tokens == 6000


def test_a_store_with_a_high_latency_is_learnt_by_trials() -> None:
    """Small loads look slow there; what trials bring must not keep large ones away."""
    world = World(2000, latency_s=0.3)
    world.warm_up()
    for _ in range(5):
        world.request(0, 500)
    tokens = 0
    for _ in range(60):
        world.clock.now += 1.0
        tokens = world.request(0, 20_000)[0].tokens
        if tokens == 20_000:
            break
    assert tokens == 20_000


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.3, 3.0))
def test_noise_does_not_make_it_flap(seed: int, ratio: float) -> None:
    """With loads and prefills that scatter by 10%, also where both cost the same."""
    choice = random.Random(seed)
    world = World(1.0, quadratic_s=0.0)
    world.mb_per_s = TOKEN_BYTES * world.tokens_per_s / MB / ratio
    world.noise = lambda: choice.uniform(0.9, 1.1)
    world.warm_up()
    for _ in range(100):
        world.request(0, 8000)
    assert world.gate.counters["gate_flips"] <= 12


def test_ranks_whose_turns_differ_agree_on_a_trial_all_the_same() -> None:
    """What is loaded is the least that any rank would load."""
    world = World(20)
    world.warm_up()
    world.request(0, 6000)
    other = CostGate(enabled=True, clock=world.clock)
    other._load, other._prefill, other._declining = world.gate._load, world.gate._prefill, {13: True}
    other._next_trial = world.clock.now + 7.0
    hit, loaded = Candidate(0, 6000, 600 * MB), 0
    for _ in range(100):
        world.clock.now += 0.3
        tokens = min(gate.judge(hit, 16, least).tokens for gate, least in ((world.gate, 512), (other, 256)))
        if tokens:
            loaded += 1
            for gate in (world.gate, other):
                gate.load_ended(gate.load_began(hit.leading(tokens)), tokens * TOKEN_BYTES, world.load_s(tokens))
    assert 1 <= loaded <= 100 * 0.3 / TRIAL_PAUSE_S


def test_trials_take_a_small_share_of_the_time() -> None:
    world = World(1, tokens_per_s=50_000)
    world.warm_up()
    world.request(0, 6000)
    began, trial_s = world.clock.now, 0.0
    while world.clock.now < began + 3600:
        verdict, _ = world.request(0, 6000)
        trial_s += world.load_s(verdict.tokens) if verdict.tokens else 0.0
        world.clock.now += 1.0
    assert 0 < trial_s < 2 * TRIAL_DUTY * 3600


def test_a_queue_of_loads_is_measured_and_not_judged() -> None:
    world = World(600, quadratic_s=0.0)
    world.warm_up()
    world.request(0, 1000)
    hit = Candidate(0, 5000, 500 * MB)
    assert world.load_s(5000) < world.prefill_s(0, 5000) < 2 * world.load_s(5000)
    assert world.gate.judge(hit).reason == "faster"
    ticket = world.gate.load_began(hit)
    assert world.gate.judge(hit).reason == "faster", "without a tier it would wait as well"
    other = world.gate.load_began(hit)
    assert (other.ahead_bytes, other.predicted_s) == (500 * MB, pytest.approx(2 * world.load_s(5000)))
    world.gate.load_ended(ticket, 100 * MB, 100 / 600)
    assert other.ahead_bytes == 100 * MB, "what was stopped was not waited for"
    assert other.overdue_at == pytest.approx(ticket.overdue_at + other.stop_s)
    known_s = world.gate._load.seconds(500 * MB)
    world.gate.load_ended(other, 500 * MB, 600 / 600)
    assert world.gate._load.seconds(500 * MB) == pytest.approx(known_s, rel=0.02)


def test_who_comes_during_the_first_load_waits_for_what_it_tells() -> None:
    world = World(1000)
    assert not world.gate.undecided
    ticket = world.gate.load_began(Candidate(0, 1000, 100 * MB))
    assert world.gate.undecided
    world.clock.now += ticket.stop_s + OVERDUE_SLACK_S + 0.1
    assert not world.gate.undecided
    assert world.gate.judge(Candidate(0, 1000, 100 * MB)) == Verdict(0, "slower")
    world.gate.load_ended(ticket)
    assert world.gate.judge(Candidate(0, 1000, 100 * MB)).reason == "unmeasured"


def test_nobody_waits_for_loads_that_tell_nothing_of_the_tier() -> None:
    world = World(1000)
    hit = Candidate(0, 1000, 100 * MB)
    from_memory = world.gate.load_began(replace(hit, memory_tokens=1000, memory_bytes=100 * MB))
    assert not world.gate.undecided
    from_both = world.gate.load_began(replace(hit, memory_tokens=900, memory_bytes=90 * MB))
    assert world.gate.undecided
    world.gate.load_ended(from_memory, 0, 0.01, memory_bytes=100 * MB)
    world.gate.load_ended(from_both)
    world.gate.load_began(replace(hit, memory_tokens=900, memory_bytes=90 * MB))
    assert world.gate.undecided, "the first one failed"
    from_both = world.gate.load_began(replace(hit, memory_tokens=900, memory_bytes=90 * MB))
    world.gate.load_ended(from_both, 10 * MB, 0.02, memory_bytes=90 * MB)
    assert not world.gate.undecided, "once is enough, whether or not the rate is known now"


def test_a_load_nobody_hears_of_is_forgotten() -> None:
    world = World(1000)
    ticket = world.gate.load_began(Candidate(0, 1000, 100 * MB))
    world.clock.now += ticket.stop_s + OVERDUE_SLACK_S + FORGET_LOAD_S
    assert world.gate.judge(Candidate(0, 1000, 100 * MB)).reason == "unmeasured"
    world.gate.load_ended(ticket, 100 * MB, 1.0)


def test_failed_loads_tell_nothing() -> None:
    gate = CostGate(enabled=True, clock=Clock())
    gate.load_ended(gate.load_began(Candidate(0, 1000, 100 * MB)))
    assert gate.judge(Candidate(0, 1000, 100 * MB)).reason == "unmeasured"


def test_switched_off_it_loads_everything_and_counts_nothing() -> None:
    world = World(1)
    world.gate.enabled = False
    world.warm_up()
    for _ in range(3):
        verdict, seconds = world.request(0, 6000)
        assert verdict == Verdict(6000, "off")
        assert seconds == pytest.approx(world.load_s(6000))
    assert world.gate.counters.as_dict() == {}


def test_turning_round_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    world = World(50)
    world.warm_up()
    with caplog.at_level("INFO", "memkv_engines"):
        for _ in range(3):
            world.request(0, 6000)
    assert world.gate.counters["gate_flips"] == 1
    assert "hits of about 6000 tokens are not loaded any more" in caplog.text
    assert world.gate.counters["gate_declined_tokens"] == 2 * 6000
    assert TRIAL_PAUSE_S > 0


# -------------------------------------------------------------------------------------------------------- two levels


def test_from_a_slow_tier_only_what_lies_in_memory_is_loaded() -> None:
    world = World(mb_per_s=50)
    world.warm_up()
    world.request(0, 8192)
    verdict, seconds = world.request(0, 8192, memory_tokens=4096)
    assert verdict == Verdict(4096, "memory")
    assert seconds == pytest.approx(world.memory_s(4096) + world.prefill_s(4096, 8192))
    assert world.request(0, 8192, memory_tokens=8192)[0] == Verdict(8192, "memory")
    assert world.gate.counters["gate_memory"] == 2
    assert world.gate.counters["gate_declined_tokens"] == 4096


def test_a_quick_tier_is_loaded_from_beside_memory() -> None:
    world = World(mb_per_s=3000)
    world.warm_up()
    world.request(0, 8192)
    verdict, _ = world.request(0, 8192, memory_tokens=4096)
    assert verdict == Verdict(8192, "faster")


def test_what_came_from_memory_tells_nothing_of_the_tier() -> None:
    world = World(mb_per_s=50)
    world.warm_up()
    for _ in range(3):
        verdict, _ = world.request(0, 4096, memory_tokens=4096)
        assert verdict == Verdict(4096, "memory")
    assert not world.gate._load.known and world.gate._memory.known
    # Most of a load from memory: its time is not that of what was read.
    ticket = world.gate.load_began(Candidate(0, 4096, 4096 * TOKEN_BYTES, 4000, 4000 * TOKEN_BYTES))
    world.gate.load_ended(ticket, 96 * TOKEN_BYTES, 1.0, memory_bytes=4000 * TOKEN_BYTES)
    assert not world.gate._load.known


def test_the_stop_is_for_what_is_read() -> None:
    world = World(mb_per_s=50)
    world.warm_up()
    size = 8192 * TOKEN_BYTES
    whole = world.gate.load_began(Candidate(0, 8192, size)).stop_s
    part = world.gate.load_began(Candidate(0, 8192, size, 6144, 6144 * TOKEN_BYTES)).stop_s
    assert part == pytest.approx(STOP_MARGIN * world.gate._prefill.seconds(6144, 8192)) and part < whole


def test_a_trial_of_the_tier_follows_what_lies_in_memory() -> None:
    world = World(mb_per_s=50)
    world.warm_up()
    world.request(0, 16384)
    assert world.request(0, 16384, memory_tokens=4096)[0] == Verdict(4096, "memory"), "not so soon"
    world.clock.now += 10 * TRIAL_PAUSE_S
    verdict, _ = world.request(0, 16384, memory_tokens=4096)
    assert verdict.reason == "trial" and 4096 < verdict.tokens < 16384
    again, _ = world.request(0, 16384, memory_tokens=4096)
    assert again == Verdict(4096, "memory"), "the turn was taken"


def test_memory_that_is_slower_than_recomputing_is_not_used_once_and_then_tried_again() -> None:
    world = World(mb_per_s=3000)
    world.warm_up()
    world.memory_mb_per_s = 10
    assert world.request(0, 4096, memory_tokens=4096)[0] == Verdict(4096, "memory")
    assert world.request(0, 4096, memory_tokens=4096)[0] == Verdict(0, "slower")
    world.memory_mb_per_s = MEMORY_MB_PER_S
    assert world.request(0, 4096, memory_tokens=4096)[0] == Verdict(4096, "memory")
    assert world.request(0, 4096, memory_tokens=4096)[0] == Verdict(4096, "memory")


@settings(max_examples=60, deadline=None)
@given(speeds, st.lists(st.tuples(hits, st.floats(0, 1)), min_size=2, max_size=12))
def test_memory_never_makes_a_request_slower_than_recomputing(
    mb_per_s: float, requests: list[tuple[tuple[int, int], float]]
) -> None:
    world = World(mb_per_s)
    world.warm_up()
    first_chunks_s = world.load_s(READERS * CHUNK_TOKENS)
    for (start, stop), share in requests:
        memory_tokens = int(share * (stop - start))
        recompute_s, rest_s = world.prefill_s(start, stop), world.prefill_s(start + memory_tokens, stop)
        verdict, seconds = world.request(start, stop, memory_tokens)
        slack_s = NEGLIGIBLE_LOAD_S + max(first_chunks_s if verdict.reason == "unmeasured" else 0.0, STOP_FLOOR_S)
        if verdict.reason == "trial":
            slack_s += max(TRIAL_SHARE * recompute_s, world.load_s(MIN_TRIAL_TOKENS + 16))
        assert seconds <= STOP_MARGIN * rest_s + world.memory_s(memory_tokens) + slack_s
