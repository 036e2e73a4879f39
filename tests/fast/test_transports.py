"""The transport contract for what needs no device library, and what is special to POSIX."""

from __future__ import annotations

import errno
import mmap
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from memkv_engines.errors import ChunkMissing, ChunkTruncated, TierFull, TierUnavailable, TransportError
from memkv_engines.limits import ALIGN_BYTES, KIB
from memkv_engines.transports import posix
from memkv_engines.transports.memory import MemoryTransport
from memkv_engines.transports.posix import BUFFERED, DIRECT, DONTCACHE, PosixTransport, probe_modes
from tests.fast.samples import aligned
from tests.fast.tier_samples import mode_works
from tests.fast.transport_contract import PAGE, FileContract, TransportContract, blank


class TestMemory(TransportContract):
    @pytest.fixture
    def transport(self) -> MemoryTransport:
        return MemoryTransport()

    @pytest.fixture
    def handle(self) -> bytearray:
        return bytearray()

    def contents(self, handle: bytearray) -> bytes:
        return bytes(handle)

    def cut(self, handle: bytearray, length: int) -> None:
        del handle[length:]


class PosixContract(FileContract):
    mode: str

    @pytest.fixture
    def transport(self, tmp_path: Path) -> PosixTransport:
        if not mode_works(tmp_path, self.mode):
            pytest.skip(f"this file system does not take {self.mode} I/O")
        return PosixTransport(self.mode)

    def test_a_full_device_is_a_full_tier(
        self, transport: PosixTransport, handle: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            _fail(monkeypatch, "pwritev", code)
            with pytest.raises(TierFull):
                transport.write(handle, [aligned(bytes(PAGE))], 0)

    def test_the_limit_on_file_sizes_is_a_full_tier(self, transport: PosixTransport, handle: int) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * KIB, hard))
        try:
            with pytest.raises(TierFull):
                transport.write(handle, [blank(128 * KIB)], 0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_other_errors_keep_their_words(
        self, transport: PosixTransport, handle: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _fail(monkeypatch, "pwritev", errno.EIO)
        _fail(monkeypatch, "preadv", errno.EIO)
        with pytest.raises(TransportError, match="Input/output error"):
            transport.write(handle, [aligned(bytes(PAGE))], 0)
        with pytest.raises(TransportError, match="Input/output error"):
            transport.read(handle, [blank(PAGE)], 0)
        _fail(monkeypatch, "preadv", errno.ESTALE)
        with pytest.raises(ChunkMissing):
            transport.read(handle, [blank(PAGE)], 0)


def _fail(monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(posix.os, call, fail)


class TestDirect(PosixContract):
    mode = DIRECT

    def test_it_is_called_direct_and_wants_alignment(self, transport: PosixTransport, handle: int) -> None:
        assert (transport.name, transport.align_bytes) == ("posix/direct", ALIGN_BYTES)
        with pytest.raises(TransportError, match="Invalid argument"):
            transport.write(handle, [aligned(bytes(PAGE))[:100]], 0)


class TestDontcache(PosixContract):
    mode = DONTCACHE


class TestBuffered(PosixContract):
    mode = BUFFERED

    def test_any_length_goes(self, transport: PosixTransport, handle: int) -> None:
        assert transport.align_bytes == 1
        transport.write(handle, [memoryview(b"abc"), memoryview(b"defgh")], 1)
        assert self.contents(handle) == b"\0abcdefgh"


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="fast"):
        PosixTransport("fast")


# ------------------------------------------------------------------------------------------------ choosing the mode


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def timings(monkeypatch: pytest.MonkeyPatch, speeds: dict[str, float | Exception]) -> None:
    def time_mode(_: int, transport: PosixTransport, *__: object) -> tuple[float, float]:
        speed = speeds[transport.mode]
        if isinstance(speed, Exception):
            raise speed
        return speed, speed

    monkeypatch.setattr(posix, "_time_mode", time_mode)


@pytest.mark.parametrize(
    ("speeds", "mode"),
    [
        ({DIRECT: 2.0, DONTCACHE: 1.0, BUFFERED: 1.0}, DIRECT),
        ({DIRECT: 0.95, DONTCACHE: 1.0, BUFFERED: 1.0}, DIRECT),
        ({DIRECT: 0.5, DONTCACHE: 0.9, BUFFERED: 1.0}, BUFFERED),
        ({DIRECT: OSError(errno.EINVAL, "no"), DONTCACHE: 2.0, BUFFERED: 1.0}, DONTCACHE),
        ({DIRECT: TransportError("no"), DONTCACHE: ChunkTruncated("no"), BUFFERED: 1.0}, BUFFERED),
    ],
)
def test_auto_takes_the_fastest_and_direct_when_it_is_near(
    folder: int, monkeypatch: pytest.MonkeyPatch, speeds: dict[str, float | Exception], mode: str
) -> None:
    timings(monkeypatch, speeds)
    report = probe_modes(folder)
    assert report.mode == mode
    assert mode in report.reason
    for refused in (m for m, speed in speeds.items() if isinstance(speed, Exception)):
        assert refused in report.reason
        assert refused not in report.write_gb_per_s


def test_on_means_direct_or_nothing(folder: int, monkeypatch: pytest.MonkeyPatch) -> None:
    timings(monkeypatch, {DIRECT: OSError(errno.EINVAL, "Invalid argument"), DONTCACHE: 1.0, BUFFERED: 1.0})
    with pytest.raises(TierUnavailable, match="Invalid argument"):
        probe_modes(folder, "on")
    assert probe_modes(folder, "off").mode != DIRECT


def test_a_full_device_is_reported_as_full(folder: int, monkeypatch: pytest.MonkeyPatch) -> None:
    timings(monkeypatch, dict.fromkeys((DIRECT, DONTCACHE, BUFFERED), OSError(errno.ENOSPC, "full")))
    with pytest.raises(TierFull):
        probe_modes(folder)


@pytest.mark.parametrize("direct_io", ["auto", "off", "page_cache"])
def test_a_real_probe_leaves_nothing_behind(folder: int, tmp_path: Path, direct_io: str) -> None:
    report = probe_modes(folder, direct_io, size_bytes=64 * KIB, rounds=1)
    assert report.mode in report.write_gb_per_s
    assert report.mode in report.read_gb_per_s
    assert list(tmp_path.iterdir()) == []


def test_probes_at_the_same_time_do_not_meet(folder: int) -> None:
    with ThreadPoolExecutor(4) as threads:
        probes = [threads.submit(probe_modes, folder, "off", 64 * KIB, 2) for _ in range(12)]
    assert not [p.result().reason for p in probes if "File exists" in p.result().reason]


def test_a_probe_left_by_a_dead_process_is_no_obstacle(folder: int, tmp_path: Path) -> None:
    for mode in (DIRECT, DONTCACHE, BUFFERED):
        (tmp_path / f".tmp-probe-{os.getpid()}-{mode}").touch()
    assert "File exists" not in probe_modes(folder, "off", 64 * KIB, 1).reason


def test_buffers_of_the_samples_are_aligned() -> None:
    assert mmap.PAGESIZE % PAGE == 0
    assert aligned(b"abc") == b"abc"
