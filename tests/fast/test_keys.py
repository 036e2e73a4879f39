"""Identity: what is refused, what is canonical, what survives the way through a name."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.errors import ChunkForeign, IdentityError
from memkv_engines.keys import ChunkKey, ChunkName, Namespace, Shard, bucket_of, namespace_folder
from memkv_engines.limits import MAX_BLOCKS_PER_CHUNK
from tests.fast.samples import NAMESPACE, SHARD, chain, make_key

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
identity_fields = st.dictionaries(st.text(max_size=8).filter(lambda k: k != "format_version"), json_values, min_size=1)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int, int]:
    total = draw(st.integers(1, 0xFFFF))
    first = draw(st.integers(0, total - 1))
    return first, draw(st.integers(1, total - first)), total


@st.composite
def chunk_keys(draw: st.DrawFn) -> ChunkKey:
    count = draw(st.integers(1, MAX_BLOCKS_PER_CHUNK))
    hashes = st.binary(min_size=32, max_size=32)
    return ChunkKey(
        namespace_digest=draw(hashes),
        first_hash=draw(hashes),
        last_hash=draw(hashes),
        block_count=count,
        group=draw(st.integers(0, 0xFFFF)),
        shard=Shard(*draw(ranges()), *draw(ranges())),
        holes=draw(st.integers(0, count - 1)),
    )


# ---------------------------------------------------------------------------------------------------- namespaces


def test_a_namespace_is_the_digest_of_its_canonical_text() -> None:
    namespace = Namespace({"b": [1, None], "a": "ü"})
    assert namespace.canonical_json == b'{"a":"\\u00fc","b":[1,null],"format_version":1}'
    assert namespace.digest == hashlib.sha256(namespace.canonical_json).digest()
    assert namespace.folder == namespace.digest.hex()[:32]


@given(identity_fields)
@settings(deadline=None, max_examples=50)
def test_the_order_of_fields_does_not_matter(fields: dict) -> None:
    assert Namespace(fields).digest == Namespace(dict(reversed(fields.items()))).digest


@given(identity_fields, identity_fields)
@settings(deadline=None, max_examples=50)
def test_other_fields_are_another_namespace(one: dict, other: dict) -> None:
    # True == 1 in Python, but not in JSON; the canonical text decides.
    same = Namespace(one).canonical_json == Namespace(other).canonical_json
    assert (Namespace(one).digest == Namespace(other).digest) == same
    assert same or repr(one) != repr(other)


@pytest.mark.parametrize(
    "fields",
    [{}, {"a": float("nan")}, {"a": float("inf")}, {"a": object()}, {"a": b"bytes"}, {1: "a"}, {"format_version": 2}],
)
def test_fields_without_a_canonical_form_are_refused(fields: dict) -> None:
    with pytest.raises(IdentityError):
        Namespace(fields)


def test_a_derived_namespace_differs_and_cannot_override() -> None:
    derived = NAMESPACE.derive(adapter="x")
    assert derived.digest not in (NAMESPACE.digest, NAMESPACE.derive(adapter="y").digest)
    with pytest.raises(IdentityError, match="dtype"):
        NAMESPACE.derive(dtype="bfloat16")


def test_a_namespace_folder_needs_a_whole_digest() -> None:
    with pytest.raises(IdentityError, match="31"):
        namespace_folder(bytes(31))


# --------------------------------------------------------------------------------------------------- shards, keys


@pytest.mark.parametrize(
    "values",
    [(-1, 1, 8), (0, 0, 8), (0, 9, 8), (7, 2, 8), (0, 1, 0), (0, 1, 0x10000)],
)
def test_impossible_ranges_are_refused(values: tuple[int, int, int]) -> None:
    with pytest.raises(IdentityError, match="head range"):
        Shard(*values, 0, 1, 1)
    with pytest.raises(IdentityError, match="layer range"):
        Shard(0, 1, 1, *values)


@pytest.mark.parametrize(
    "change",
    [
        {"namespace_digest": bytes(16)},
        {"first_hash": bytes(31)},
        {"last_hash": bytes(33)},
        {"block_count": 0},
        {"block_count": MAX_BLOCKS_PER_CHUNK + 1},
        {"holes": -1},
        {"holes": 4},
        {"group": -1},
        {"group": 0x10000},
    ],
)
def test_impossible_keys_are_refused(change: dict) -> None:
    with pytest.raises(IdentityError):
        dataclasses.replace(make_key(4), **change)


def test_the_parallel_rank_is_nowhere_but_in_the_shard() -> None:
    half = Shard(0, 1, 2, 0, 30, 30)
    assert make_key(shard=half).name != make_key(shard=SHARD).name
    assert half.text == "h0.1.2-l0.30.30"
    assert half.as_tuple() == (0, 1, 2, 0, 30, 30)


# ---------------------------------------------------------------------------------------------------------- names


@given(chunk_keys())
@settings(deadline=None, max_examples=200)
def test_names_round_trip(key: ChunkKey) -> None:
    name = key.name
    assert ChunkName.parse(name.text) == name
    assert name.bucket == bucket_of(key.first_hash) == key.first_hash.hex()[:3]
    assert len(name.text) < 255, "a file name"
    assert not name.text.startswith(".") and "/" not in name.text


@given(st.text(max_size=120))
@settings(deadline=None, max_examples=200)
def test_no_text_is_taken_for_a_name(text: str) -> None:
    with pytest.raises(ChunkForeign):
        ChunkName.parse(text)


@given(chunk_keys(), st.data())
@settings(deadline=None, max_examples=200)
def test_a_changed_name_is_refused_or_canonical(key: ChunkKey, data: st.DataObject) -> None:
    text = key.name.text
    position = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.sampled_from("0123456789abcdefABgho.-k/\n٣²\x00"))
    changed = text[:position] + letter + text[position + 1 :]
    try:
        name = ChunkName.parse(changed)
    except ChunkForeign:
        return
    assert name.text == changed


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("-b4-", "-b04-"),
        ("-b4-", "-b0-"),
        ("-b4-", "-b4097-"),
        ("-o0-", "-o4-"),
        ("-g0-", "-g65536-"),
        ("-g0-", "-g٣-"),
        ("-h0.3.3-", "-h00.3.3-"),
        ("-h0.3.3-", "-h0.4.3-"),
        ("l0.30.30", "l0.30.70000"),
        (".kv", ".kv\n"),
        (".kv", ".kv.tmp"),
    ],
)
def test_names_have_one_spelling_and_possible_values(part: str, other: str) -> None:
    text = make_key(4).name.text
    assert part in text
    with pytest.raises(ChunkForeign):
        ChunkName.parse(text.replace(part, other))


def test_variants_of_one_beginning_are_neighbours() -> None:
    hashes = chain(8)
    names = [ChunkKey(NAMESPACE.digest, hashes[0], hashes[n - 1], n, 0, SHARD).name for n in (2, 5, 8)]
    assert len({name.bucket for name in names}) == 1
    assert len({name.text[:32] for name in names}) == 1
