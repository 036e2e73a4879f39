"""Everything that parses bytes which others may have written, as functions of bytes, for `targets.py`.

A parser returns a text that tells how far it came, or raises. What repairs an input (`reseal_...`, `reframe`) puts
right what would stop it at the door, a digest, a magic or a length, so that what lies behind meets hostile bytes too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import socket
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
from xxhash import xxh3_64_intdigest

from memkv_engines import config, secret
from memkv_engines.chunk import codec
from memkv_engines.chunk.checksum import header_digest
from memkv_engines.chunk.protection import Protection
from memkv_engines.cli.doctor import gpu, machine, storage
from memkv_engines.cli.doctor.finding import Host
from memkv_engines.cli.patch import diff
from memkv_engines.errors import (
    ChunkError,
    ConfigError,
    IdentityError,
    IoServiceError,
    PatchError,
)
from memkv_engines.keys import ChunkName, Namespace, namespace_folder_of
from memkv_engines.offload import messages
from memkv_engines.offload.channel import EngineEnd, ServiceEnd
from memkv_engines.offload.pages import MappedPages
from memkv_engines.offload.service import IoService
from memkv_engines.tier import directory as tier_directory
from memkv_engines.tier import policy, records, striped, usage
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.transports import nixl_install, topology
from memkv_engines.transports.posix import BUFFERED, ModeReport
from tests.fast.io_samples import BLOCKS_PER_CHUNK, block_outermost, make_run, make_store
from tests.fast.samples import NAMESPACE, SHARD, chain, make_chunk

logging.getLogger("memkv_engines").setLevel(logging.CRITICAL)

MEMORY = Path("/dev/shm")


@cache
def folder() -> Path:
    """A folder for files that parsers read, in memory where there is any; goes with the process."""
    made = tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None)
    _KEPT.append(made)
    return Path(made.name)


_KEPT: list[Any] = []


@cache
def folder_fd(name: str = "") -> int:
    """A descriptor of it, or of a folder in it."""
    (folder() / name).mkdir(exist_ok=True)
    return os.open(folder() / name, os.O_RDONLY)


def written(name: str, data: bytes) -> None:
    """Put a file there."""
    (folder() / name).write_bytes(data)


# --------------------------------------------------------------------------------------------------------------- chunks


PROTECTIONS = tuple(Protection(bytes(range(32)), encrypt=encrypt) for encrypt in (False, True))


def parse_chunk(data: bytes) -> str:
    header = codec.decode_header(data)
    return f"{read_blocks(header, data)} {header.geometry.block_count > 1}"


def parse_protected_chunk(data: bytes) -> str:
    """As those with a key read it, and tools."""
    header = codec.read_header(data)
    kept = [ChunkError("not protected")]
    for protection in PROTECTIONS:
        try:
            return read_blocks(codec.decode_header(data, protection), data)
        except ChunkError as error:
            kept.append(error)
    with contextlib.suppress(ChunkError):
        codec.authenticated(header, PROTECTIONS[0])
    raise kept[-1]


def read_blocks(header: codec.ChunkHeader, data: bytes) -> str:
    """Hold a header against itself, and verify all of its blocks that are there."""
    geometry = header.geometry
    assert header.encode() == data[: geometry.header_bytes], "two headers for one chunk"
    codec.check_header(header, header.key.namespace_digest, header.key.name, geometry, [header.key.first_hash])
    assert ChunkName.parse(header.key.name.text) == header.key.name
    if len(data) < geometry.object_bytes:
        return "header"
    payload = memoryview(bytearray(data))[geometry.header_bytes : geometry.object_bytes]
    return f"bad block {codec.verify_blocks(header, 0, geometry.block_count, payload)}"


def reseal_header(data: bytes) -> bytes:
    """With the magic, the version, a length that fits, and the digest of what is there."""
    body = bytearray(data.ljust(8192, b"\0"))
    body[:10] = codec.MAGIC + (1).to_bytes(2, "little")
    header_bytes = min(len(body) // 4096, max(1, int.from_bytes(body[12:16], "little") // 4096)) * 4096
    body[12:16] = header_bytes.to_bytes(4, "little")
    start, end = 512 - 16, 512
    body[start:end] = header_digest([bytes(body[:start]), bytes(body[end:header_bytes])])
    return bytes(body)


def chunk_seeds(protection: Protection | None = None) -> tuple[bytes, ...]:
    made = []
    for count, size, holes in ((1, 300, 0), (4, 500, 2), (40, 7, 0)):
        plain, payload = make_chunk(count, size, holes=holes)
        hashes = [block.chain_hash for block in plain.blocks]
        header = codec.build_header(plain.key, 16, size, hashes, 7, memoryview(payload), protection)
        made.append(header.encode() + bytes(payload))
    return tuple(made)


def parse_name(data: bytes) -> str:
    text = os.fsdecode(data)
    name = ChunkName.parse(text)
    assert name.text == text and records.parse_name(text, name.bucket) == name
    return "name"


def parse_folder(data: bytes) -> str:
    text = os.fsdecode(data)
    return f"{records.is_namespace(text)} {records.is_bucket(text)} {records.parse_name(text, 'abc')}"


# ---------------------------------------------------------------------------------------------------------- small files


def parse_manifest(data: bytes) -> str:
    folder_name = namespace_folder_of(data)
    written(records.MANIFEST, data)
    return str(type(records.read_manifest(folder_fd(), folder_name)))


def parse_policy(data: bytes) -> str:
    fd = folder_fd()
    folder_fd("ns")
    written(f"ns/{policy.POLICY}", data)
    found = policy.load_policy(fd, "ns")
    policy.save_policy(fd, "ns", found)
    assert policy.policy_of(fd, "ns") == found
    return "policy"


def parse_quotas(data: bytes) -> str:
    fd = folder_fd()
    written(policy.QUOTAS, data)
    found = policy.load_quotas(fd)
    policy.save_quotas(fd, found)
    assert policy.quotas_of(fd) == found
    return f"{len(found.tenants)} tenants"


def parse_usage(data: bytes) -> str:
    fd = folder_fd("usage")
    written(f"usage/{usage.NAME}", data)
    usage.read_count(fd)
    count = usage.UsageFile(fd)
    granted, now = count.reserve(10, 1 << 20)
    count.add(-(1 << 62))
    count.correct(77, now)
    count.close()
    return f"granted {granted}"


def reseal_usage(data: bytes) -> bytes:
    body = b"MEMKVUS2" + data[8:24].ljust(16, b"\0")
    return body + xxh3_64_intdigest(body).to_bytes(8, "little")


def parse_drive(data: bytes) -> str:
    folder_fd("drive")
    written(f"drive/{striped.ID_FILE}", data)
    return str(type(striped.drive_seed(str(folder() / "drive"), may_write=False)))


def parse_key(data: bytes) -> str:
    written("key", data)
    (folder() / "key").chmod(0o600)
    return repr(secret.read_key_file(str(folder() / "key"), "key"))


def parse_config_file(data: bytes) -> str:
    written("config.yaml", data)
    config.load_config({config.CONFIG_FILE_KEY: str(folder() / "config.yaml"), "path": "/kv"}, {}).describe()
    return "config"


def parse_config_values(data: bytes) -> str:
    """Extra configuration as an engine hands it over, and variables, both out of one JSON object."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError("not what an engine hands over")
    known = {key: value for key, value in values.items() if key != config.CONFIG_FILE_KEY}
    environ = {f"{config.ENV_PREFIX}{key.upper()}": str(value) for key, value in known.items()}
    outcome = ""
    for extra, variables in ((known, {}), ({}, environ)):
        try:
            config.load_config(extra, variables).describe()
            outcome += "config "
        except ConfigError as error:
            outcome += f"{str(error)[:20]} "
    return outcome


