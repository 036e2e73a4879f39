"""Protected chunks against their specification, and against who has no key but can write everything."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import itertools
import struct

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.chunk import codec, protection
from memkv_engines.chunk.codec import (
    ChunkHeader,
    check_header,
    decode_header,
    kind_of_bad_block,
    read_header,
    verify_blocks,
)
from memkv_engines.chunk.protection import Protection
from memkv_engines.errors import (
    ChunkError,
    ChunkForeign,
    ChunkForged,
    ChunkOtherKey,
    ChunkUnauthenticated,
    ChunkVersion,
)
from memkv_engines.keys import Namespace
from tests.fast.protected_samples import AUTH, BLOCK_BYTES, COUNT, ENCRYPT, KEY, OTHER_KEY, STRIDE, sealed
from tests.fast.samples import NAMESPACE, chain, chain_hash, make_chunk, make_key, noise
from tests.fast.test_codec import set_field, sign

BOTH = pytest.mark.parametrize("guardian", [AUTH, ENCRYPT], ids=["auth", "encrypt"])


def opened(header: ChunkHeader, payload: bytearray, guardian: Protection) -> tuple[int | None, bytearray]:
    """What a reader with a key makes of it: the first bad block, and the payload as it would reach pages."""
    decoded = decode_header(header.encode(), guardian)
    plain = bytearray(payload)
    return verify_blocks(decoded, header.key.holes, header.key.block_count, memoryview(plain)[_start(header) :]), plain


def _start(header: ChunkHeader) -> int:
    return header.key.holes * header.geometry.block_stride_bytes


def resigned(data: bytearray) -> bytes:
    """What somebody without the key can do: digests that fit."""
    return bytes(sign(data))


# ------------------------------------------------------------------------------------------------- the written spec


def hkdf(key: bytes, info: bytes, length: int, salt: bytes = b"") -> bytes:
    """RFC 5869, written down a second time."""
    pseudo_random = hmac.digest(salt or bytes(32), key, "sha256")
    out, block = b"", b""
    for counter in itertools.count(1):
        if len(out) >= length:
            return out[:length]
        block = hmac.digest(pseudo_random, block + info + bytes([counter]), "sha256")
        out += block
    raise AssertionError


@pytest.fixture
def fixed_salt(monkeypatch: pytest.MonkeyPatch) -> bytes:
    salt = bytes(range(100, 132))
    monkeypatch.setattr(codec, "new_salt", lambda: salt)
    return salt


@BOTH
def test_the_bytes_are_those_of_the_specification(guardian: Protection, fixed_salt: bytes) -> None:
    header, payload = sealed(guardian, 3, holes=1)
    plain = noise(3 * STRIDE)
    expected = bytearray(sealed_plainly(3, holes=1).encode())
    set_field(expected, "mac_id", 1)
    set_field(expected, "cipher_id", int(guardian.encrypt))
    expected[184:200] = hkdf(KEY, b"memkv-engines 1 key id", 16)
    expected[200:232] = fixed_salt
    namespace_key = hkdf(KEY, b"memkv-engines 1 namespace" + NAMESPACE.digest, 32)
    keys = hkdf(namespace_key, b"memkv-engines 1 chunk" + bytes(expected[:200]), 64, fixed_salt)
    for i in (1, 2):
        block = plain[i * STRIDE : i * STRIDE + BLOCK_BYTES]
        nonce = struct.pack("<IQ", i, 1)
        context = chain_hash(i) + struct.pack("<IQ", i, BLOCK_BYTES)
        if guardian.encrypt:
            sealed_block = AESGCM(keys[:32]).encrypt(nonce, block, context)
        else:
            sealed_block = block + AESGCM(keys[:32]).encrypt(nonce, b"", context + block)
        stored, tag = sealed_block[:-16], sealed_block[-16:]
        assert payload[i * STRIDE : i * STRIDE + BLOCK_BYTES] == stored
        assert (
            payload[i * STRIDE + BLOCK_BYTES : (i + 1) * STRIDE] == plain[i * STRIDE + BLOCK_BYTES : (i + 1) * STRIDE]
        )
        row = 512 + 96 * i
        expected[row + 32 : row + 48] = codec.block_digest(memoryview(stored), chain_hash(i), i)
        expected[row + 64 : row + 80] = tag
        expected[row + 80 : row + 92] = nonce
    expected[464:496] = hmac.digest(keys[32:], bytes(expected[:464] + expected[512:]), "sha256")
    assert header.encode() == resigned(expected)
    assert payload[:STRIDE] == plain[:STRIDE], "an absent block is left alone"


def sealed_plainly(count: int, *, holes: int) -> ChunkHeader:
    return make_chunk(count, BLOCK_BYTES, holes=holes)[0]


@pytest.mark.parametrize(
    ("guardian", "digest"),
    [
        (AUTH, "7bb9318c79d5b19a4ccee892633ff4b40f14a002b59dd6fb7da5f6f1c86dbe60"),
        (ENCRYPT, "4e87d07f00457663ce13529bd4d52c80b66d2c2c3881660dde3abadf95843a98"),
    ],
    ids=["auth", "encrypt"],
)
def test_the_format_has_not_moved(guardian: Protection, digest: str, fixed_salt: bytes) -> None:
    header, payload = sealed(guardian, 3, 300_000, holes=1)
    assert hashlib.sha256(header.encode() + payload).hexdigest() == digest


def test_without_a_key_nothing_has_changed() -> None:
    assert sealed_plainly(3, holes=1).seal is None
    assert sealed_plainly(3, holes=1).encode()[184:496] == bytes(312)


# ------------------------------------------------------------------------------------------------------- round trips


@BOTH
@given(st.integers(1, 9), st.one_of(st.integers(1, 9000), st.sampled_from([262_143, 262_144, 262_145])), st.data())
@settings(deadline=None, max_examples=25)
def test_any_run_of_blocks_comes_back(guardian: Protection, count: int, block_bytes: int, data: st.DataObject) -> None:
    holes = data.draw(st.integers(0, count - 1))
    first = data.draw(st.integers(holes, count - 1))
    stop = data.draw(st.integers(first + 1, count))
    header, payload = sealed(guardian, count, block_bytes, holes=holes)
    stride = header.geometry.block_stride_bytes
    plain = noise(count * stride)
    decoded = decode_header(header.encode() + b"more", guardian)
    assert decoded == header
    check_header(decoded, NAMESPACE.digest, header.key.name, header.geometry, chain(count))
    run = bytearray(payload[first * stride : stop * stride])
    assert verify_blocks(decoded, first, stop, memoryview(run)) is None
    for i in range(first, stop):
        block = run[(i - first) * stride : (i - first) * stride + block_bytes]
        assert block == plain[i * stride : i * stride + block_bytes]
        if block_bytes > 8:
            assert (payload[i * stride : i * stride + block_bytes] == block) != guardian.encrypt


@BOTH
def test_damage_in_any_block_of_any_run_is_found_and_told_from_forgery(guardian: Protection) -> None:
    header, payload = sealed(guardian)
    decoded = decode_header(header.encode(), guardian)
    for first, stop in itertools.combinations(range(COUNT + 1), 2):
        for bad in range(first, stop):
            for position in (0, 17, BLOCK_BYTES - 1):
                run = memoryview(bytearray(payload[first * STRIDE : stop * STRIDE]))
                run[(bad - first) * STRIDE + position] ^= 1
                stored = bytes(run)
                assert verify_blocks(decoded, first, stop, run) == bad
                assert kind_of_bad_block(decoded, bad, first, run) == "damaged"
                place = slice((bad - first) * STRIDE, (bad - first + 1) * STRIDE)
                assert bytes(run[place]) == stored[place], "the block is as it was stored"


@BOTH
def test_a_block_that_is_short_or_absent_is_bad(guardian: Protection) -> None:
    header, payload = sealed(guardian, holes=1)
    decoded = decode_header(header.encode(), guardian)
    assert verify_blocks(decoded, 0, COUNT, memoryview(bytearray(payload))) == 0
    assert kind_of_bad_block(decoded, 0, 0, memoryview(payload)) == "damaged"
    short = memoryview(bytearray(payload[STRIDE : 2 * STRIDE + 100]))
    assert verify_blocks(decoded, 1, COUNT, short) == 2
    assert kind_of_bad_block(decoded, 2, 1, short) == "damaged"


# ------------------------------------------------------------------------------------- without the key, or another's


@BOTH
def test_who_may_read_what(guardian: Protection) -> None:
    data = sealed(guardian)[0].encode()
    plain = make_chunk(COUNT, BLOCK_BYTES)[0].encode()
    other_way = ENCRYPT if guardian is AUTH else AUTH
    assert decode_header(data, guardian).guard is not None
    assert decode_header(plain).seal is None
    for stored, reader, kind in (
        (data, None, ChunkOtherKey),
        (data, Protection(OTHER_KEY, encrypt=guardian.encrypt), ChunkOtherKey),
        (data, other_way, ChunkOtherKey),
        (plain, guardian, ChunkUnauthenticated),
    ):
        with pytest.raises(kind):
            decode_header(stored, reader)
    assert read_header(data).guard is None, "a tool has not authenticated what it only looks at"


@BOTH
def test_every_changed_byte_of_a_header_is_refused(guardian: Protection) -> None:
    good = sealed(guardian, 3)[0].encode()
    refused = set()
    for position in range(len(good)):
        for mask in (0x01, 0x80):
            bad = bytearray(good)
            bad[position] ^= mask
            with pytest.raises(ChunkError):
                decode_header(bytes(bad), guardian)
            if not 496 <= position < 512:
                with pytest.raises(ChunkError) as caught:
                    decode_header(resigned(bad), guardian)
                refused.add(type(caught.value).kind)
    assert refused >= {"forged", "other_key", "foreign", "version"}


@BOTH
@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(1, 255)), min_size=1, max_size=5))
@settings(deadline=None, max_examples=150)
def test_a_resigned_header_is_never_believed(guardian: Protection, changes: list[tuple[int, int]]) -> None:
    good = sealed(guardian, 3)[0].encode()
    bad = bytearray(good)
    for position, mask in changes:
        bad[position] ^= mask
    data = resigned(bad)
    if data == good:
        return
    with pytest.raises(ChunkError):
        decode_header(data, guardian)


@BOTH
def test_a_table_entry_of_another_chunk_is_refused(guardian: Protection) -> None:
    """Tag, digest or whole row, with the block it belongs to."""
    one, payload = sealed(guardian)
    two, other = sealed(guardian, seed=1)  # Another write of the same chunk: everything but salt and bytes is the same.
    assert one.seal is not None and two.seal is not None and one.seal.salt != two.seal.salt
    for start, length in ((64, 16), (32, 16), (0, 96)):
        data = bytearray(one.encode())
        row = 512 + 96 * 2
        data[row + start : row + start + length] = two.encode()[row + start : row + start + length]
        with pytest.raises(ChunkForged):
            decode_header(resigned(data), guardian)
    spliced = bytearray(payload)
    spliced[2 * STRIDE : 3 * STRIDE] = other[2 * STRIDE : 3 * STRIDE]
    assert opened(one, spliced, guardian)[0] == 2
    assert opened(one, bytearray(other), guardian)[0] == 0
    assert opened(two, bytearray(other), guardian)[0] is None


@BOTH
def test_swapped_blocks_are_refused(guardian: Protection) -> None:
    header, payload = sealed(guardian)
    swapped = bytearray(payload)
    swapped[STRIDE : 3 * STRIDE] = payload[2 * STRIDE : 3 * STRIDE] + payload[STRIDE : 2 * STRIDE]
    assert opened(header, swapped, guardian)[0] == 1
    rows = bytearray(header.encode())
    for start, length in ((32, 16), (64, 16)):
        a, b = 512 + 96 + start, 512 + 192 + start
        rows[a : a + length], rows[b : b + length] = rows[b : b + length], rows[a : a + length]
    with pytest.raises(ChunkForged):
        decode_header(resigned(rows), guardian)


@BOTH
def test_the_same_bytes_under_a_forged_digest_are_forged(guardian: Protection) -> None:
    """The payload is changed and the digest made to fit; the table's MAC is what fails, and without it the tag does."""
    header, payload = sealed(guardian)
    payload[STRIDE + 5] ^= 1
    digest = codec.block_digest(memoryview(payload)[STRIDE : STRIDE + BLOCK_BYTES], chain_hash(1), 1)
    blocks = [*header.blocks]
    blocks[1] = dataclasses.replace(blocks[1], digest=digest)
    forged = dataclasses.replace(header, blocks=tuple(blocks))
    with pytest.raises(ChunkForged):
        decode_header(forged.encode(), guardian)
    assert header.guard is not None
    run = memoryview(payload)[STRIDE:]
    assert verify_blocks(forged, 1, COUNT, run) == 1
    assert kind_of_bad_block(forged, 1, 1, run) == "forged"


