"""What is learnt of loads, prefills and steps."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.limits import ESTIMATE_CLIP, ESTIMATE_HALF_LIFE_S, MIN_PREFILL_SAMPLE_TOKENS, MIN_PREFILL_SPAN_TOKENS
from memkv_engines.offload.estimates import DecayedFit, LoadCost, PrefillCost, StepClock
from tests.fast.clocks import Clock

MB = 1_000_000


def load_cost(clock: Clock, latency_s: float, bytes_per_s: float, sizes: list[int]) -> LoadCost:
    cost = LoadCost(clock)
    for size in sizes:
        cost.observe(size, latency_s + size / bytes_per_s)
        clock.now += 0.1
    return cost


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 0.3), st.floats(5 * MB, 5_000 * MB), st.lists(st.integers(4, 400), min_size=4, max_size=30))
def test_a_line_is_found_again(latency_s: float, bytes_per_s: float, sizes_mb: list[int]) -> None:
    sizes = [size * MB for size in sizes_mb]
    cost = load_cost(Clock(), latency_s, bytes_per_s, sizes)
    for size in sizes[-2:]:
        actual = latency_s + size / bytes_per_s
        assert cost.seconds(size) == pytest.approx(actual, rel=0.5)


def test_latency_is_told_from_bandwidth_once_sizes_differ() -> None:
    cost = load_cost(Clock(), 0.1, 1000 * MB, [4 * MB, 100 * MB] * 4)
    assert cost.seconds(1000 * MB) == pytest.approx(1.1, rel=0.15)
    assert cost.bytes_in(1.1) == pytest.approx(1000 * MB, rel=0.2)
    same = load_cost(Clock(), 0.1, 1000 * MB, [4 * MB] * 8)
    assert same.seconds(8 * MB) == pytest.approx(2 * 0.104)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1e9), st.floats(1, 1e9), st.floats(1e-6, 1e3), st.floats(0, 1e4)), max_size=20),
    st.floats(0, 1e9),
    st.floats(1, 1e9),
)
def test_costs_are_never_negative(samples: list[tuple[float, float, float, float]], u: float, v: float) -> None:
    clock = Clock()
    fit = DecayedFit(clock)
    for more_u, more_v, y, pause_s in samples:
        clock.now += pause_s
        fit.observe(more_u, more_v, y)
        assert fit.first >= 0 and fit.second >= 0
    assert fit.at(u, v) >= 0


def test_one_hiccup_moves_the_line_and_does_not_make_it() -> None:
    cost = load_cost(Clock(), 0.0, 1000 * MB, [100 * MB] * 10)
    cost.observe(100 * MB, 400 * 0.1)
    assert 0.1 < cost.seconds(100 * MB) < ESTIMATE_CLIP * 0.1


def test_after_a_pause_the_next_sample_tells_most() -> None:
    clock = Clock()
    cost = load_cost(clock, 0.0, 50 * MB, [100 * MB] * 10)
    clock.now += 6 * ESTIMATE_HALF_LIFE_S
    cost.observe(100 * MB, 0.1)
    assert cost.seconds(100 * MB) < 0.4


def test_prefill_grows_with_position() -> None:
    cost = PrefillCost(Clock())
    for start in (0, 2048, 4096, 6144, 0, 2048, 4096):
        span = (start, start + 2048)
        cost.observe([span], 1e-4 * 2048 + 1e-8 * (span[1] ** 2 - span[0] ** 2) / 2)
    assert cost.seconds(30_000, 40_000) == pytest.approx(1.0 + 1e-8 * (16e8 - 9e8) / 2, rel=0.2)
    assert cost.seconds(0, 1000) < cost.seconds(9000, 10_000)


def test_the_first_step_and_small_ones_teach_nothing() -> None:
    cost = PrefillCost(Clock())
    cost.observe([(0, 2048)], 60.0)
    assert not cost.known
    cost.observe([(0, MIN_PREFILL_SAMPLE_TOKENS - 1)], 1.0)
    cost.observe([(5000 + i, 5001 + i) for i in range(10 * MIN_PREFILL_SAMPLE_TOKENS)], 1.0)
    cost.observe([(0, MIN_PREFILL_SPAN_TOKENS - 1)] * 100, 1.0)
    assert not cost.known
    cost.observe([(0, 2048), (7, 8)], 1.0)
    assert cost.known


def test_steps_that_overlap_are_timed_from_the_result_before() -> None:
    clock = Clock()
    steps = StepClock(clock)
    first = steps.now()
    clock.now += 1.0
    second = steps.now()  # scheduled ahead of the first one's result
    clock.now += 1.0
    assert steps.ended(first) == 2.0
    clock.now += 3.0
    assert steps.ended(second) == 3.0
    clock.now += 50.0  # idle
    third = steps.now()
    clock.now += 1.0
    assert steps.ended(third) == 1.0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_a_noisy_tier_is_known_within_its_noise(seed: int) -> None:
    choice, clock = random.Random(seed), Clock()
    cost = LoadCost(clock)
    for _ in range(50):
        size = choice.randrange(4, 200) * MB
        cost.observe(size, size / (1000 * MB) * choice.uniform(0.8, 1.25))
        clock.now += 0.5
    assert 0.07 < cost.seconds(100 * MB) < 0.14
