"""The chunk format against its specification, and against everything a disk or another writer can do to it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import struct
from collections.abc import Callable

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.chunk import codec
from memkv_engines.chunk.checksum import block_digest
from memkv_engines.chunk.codec import Geometry, build_header, check_header, decode_header, verify_blocks
from memkv_engines.errors import (
    ChunkDamaged,
    ChunkError,
    ChunkForeign,
    ChunkTruncated,
    ChunkVersion,
    IdentityError,
)
from memkv_engines.keys import ChunkName, Shard
from memkv_engines.limits import ALIGN_BYTES, DIGEST_BYTES, MAX_BLOCK_BYTES, MAX_BLOCKS_PER_CHUNK, MIB
from tests.fast.samples import NAMESPACE, chain, chain_hash, make_chunk, make_key, noise

MLA_BLOCK_BYTES = 1_124_352
STATE_BLOCK_BYTES = 39_531_264
FIELDS = {  # name: (offset, format), as in FORMAT.md
    "magic": (0, "8s"),
    "version": (8, "H"),
    "hash_bytes": (10, "H"),
    "header_bytes": (12, "I"),
    "hash_id": (16, "H"),
    "mac_id": (18, "H"),
    "cipher_id": (20, "H"),
    "payload_order": (22, "H"),
    "namespace_digest": (24, "32s"),
    "group": (56, "I"),
    "head_first": (60, "H"),
    "head_count": (62, "H"),
    "heads_total": (64, "H"),
    "layer_first": (66, "H"),
    "layer_count": (68, "H"),
    "layers_total": (70, "H"),
    "first_hash": (72, "32s"),
    "last_hash": (104, "32s"),
    "flags": (136, "Q"),
    "block_count": (144, "I"),
    "block_tokens": (148, "I"),
    "block_bytes": (152, "Q"),
    "block_stride_bytes": (160, "Q"),
    "payload_bytes": (168, "Q"),
    "first_position": (176, "Q"),
}


def set_field(header: bytearray, name: str, value: object) -> None:
    offset, kind = FIELDS[name]
    struct.pack_into("<" + kind, header, offset, value)


def sign(header: bytearray) -> bytearray:
    """Give a changed header the digest that fits, as a newer writer or an attacker would."""
    header[496:512] = xxhash.xxh3_128(bytes(header[:496] + header[512:])).digest()
    return header


def spec_digest(block: bytes, chain: bytes, index: int) -> bytes:
    """The block digest, written down a second time from FORMAT.md."""
    leaves = b"".join(
        xxhash.xxh3_64_intdigest(block[at : at + 16384]).to_bytes(8, "big") for at in range(0, len(block), 16384)
    )
    text = chain + index.to_bytes(4, "little") + len(block).to_bytes(8, "little") + leaves
    return xxhash.xxh3_128_intdigest(text).to_bytes(16, "big")


# ------------------------------------------------------------------------------------------------- the written spec


def test_the_bytes_are_those_of_the_specification() -> None:
    header, payload = make_chunk(5, 5000, holes=2)
    key = header.key
    values = {
        "magic": b"MEMKVCH1", "version": 1, "hash_bytes": 32, "header_bytes": 4096, "hash_id": 1, "mac_id": 0,
        "cipher_id": 0, "payload_order": 1, "namespace_digest": NAMESPACE.digest, "group": 0, "head_first": 0,
        "head_count": 3, "heads_total": 3, "layer_first": 0, "layer_count": 30, "layers_total": 30,
        "first_hash": key.first_hash, "last_hash": key.last_hash, "flags": 0, "block_count": 5, "block_tokens": 16,
        "block_bytes": 5000, "block_stride_bytes": 8192, "payload_bytes": 5 * 8192, "first_position": 7,
    }  # fmt: skip
    expected = bytearray(4096)
    for name, value in values.items():
        set_field(expected, name, value)
    for i in range(5):
        row = 512 + 96 * i
        expected[row : row + 32] = chain_hash(i)
        if i >= 2:
            block = bytes(payload[i * 8192 : i * 8192 + 5000])
            expected[row + 32 : row + 48] = spec_digest(block, chain_hash(i), i)
            expected[row + 48] = 1
    assert header.encode() == bytes(sign(expected))


def test_the_format_has_not_moved() -> None:
    header, _ = make_chunk(3, 20_000, holes=1)
    assert hashlib.sha256(header.encode()).hexdigest() == (
        "5dae092e73dc63c80c39801526e498387c114692065df9b491beb9d87b1c6896"
    )


@pytest.mark.parametrize(
    ("count", "block_bytes", "header_bytes", "object_bytes"),
    [
        (3, 1_474_560, 4096, 4_427_776),
        (4, MLA_BLOCK_BYTES, 4096, 4_509_696),
        (1, STATE_BLOCK_BYTES, 4096, 39_538_688),
        (256, 1, 28_672, 28_672 + 256 * 4096),
        (4096, 1, 397_312, 397_312 + 4096 * 4096),
    ],
)
def test_sizes_are_functions_of_the_geometry(
    count: int, block_bytes: int, header_bytes: int, object_bytes: int
) -> None:
    geometry = Geometry(count, block_bytes, 16)
    assert (geometry.header_bytes, geometry.object_bytes) == (header_bytes, object_bytes)
    assert geometry.block_offset(count - 1) + geometry.block_stride_bytes == object_bytes
    assert all(geometry.block_offset(i) % ALIGN_BYTES == 0 for i in range(count))


@pytest.mark.parametrize(
    ("count", "block_bytes"),
    [(0, 1), (MAX_BLOCKS_PER_CHUNK + 1, 1), (1, 0), (1, MAX_BLOCK_BYTES + 1), (3, MAX_BLOCK_BYTES), (-1, 1)],
)
def test_impossible_geometries_are_foreign(count: int, block_bytes: int) -> None:
    with pytest.raises(ChunkForeign):
        Geometry(count, block_bytes, 16)


@given(st.binary(max_size=40_000), st.binary(min_size=32, max_size=32), st.integers(0, 4095))
@settings(deadline=None, max_examples=50)
def test_the_digest_tree(block: bytes, chain: bytes, index: int) -> None:
    assert block_digest(memoryview(block), chain, index) == spec_digest(block, chain, index)


# ------------------------------------------------------------------------------------------------------- round trips


@given(st.integers(1, 12), st.integers(1, 9000), st.data())
@settings(deadline=None, max_examples=40)
def test_round_trip(count: int, block_bytes: int, data: st.DataObject) -> None:
    holes = data.draw(st.integers(0, count - 1))
    header, payload = make_chunk(count, block_bytes, holes=holes)
    encoded = header.encode()
    assert len(encoded) == header.geometry.header_bytes
    decoded = decode_header(encoded + b"what follows is not looked at")
    assert decoded == header
    check_header(decoded, NAMESPACE.digest, header.key.name, header.geometry, chain(count))
    assert (
        verify_blocks(decoded, holes, count, memoryview(payload)[holes * header.geometry.block_stride_bytes :]) is None
    )


@pytest.mark.parametrize(("count", "block_bytes"), [(4, MLA_BLOCK_BYTES), (1, STATE_BLOCK_BYTES), (256, 16_640)])
def test_real_sizes_round_trip_and_damage_is_found(count: int, block_bytes: int) -> None:
    header, payload = make_chunk(count, block_bytes)
    stride = header.geometry.block_stride_bytes
    decoded = decode_header(memoryview(header.encode()))
    view = memoryview(payload)
    assert verify_blocks(decoded, 0, count, view) is None
    for index in sorted({0, count // 2, count - 1}):
        for position in (0, block_bytes // 2, block_bytes - 1):
            view[index * stride + position] ^= 0x10
            assert verify_blocks(decoded, 0, count, view) == index
            view[index * stride + position] ^= 0x10


def test_padding_is_not_covered() -> None:
    header, payload = make_chunk(2, 5000)
    payload[5000] ^= 0xFF
    payload[-1] ^= 0xFF
    assert verify_blocks(header, 0, 2, memoryview(payload)) is None


# --------------------------------------------------------------------------------------------------- runs of blocks


def test_every_run_of_blocks_verifies_alone_and_finds_its_damage() -> None:
    count = 10
    header, payload = make_chunk(count, 300)
    stride = header.geometry.block_stride_bytes
    for first, stop in itertools.combinations(range(count + 1), 2):
        run = bytearray(payload[first * stride : stop * stride])
        assert verify_blocks(header, first, stop, memoryview(run)) is None
        for bad in range(first, stop):
            position = (bad - first) * stride + (bad * 31) % 300
            run[position] ^= 1
            assert verify_blocks(header, first, stop, memoryview(run)) == bad
            run[position] ^= 1


def test_every_block_of_a_large_chunk_is_told_apart() -> None:
    count = 256
    header, payload = make_chunk(count, 64)
    stride = header.geometry.block_stride_bytes
    view = memoryview(payload)
    for bad in range(count):
        view[bad * stride + bad % 64] ^= 1
        assert verify_blocks(header, bad, bad + 1, view[bad * stride : (bad + 1) * stride]) == bad
        assert verify_blocks(header, max(0, bad - 2), count, view[max(0, bad - 2) * stride :]) == bad
        view[bad * stride + bad % 64] ^= 1


def test_swapped_misplaced_and_short_blocks_fail() -> None:
    header, payload = make_chunk(4, 4096)
    one, two = bytes(payload[4096:8192]), bytes(payload[8192:12288])
    assert verify_blocks(header, 1, 3, memoryview(two + one)) == 1
    assert verify_blocks(header, 1, 2, memoryview(two)) == 1
    assert verify_blocks(header, 2, 3, memoryview(one)) == 2
    assert verify_blocks(header, 0, 4, memoryview(payload)[: 4096 * 3 + 17]) == 3
    assert verify_blocks(header, 0, 4, memoryview(payload)[: 4096 * 2]) == 2


def test_the_same_bytes_elsewhere_have_another_digest() -> None:
    block = memoryview(noise(20_000))
    digests = {
        block_digest(block, chain_hash(0), 0),
        block_digest(block, chain_hash(0), 1),
        block_digest(block, chain_hash(1), 0),
        block_digest(block[:-1], chain_hash(0), 0),
    }
    assert len(digests) == 4


def test_zeros_of_another_length_have_another_digest() -> None:
    assert len({block_digest(memoryview(bytes(n)), chain_hash(0), 0) for n in range(0, 70_000, 1009)}) == 70


def test_an_absent_block_is_never_verified() -> None:
    header, payload = make_chunk(5, 100, holes=3)
    view = memoryview(payload)
    stride = header.geometry.block_stride_bytes
    assert [b.present for b in header.blocks] == [False, False, False, True, True]
    assert verify_blocks(header, 3, 5, view[3 * stride :]) is None
    for first in range(3):
        assert verify_blocks(header, first, 5, view[first * stride :]) == first


# ---------------------------------------------------------------------------------------------------- bad headers


def test_every_flipped_byte_of_a_header_is_refused() -> None:
    header, _ = make_chunk(3, 100)
    good = header.encode()
    for position in range(len(good)):
        for mask in (0x01, 0x80, 0xFF):
            bad = bytearray(good)
            bad[position] ^= mask
            with pytest.raises(ChunkError):
                decode_header(bad)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 183, 184, 495, 496, 511, 512, 513, 607, 608, 4095, 4096, 28_671])
def test_a_cut_header_is_truncated(length: int) -> None:
    header, _ = make_chunk(256, 100)
    with pytest.raises(ChunkTruncated):
        decode_header(header.encode()[:length])


@pytest.mark.parametrize("start", [512, 4096, 8192])
def test_a_header_with_a_lost_sector_is_damaged(start: int) -> None:
    encoded = bytearray(make_chunk(256, 100)[0].encode())
    encoded[start : start + 512] = bytes(512)
    with pytest.raises(ChunkDamaged):
        decode_header(encoded)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("magic", b"MEMKVCH2", ChunkForeign),
        ("magic", bytes(8), ChunkForeign),
        ("version", 0, ChunkVersion),
        ("version", 2, ChunkVersion),
        ("hash_bytes", 16, ChunkVersion),
        ("hash_id", 0, ChunkVersion),
        ("hash_id", 2, ChunkVersion),
        ("mac_id", 1, ChunkVersion),
        ("cipher_id", 1, ChunkVersion),
        ("payload_order", 0, ChunkVersion),
        ("payload_order", 2, ChunkVersion),
        ("flags", 1, ChunkVersion),
        ("flags", 1 << 63, ChunkVersion),
        ("header_bytes", 0, ChunkForeign),
        ("header_bytes", 4095, ChunkForeign),
        ("header_bytes", 0xFFFF_FFFF, ChunkForeign),
        ("header_bytes", 8192, ChunkTruncated),
        ("group", 0x10000, ChunkForeign),
        ("head_count", 0, ChunkForeign),
        ("head_first", 1, ChunkForeign),
        ("layers_total", 29, ChunkForeign),
        ("first_hash", bytes(32), ChunkForeign),
        ("last_hash", bytes(32), ChunkForeign),
        ("block_count", 0, ChunkForeign),
        ("block_count", 2, ChunkForeign),
        ("block_count", 4, ChunkForeign),
        ("block_count", 0xFFFF_FFFF, ChunkForeign),
        ("block_bytes", 0, ChunkForeign),
        ("block_bytes", 4097, ChunkForeign),
        ("block_bytes", 2**64 - 1, ChunkForeign),
        ("block_stride_bytes", 100, ChunkForeign),
        ("payload_bytes", 0, ChunkForeign),
        ("payload_bytes", 2**64 - 1, ChunkForeign),
    ],
)
def test_a_signed_header_with_a_wrong_field_is_refused(name: str, value: object, kind: type[ChunkError]) -> None:
    encoded = bytearray(make_chunk(3, 100)[0].encode())
    set_field(encoded, name, value)
    with pytest.raises(kind):
        decode_header(sign(encoded))


@pytest.mark.parametrize(
    ("position", "kind"),
    [
        (184, ChunkVersion),  # reserved, fixed part
        (495, ChunkVersion),
        (512 + 48, ChunkForeign),  # row 0: no longer present, yet with a digest
        (512 + 49, ChunkVersion),  # row 0: unknown flags
        (512 + 52, ChunkVersion),  # reserved
        (512 + 64, ChunkVersion),  # tag
        (512 + 91, ChunkVersion),  # nonce
        (512 + 95, ChunkVersion),  # reserved
        (512 + 3 * 96, ChunkVersion),  # after the table
        (4095, ChunkVersion),
        (512, ChunkForeign),  # chain hash of the first block
        (512 + 2 * 96, ChunkForeign),  # and of the last
    ],
)
def test_a_signed_header_that_uses_reserved_room_is_refused(position: int, kind: type[ChunkError]) -> None:
    encoded = bytearray(make_chunk(3, 100)[0].encode())
    encoded[position] ^= 1
    with pytest.raises(kind):
        decode_header(sign(encoded))


def test_a_header_without_any_present_block_is_foreign() -> None:
    encoded = bytearray(make_chunk(2, 100)[0].encode())
    for row in (512, 608):
        encoded[row + 32 : row + 52] = bytes(20)
    with pytest.raises(ChunkForeign):
        decode_header(sign(encoded))


@given(st.binary(max_size=600))
@settings(deadline=None, max_examples=100)
def test_random_bytes_are_no_chunk(data: bytes) -> None:
    with pytest.raises(ChunkError):
        decode_header(data)
    with pytest.raises(ChunkError):
        decode_header(b"MEMKVCH1\x01\x00" + data + bytes(4096))


@given(st.integers(1, 50), st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=300)
def test_signed_mutations_are_refused_or_mean_what_they_say(count: int, changes: list[tuple[int, int]]) -> None:
    encoded = bytearray(make_chunk(count, 64)[0].encode())
    for position, mask in changes:
        # Mostly where the fields are, sometimes anywhere.
        where = position % 184 if position % 2 else position % len(encoded)
        encoded[where] ^= mask
    sign(encoded)
    try:
        decoded = decode_header(encoded)
    except ChunkError:
        return
    assert decoded.encode() == bytes(encoded), "whatever is accepted has one spelling"


@given(st.sampled_from(sorted(FIELDS)), st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=300)
def test_signed_fields_with_any_value(name: str, value: int) -> None:
    encoded = bytearray(make_chunk(2, 64)[0].encode())
    offset, kind = FIELDS[name]
    size = struct.calcsize("<" + kind)
    encoded[offset : offset + size] = value.to_bytes(8, "little")[:size].ljust(size, b"\0")
    sign(encoded)
    try:
        decoded = decode_header(encoded)
    except ChunkError:
        return
    assert decoded.encode() == bytes(encoded)


# --------------------------------------------------------------------------------------------- is it the one asked for


def renamed(**change: object) -> Callable[[ChunkName], ChunkName]:
    return lambda name: dataclasses.replace(name, **change)


@pytest.mark.parametrize(
    "rename",
    [
        renamed(first=bytes(16)),
        renamed(last=bytes(16)),
        renamed(block_count=5),
        renamed(holes=1),
        renamed(group=1),
        renamed(shard_text=Shard(0, 1, 3, 0, 30, 30).text),
    ],
)
def test_a_chunk_under_another_name_is_foreign(rename: Callable[[ChunkName], ChunkName]) -> None:
    header, _ = make_chunk(4, 100)
    with pytest.raises(ChunkForeign):
        check_header(header, NAMESPACE.digest, rename(header.key.name), header.geometry, chain(4))


def test_a_chunk_of_another_namespace_prefix_or_geometry_is_foreign() -> None:
    header, _ = make_chunk(4, 100)
    name, geometry = header.key.name, header.geometry
    check_header(header, NAMESPACE.digest, name, geometry, chain(2))
    # Names hold 16 bytes of each hash; the others decide all the same.
    close = [h[:16] + bytes(16) for h in chain(4)]
    digest = NAMESPACE.digest[:16] + bytes(16)
    for wrong in (
        (digest, name, geometry, chain(4)),
        (NAMESPACE.digest, name, Geometry(4, 101, 16), chain(4)),
        (NAMESPACE.digest, name, Geometry(4, 100, 32), chain(4)),
        (NAMESPACE.digest, name, geometry, close),
        (NAMESPACE.digest, name, geometry, [*chain(3), close[3]]),
        (NAMESPACE.digest, name, geometry, chain(4, "b")),
        (NAMESPACE.digest, name, geometry, chain(5)),
    ):
        with pytest.raises(ChunkForeign):
            check_header(header, *wrong)


@pytest.mark.parametrize(
    ("hashes", "length"),
    [(chain(3), 4 * 4096), (chain(5), 4 * 4096), (chain(4, "b"), 4 * 4096), (chain(4), 3 * 4096), (chain(4), 5 * 4096)],
)
def test_a_writer_cannot_describe_what_it_does_not_have(hashes: list[bytes], length: int) -> None:
    with pytest.raises(IdentityError):
        build_header(make_key(4), 16, 100, hashes, 0, memoryview(bytes(length)))


def test_the_digests_are_as_long_as_the_table_says() -> None:
    assert len(block_digest(memoryview(b"x"), chain_hash(0), 0)) == DIGEST_BYTES == 16
    assert codec.MAGIC == b"MEMKVCH1"
    assert Geometry(1, MIB, 16).header_bytes == 4096
