"""What a file itself is asked for where a transport hides the system's error number."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from memkv_engines.errors import ChunkMissing, ChunkTruncated, MemKVError, TierFull, TransportError
from memkv_engines.limits import ALIGN_BYTES
from memkv_engines.transports import files
from memkv_engines.transports.base import DeviceView
from memkv_engines.transports.files import address_of, check_reach, why_read_failed, why_write_failed
from tests.fast.samples import aligned, noise

PAGE = ALIGN_BYTES


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "object", os.O_RDWR | os.O_CREAT)
    os.write(fd, noise(2 * PAGE))
    yield fd
    os.close(fd)


def fail(monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    def failing(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, call, failing)


def test_how_far_a_file_reaches(fd: int) -> None:
    check_reach(fd, 0)
    check_reach(fd, 2 * PAGE)
    with pytest.raises(ChunkTruncated, match="ends 1 B early"):
        check_reach(fd, 2 * PAGE + 1)


@pytest.mark.parametrize(("code", "ours"), [(errno.ESTALE, ChunkMissing), (errno.EIO, TransportError)])
def test_a_file_that_cannot_be_asked(fd: int, code: int, ours: type[MemKVError]) -> None:
    view = aligned(bytes(PAGE))
    # For a moment only: pytest itself needs fstat.
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, "fstat", code)
        error = why_read_failed(fd, [view], 0, 1, "NIXL_ERR_BACKEND")
        try:
            check_reach(fd, PAGE)
            raised: object = None
        except MemKVError as caught:
            raised = caught
    assert type(error) is type(raised) is ours


def test_a_read_that_failed_for_another_reason_keeps_its_words(fd: int) -> None:
    error = why_read_failed(fd, [aligned(bytes(PAGE))], 0, PAGE, "NIXL_ERR_BACKEND")
    assert (type(error), str(error)) == (TransportError, "read failed: NIXL_ERR_BACKEND")
    assert type(why_read_failed(fd, [aligned(bytes(PAGE))], 2 * PAGE, PAGE, "")) is ChunkTruncated


@pytest.mark.parametrize("code", sorted(files.NO_ROOM))
def test_a_write_that_failed_for_want_of_room(fd: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(why_write_failed(fd, [aligned(bytes(PAGE))], 0, PAGE, "BACKEND")) is TransportError
    fail(monkeypatch, "posix_fallocate", code)
    assert type(why_write_failed(fd, [aligned(bytes(PAGE))], 0, PAGE, "BACKEND")) is TierFull


def test_a_write_that_failed_and_cannot_be_asked_about(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "posix_fallocate", errno.EOPNOTSUPP)
    error = why_write_failed(fd, [aligned(bytes(PAGE))], 0, PAGE, "BACKEND")
    assert str(error) == "write failed: BACKEND"


@pytest.mark.parametrize(
    ("views", "offset", "says"),
    [
        ([aligned(bytes(2 * PAGE))[1:]], 0, f"{2 * PAGE - 1} B at address"),
        ([aligned(bytes(PAGE)), aligned(bytes(100))], 0, "100 B at address"),
        ([aligned(bytes(PAGE))], 7, "for offset 7"),
        ([DeviceView(PAGE + 512, PAGE)], 0, "address 0x1200"),
    ],
)
def test_misalignment_is_told_with_its_remedy(fd: int, views: list[memoryview], offset: int, says: str) -> None:
    error = str(why_write_failed(fd, views, offset, PAGE, "BACKEND"))
    assert says in error
    assert "multiples of 4096 B" in error and "direct_io=off" in error
    assert str(why_write_failed(fd, views, offset, 1, "BACKEND")) == "write failed: BACKEND"


def test_addresses() -> None:
    view = aligned(bytes(PAGE))
    assert address_of(view) % PAGE == 0
    assert address_of(view[5:]) == address_of(view.toreadonly()) + 5
    assert address_of(memoryview(b"")) == 0
    assert address_of(DeviceView(77, 3)) == 77
