"""The transport contract, once for every implementation: inherit ``TransportContract`` or ``FileContract``."""

from __future__ import annotations

import errno
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from memkv_engines.errors import ChunkTruncated, TransportError
from memkv_engines.limits import ALIGN_BYTES, MAX_IOVECS_PER_CALL
from memkv_engines.transports.base import FileTransport, Transport
from memkv_engines.transports.files import address_of
from memkv_engines.transports.memory import MemoryTransport
from tests.fast.samples import aligned, noise

PAGE = ALIGN_BYTES


def blank(length: int) -> memoryview:
    return aligned(b"\xee" * length)


class TransportContract(ABC):
    """What every transport does. Lengths and offsets are multiples of ``ALIGN_BYTES``, as tiers use them."""

    @pytest.fixture
    @abstractmethod
    def transport(self) -> Transport[Any]:
        """The transport."""

    @pytest.fixture
    @abstractmethod
    def handle(self) -> Any:
        """An empty open object."""

    @abstractmethod
    def contents(self, handle: Any) -> bytes:
        """What lies in the object, read without the transport."""

    @abstractmethod
    def cut(self, handle: Any, length: int) -> None:
        """Shorten the object behind the transport's back."""

    def test_it_says_what_it_is(self, transport: Transport[Any]) -> None:
        assert transport.name
        assert ALIGN_BYTES % transport.align_bytes == 0

    def test_what_was_written_is_read(self, transport: Transport[Any], handle: Any) -> None:
        data = noise(5 * PAGE)
        assert transport.write(handle, [aligned(data[:PAGE]), aligned(data[PAGE:])], 0) == len(data)
        assert self.contents(handle) == data
        views = [blank(3 * PAGE), blank(2 * PAGE)]
        transport.read(handle, views, 0)
        assert b"".join(views) == data

    def test_any_run_can_be_read_and_written(self, transport: Transport[Any], handle: Any) -> None:
        data = bytearray(noise(6 * PAGE))
        transport.write(handle, [aligned(bytes(data))], 0)
        data[2 * PAGE : 4 * PAGE] = noise(2 * PAGE, seed=1)
        transport.write(handle, [aligned(bytes(data[2 * PAGE : 4 * PAGE]))], 2 * PAGE)
        for first in range(6):
            for stop in range(first + 1, 7):
                view = blank((stop - first) * PAGE)
                transport.read(handle, [view], first * PAGE)
                assert view == data[first * PAGE : stop * PAGE]

    def test_writing_past_the_end_leaves_zeros(self, transport: Transport[Any], handle: Any) -> None:
        transport.write(handle, [aligned(noise(PAGE))], 2 * PAGE)
        assert self.contents(handle) == bytes(2 * PAGE) + noise(PAGE)

    def test_nothing_is_written_and_read(self, transport: Transport[Any], handle: Any) -> None:
        assert transport.write(handle, [], 0) == 0
        transport.read(handle, [], 0)
        assert self.contents(handle) == b""

    def test_more_pieces_than_one_call_takes(self, transport: Transport[Any], handle: Any) -> None:
        pieces = 2 * MAX_IOVECS_PER_CALL + 3
        unit = 512
        data = noise(pieces * unit)
        source, target = aligned(data), blank(pieces * unit)
        cuts = [slice(i * unit, (i + 1) * unit) for i in range(pieces)]
        try:
            assert transport.write(handle, [source[cut] for cut in cuts], 0) == len(data)
        except TransportError as error:
            pytest.skip(f"the file system wants larger pieces: {error}")
        transport.read(handle, [target[cut] for cut in cuts], 0)
        assert target == data == self.contents(handle)

    @pytest.mark.parametrize("length", [0, 1, 511, 512, PAGE - 1, PAGE, 2 * PAGE - 1])
    def test_a_short_object_is_truncated(self, transport: Transport[Any], handle: Any, length: int) -> None:
        transport.write(handle, [aligned(noise(2 * PAGE))], 0)
        self.cut(handle, length)
        with pytest.raises(ChunkTruncated):
            transport.read(handle, [blank(PAGE), blank(PAGE)], 0)
        with pytest.raises(ChunkTruncated):
            transport.read(handle, [blank(PAGE)], PAGE)

    def test_reading_behind_the_end_is_truncated(self, transport: Transport[Any], handle: Any) -> None:
        transport.write(handle, [aligned(noise(PAGE))], 0)
        with pytest.raises(ChunkTruncated):
            transport.read(handle, [blank(PAGE)], 64 * PAGE)

    def test_threads_share_a_transport(self, transport: Transport[Any], handle: Any) -> None:
        data = noise(16 * PAGE)
        transport.write(handle, [aligned(data)], 0)

        def read(index: int) -> bool:
            view = blank(PAGE)
            transport.read(handle, [view], index % 16 * PAGE)
            return view == data[index % 16 * PAGE :][:PAGE]

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(read, range(64)))

    @pytest.mark.parametrize("seed", range(8))
    def test_it_equals_the_reference(self, transport: Transport[Any], handle: Any, seed: int) -> None:
        choose = random.Random(seed)
        writes = [(choose.randrange(9), choose.randrange(1, 5)) for _ in range(6)]
        reference, expected = MemoryTransport(), bytearray()
        for number, (offset, pages) in enumerate(writes):
            view = aligned(noise(pages * PAGE, number))
            assert transport.write(handle, [view], offset * PAGE) == reference.write(expected, [view], offset * PAGE)
        assert self.contents(handle) == bytes(expected)


