"""The targets of `hostile.py`: a parser, what it may raise, well-formed and hard inputs to begin with.

Anything that a target's `parse` raises besides its own `errors` is a crash.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from memkv_engines.errors import (
    ChunkError,
    ChunkForeign,
    ConfigError,
    IdentityError,
    IoServiceError,
    PatchError,
    TierError,
)
from memkv_engines.offload import messages
from tests.fast.samples import NAMESPACE, make_name
from tests.trust.parsers import (
    PROTECTIONS,
    REPLIES,
    REQUESTS,
    chunk_seeds,
    parse_chunk,
    parse_config_file,
    parse_config_values,
    parse_drive,
    parse_folder,
    parse_frames,
    parse_key,
    parse_machine,
    parse_manifest,
    parse_messages,
    parse_name,
    parse_namespace,
    parse_patch,
    parse_policy,
    parse_protected_chunk,
    parse_quotas,
    parse_request_and_serve,
    parse_usage,
    reframe,
    reseal_header,
    reseal_usage,
)


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        name: what it reads.
        parse: reads it.
        errors: what it may raise; those are misses and refusals.
        seeds: well-formed inputs to begin with.
        repair: makes a mutated input pass the first checks.
        share: of the inputs that a target of share 1 gets, for those that are slow.
    """

    name: str
    parse: Callable[[bytes], str]
    errors: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]
    repair: Callable[[bytes], bytes] = bytes
    share: float = 1.0


CHUNK_NAMES = tuple(make_name(count, prompt).text.encode() for count, prompt in ((4, "a"), (900, "b")))
PATCH = (
    b"A patch\n\n--- a/vllm/x.py\n+++ b/vllm/x.py\n@@ -1,3 +1,4 @@\n one\n-two\n+TWO\n+more\n three\n"
    b"@@ -7,2 +8,2 @@\n seven\n-eight\n+EIGHT\n\\ No newline at end of file\n\0one\ntwo\nthree\n4\n5\n6\nseven\neight\n"
)
MACHINE = (
    b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n29 22 0:25 / /a\\040b rw - nfs4 host:/x rw,vers=4.2\n",
    b"\x1b[4mGPU0 GPU1 NIC0 mlx5_0 CPU Affinity\x1b[0m\nGPU0  X  NV18 PIX SYS 0-31\nGPU1 NV18 X PXB NODE 0-31\n",
    b"/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/nvme/nvme0\n/sys/devices/pci0000:00/0000:00:01.0/0000:02:00.0",
    b'150000 100000 [never] madvise "allow_compat_mode" : true',
    b"1.5.0rc2+cu12",
    b"1" * 5000,
    "\N{SUPERSCRIPT TWO} 5".encode(),
)
YAML = (
    b"path: /nvme/kv\ncapacity_bytes: 10_000\ndirect_io: on\nhit_ttl_s: 6e2\nstore: no\n",
    b"path: [/nvme0/kv, /nvme1/kv]\ntenant: 2020-01-02\nweights_id: 0x1F\nload: 1:30\n",
    b"a: &a [1, 2]\nb: &b [*a, *a]\ntenant: *b\n? [x, y]\n: !!binary aGk=\n",
)
# What PyYAML answers with an error of Python's; and a few lines that nest a list a million times.
HARD_YAML = (
    b"tenant: 2020-13-45\n",
    b"[" * 5000,
    b"- " * 5000,
    b"capacity_bytes: 1" + b"0" * 5000,
    b"tenant: !!timestamp x\n",
    b"tenant: !!int ''\n",
    b"store: !!bool x\n",
    b"hit_ttl_s: 1" + b":1" * 3000 + b".0\n",
    b"tenant: [&a [x, x, x, x, x, x, x, x], "
    + b", ".join(b"&%c [%s]" % (98 + i, b", ".join([b"*%c" % (97 + i)] * 8)) for i in range(8))
    + b"]\n",
)
HARD_REQUESTS = tuple(
    messages.encode(messages.Manifest(text)) for text in (b"[" * 100_000, b'{"a":' + b"[" * 990 + b"]" * 990 + b"}")
)
JSON_CONFIG = (
    b'{"path": "/kv", "capacity_bytes": 1e9, "eviction": "lru", "store": true, "hit_ttl_s": 0.5, "tenant": "t"}',
    b'{"path": ["/a", "/b"], "io_threads": "0x10", "load": "off", "pth": null, "miss_ttl_s": NaN}',
)

TARGETS = {
    target.name: target
    for target in (
        Target("chunk", parse_chunk, (ChunkError,), chunk_seeds(), reseal_header),
        Target(
            "protected chunk",
            parse_protected_chunk,
            (ChunkError,),
            (*chunk_seeds(PROTECTIONS[0]), *chunk_seeds(PROTECTIONS[1]), *chunk_seeds()[:1]),
            reseal_header,
        ),
        Target(
            "chunk name", parse_name, (ChunkForeign,), (make_name().text.encode(), make_name(900, "b").text.encode())
        ),
        Target("names of folders", parse_folder, (), (NAMESPACE.folder.encode(), b"0af", *CHUNK_NAMES)),
        Target("manifest", parse_manifest, (ChunkForeign,), (NAMESPACE.canonical_json, b'{"tenant": "t"}', b"[[[]]]")),
        Target("namespace", parse_namespace, (IdentityError,), (NAMESPACE.canonical_json, b'{"a": [1, {"b": null}]}')),
        Target(
            "policy",
            parse_policy,
            (ConfigError,),
            (b'{"pinned": true, "priority": -5, "ttl_s": 60, "version": 1}', b"{}"),
        ),
        Target("quotas", parse_quotas, (ConfigError,), (b'{"tenants": {"a": 1, "": 5000000}, "version": 1}', b"{}")),
        Target("usage file", parse_usage, (TierError, ChunkForeign), (reseal_usage(bytes(24)),), reseal_usage),
        Target("drive id", parse_drive, (), (b"0123456789abcdef" * 2, b"01 23456789abcdef0123 456789abcd")),
        Target("key file", parse_key, (ConfigError,), (bytes(range(32)).hex().encode() + b"\n", b"0" * 64)),
        Target("configuration file", parse_config_file, (ConfigError,), (*YAML, *HARD_YAML), share=0.5),
        Target("configuration values", parse_config_values, (ConfigError,), JSON_CONFIG),
        Target("messages", parse_messages, (IoServiceError,), tuple(map(messages.encode, (*REQUESTS, *REPLIES)))),
        Target(
            "channel frames",
            parse_frames,
            (),
            (reframe(b"\x05" + bytes(range(40))), struct.pack("<I", 1 << 30) + b"x"),
            reframe,
            share=0.25,
        ),
        Target(
            "requests, served",
            parse_request_and_serve,
            (IoServiceError,),
            (*map(messages.encode, REQUESTS[1:5]), *HARD_REQUESTS),
            share=0.05,
        ),
        Target("patch", parse_patch, (PatchError,), (PATCH,)),
        Target("machine", parse_machine, (), MACHINE),
    )
}
