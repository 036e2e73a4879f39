"""A vendor's plugin in the real NIXL behind our contract, and all that such a plugin may do wrong.

Runs in a process of its own, with ``NIXL_PLUGIN_DIR`` set: NIXL looks once per process (``test_nixl_plugin.py``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memkv_engines.errors import ChunkTruncated, ConfigError, TransferOverdue, TransportError
from memkv_engines.limits import ALIGN_BYTES
from memkv_engines.transports.files import address_of
from memkv_engines.transports.nixl import NixlTransport
from tests.fast.io_samples import load, make_run, make_store, setup_for, started, store
from tests.fast.samples import aligned, chain, noise
from tests.fast.service_samples import POOL, N
from tests.fast.transport_contract import FileContract, blank

PAGE = ALIGN_BYTES


class VendorContract(FileContract):
    plugin: str
    direct: bool
    name: str

    @pytest.fixture
    def transport(self) -> Iterator[NixlTransport]:
        transport = NixlTransport(self.plugin, direct=self.direct)
        yield transport
        transport.close()

    def test_its_name_says_what_was_taken(self, transport: NixlTransport) -> None:
        assert transport.name == self.name
        assert not transport.moves_device_memory


class TestLaterDirect(VendorContract):
    plugin, direct, name = "VENDOR", True, "nixl/vendor/direct"


class TestLaterBuffered(VendorContract):
    plugin, direct, name = "VENDOR", False, "nixl/vendor/buffered"


class TestAtOnceDirect(VendorContract):
    plugin, direct, name = "ATONCE", True, "nixl/atonce/direct"


# ------------------------------------------------------------------------------------- plugins that cannot be started


@pytest.mark.parametrize(
    ("plugin", "why"),
    [
        ("NOELF", "invalid ELF header|file too short"),
        ("NOSYMBOL", "undefined symbol: vendor_runtime"),
        ("NOINIT", "it is no plugin of NIXL: it has no nixl_plugin_init"),
        ("NULLINIT", "it loads, and refuses to start"),
        ("NEWABI", r"it has plugin API version 2, and NIXL \S+ takes another"),
        ("NOENGINE", "it loads, and refuses to start"),
        ("INITERROR", "it loads, and refuses to start"),
        ("RAISES", "it loads, and refuses to start .*the vendor's device does not answer"),
        ("NOFILES", "moves DRAM_SEG, OBJ_SEG: a directory tier needs a plugin"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_a_refusal_that_says_why(plugin: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"nixl_plugin='{plugin}'.*({why})"):
        NixlTransport(plugin)


def test_a_plugin_that_is_not_in_the_folder_is_told_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"no libplugin_POSIX\.so in .*; there are .*VENDOR"):
        NixlTransport("POSIX")


# ---------------------------------------------------------------------------------------- transfers that do not work


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "object"
    path.write_bytes(noise(4 * PAGE))
    return path


def opened(transport: NixlTransport, path: Path) -> object:
    return transport.attach(os.open(path, os.O_RDWR | os.O_CLOEXEC), writable=True)


@pytest.mark.parametrize("plugin", ["FAILPOST", "FAILLATER", "THROWS"])
def test_a_transfer_that_fails_is_an_error_and_the_next_one_is_not_refused(plugin: str, path: Path) -> None:
    transport = NixlTransport(plugin, direct=False)
    handle = opened(transport, path)
    for _ in range(3):
        with pytest.raises(TransportError) as caught:
            transport.read(handle, [blank(PAGE), blank(PAGE)], 0)
        assert not isinstance(caught.value, TransferOverdue), "nothing is under way any more"
        with pytest.raises(TransportError):
            transport.write(handle, [aligned(noise(PAGE, 1))], 0)
    transport.detach(handle)
    transport.close()
    assert path.read_bytes() == noise(4 * PAGE)


def test_a_transfer_that_does_not_end_is_withheld_until_it_is_seen_to_end(path: Path, tmp_path: Path) -> None:
    until = tmp_path / "until"
    transport = NixlTransport("LATE", direct=False, options={"until": str(until)}, timeout_s=0.1)
    handle, pool = opened(transport, path), blank(4 * PAGE)
    transport.register(address_of(pool), len(pool))
    with pytest.raises(TransferOverdue, match="by LATE are not done after") as caught:
        transport.read(handle, [pool[:PAGE], pool[2 * PAGE : 3 * PAGE]], 0)
    assert not caught.value.ended()
    with pytest.raises(TransportError, match="overdue transfer may still write"):
        transport.read(handle, [pool[PAGE // 2 : PAGE]], 0)
    transport.detach(handle)
    os.fstat(handle.fd)  # type: ignore[attr-defined] # still open: its number may not become another file's
    until.touch()
    deadline = time.monotonic() + 10
    while not caught.value.ended():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert bytes(pool[:PAGE]) + bytes(pool[2 * PAGE : 3 * PAGE]) == noise(4 * PAGE)[: 2 * PAGE], "they landed late"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle.fd)  # type: ignore[attr-defined]
    transport.close()


def test_a_short_file_is_truncated_whatever_the_plugin_reports(path: Path) -> None:
    transport = NixlTransport("SHORT", direct=False)
    handle = opened(transport, path)
    with pytest.raises(ChunkTruncated):
        transport.read(handle, [blank(5 * PAGE)], 0)
    transport.detach(handle)
    transport.close()


def test_the_interface_cannot_tell_a_short_transfer() -> None:
    """No count comes back, so that half of the bytes pass for all of them here; the digests of a chunk find it."""
    transport = NixlTransport("SHORT", direct=False)
    fd = os.memfd_create("short")
    os.pwrite(fd, noise(2 * PAGE), 0)
    handle, view = transport.attach(fd), blank(2 * PAGE)
    transport.register(address_of(view), len(view))
    transport.read(handle, [view], 0)
    assert bytes(view) == noise(2 * PAGE)[:PAGE] + b"\xee" * PAGE
    transport.detach(handle)
    transport.close()


# ------------------------------------------------------------------------------------- through the configuration key


@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.parametrize("plugin", ["VENDOR", "ATONCE"])
def test_chunks_go_through_the_plugin_that_the_key_names(tmp_path: Path, plugin: str, mode: str) -> None:
    setup = setup_for(tmp_path / "kv", [POOL], transport="nixl", nixl_plugin=plugin, direct_io="on")
    client = started(setup, mode)
    assert client.ready.tier_name == f"directory(nixl/{plugin.lower()}/direct)"
    hashes = chain(N, "vendor")
    assert store(client, make_store(POOL, hashes, range(N))) == ("stored",)
    assert load(client, make_run(POOL, hashes, range(12, 16))).kinds == ("",)
    assert [POOL.block(12 + i) for i in range(N)] == [POOL.block(i) for i in range(N)]
    client.close()


FAILING = ["FAILPOST", "FAILLATER", "THROWS"]


@pytest.mark.parametrize("plugin", [*FAILING, "SHORT"])
def test_a_plugin_that_moves_nothing_right_is_a_refusal_to_start(tmp_path: Path, plugin: str) -> None:
    setup = setup_for(tmp_path, [POOL], transport="nixl", nixl_plugin=plugin)
    with pytest.raises(ConfigError, match=rf"nixl/{plugin.lower()}/buffered does not work in the tier's directory"):
        started(setup, "off")


@pytest.fixture
def well(request: pytest.FixtureRequest) -> Iterator[Path]:
    """While this file is there, the plugin of the test's parameter works."""
    file = Path(os.environ["NIXL_PLUGIN_DIR"]) / f"libplugin_{request.getfixturevalue('plugin')}.so.well"
    file.touch()
    yield file
    file.unlink(missing_ok=True)


