"""The demo's verdict: it must not call a restore right that was not one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.demo_phases import FirstVisit, Recompute, Restart, Restored, Settings, candidate_settings
from benchmarks.demo_report import MEANING, Row
from benchmarks.demo_workload import Workload, largest_prime_below
from benchmarks.engine_run import Answer
from benchmarks.texts import documents
from benchmarks.tier_files import ChunkFile, TierContents, contents_of
from memkv_engines.keys import ChunkName

BLOCK_SIZE = 32
PROMPT_TOKENS = 330
SHARD = "h0.3.3-l0.30.30"


def answer(ttft_s: float, *tokens: int) -> Answer:
    return Answer(tokens or (1, 2, 3), "text", PROMPT_TOKENS, 0, ttft_s, ttft_s)


def chunk(number: int, blocks: int) -> ChunkFile:
    name = ChunkName(bytes([number]) * 16, bytes([number + 100]) * 16, blocks, 0, 0, SHARD)
    return ChunkFile(Path(name.text), name, blocks * 1000)


def row(dtype: str = "float32") -> Row:
    """A run in which all went well: chunks of 3 blocks, hits of 10 and of 7."""
    prompt = tuple(range(PROMPT_TOKENS))
    return Row(
        dtype,
        Settings("0-1", 8192),
        Workload(("a document",), (prompt,), prompt, 7, (prompt,)),
        BLOCK_SIZE,
        Recompute([answer(8.0)], [[answer(0.2), answer(0.4)]], answer(8.0, 7), answer(4.0, 7), 10.0),
        FirstVisit([answer(8.2)], [TierContents((chunk(1, 3), chunk(2, 3), chunk(3, 3), chunk(4, 1)))], 10.0),
        Restart([[Restored(answer(0.4), 320, 0.1, 0.11)]], Restored(answer(3.0, 7), 224, 0.1, 0.11), 4, 10.0),
    )


def test_a_good_run_passes_and_its_numbers_are_explained() -> None:
    good = row()
    assert good.failures() == []
    numbers = good.numbers()
    assert numbers.keys() >= MEANING.keys()
    assert numbers["speedup"] == pytest.approx(20.0)
    assert numbers["restore_over_limit"] == pytest.approx(0.4 / (0.1 + 0.3))
    assert numbers["load_over_raw_read"] == pytest.approx([1.1, 1.1, 1.1])
    assert (numbers["chunks"], numbers["tail_chunks"], numbers["blocks_per_chunk"]) == (4, 1, 3)
    assert (numbers["chunk_bytes"], numbers["stored_bytes"]) == (3000, 10000)
    assert numbers["partial_chunk_hits"] == 1


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"first_visit": FirstVisit([answer(8.2, 9)], row().first_visit.files, 0.0)}, "first visit"),
        ({"restart": replace(row().restart, restored=[[Restored(answer(0.4, 9), 320, 0.1, 0.11)]])}, "restored"),
        ({"restart": replace(row().restart, diverging=Restored(answer(3.0, 9), 224, 0.1, 0.11))}, "diverging"),
        ({"restart": replace(row().restart, restored=[[Restored(answer(0.4), 224, 0.1, 0.11)]])}, "only 224 of 320"),
        ({"restart": replace(row().restart, diverging=Restored(answer(3.0, 7), 192, 0.1, 0.11))}, "no part of a chunk"),
        ({"restart": replace(row().restart, diverging=Restored(answer(3.0, 7), 0, 0.1, 0.11))}, "no part of a chunk"),
    ],
)
def test_a_bad_run_fails_and_says_why(changed: dict[str, object], complaint: str) -> None:
    bad = replace(row(), **changed)  # type: ignore[arg-type]
    assert any(complaint in failure for failure in bad.failures())
    assert bad.tokens_equal == ("tokens differ" not in " ".join(bad.failures()))


def test_a_local_hit_counts_in_fp32_and_may_differ_from_a_computed_answer_in_bf16() -> None:
    local = replace(row().recompute, local=[[answer(0.2, 9)]], diverging_local=answer(4.0, 8))
    again = Restart([[Restored(answer(0.4, 9), 320, 0.1, 0.11)]], Restored(answer(3.0, 8), 224, 0.1, 0.11), 4, 0.0)
    assert replace(row("bfloat16"), recompute=local, restart=again).tokens_equal
    assert not replace(row("float32"), recompute=local, restart=again).tokens_equal


def test_every_core_is_among_the_settings_and_so_is_a_batch_for_the_whole_prompt() -> None:
    found = candidate_settings(6200)
    assert found[0].threads == "auto"
    assert found[-1].batch_tokens == 8192
    assert len(set(found)) == len(found)


def test_texts_are_long_different_and_always_the_same() -> None:
    found = documents(5, 20_000)
    assert found == documents(5, 20_000)
    assert all(len(document.body) >= 20_000 for document in found)
    assert len({document.body[:100] for document in found}) == len({document.title for document in found}) == 5
    with pytest.raises(LookupError):
        documents(1, 1 << 30)


@pytest.mark.parametrize(("limit", "prime"), [(128, 127), (10, 7), (3, 2), (8, 7)])
def test_the_largest_prime_below(limit: int, prime: int) -> None:
    assert largest_prime_below(limit) == prime


def test_only_chunks_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "namespace" / "abc"
    folder.mkdir(parents=True)
    (folder / chunk(1, 3).name.text).write_bytes(b"x" * 10)
    (folder / ".tmp-1").write_bytes(b"x")
    (folder / "foreign.kv").write_bytes(b"x")
    found = contents_of(tmp_path)
    assert (len(found.chunks), found.blocks, found.stored_bytes) == (1, 3, 10)
    assert found.without(found).chunks == ()
