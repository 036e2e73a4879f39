"""What a job answers, whatever order its chunks end in."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from memkv_engines.errors import IoServiceError
from memkv_engines.offload.loading import LoadOutcome
from memkv_engines.offload.messages import LoadRun
from memkv_engines.offload.outcomes import LoadTally, StoreTally

BLOCKS = 2


def run_of(chunks: int) -> LoadRun:
    """A run of full chunks; of none: one that contradicts itself."""
    count = max(chunks, 1) * BLOCKS
    ids = np.arange(count if chunks else count + 1, dtype="<i4").tobytes()
    return LoadRun(b"n" * 32, 0, BLOCKS, max(chunks, 1), 0, b"", 0, bytes(32 * count), ids)


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[list[LoadOutcome]], list[tuple[int, int]]]:
    """Outcomes of every chunk of some runs, and the order they come in."""
    outcome = st.sampled_from([LoadOutcome(BLOCKS, "", 9), LoadOutcome(1, "damaged", 5), LoadOutcome(0, "absent", 0)])
    runs = draw(st.lists(st.lists(outcome, max_size=5), max_size=4))
    places = [(run, index) for run, outcomes in enumerate(runs) for index in range(len(outcomes))]
    return runs, draw(st.permutations(places))


@given(loads())
def test_a_load_answers_with_its_leading_good_blocks(
    case: tuple[list[list[LoadOutcome]], list[tuple[int, int]]],
) -> None:
    runs, order = case
    tally = LoadTally([run_of(len(outcomes)) for outcomes in runs])
    assert sorted(order) == tally.places()
    assert [len(chunks) for chunks in tally.chunks] == [len(outcomes) for outcomes in runs]
    settled: set[tuple[int, int]] = set()
    for number, (run, index) in enumerate(order, start=1):
        earlier_bad = any(runs[r][i].kind for r, i in settled if r == run and i < index)
        assert tally.is_pointless(run, index) == earlier_bad
        assert tally.open_chunks == len(order) - number + 1
        assert tally.settle(run, index, runs[run][index]) == (number == len(order))
        settled.add((run, index))
    expected = []
    for outcomes in runs:
        bad = next((i for i, outcome in enumerate(outcomes) if outcome.kind), len(outcomes))
        good = sum(outcome.good_blocks for outcome in outcomes[: bad + 1])
        kind = outcomes[bad].kind if bad < len(outcomes) else "" if outcomes else IoServiceError.kind
        expected.append((good, kind))
    assert list(zip(*tally.answer(), strict=True)) == expected
    assert sorted(o.read_bytes for o in tally.settled()) == sorted(o.read_bytes for run in runs for o in run)


@given(
    st.lists(st.tuples(st.sampled_from(["stored", "shed", "failed"]), st.integers(0, 99)), min_size=1).flatmap(
        lambda chunks: st.tuples(st.just(chunks), st.permutations(range(len(chunks))))
    )
)
def test_a_store_answers_once_with_the_last_chunk(case: tuple[list[tuple[str, int]], list[int]]) -> None:
    chunks, order = case
    tally = StoreTally(7, len(chunks))
    answers = [tally.settle(index, chunks[index][0], chunks[index][1], 2 * chunks[index][1]) for index in order]
    assert answers[:-1] == [None] * (len(order) - 1)
    last = answers[-1]
    assert last is not None
    assert (last.job_id, last.outcomes) == (7, tuple(outcome for outcome, _ in chunks))
    total = sum(size for _, size in chunks)
    assert (last.written_bytes, last.payload_bytes) == (total, 2 * total)