# ------------------------------------------------------------------------------------------------------------- messages

HASHES = chain(BLOCKS_PER_CHUNK, "hostile")
POOL = block_outermost(0, 3 * BLOCKS_PER_CHUNK, 4096)
REQUESTS = (
    messages.Setup("/kv", "auto", 0, False, 8, 1 << 28, (POOL.spec(),), 7, 9, b"c" * 16, "lru"),
    messages.Store(3, (make_store(POOL, HASHES, range(BLOCKS_PER_CHUNK)),)),
    messages.Load(4, (make_run(POOL, HASHES, range(BLOCKS_PER_CHUNK)),)),
    messages.Probe(
        5, NAMESPACE.digest, 0, BLOCKS_PER_CHUNK, 0, 0, b"".join(HASHES), (SHARD.as_tuple(),), True, 0, 8, True
    ),
    messages.Manifest(b'{"model": "tiny", "more": [1, 2.5, null, {"a": "b"}]}'),
    messages.Stop(),
)
REPLIES = (
    messages.Ready("tier", "why", ("/",), memory=messages.MemorySize(3, 4 << 20)),
    messages.LoadDone(4, (BLOCKS_PER_CHUNK,), ("",), 1, 4096, 12),
    messages.StoreDone(3, ("stored",), 4096, 4096),
    messages.InMemory((b"c" * 18,), (b"w" * 18,)),
    messages.ProbeDone(5, (messages.Segment(0, HASHES[-1][:16], 4, 0, 4, b"".join(HASHES)),), 3),
)


def parse_messages(data: bytes) -> str:
    told = []
    for decode in (messages.decode_request, messages.decode_reply):
        try:
            message = decode(data)
        except IoServiceError:
            continue
        assert decode(messages.encode(message)) == message
        told.append(type(message).__name__)
    if not told:
        raise IoServiceError("neither")
    return " ".join(told)