@BOTH
@pytest.mark.parametrize("what", ["name", "namespace", "tenant key", "group"])
def test_a_right_chunk_in_another_place_is_refused(guardian: Protection, what: str) -> None:
    """Its bytes are as they were written; then its header is made to fit the place."""
    header, _ = sealed(guardian)
    tenant = Namespace({"model": "tiny", "dtype": "float32", "tenant": "b"})
    if what == "tenant key":
        with pytest.raises(ChunkOtherKey):
            decode_header(header.encode(), Protection(OTHER_KEY, encrypt=guardian.encrypt))
        return
    namespace = tenant.digest if what == "namespace" else NAMESPACE.digest
    name = make_key(COUNT, prompt="b").name if what == "name" else header.key.name
    if what == "group":
        name = dataclasses.replace(name, group=1)
    with pytest.raises(ChunkForeign):
        check_header(decode_header(header.encode(), guardian), namespace, name, header.geometry, [])
    data = bytearray(header.encode())
    if what == "namespace":
        set_field(data, "namespace_digest", tenant.digest)
    elif what == "group":
        set_field(data, "group", 1)
    else:
        for i, stranger in enumerate(chain(COUNT, "b")):
            data[512 + 96 * i : 544 + 96 * i] = stranger
        set_field(data, "first_hash", chain_hash(0, "b"))
        set_field(data, "last_hash", chain_hash(COUNT - 1, "b"))
    with pytest.raises(ChunkForged):
        decode_header(resigned(data), guardian)


