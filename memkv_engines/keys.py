"""Identity: namespaces, shards and chunk keys, and the names chunks have in a tier.

Pure. A namespace is everything that must agree for stored bytes to be reusable (model, weights, dtype, layout,
hash format, tenant, format version). The parallel size is not in it: what a rank owns is the shard in the key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from memkv_engines.errors import ChunkForeign, IdentityError
from memkv_engines.limits import BUCKET_HEX_DIGITS, HASH_BYTES, KEY_BYTES, MAX_BLOCKS_PER_CHUNK

FORMAT_VERSION = 1

JsonValue = str | int | float | bool | None | list["JsonValue"] | dict[str, "JsonValue"]


@dataclass(frozen=True)
class Namespace:
    """An immutable set of identity fields with a canonical JSON form.

    Attributes:
        fields: what must agree; keys are strings, values are JSON scalars, lists or maps of them.
    """

    fields: Mapping[str, JsonValue]
    canonical_json: bytes = field(init=False, repr=False, compare=False)
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        if not self.fields:
            raise IdentityError("a namespace needs at least one identity field")
        body = {"format_version": FORMAT_VERSION, **self.fields}
        if body["format_version"] != FORMAT_VERSION or not all(isinstance(key, str) for key in self.fields):
            raise IdentityError(f"namespace fields need text keys and format version {FORMAT_VERSION}: {body}")
        try:
            text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
        except (TypeError, ValueError, RecursionError) as error:
            raise IdentityError(f"namespace fields are not plain JSON values: {error}") from error
        object.__setattr__(self, "canonical_json", text.encode("ascii"))
        object.__setattr__(self, "digest", hashlib.sha256(self.canonical_json).digest())

    @property
    def folder(self) -> str:
        """Name of the namespace's folder in a tier: half the digest in hexadecimal."""
        return namespace_folder(self.digest)

    def derive(self, **extra: JsonValue) -> Namespace:
        """A namespace with more fields, for a LoRA adapter or after a cache reset."""
        clash = set(extra) & set(self.fields)
        if clash:
            raise IdentityError(f"namespace fields given twice: {sorted(clash)}")
        return Namespace({**self.fields, **extra})


def namespace_folder(digest: bytes) -> str:
    """Folder name for a namespace digest of 32 bytes."""
    if len(digest) != 32:
        raise IdentityError(f"a namespace digest has 32 bytes, not {len(digest)}")
    return digest[:16].hex()


def namespace_folder_of(canonical_json: bytes) -> str:
    """Folder name for the canonical form of a namespace."""
    return namespace_folder(hashlib.sha256(canonical_json).digest())


@dataclass(frozen=True, order=True)
class Shard:
    """The part of a chunk one parallel rank owns, as a canonical range rather than a rank number.

    ``heads_total`` is the model's number of KV heads (1 for MLA, whose latent is stored once) and
    ``layers_total`` the number of layers of the KV group over all pipeline stages.
    """

    head_first: int
    head_count: int
    heads_total: int
    layer_first: int
    layer_count: int
    layers_total: int

    def __post_init__(self) -> None:
        for what, first, count, total in (
            ("head", self.head_first, self.head_count, self.heads_total),
            ("layer", self.layer_first, self.layer_count, self.layers_total),
        ):
            if not (0 <= first and 0 < count and first + count <= total <= 0xFFFF):
                raise IdentityError(f"impossible {what} range: first={first} count={count} total={total}")

    @property
    def text(self) -> str:
        """The form used in names: ``h0.3.3-l0.30.30``."""
        return (
            f"h{self.head_first}.{self.head_count}.{self.heads_total}"
            f"-l{self.layer_first}.{self.layer_count}.{self.layers_total}"
        )

    def as_tuple(self) -> tuple[int, int, int, int, int, int]:
        """Fields in header order."""
        return (
            self.head_first,
            self.head_count,
            self.heads_total,
            self.layer_first,
            self.layer_count,
            self.layers_total,
        )


