"""Protected chunks against their specification, and against who has no key but can write everything."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import itertools
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.chunk import codec, protection
from memkv_engines.chunk.codec import (
    ChunkHeader,
    build_header,
    check_header,
    decode_header,
    kind_of_bad_block,
    read_header,
    verify_blocks,
)
from memkv_engines.chunk.protection import Protection
from memkv_engines.config import load_config
from memkv_engines.doors.protection import protection_identity, protection_spec
from memkv_engines.errors import (
    ChunkError,
    ChunkForeign,
    ChunkForged,
    ChunkOtherKey,
    ChunkUnauthenticated,
    ChunkVersion,
    ConfigError,
)
from memkv_engines.keys import ChunkKey, Namespace
from memkv_engines.offload.messages import ProtectionSpec, Setup, decode_request, encode
from memkv_engines.offload.service import open_protection
from memkv_engines.secret import SecretKey, parse_key, read_key_file
from tests.fast.samples import NAMESPACE, SHARD, chain, chain_hash, make_chunk, make_key, noise
from tests.fast.test_codec import set_field, sign

KEY = hashlib.sha256(b"the key").digest()
OTHER_KEY = hashlib.sha256(b"another key").digest()
AUTH, ENCRYPT = Protection(KEY, encrypt=False), Protection(KEY, encrypt=True)
BOTH = pytest.mark.parametrize("guardian", [AUTH, ENCRYPT], ids=["auth", "encrypt"])
COUNT, BLOCK_BYTES, STRIDE = 4, 5000, 8192


def sealed(
    guardian: Protection,
    count: int = COUNT,
    block_bytes: int = BLOCK_BYTES,
    *,
    holes: int = 0,
    prompt: str = "a",
    namespace: Namespace = NAMESPACE,
    seed: int = 0,
) -> tuple[ChunkHeader, bytearray]:
    """A protected chunk; its payload as stored."""
    hashes = chain(count, prompt)
    key = ChunkKey(namespace.digest, hashes[0], hashes[-1], count, 0, SHARD, holes)
    stride = -(-block_bytes // 4096) * 4096
    payload = bytearray(noise(count * stride, seed))
    return build_header(key, 16, block_bytes, hashes, 7, memoryview(payload), guardian), payload


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


# --------------------------------------------------------------------------------------------------------------- keys


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(KEY.hex() + "\n")
    path.chmod(0o600)
    return path


def test_a_key_from_a_file_or_a_variable(key_file: Path) -> None:
    one = load_config({"path": "kv", "protection": "auth", "protection_key_file": str(key_file)}, {})
    two = load_config({"path": "kv", "protection": "encrypt"}, {"MEMKV_ENGINES_PROTECTION_KEY": KEY.hex()})
    for config in (one, two):
        assert config.secret_key is not None and config.secret_key.reveal() == KEY
    assert load_config({"path": "kv"}, {}).secret_key is None
    assert protection_identity(load_config({"path": "kv"}, {})) == {}
    assert protection_spec(load_config({"path": "kv"}, {})) is None


def test_a_key_is_never_shown(key_file: Path) -> None:
    config = load_config({"path": "kv", "protection": "encrypt", "protection_key_file": str(key_file)}, {})
    spec = protection_spec(config)
    assert spec is not None and spec.key == KEY
    setup = Setup("/kv", "off", 0, True, 1, 1 << 20, protection=spec)
    assert decode_request(encode(setup)) == setup
    guardian = Protection(KEY, encrypt=True)
    guard = sealed(guardian)[0].guard
    identity = protection_identity(config)
    shown = [config, config.describe(), spec, setup, guardian, guard, sealed(guardian)[0], config.secret_key]
    texts = [*map(repr, shown), *map(str, shown), json.dumps(identity), Namespace(identity).canonical_json.decode()]
    for text in texts:
        for form in (KEY.hex(), KEY.hex().upper(), repr(KEY)[2:-1], repr(list(KEY))[1:-1]):
            assert form not in text
    assert "protection_key=set (protection_key_file)" in config.describe()
    for holder in (config.secret_key, guardian):
        with pytest.raises(TypeError):
            pickle.dumps(holder)


def test_the_key_id_keeps_namespaces_apart(key_file: Path) -> None:
    def fields(way: str, key: bytes) -> str:
        environ = {"MEMKV_ENGINES_PROTECTION_KEY": key.hex()}
        return json.dumps(protection_identity(load_config({"path": "kv", "protection": way}, environ)))

    assert len({fields(way, key) for way in ("auth", "encrypt") for key in (KEY, OTHER_KEY)}) == 4
    assert AUTH.key_id == ENCRYPT.key_id != Protection(OTHER_KEY, encrypt=True).key_id


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610, 0o622, 0o777])
def test_a_file_that_others_can_use_is_refused(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    with pytest.raises(ConfigError, match=rf"protection_key_file=.*{mode:04o}.*chmod 600"):
        load_config({"path": "kv", "protection": "auth", "protection_key_file": str(key_file)}, {})


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("", "64 hexadecimal digits"),
        ("zz" * 32, "64 hexadecimal digits"),
        (KEY.hex()[:-1], "64 hexadecimal digits"),
        (KEY.hex() + "0", "64 hexadecimal digits"),
        ("\xff" * 64, "64 hexadecimal digits"),
        ("00" * 32, "not random"),
        ("0123" * 16, "not random"),
        (" " * 5000, "larger than"),
    ],
)
def test_a_file_without_a_key_is_refused_and_not_quoted(key_file: Path, body: str, why: str) -> None:
    key_file.write_text(body, encoding="latin-1")
    with pytest.raises(ConfigError, match=why) as caught:
        read_key_file(str(key_file), "protection_key_file")
    assert "openssl rand -hex 32" in str(caught.value)
    assert not body.strip() or body not in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path, key_file: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for name in ("absent", "fifo", ".", "nul\0"):
        with pytest.raises(ConfigError, match=r"protection_key_file=.*(cannot be read|regular)"):
            read_key_file(str(tmp_path / name), "protection_key_file")
    (tmp_path / "link").symlink_to(key_file)
    assert read_key_file(str(tmp_path / "link"), "x").reveal() == KEY


def test_a_file_of_somebody_else_is_refused(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = key_file.stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: uid + 1)
    if uid:
        with pytest.raises(ConfigError, match="belongs to user"):
            read_key_file(str(key_file), "protection_key_file")
    else:
        assert read_key_file(str(key_file), "x").reveal() == KEY, "the administrator's"


@pytest.mark.parametrize(
    ("extra", "environ", "why"),
    [
        ({"protection": "auth"}, {}, "needs one key and has 0"),
        ({"protection": "encrypt", "protection_key_file": "k"}, {"PROTECTION_KEY": KEY.hex()}, "one key and has 2"),
        ({"protection_key_file": "k"}, {}, "protection=off"),
        ({}, {"PROTECTION_KEY": KEY.hex()}, "protection=off"),
        ({"protection": "auth"}, {"PROTECTION_KEY": "abc"}, "MEMKV_ENGINES_PROTECTION_KEY does not hold a key"),
        ({"protection": "mac"}, {}, "one of"),
        ({"protection": "auth", "protection_key": KEY.hex()}, {}, "did you mean 'protection_key_file'"),
    ],
)
def test_a_wrong_choice_of_keys_is_refused(extra: dict[str, str], environ: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        load_config({"path": "kv", **extra}, {f"MEMKV_ENGINES_{k}": v for k, v in environ.items()})
    assert KEY.hex() not in str(caught.value)


def test_keys_are_read_in_either_case() -> None:
    assert parse_key(f"  {KEY.hex().upper()}\n", "x").reveal() == KEY
    assert isinstance(parse_key(KEY.hex(), "x"), SecretKey)


# -------------------------------------------------------------------------------------------------------- the library


def test_a_missing_library_is_refused_with_the_remedy() -> None:
    program = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from memkv_engines.errors import ConfigError\n"
        "from memkv_engines.chunk.protection import Protection\n"
        "try:\n    Protection(bytes(range(32)), encrypt=True)\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "cryptography" in done.stdout and "pip install 'memkv-engines[crypto]'" in done.stdout


def test_a_library_that_cannot_or_errs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protection, "_KNOWN_TAG", "00" * 16)
    with pytest.raises(ConfigError, match="encrypts wrongly"):
        Protection(KEY, encrypt=True)

    def too_old(*_: object) -> object:
        raise ValueError("buffer must be at least 262159 bytes for this payload")

    monkeypatch.setattr(protection, "_encryptor", too_old)
    with pytest.raises(ConfigError, match="44 or later"):
        Protection(KEY, encrypt=True)


def test_nothing_imports_the_library_without_a_key() -> None:
    program = (
        "import sys, memkv_engines.offload.process, memkv_engines.doors.io_client, memkv_engines.cli.tier.examine\n"
        "from memkv_engines.config import load_config\n"
        "load_config({'path': 'kv'}, {})\n"
        "print('cryptography' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_setup_without_a_key_of_the_right_length_is_refused() -> None:
    setup = Setup("/kv", "off", 0, True, 1, 1 << 20, protection=ProtectionSpec(True, b"short"))
    with pytest.raises(ConfigError, match="32 bytes"):
        open_protection(setup)
    assert open_protection(msgspec.structs.replace(setup, protection=None)) is None