def test_a_protected_chunk_made_to_look_plain_is_refused() -> None:
    """To a reader without a key ciphertext with right digests would be wrong tokens."""
    for start, stop in ((18, 22), (18, 20), (20, 22)):
        data = bytearray(sealed(ENCRYPT)[0].encode())
        data[start:stop] = bytes(stop - start)
        for reader in (None, AUTH, ENCRYPT):
            with pytest.raises(ChunkError):
                decode_header(resigned(data), reader)


@pytest.mark.parametrize(("mac_id", "cipher_id"), [(0, 1), (2, 0), (1, 2), (2, 2), (65535, 65535)])
def test_unknown_ways_are_another_version(mac_id: int, cipher_id: int) -> None:
    data = bytearray(sealed(ENCRYPT)[0].encode())
    set_field(data, "mac_id", mac_id)
    set_field(data, "cipher_id", cipher_id)
    for reader in (None, ENCRYPT):
        with pytest.raises(ChunkVersion):
            decode_header(resigned(data), reader)


# ------------------------------------------------------------------------------------------------------------- nonces


@BOTH
def test_no_key_and_nonce_serve_twice(guardian: Protection, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[bytes, bytes]] = []
    real = protection._encryptor

    def noted(key: bytes, nonce: bytes) -> object:
        used.append((key, nonce))
        return real(key, nonce)

    monkeypatch.setattr(protection, "_encryptor", noted)
    for prompt, holes in (("a", 0), ("a", 0), ("a", 1), ("b", 0)):
        for namespace in (NAMESPACE, Namespace({"model": "other"})):
            sealed(guardian, holes=holes, prompt=prompt, namespace=namespace)
    assert len(used) == len(set(used)) == 2 * (4 + 4 + 3 + 4)
    assert all(len(nonce) == 12 for _, nonce in used)
    assert len({nonce for _, nonce in used}) == 4


def test_both_ways_have_different_keys(fixed_salt: bytes) -> None:
    one, two = (sealed(guardian)[0] for guardian in (AUTH, ENCRYPT))
    assert one.guard is not None and two.guard is not None
    assert one.guard.header_mac([b"x"]) != two.guard.header_mac([b"x"])