def parse_frames(data: bytes) -> str:
    """What comes over the channel in pieces: an engine that sends nonsense, and a service that does."""
    counts = []
    for make in (EngineEnd, ServiceEnd):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            end = make(ours)
            # More than the socket takes at once would wait for ever here.
            theirs.sendall(data[: 1 << 15])
            theirs.close()
            received: list[bytes] = []
            try:
                while part := end.receive():
                    received += part
            except IoServiceError:
                pass
            counts.append(len(received))
            assert all(len(message) <= len(data) for message in received)
    return str(counts)


def reframe(data: bytes) -> bytes:
    """As frames: the first byte tells how long each is."""
    step = 1 + (data[0] if data else 0)
    parts = [data[start : start + step] for start in range(1, len(data), step)]
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


class Served:
    """A service on threads of this process that is asked one thing after the other."""

    def __init__(self) -> None:
        self.replies: queue.SimpleQueue[messages.Reply] = queue.SimpleQueue()
        setup = messages.Setup("", "off", 0, False, 1, 8 << 20, (POOL.spec(),))
        with mock.patch.object(tier_directory, "probe_modes", lambda *_: ModeReport(BUFFERED, "not probed", {}, {})):
            tier = DirectoryTier(folder() / "served")
        self._service = IoService(setup, tier, MappedPages(), self.replies.put)
        self._service.start()
        self._number = 0
        self.guards = (POOL.memory[:4096].copy(), POOL.memory[-4096:].copy())

    def ask(self, request: messages.Request) -> messages.Reply | None:
        """Submit it under a number of its own; the answer, None for what has none."""
        if isinstance(request, (messages.Setup, messages.Stop)):
            raise IoServiceError("not for a service that runs")
        self._number += 1
        if isinstance(request, messages.Manifest):
            self._service.submit(request)
            self._service.submit(REQUESTS[3].numbered(self._number))  # type: ignore[union-attr]
        elif isinstance(request, messages.Probe):
            self._service.submit(request.numbered(self._number))
        else:
            self._service.submit(msgspec.structs.replace(request, job_id=self._number))
        while True:
            reply = self.replies.get(timeout=20)
            number = getattr(reply, "probe_id", getattr(reply, "job_id", None))
            if not isinstance(reply, messages.Gathered) and number == self._number:
                return reply


@cache
def served() -> Served:
    return Served()


def parse_request_and_serve(data: bytes) -> str:
    request = messages.decode_request(data)
    service = served()
    reply = service.ask(request)
    assert (POOL.memory[:4096] == service.guards[0]).all() and (POOL.memory[-4096:] == service.guards[1]).all()
    kinds = getattr(reply, "kinds", getattr(reply, "outcomes", ()))
    return f"{type(reply).__name__} {' '.join(kinds[:3])}"


# ------------------------------------------------------------------------------------------------------------- the rest


def parse_namespace(data: bytes) -> str:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IdentityError("not JSON") from error
    return Namespace(fields).folder[:1] if isinstance(fields, dict) else "no fields"


def parse_patch(data: bytes) -> str:
    """A patch, and a file that it is for; a zero byte between them."""
    text, _, content = data.partition(b"\0")
    patch = diff.parse(text, "hostile")
    outcome = f"{len(patch.files)} files"
    for file in patch.files:
        assert not file.path.is_absolute() and ".." not in file.path.parts
        for reverse in (False, True):
            try:
                diff.change(content, file, reverse=reverse)
                outcome += f" changed {reverse}"
            except PatchError:
                outcome += " kept"
    return outcome


class TextHost(Host):
    """A machine whose every file holds the same."""

    def __init__(self, text: str) -> None:
        super().__init__(Path("/nowhere"), {"PATH": ""})
        object.__setattr__(self, "_text", text)

    def text(self, path: str) -> str:
        return str(self._text)  # type: ignore[attr-defined]

    def output(self, *command: str) -> str:
        return str(self._text)  # type: ignore[attr-defined]


def parse_machine(data: bytes) -> str:
    """What the doctor and the choice of a transport read of the machine."""
    text = data.decode(errors="replace")
    host = TextHost(text)
    cores = machine._cores(host).verdict
    machine._huge_pages(host)
    kind, _, _ = storage.mount_of(host, Path("/a/b"))
    gpu._cufile_config(host)
    found = [finding.value for finding in gpu._topology(host)]
    worst = topology.parse_matrix(text).worst()
    lines = text.splitlines() or [""]
    near = topology.distance(topology.PciDevice("a", lines[0]), topology.PciDevice("b", lines[-1], 1))
    usable = nixl_install.why_unusable(text)[:14]
    return f"{cores} {kind[:6]} {found} {worst is None} {near} {usable}"
