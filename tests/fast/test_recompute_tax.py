"""The recompute tax's arithmetic, and the traces it is paid on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import traces
from benchmarks.recompute_tax import Prefill, Served, fit, tax
from benchmarks.traces import Request, TraceError

BLOCK = 16


def served(prompt: int, seen: int = 0, local: int = 0, external: int = 0, ttft_s: float = 1.0) -> Served:
    return Served(prompt, seen, local, external, ttft_s)


# --------------------------------------------------------------------------------------------------------------- tax


def test_only_tokens_seen_before_and_computed_again_are_tax() -> None:
    flat = Prefill(1.0, 0.0)
    body = tax(
        [served(100), served(100, seen=80), served(100, seen=80, local=30), served(100, seen=80, local=90)], flat
    )
    assert body["computed_tokens"] == 100 + 100 + 70 + 10
    assert body["computed_again_tokens"] == 80 + 50
    assert body["tax_tokens_share"] == pytest.approx(130 / 280)
    assert body["tax_seconds_share"] == pytest.approx(130 / 280)


def test_hits_from_either_place_save_tax() -> None:
    body = tax([served(100, seen=80, local=30, external=50)], Prefill(1.0, 0.0))
    assert (body["computed_tokens"], body["computed_again_tokens"], body["tax_tokens_share"]) == (20, 0, 0.0)


def test_late_tokens_cost_more_seconds_than_early_ones() -> None:
    body = tax([served(100, seen=50)], Prefill(0.0, 1.0))
    assert body["tax_tokens_share"] == 0.5
    assert body["tax_seconds_share"] == pytest.approx(0.25)


def test_the_rate_is_fitted_to_what_loaded_nothing() -> None:
    cost = Prefill(2e-4, 3e-8)
    requests = [served(n, local=n // 4, ttft_s=cost.seconds(n // 4, n)) for n in (500, 1000, 3000, 8000)]
    requests.append(served(8000, external=7900, ttft_s=99.0))
    found = fit(requests)
    assert (found.per_token, found.per_pair) == (pytest.approx(2e-4), pytest.approx(3e-8))
    with pytest.raises(ValueError, match="no prefill rate"):
        fit([served(100, external=50)])


@given(st.lists(st.tuples(st.integers(1, 9000), st.floats(0.001, 100)), min_size=1, max_size=8))
def test_a_rate_is_never_negative(pairs: list[tuple[int, float]]) -> None:
    found = fit([served(tokens, ttft_s=seconds) for tokens, seconds in pairs])
    assert found.per_token >= 0 and found.per_pair >= 0


# ------------------------------------------------------------------------------------------------------------- traces


def test_a_written_trace_is_read_again(tmp_path: Path) -> None:
    made = traces.conversations(
        count=3, turns=3, document_tokens=64, turn_tokens=32, output_tokens=4, block_tokens=BLOCK
    )
    traces.write_trace(made, tmp_path / "trace.jsonl")
    assert traces.read_trace(tmp_path / "trace.jsonl", BLOCK) == made
    assert len(traces.read_trace(tmp_path / "trace.jsonl", BLOCK, limit=2)) == 2
    assert sorted(request.input_tokens for request in made) == [64] * 3 + [96] * 3 + [128] * 3
    assert [request.timestamp_ms for request in made] == sorted(request.timestamp_ms for request in made)


def test_turns_of_a_conversation_extend_each_other_and_share_only_the_system_prompt() -> None:
    made = traces.conversations(
        count=2, turns=3, document_tokens=64, turn_tokens=32, output_tokens=4, block_tokens=BLOCK, system_blocks=2
    )
    by_length = {n: [r.blocks for r in made if r.input_tokens == n] for n in (64, 96, 128)}
    assert all(blocks[:2] == (0, 1) for group in by_length.values() for blocks in group)
    assert all(any(late[: len(early)] == early for late in by_length[128]) for early in by_length[96])
    first, second = by_length[64]
    assert not set(first[2:]) & set(second[2:])
    seen = traces.seen_tokens(made, BLOCK)
    assert seen[0] == 0
    assert sorted(seen) == [0, 32, 64, 64, 96, 96]


def test_seen_tokens_are_whole_blocks_and_leave_one_to_compute() -> None:
    requests = [
        Request(0, 40, 1, (1, 2, 3)),
        Request(1, 32, 1, (1, 2)),
        Request(2, 48, 1, (1, 2, 4)),
        Request(3, 40, 1, (2, 1, 3)),
    ]
    assert traces.seen_tokens(requests, BLOCK) == [0, 31, 32, 0]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8))
def test_seen_tokens_are_the_longest_shared_prefix(ids: list[list[int]]) -> None:
    requests = [Request(n, len(blocks) * BLOCK, 1, tuple(blocks)) for n, blocks in enumerate(ids)]
    prompts = [traces.prompt_of(request, BLOCK, 40_000) for request in requests]
    for number, found in enumerate(traces.seen_tokens(requests, BLOCK)):
        longest = 0
        for other in prompts[:number]:
            same = 0
            while same < min(len(other), len(prompts[number])) and other[same] == prompts[number][same]:
                same += 1
            longest = max(longest, same)
        assert found == min(longest // BLOCK * BLOCK, len(prompts[number]) - 1)


def test_a_prompt_has_the_length_that_the_trace_says() -> None:
    prompt = traces.prompt_of(Request(0, 40, 1, (7, 8, 9)), BLOCK, 100)
    assert len(prompt) == 40
    assert prompt[:32] == traces.prompt_of(Request(0, 32, 1, (7, 8)), BLOCK, 100)
    assert max(prompt) < 100


GOOD = {"timestamp": 0, "input_length": 40, "output_length": 4, "hash_ids": [1, 2, 3]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hash_ids": [1, 2]}, "--trace-block-tokens"),
        ({"hash_ids": "1,2,3"}, "hash_ids"),
        ({"hash_ids": [1, 2, True]}, "hash_ids"),
        ({"input_length": 0}, "input_length"),
        ({"input_length": "40"}, "input_length"),
        ({"output_length": None}, "output_length"),
        ({"timestamp": -1}, "timestamp"),
    ],
)
def test_a_bad_line_is_refused_by_name(tmp_path: Path, change: dict[str, object], says: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, **change}) + "\n")
    with pytest.raises(TraceError, match=f"line 2.*{says}"):
        traces.read_trace(path, BLOCK)


@pytest.mark.parametrize("text", ["", "\n\n", "[1]\n", "{\n"])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(TraceError):
        traces.read_trace(path, BLOCK)