@pytest.mark.parametrize("plugin", [*FAILING, "SHORT"])
def test_a_plugin_that_fails_later_gives_misses_and_no_wrong_byte_and_works_again(
    tmp_path: Path, plugin: str, well: Path
) -> None:
    client = started(setup_for(tmp_path, [POOL], transport="nixl", nixl_plugin=plugin), "off")
    hashes = chain(N, plugin)
    assert store(client, make_store(POOL, hashes, range(N))) == ("stored",)
    before = POOL.memory.copy()
    well.unlink()
    for _ in range(3):
        result = load(client, make_run(POOL, hashes, range(12, 16)))
        assert result.kinds != ("",)
        # Of half a chunk the leading blocks are right, and no other page is touched.
        assert result.good_blocks[0] in ((0, N // 2) if plugin == "SHORT" else (0,))
        before = POOL.with_copies(before, {12 + i: i for i in range(result.good_blocks[0])})
        assert (POOL.memory == before).all()
    if plugin != "SHORT":  # Half a chunk passes for a stored one: who reads it finds out.
        assert store(client, make_store(POOL, chain(N, f"new {plugin}"), range(N))) == ("failed",)
    well.touch()
    fresh = chain(N, f"again {plugin}")
    assert store(client, make_store(POOL, fresh, range(N))) == ("stored",)
    assert load(client, make_run(POOL, fresh, range(12, 16))).kinds == ("",)
    if plugin != "SHORT":
        assert load(client, make_run(POOL, hashes, range(12, 16))).kinds == ("",), "a failed read removes nothing"
    client.close()
