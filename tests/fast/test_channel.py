"""Messages arrive whole, in order and once, however the kernel cuts them; a peer that is gone or mad is an error."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_engines.errors import IoServiceError
from memkv_engines.limits import MAX_MESSAGE_BYTES, MIB
from memkv_engines.offload import channel
from memkv_engines.offload.channel import EngineEnd, ServiceEnd


@pytest.fixture
def pair() -> Iterator[tuple[EngineEnd, socket.socket]]:
    """The engine's end, and the raw socket at the other side."""
    ours, theirs = socket.socketpair()
    end = EngineEnd(ours)
    yield end, theirs
    end.close()
    theirs.close()


def frame(message: bytes) -> bytes:
    return struct.pack("<I", len(message)) + message


messages = st.lists(st.binary(max_size=200), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(messages, st.data())
def test_any_cut_of_the_stream_gives_the_same_messages(sent: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(frame, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    ours, theirs = socket.socketpair()
    end, got = EngineEnd(ours), []
    with theirs:
        for piece in pieces:
            theirs.sendall(piece)
            got += end.receive()
    end.close()
    assert got == sent


@settings(max_examples=30, deadline=None)
@given(messages, st.integers(1, 64))
def test_the_service_gets_the_same_messages(sent: list[bytes], step: int) -> None:
    stream = b"".join(map(frame, sent))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        end = ServiceEnd(theirs)
        for start in range(0, len(stream), step):
            ours.sendall(stream[start : start + step])
        ours.shutdown(socket.SHUT_WR)
        got: list[bytes] = []
        while batch := end.receive():
            got += batch
    assert got == sent


def test_both_ends_talk(pair: tuple[EngineEnd, socket.socket]) -> None:
    engine, raw = pair
    service = ServiceEnd(raw)
    for message in (b"", b"x", b"y" * 100_000):
        engine.send(message)
        assert service.receive() == [message]
        service.send(message[::-1])
        assert engine.wait(5)
        received: list[bytes] = []
        while not received:
            received = engine.receive()
        assert received == [message]
    assert engine.receive() == []
    assert not engine.wait(0.0)


def test_what_the_kernel_does_not_take_waits_in_order(pair: tuple[EngineEnd, socket.socket]) -> None:
    engine, raw = pair
    service = ServiceEnd(raw)
    sent = [bytes([i]) * MIB for i in range(24)]
    for message in sent:
        engine.send(message)  # nobody reads yet, and yet it returns
    got: list[bytes] = []

    def read() -> None:
        while len(got) < len(sent):
            got.extend(service.receive())

    reader = threading.Thread(target=read)
    reader.start()
    while reader.is_alive():
        engine.wait(0.01)
        assert engine.receive() == []
    assert got == sent


def test_a_reader_that_never_reads_is_an_error_and_not_memory(
    pair: tuple[EngineEnd, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "MAX_OUTBOX_BYTES", 8 * MIB)
    engine, _ = pair
    with pytest.raises(IoServiceError, match="outbox full"):
        for _ in range(100):
            engine.send(bytes(MIB))
    assert len(engine._outbox) <= 8 * MIB + 4


def test_oversize_is_refused_by_whoever_sees_it(
    pair: tuple[EngineEnd, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, raw = pair
    monkeypatch.setattr(channel, "MAX_MESSAGE_BYTES", 1000)
    engine.send(bytes(1000))
    with pytest.raises(IoServiceError):
        engine.send(bytes(1001))
    raw.sendall(struct.pack("<I", 1001))
    with pytest.raises(IoServiceError, match="exceeds"):
        engine.receive()
    # A length of nonsense allocates nothing.
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(IoServiceError, match="exceeds"):
            ServiceEnd(theirs).receive()
    assert MAX_MESSAGE_BYTES < 0xFFFFFFFF


def test_last_words_are_heard_before_the_end(pair: tuple[EngineEnd, socket.socket]) -> None:
    engine, raw = pair
    raw.sendall(frame(b"last") + frame(b"words") + b"\x09\x00")
    raw.close()
    assert engine.wait(1)
    assert engine.receive() == [b"last", b"words"]
    with pytest.raises(IoServiceError, match="gone"):
        engine.receive()


def test_sending_to_nobody_is_an_error(pair: tuple[EngineEnd, socket.socket]) -> None:
    engine, raw = pair
    raw.close()
    with pytest.raises(IoServiceError):
        engine.send(b"hello")


def test_an_engine_that_goes_without_reading_is_an_end_not_an_error() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        service = ServiceEnd(theirs)
        service.send(b"never read")
        ours.close()
        assert service.receive() == []