@dataclass(frozen=True)
class ChunkKey:
    """Identity of one stored chunk.

    A chunk is *found* by the chain hash of its first block and *identified* by that of its last. ``holes`` is the
    number of leading blocks that are absent (a sliding window had already dropped them).
    """

    namespace_digest: bytes
    first_hash: bytes
    last_hash: bytes
    block_count: int
    group: int
    shard: Shard
    holes: int = 0

    def __post_init__(self) -> None:
        if len(self.namespace_digest) != 32:
            raise IdentityError(f"a namespace digest has 32 bytes, not {len(self.namespace_digest)}")
        for name in ("first_hash", "last_hash"):
            if len(getattr(self, name)) != HASH_BYTES:
                raise IdentityError(f"{name} has {len(getattr(self, name))} bytes; block hashes have {HASH_BYTES}")
        if not 1 <= self.block_count <= MAX_BLOCKS_PER_CHUNK:
            raise IdentityError(f"block_count={self.block_count} is outside 1..{MAX_BLOCKS_PER_CHUNK}")
        if not 0 <= self.holes < self.block_count:
            raise IdentityError(f"holes={self.holes} leaves no block of {self.block_count}")
        if not 0 <= self.group <= 0xFFFF:
            raise IdentityError(f"group={self.group} is outside 0..65535")

    @property
    def name(self) -> ChunkName:
        """The object's name; it holds only 16-byte prefixes, the header confirms the rest."""
        return ChunkName(
            self.first_hash[:KEY_BYTES],
            self.last_hash[:KEY_BYTES],
            self.block_count,
            self.holes,
            self.group,
            self.shard.text,
        )


_RANGE = r"(\d{1,5})\.(\d{1,5})\.(\d{1,5})"
_NAME = re.compile(
    rf"([0-9a-f]{{32}})-([0-9a-f]{{32}})-b(\d{{1,4}})-o(\d{{1,4}})-g(\d{{1,5}})-h{_RANGE}-l{_RANGE}\.kv", re.ASCII
)


@dataclass(frozen=True)
class ChunkName:
    """What a chunk is called inside its namespace folder.

    ``first`` and ``last`` are 16-byte prefixes of block hashes; names sort by first block, so that all variants
    that start at the same block are neighbours in one bucket folder.
    """

    first: bytes
    last: bytes
    block_count: int
    holes: int
    group: int
    shard_text: str

    @property
    def bucket(self) -> str:
        """The bucket folder."""
        return bucket_of(self.first)

    @property
    def text(self) -> str:
        """File name inside the bucket."""
        return (
            f"{self.first.hex()}-{self.last.hex()}-b{self.block_count}-o{self.holes}-g{self.group}-{self.shard_text}.kv"
        )

    @classmethod
    def parse(cls, text: str) -> ChunkName:
        """Parse a file name found in a bucket; nothing in it is trusted.

        Raises:
            ChunkForeign: it is not one of our names.
        """
        match = _NAME.fullmatch(text)
        if match is None:
            raise ChunkForeign(f"not a chunk name: {text[:200]!r}")
        count, holes, group, *ranges = map(int, match.groups()[2:])
        try:
            shard = Shard(*ranges)
        except IdentityError as error:
            raise ChunkForeign(f"impossible shard in chunk name: {text!r}") from error
        if not 1 <= count <= MAX_BLOCKS_PER_CHUNK or holes >= count or group > 0xFFFF:
            raise ChunkForeign(f"impossible block counts or group in chunk name: {text!r}")
        name = cls(bytes.fromhex(match[1]), bytes.fromhex(match[2]), count, holes, group, shard.text)
        if name.text != text:
            raise ChunkForeign(f"not the canonical form of a chunk name: {text!r}")
        return name


def bucket_of(first: bytes) -> str:
    """Bucket folder for the (16-byte prefix of the) hash of a chunk's first block."""
    return first[: (BUCKET_HEX_DIGITS + 1) // 2].hex()[:BUCKET_HEX_DIGITS]
