"""``memkv-engines tier verify`` and ``repair`` where chunks are protected: with the key, and without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from memkv_engines.chunk.protection import Protection
from memkv_engines.keys import Namespace
from memkv_engines.tier.directory import DirectoryTier
from tests.fast.cli_tier_samples import CHUNK_BYTES, TWO, Directory, Run, chunk, flip
from tests.fast.protected_samples import AUTH, ENCRYPT, KEY, OTHER_KEY
from tests.fast.samples import aligned
from tests.fast.test_codec import sign

SECRET = Namespace({"model": "one", "protection": ENCRYPT.identity()})
OTHERS = Namespace({"model": "one", "protection": Protection(OTHER_KEY, encrypt=False).identity()})


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(KEY.hex())
    path.chmod(0o600)
    return path


@pytest.fixture
def mixed(directory: Directory) -> Directory:
    """Eight chunks without protection, three with the key, two with another."""
    tier = DirectoryTier(directory.root, direct_io="off", capacity_bytes=100 * CHUNK_BYTES)
    for namespace, guardian, count in ((SECRET, ENCRYPT, 3), (OTHERS, Protection(OTHER_KEY, encrypt=False), 2)):
        tier.write_manifest(namespace)
        for number in range(count):
            name, data = chunk(namespace, f"prompt {number}", guardian)
            tier.put(namespace.folder, name, [aligned(data)])
    tier.scan()
    tier.close()
    return directory


def test_with_and_without_the_key(run: Run, mixed: Directory, key_file: Path) -> None:
    code, body = run("verify")
    assert (code, body["findings"]) == (0, [])
    assert {k: body["summary"][k] for k in ("chunks", "authenticated", "digests_only")} == {
        "chunks": 13, "authenticated": 0, "digests_only": 5,
    }  # fmt: skip
    code, body = run("verify", "--key-file", str(key_file))
    assert (code, body["findings"]) == (0, [])
    assert (body["summary"]["authenticated"], body["summary"]["digests_only"]) == (3, 2)
    assert "5 are protected: digests checked only, their MACs need --key-file" in run("verify", as_json=False)[1]
    text = run("verify", "--key-file", str(key_file), as_json=False)[1]
    assert "3 of them are authentic" in text and "2 are protected: digests checked only" in text
    assert KEY.hex() not in text


def resign(data: bytearray) -> bytes:
    return bytes(sign(data[:4096]) + data[4096:])


def forge(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[512 + 64] ^= 1
    path.write_bytes(resign(data))


def strip(path: Path) -> None:
    path.write_bytes(chunk(SECRET, "prompt 0")[1])


def with_another_key(path: Path) -> None:
    path.write_bytes(chunk(SECRET, "prompt 0", Protection(OTHER_KEY, encrypt=True))[1])


def other_way(path: Path) -> None:
    """Authentic, in a namespace that is encrypted: a reader misses, and there is no harm in it."""
    path.write_bytes(chunk(SECRET, "prompt 0", AUTH)[1])


@pytest.mark.parametrize(
    ("change", "without_key", "with_key", "mended"),
    [
        (lambda path: flip(path, 4096 + 100), "damaged", "damaged", True),
        (forge, None, "forged", True),
        (strip, "unauthenticated", "unauthenticated", True),
        (with_another_key, "other_key", "other_key", False),
        (other_way, None, None, False),
    ],
    ids=["damaged", "forged", "without a MAC", "another key", "the other way"],
)
def test_what_is_wrong_is_found(
    run: Run,
    mixed: Directory,
    key_file: Path,
    change: Callable[[Path], None],
    without_key: str | None,
    with_key: str | None,
    mended: bool,
) -> None:
    path = mixed.path(0, SECRET)
    change(path)
    for options, kind in (((), without_key), (("--key-file", str(key_file)), with_key)):
        code, body = run("verify", *options)
        assert [finding["kind"] for finding in body["findings"]] == ([kind] if kind else [])
        assert code == bool(kind)
    before = mixed.files()
    run("repair", "--key-file", str(key_file))
    gone = {str(path.relative_to(mixed.root))} if mended else set()
    assert before - mixed.files() == gone


def test_a_block_forged_below_a_right_header_is_found(
    run: Run, mixed: Directory, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody with the key of the header only does not exist; the tag is checked all the same."""
    monkeypatch.setattr("memkv_engines.chunk.protection.BlockCheck.is_right", lambda _: False)
    code, body = run("verify", "--key-file", str(key_file))
    assert code == 1
    assert [finding["kind"] for finding in body["findings"]] == ["forged"] * 3


def test_the_other_namespaces_are_read_as_before(run: Run, mixed: Directory, key_file: Path) -> None:
    flip(mixed.path(1, TWO), 4096 + 100)
    code, body = run("verify", "--key-file", str(key_file))
    assert code == 1
    assert [finding["kind"] for finding in body["findings"]] == ["damaged"]


def test_a_key_that_others_can_read_is_a_wrong_call(run: Run, mixed: Directory, key_file: Path) -> None:
    key_file.chmod(0o644)
    assert run("verify", "--key-file", str(key_file), as_json=False)[0] == 2
    assert run("verify", "--key-file", str(key_file) + "x", as_json=False)[0] == 2
