"""Configuration: one frozen tree, read in one printed order; the only module that reads the environment.

Order, later wins: defaults, YAML file (``config_file`` or ``MEMKV_ENGINES_CONFIG_FILE``), ``MEMKV_ENGINES_*``
variables, the engine's extra config. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from memkv_engines.errors import ConfigError
from memkv_engines.limits import (
    DEFAULT_CHUNK_TARGET_BYTES,
    MAX_CHUNK_TARGET_BYTES,
    MAX_IO_THREADS,
    MIB,
    MIN_CHUNK_TARGET_BYTES,
)
from memkv_engines.secret import SecretKey, parse_key, read_key_file

# What PyYAML raises besides its own errors: for dates and numbers that are none, and lists in lists in lists.
_YAML_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)

# A YAML file of a few lines can nest one list into another a billion times.
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxlong, _short.maxother = 3, 1000, 1000, 1000

ENV_PREFIX = "MEMKV_ENGINES_"
KEY_VARIABLE = f"{ENV_PREFIX}PROTECTION_KEY"
"""The key itself, in hexadecimal: not a configuration key, since engines print those."""


def split_paths(path: str) -> list[str]:
    """The directories a ``path`` names: one, or several with commas between them."""
    return [part for part in (part.strip() for part in path.split(",")) if part]


def _key(
    default: Any, help_: str, *, choices: tuple[str, ...] = (), low: float = 0, high: float = 2**62, many: bool = False
) -> Any:
    return field(default=default, metadata={"help": help_, "choices": choices, "low": low, "high": high, "many": many})


@dataclass(frozen=True)
class TierConfig:
    """Where chunks live."""

    path: str = _key(
        "",
        "directory of the tier (NVMe or a shared mount), or several, one per drive: a list, or a,b; required",
        many=True,
    )
    capacity_bytes: int = _key(0, "bound on the bytes of all chunks in the directory (in each); 0 means none")
    eviction: str = _key(
        "segmented_lru",
        "what goes when capacity_bytes is nearly reached: chunks never read first (segmented_lru), the least recently "
        "used (lru), or nothing, and stores stop (off)",
        choices=("segmented_lru", "lru", "off"),
    )
    direct_io: str = _key(
        "auto",
        "O_DIRECT: auto (probe and time), on, off; page_cache: buffered, and chunks stay in memory that is free",
        choices=("auto", "on", "off", "page_cache"),
    )
    memory_bytes: int = _key(
        0, "memory per worker before the directory, in which the chunks stay that were stored or loaded last; 0: none"
    )


@dataclass(frozen=True)
class ChunkConfig:
    """How big chunks are."""

    chunk_target_bytes: int = _key(
        DEFAULT_CHUNK_TARGET_BYTES,
        "wanted chunk size; the number of whole blocks nearest to it is taken",
        low=MIN_CHUNK_TARGET_BYTES,
        high=MAX_CHUNK_TARGET_BYTES,
    )


@dataclass(frozen=True)
class IoConfig:
    """How bytes move."""

    io_process: str = _key(
        "auto",
        "run the I/O loop in a child process, outside the engine's GIL: auto, on, off (a thread)",
        choices=("auto", "on", "off"),
    )
    io_threads: int = _key(
        8, "chunks written at a time, one thread each; half as many are read at a time", low=1, high=MAX_IO_THREADS
    )
    staging_bytes: int = _key(
        256 * MIB,
        "staging memory per worker: for loads 2 chunks per io_threads, half of it at most; the rest for stores",
        low=8 * MIB,
    )
    load_timeout_ms: int = _key(30_000, "a load older than this is abandoned and recomputed", low=10)
    fence_timeout_ms: int = _key(2_000, "longest wait of a step for gathers before the stores are dropped", low=10)


@dataclass(frozen=True)
class TransportConfig:
    """Which library moves the bytes; the choice and its reason are logged, and shown by ``doctor``."""

    transport: str = _key(
        "auto",
        "what moves bytes: posix, nixl, gds (kvikio), or auto: gds where GPUDirect Storage works, else posix",
        choices=("auto", "posix", "nixl", "gds"),
    )
    gds: str = _key(
        "auto", "GPUDirect Storage: on (or refuse to start), off, auto (where it works)", choices=("auto", "on", "off")
    )
    nixl_plugin: str = _key("POSIX", "NIXL's storage plugin: POSIX, GDS, GDS_MT, or one in NIXL_PLUGIN_DIR")
    staging_medium: str = _key(
        "auto",
        "where chunks of a KV cache in GPU memory are staged: gpu (GPUDirect), host, auto (by the PCIe topology)",
        choices=("auto", "gpu", "host"),
    )


@dataclass(frozen=True)
class LookupConfig:
    """What is known about the tier without asking it."""

    index_entries: int = _key(1 << 20, "chunks the in-memory index can hold", low=1 << 10, high=1 << 28)
    hit_ttl_s: float = _key(600.0, "a known hit is asked for again after this long", low=0.1)
    miss_ttl_s: float = _key(2.0, "a known miss is asked for again after this long")
    probe_timeout_ms: int = _key(250, "a look-up that takes longer becomes a miss", low=1)


@dataclass(frozen=True)
class IdentityConfig:
    """What keeps tenants and models apart."""

    tenant: str = _key("", "tenants with different names never share a chunk")
    weights_id: str = _key("", "names the weights instead of fingerprinting them; two models must never share one")


@dataclass(frozen=True)
class ProtectionConfig:
    """What protects chunks from others who can write, or read, the tier."""

    protection: str = _key(
        "off",
        "auth: chunks made or changed without the key are misses; encrypt: also nobody reads them without it; off",
        choices=("off", "auth", "encrypt"),
    )
    protection_key_file: str = _key(
        "", f"file with the key, 64 hexadecimal digits, readable by its owner only; or give {KEY_VARIABLE}"
    )


@dataclass(frozen=True)
class PolicyConfig:
    """What is done."""

    store: bool = _key(True, "write new chunks")
    load: bool = _key(True, "use stored chunks")
    cost_gate: str = _key(
        "on",
        "load a hit only as far as that is predicted to be faster than recomputing: on, off (always)",
        choices=("on", "off"),
    )
    on_load_failure: str = _key(
        "recompute", "what the engine does with a request whose load failed", choices=("recompute", "fail")
    )


@dataclass(frozen=True)
class Config:
    """The whole configuration, grouped; keys are flat and unique over the groups."""

    tier: TierConfig = TierConfig()
    chunk: ChunkConfig = ChunkConfig()
    io: IoConfig = IoConfig()
    transport: TransportConfig = TransportConfig()
    lookup: LookupConfig = LookupConfig()
    identity: IdentityConfig = IdentityConfig()
    protection: ProtectionConfig = ProtectionConfig()
    policy: PolicyConfig = PolicyConfig()
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    secret_key: SecretKey | None = field(default=None, compare=False)

    def describe(self) -> str:
        """One line per key with its value and where it came from."""
        lines = []
        for group, key in _KEYS.values():
            value = getattr(getattr(self, group), key)
            lines.append(f"{key}={value!r} ({self.sources.get(key, 'default')})")
        if self.secret_key is not None:
            source = "protection_key_file" if self.protection.protection_key_file else KEY_VARIABLE
            lines.append(f"protection_key={self.secret_key} ({source})")
        return "\n".join(lines)


_GROUPS: dict[str, type] = {
    "tier": TierConfig,
    "chunk": ChunkConfig,
    "io": IoConfig,
    "transport": TransportConfig,
    "lookup": LookupConfig,
    "identity": IdentityConfig,
    "protection": ProtectionConfig,
    "policy": PolicyConfig,
}
_KEYS: dict[str, tuple[str, str]] = {
    f.name: (group, f.name) for group, cls in _GROUPS.items() for f in dataclasses.fields(cls)
}
CONFIG_FILE_KEY = "config_file"
assert len(_KEYS) == sum(len(dataclasses.fields(c)) for c in _GROUPS.values()), "config keys must be unique"
assert len(_KEYS) < 30, "the configuration stays small"


def load_config(extra: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """Read the configuration.

    Args:
        extra: the engine's extra config (``kv_connector_extra_config``).
        environ: environment to read; the process's by default.

    Raises:
        ConfigError: unknown key, wrong type, value out of range, no ``path``, or no usable key where one is needed.
    """
    extra = dict(extra or {})
    environ = os.environ if environ is None else environ
    from_env = {k[len(ENV_PREFIX) :].lower(): v for k, v in environ.items() if k.startswith(ENV_PREFIX)}
    key_text = from_env.pop(KEY_VARIABLE.removeprefix(ENV_PREFIX).lower(), "")
    file_names = (extra.pop(CONFIG_FILE_KEY, None), from_env.pop(CONFIG_FILE_KEY, None))
    file_name = file_names[0] or file_names[1]
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if file_name:
        layers.append((f"file {file_name}", _read_yaml(str(file_name))))
    layers.append(("environment", from_env))
    layers.append(("engine's extra config", extra))
    values: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS}
    sources: dict[str, str] = {}
    for source, layer in layers:
        for key, raw in layer.items():
            group, name = _resolve(key, source)
            values[group][name] = _convert(_field_of(group, name), raw, source)
            sources[name] = source
    config = Config(**{g: cls(**values[g]) for g, cls in _GROUPS.items()}, sources=sources)
    config = dataclasses.replace(config, secret_key=_secret_key(config.protection, key_text))
    if not split_paths(config.tier.path):
        raise ConfigError(
            "key 'path' is missing: give the tier's directory, e.g. "
            '--kv-transfer-config \'{"kv_connector": "MemKVConnector", "kv_role": "kv_both", '
            '"kv_connector_extra_config": {"path": "/nvme/memkv"}}\' or MEMKV_ENGINES_PATH=/nvme/memkv'
        )
    return config


def _secret_key(protection: ProtectionConfig, text: str) -> SecretKey | None:
    file_name = protection.protection_key_file
    given = [what for what, there in (("protection_key_file", file_name), (KEY_VARIABLE, text)) if there]
    if protection.protection == "off":
        if given:
            raise ConfigError(f"{given[0]} gives a key, but protection=off: set protection=auth or encrypt, or no key")
        return None
    if len(given) != 1:
        raise ConfigError(
            f"protection={protection.protection} needs one key and has {len(given)}: give either protection_key_file, "
            f"a file with 64 hexadecimal digits that only its owner can read, or {KEY_VARIABLE}"
        )
    return read_key_file(file_name, "protection_key_file") if file_name else parse_key(text, KEY_VARIABLE)


def _resolve(key: str, source: str) -> tuple[str, str]:
    if key not in _KEYS:
        if key == CONFIG_FILE_KEY:
            raise ConfigError(f"key {key!r} in {source}: one file cannot name another; put the keys here")
        key = str(key)[: _short.maxstring]
        near = difflib.get_close_matches(key, [*_KEYS, CONFIG_FILE_KEY], n=1, cutoff=0.0)
        raise ConfigError(f"unknown key {key!r} in {source}: did you mean {near[0]!r}? Known keys: {sorted(_KEYS)}")
    return _KEYS[key]


def _field_of(group: str, name: str) -> dataclasses.Field[Any]:
    return next(f for f in dataclasses.fields(_GROUPS[group]) if f.name == name)


def _convert(spec: dataclasses.Field[Any], raw: Any, source: str) -> Any:
    kind = str(spec.type)

    def reject(why: str) -> ConfigError:
        value = _short.repr(raw)
        return ConfigError(f"key {spec.name!r} in {source} has value {value}: {why}. It is: {spec.metadata['help']}")

    value: Any
    if kind == "bool":
        words = {**dict.fromkeys(("true", "1", "yes", "on"), True), **dict.fromkeys(("false", "0", "no", "off"), False)}
        value = raw if isinstance(raw, bool) else words.get(str(raw).lower())
        if value is None:
            raise reject("give true or false")
        return value
    if kind in ("int", "float"):
        if isinstance(raw, bool):
            raise reject("give a number")
        try:
            value = int(str(raw), 0) if kind == "int" and not isinstance(raw, float) else float(raw)
        except (TypeError, ValueError, OverflowError) as error:
            raise reject("give a number") from error
        if kind == "int" and isinstance(value, float) and not value.is_integer():
            raise reject("give a whole number")
        value = int(value) if kind == "int" else value
        if not spec.metadata["low"] <= value <= spec.metadata["high"]:
            raise reject(f"give a number from {spec.metadata['low']} to {spec.metadata['high']}")
        return value
    if spec.metadata["many"] and isinstance(raw, list):
        if not raw or not all(isinstance(item, str) and item.strip() and "," not in item for item in raw):
            raise reject("give a list of texts without commas")
        return ",".join(raw)
    # YAML reads a bare `on` or `off` as a boolean; the switches of this file are words.
    value = {True: "on", False: "off"}[raw] if isinstance(raw, bool) and spec.metadata["choices"] else raw
    if not isinstance(value, str):
        raise reject("give a text")
    if spec.metadata["choices"] and value not in spec.metadata["choices"]:
        raise reject(f"give one of {list(spec.metadata['choices'])}")
    return value


def _read_yaml(file_name: str) -> Mapping[str, Any]:
    try:
        body = yaml.safe_load(Path(file_name).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, *_YAML_ERRORS) as error:
        raise ConfigError(f"{CONFIG_FILE_KEY}={file_name!r} cannot be read as YAML: {error}") from error
    if body is None:
        return {}
    if not isinstance(body, dict) or not all(isinstance(k, str) for k in body):
        raise ConfigError(f"{CONFIG_FILE_KEY}={file_name!r} must hold a map of keys to values")
    return body
