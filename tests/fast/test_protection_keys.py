"""The key of protected chunks: where it comes from, who may not read it, and that it is shown nowhere."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from memkv_engines.chunk import protection
from memkv_engines.chunk.protection import Protection
from memkv_engines.config import load_config
from memkv_engines.doors.protection import protection_identity, protection_spec
from memkv_engines.errors import ConfigError
from memkv_engines.keys import Namespace
from memkv_engines.offload.messages import ProtectionSpec, Setup, decode_request, encode
from memkv_engines.offload.service import open_protection
from memkv_engines.secret import SecretKey, parse_key, read_key_file
from tests.fast.protected_samples import AUTH, ENCRYPT, KEY, OTHER_KEY, sealed

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
