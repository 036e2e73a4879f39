"""Configuration: every error names key, value and remedy; later sources win."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.config import _GROUPS, _KEYS, CONFIG_FILE_KEY, ENV_PREFIX, Config, load_config, split_paths
from memkv_engines.errors import ConfigError
from memkv_engines.limits import MIB
from memkv_engines.tier.eviction import POLICIES
from memkv_engines.transports import posix

FIELDS = {f.name: f for cls in _GROUPS.values() for f in dataclasses.fields(cls)}
WRONG: dict[str, list[Any]] = {
    "int": ["many", 1.5, None, True, [1], math.nan, math.inf, 2**63, -1, "1e400", 10**400],
    "float": ["soon", None, False, [], math.nan, math.inf, -1.0, "inf", 10**400],
    "bool": ["perhaps", 2, None, 1.5, []],
    "str": [1, None, 2.5, ["x"], {"a": 1}],
}


def load(extra: dict[str, Any] | None = None, **environ: str) -> Config:
    """Load with a path, so that only what a test is about can be wrong."""
    return load_config({"path": "kv", **(extra or {})}, {f"{ENV_PREFIX}{k}": v for k, v in environ.items()})


def value_of(config: Config, key: str) -> Any:
    return getattr(getattr(config, _KEYS[key][0]), key)


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


# ------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (name, value)
        for name, spec in FIELDS.items()
        for value in WRONG[str(spec.type)]
        if not (spec.metadata["many"] and value == ["x"])
    ],
)
def test_a_wrong_value_names_key_value_source_and_remedy(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load({key: value})
    text = str(caught.value)
    assert repr(key) in text
    assert repr(value) in text
    assert "extra config" in text
    assert ": give " in text
    assert FIELDS[key].metadata["help"] in text


def test_the_choices_are_those_of_who_knows_them() -> None:
    assert set(FIELDS["eviction"].metadata["choices"]) == set(POLICIES)
    assert set(FIELDS["direct_io"].metadata["choices"]) == set(posix._CANDIDATES)


@pytest.mark.parametrize("key", [name for name, spec in FIELDS.items() if spec.metadata["choices"]])
def test_a_wrong_choice_lists_the_choices(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({key: "sometimes"})
    assert all(repr(choice) in str(caught.value) for choice in FIELDS[key].metadata["choices"])


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("pth", "path"),
        ("chunk_target", "chunk_target_bytes"),
        ("iothreads", "io_threads"),
        ("config_fil", "config_file"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{key}' in .*did you mean '{nearest}'"):
        load({key: "x"})


@given(st.text(max_size=12).filter(lambda key: key not in _KEYS and key != CONFIG_FILE_KEY))
@settings(deadline=None, max_examples=50)
def test_every_unknown_key_is_an_error(key: str) -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        load({key: 1})


def test_an_unknown_variable_is_an_error_and_others_are_no_business_of_ours() -> None:
    with pytest.raises(ConfigError, match="'io_thread' in environment"):
        load(IO_THREAD="3")
    assert load_config({"path": "kv"}, {"MEMKV_TIER": "other product", "PATH": "x"}).tier.path == "kv"


@pytest.mark.parametrize("extra", [None, {}, {"path": ""}, {"tenant": "x"}])
def test_a_missing_path_shows_both_ways_to_give_it(extra: dict[str, Any] | None) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(extra, {})
    assert "'path'" in str(caught.value)
    assert "kv_connector_extra_config" in str(caught.value)
    assert "MEMKV_ENGINES_PATH" in str(caught.value)


@pytest.mark.parametrize("body", ["[1, 2]", "3", "{1: 2}", "a: [", "\x00", "path: !!python/object:os.system {}"])
def test_a_file_that_is_not_a_map_is_an_error(yaml_file: Path, body: str) -> None:
    yaml_file.write_text(body)
    with pytest.raises(ConfigError, match=r"config_file=.*config\.yaml"):
        load({CONFIG_FILE_KEY: str(yaml_file)})


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"tenant: \xff")
    for name in ("absent.yaml", "", "latin"):
        with pytest.raises(ConfigError, match="cannot be read as YAML"):
            load({CONFIG_FILE_KEY: str(tmp_path / name)})


def test_a_file_cannot_name_another(yaml_file: Path) -> None:
    yaml_file.write_text("config_file: other.yaml")
    with pytest.raises(ConfigError, match="one file cannot name another"):
        load({CONFIG_FILE_KEY: str(yaml_file)})


# ----------------------------------------------------------------------------------------------- sources and order


def test_later_sources_win_and_are_named(yaml_file: Path) -> None:
    yaml_file.write_text("tenant: file\nweights_id: file\nio_threads: 3\npath: file\n")
    extra = {CONFIG_FILE_KEY: str(yaml_file), "path": "extra"}
    config = load_config(extra, {"MEMKV_ENGINES_TENANT": "env", "MEMKV_ENGINES_PATH": "env"})
    assert (config.tier.path, config.identity.tenant, config.identity.weights_id) == ("extra", "env", "file")
    assert (config.io.io_threads, config.policy.store) == (3, True)
    assert config.sources["tenant"] == "environment"
    assert config.sources["weights_id"].startswith("file ")
    assert "store" not in config.sources


def test_the_file_named_by_the_engine_wins_over_the_one_in_the_environment(yaml_file: Path, tmp_path: Path) -> None:
    yaml_file.write_text("tenant: engine")
    (tmp_path / "env.yaml").write_text("tenant: env")
    environ = {"MEMKV_ENGINES_PATH": "kv", "MEMKV_ENGINES_CONFIG_FILE": str(tmp_path / "env.yaml")}
    assert load_config({}, environ).identity.tenant == "env"
    assert load_config({CONFIG_FILE_KEY: str(yaml_file)}, environ).identity.tenant == "engine"


def test_the_process_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMKV_ENGINES_PATH", "kv")
    assert load_config().tier.path == "kv"


def test_an_empty_file_says_nothing(yaml_file: Path) -> None:
    yaml_file.write_text("# only a comment\n")
    assert load({CONFIG_FILE_KEY: str(yaml_file)}) == load()


def test_the_callers_dictionary_is_not_changed(yaml_file: Path) -> None:
    yaml_file.write_text("tenant: x")
    extra = {CONFIG_FILE_KEY: str(yaml_file), "path": "kv"}
    load_config(extra, {})
    assert extra == {CONFIG_FILE_KEY: str(yaml_file), "path": "kv"}


@pytest.mark.parametrize(
    ("key", "raw", "value"),
    [
        ("io_threads", "8", 8),
        ("io_threads", 8.0, 8),
        ("staging_bytes", "0x1000000", 16 * MIB),
        ("staging_bytes", "16_777_216", 16 * MIB),
        ("hit_ttl_s", "1.5", 1.5),
        ("hit_ttl_s", 2, 2.0),
        ("store", "FALSE", False),
        ("store", "0", False),
        ("load", "yes", True),
        ("load", True, True),
        ("direct_io", "off", "off"),
        ("direct_io", False, "off"),
        ("direct_io", True, "on"),
        ("tenant", "böb", "böb"),
    ],
)
def test_values_are_understood_as_text_and_as_json(key: str, raw: Any, value: Any) -> None:
    assert value_of(load({key: raw}), key) == value
    assert type(value_of(load({key: raw}), key)) is type(value)


def test_several_directories_are_a_list_or_a_text_with_commas(yaml_file: Path) -> None:
    yaml_file.write_text("path:\n  - /nvme0/kv\n  - /nvme1/kv\n")
    from_file = load_config({CONFIG_FILE_KEY: str(yaml_file)}, {})
    from_text = load_config({"path": "/nvme0/kv, /nvme1/kv"}, {})
    assert split_paths(from_file.tier.path) == split_paths(from_text.tier.path) == ["/nvme0/kv", "/nvme1/kv"]
    assert split_paths(load({}).tier.path) == ["kv"]


@pytest.mark.parametrize("path", [[], [""], ["a", 1], ["a,b"], {"a": 1}, ["a", None], ","])
def test_a_wrong_list_of_directories_is_refused(path: Any) -> None:
    with pytest.raises(ConfigError, match="path"):
        load_config({"path": path}, {})


def test_a_bare_off_in_yaml_is_the_word(yaml_file: Path) -> None:
    yaml_file.write_text("direct_io: off\nio_process: on\nstore: off\n")
    config = load({CONFIG_FILE_KEY: str(yaml_file)})
    assert (config.tier.direct_io, config.io.io_process, config.policy.store) == ("off", "on", False)


@pytest.mark.parametrize("key", [name for name, spec in FIELDS.items() if str(spec.type) in ("int", "float")])
def test_bounds_are_inclusive(key: str) -> None:
    spec = FIELDS[key]
    for bound in (spec.metadata["low"], spec.metadata["high"]):
        assert value_of(load({key: bound}), key) == bound
    for outside in (spec.metadata["low"] - 1, spec.metadata["high"] * 2):
        with pytest.raises(ConfigError, match="give a number from"):
            load({key: outside})


@pytest.mark.parametrize("key", list(FIELDS))
def test_a_default_is_a_legal_value(key: str) -> None:
    value = "kv" if key == "path" else FIELDS[key].default
    assert value_of(load({key: value}), key) == value
    assert FIELDS[key].metadata["help"]


def test_the_description_has_a_line_per_key_with_its_source() -> None:
    lines = load({"io_threads": 7}, TENANT="x").describe().splitlines()
    assert len(lines) == len(_KEYS)
    assert "io_threads=7 (engine's extra config)" in lines
    assert "tenant='x' (environment)" in lines
    assert "store=True (default)" in lines


def test_what_came_through_json_is_the_same() -> None:
    extra = {name: spec.default for name, spec in FIELDS.items()} | {"path": "kv"}
    assert load(json.loads(json.dumps(extra))) == load(extra) == load()