class FileContract(TransportContract):
    """What every transport over files does. A test class gives ``transport``."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        """Where the object lies."""
        return tmp_path / "object"

    @pytest.fixture
    def handle(self, transport: FileTransport[Any], path: Path) -> Iterator[Any]:
        handle = self.opened(transport, path)
        yield handle
        transport.detach(handle)

    def opened(self, transport: FileTransport[Any], path: Path) -> Any:
        """A handle of the file, made if there is none."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | transport.open_flags, 0o600)
        except OSError as error:
            pytest.skip(f"refused by this file system: {error}")
        return transport.attach(fd, writable=True)

    @pytest.fixture(autouse=True)
    def _know_the_path(self, path: Path) -> None:
        self._path = path

    def contents(self, handle: Any) -> bytes:
        return self._path.read_bytes()

    def cut(self, handle: Any, length: int) -> None:
        os.truncate(self._path, length)

    def test_detaching_closes_the_descriptor(self, transport: FileTransport[Any], path: Path) -> None:
        path.write_bytes(noise(PAGE))
        before = open_descriptors()
        for _ in range(20):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | transport.open_flags)
            handle = transport.attach(fd)
            view = blank(PAGE)
            transport.read(handle, [view], 0)
            assert view == noise(PAGE)
            transport.detach(handle)
            with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
                os.fstat(fd)
        transport.close()
        assert len(open_descriptors()) <= len(before)

    def test_a_file_is_read_after_it_was_unlinked(self, transport: FileTransport[Any], path: Path) -> None:
        path.write_bytes(noise(2 * PAGE))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | transport.open_flags)
        path.unlink()
        handle = transport.attach(fd)
        path.write_bytes(bytes(2 * PAGE))
        view = blank(2 * PAGE)
        transport.read(handle, [view], 0)
        transport.detach(handle)
        assert view == noise(2 * PAGE)

    def test_another_file_of_the_same_name_is_another_file(self, transport: FileTransport[Any], path: Path) -> None:
        for seed in range(5):
            path.unlink(missing_ok=True)
            path.write_bytes(noise(PAGE, seed))
            handle = transport.attach(os.open(path, os.O_RDONLY | os.O_CLOEXEC | transport.open_flags))
            view = blank(PAGE)
            transport.read(handle, [view], 0)
            transport.detach(handle)
            assert view == noise(PAGE, seed)

    def test_registered_memory_and_other_memory(self, transport: FileTransport[Any], handle: Any, path: Path) -> None:
        pool = blank(8 * PAGE)
        address = address_of(pool)
        transport.register(address, 4 * PAGE)
        pool[:] = noise(8 * PAGE)
        transport.write(handle, [pool[:PAGE], pool[6 * PAGE : 7 * PAGE], pool[2 * PAGE : 4 * PAGE]], 0)
        data = noise(8 * PAGE)
        written = data[:PAGE] + data[6 * PAGE : 7 * PAGE] + data[2 * PAGE : 4 * PAGE]
        assert path.read_bytes() == written
        pool[:] = b"\xee" * (8 * PAGE)
        # The second view begins in registered memory and ends in other memory.
        transport.read(handle, [pool[PAGE : 2 * PAGE], pool[3 * PAGE : 5 * PAGE], pool[7 * PAGE :]], 0)
        assert pool[PAGE : 2 * PAGE] == written[:PAGE]
        assert pool[3 * PAGE : 5 * PAGE] == written[PAGE : 3 * PAGE]
        assert pool[7 * PAGE :] == written[3 * PAGE :]
        for untouched in (0, 2, 5, 6):
            assert pool[untouched * PAGE : (untouched + 1) * PAGE] == b"\xee" * PAGE
        transport.deregister(address)
        transport.deregister(address)
        transport.read(handle, [pool[:PAGE]], 0)
        assert pool[:PAGE] == written[:PAGE]

    def test_large_transfers(self, transport: FileTransport[Any], handle: Any, path: Path) -> None:
        data = noise(9 * 1024 * PAGE // 4)
        source, target = aligned(data), blank(len(data))
        transport.register(address_of(target), len(data))
        assert transport.write(handle, [source], 0) == len(data)
        transport.read(handle, [target], 0)
        assert target == data
        transport.deregister(address_of(target))

    def test_memory_that_may_not_be_written_is_not(
        self, transport: FileTransport[Any], handle: Any, path: Path
    ) -> None:
        transport.write(handle, [aligned(noise(PAGE))], 0)
        target = blank(PAGE)
        with pytest.raises(BufferError):
            transport.read(handle, [target.toreadonly()], 0)
        assert target == b"\xee" * PAGE

    def test_a_descriptor_that_is_read_only_is_not_written(self, transport: FileTransport[Any], path: Path) -> None:
        path.write_bytes(noise(PAGE))
        handle = transport.attach(os.open(path, os.O_RDONLY | os.O_CLOEXEC | transport.open_flags))
        with pytest.raises(TransportError):
            transport.write(handle, [aligned(bytes(PAGE))], 0)
        transport.detach(handle)
        assert path.read_bytes() == noise(PAGE)

    def test_closing_twice(self, transport: FileTransport[Any], handle: Any) -> None:
        transport.close()
        transport.close()


def open_descriptors() -> list[str]:
    """What this process has open."""
    return os.listdir("/proc/self/fd")
