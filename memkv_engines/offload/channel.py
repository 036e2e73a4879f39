"""Length-prefixed messages over a Unix socket pair.

The engine's end never blocks: what the kernel does not take at once waits in an outbox that every poll flushes, and
a poll reads whatever has arrived. The service's end blocks.
"""

from __future__ import annotations

import select
import socket
import struct
import threading

from memkv_engines.errors import IoServiceError
from memkv_engines.limits import MAX_MESSAGE_BYTES, MAX_OUTBOX_BYTES, MIB

_LENGTH = struct.Struct("<I")
_RECEIVE_BYTES = 1 * MIB


class EngineEnd:
    """The engine's end: one thread at a time, but for ``wait``, which alone blocks and may run beside the others.

    Args:
        sock: one end of a stream socket pair.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 4 * MIB)
        self._outbox = bytearray()
        self._inbox = bytearray()
        self._flushing = threading.Lock()

    def send(self, message: bytes) -> None:
        """Queue one message and push what fits.

        Raises:
            IoServiceError: the peer is gone, or has not read for so long that the outbox is full.
        """
        if len(message) > MAX_MESSAGE_BYTES or len(self._outbox) + len(message) > MAX_OUTBOX_BYTES:
            raise IoServiceError(f"outbox full: {len(self._outbox)} B wait, {len(message)} B more")
        with self._flushing:
            self._outbox += _LENGTH.pack(len(message)) + message
        self._flush()

    def receive(self) -> list[bytes]:
        """All whole messages that have arrived.

        Raises:
            IoServiceError: the peer closed its end or sent nonsense.
        """
        self._flush()
        closed = False
        while True:
            try:
                data = self._sock.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                raise IoServiceError(f"I/O service connection failed: {error.strerror}") from error
            if not data:
                closed = True
                break
            self._inbox += data
        messages = _split(self._inbox)
        if closed and not messages:
            raise IoServiceError("the I/O service has gone")
        return messages

    def wait(self, timeout_s: float) -> bool:
        """Block until something can be read or the time is up."""
        # Not select(): an engine may hold more than the 1,024 descriptors that it can watch.
        poll = select.poll()
        poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._outbox else 0))
        events = sum(flags for _, flags in poll.poll(max(0.0, timeout_s) * 1000))
        if events & select.POLLOUT:
            self._flush()
        return bool(events & ~select.POLLOUT)

    def close(self) -> None:
        """Close this end; the service sees end-of-file and exits."""
        self._sock.close()

    def _flush(self) -> None:
        with self._flushing:
            while self._outbox:
                try:
                    sent = self._sock.send(self._outbox)
                except BlockingIOError:
                    return
                except OSError as error:
                    raise IoServiceError(f"I/O service connection failed: {error.strerror}") from error
                del self._outbox[:sent]


class ServiceEnd:
    """The service's end: ``receive`` from one thread, ``send`` from any."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(True)
        self._inbox = bytearray()
        self._lock = threading.Lock()

    def send(self, message: bytes) -> None:
        """Send one message; blocks while the engine does not read."""
        with self._lock:
            self._sock.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self) -> list[bytes]:
        """Block for at least one whole message; empty when the engine closed its end."""
        while True:
            messages = _split(self._inbox)
            if messages:
                return messages
            try:
                data = self._sock.recv(_RECEIVE_BYTES)
            except ConnectionResetError:
                return []  # The engine went away without reading all we said.
            if not data:
                return []
            self._inbox += data


def _split(inbox: bytearray) -> list[bytes]:
    messages = []
    cursor = 0
    while len(inbox) - cursor >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(inbox, cursor)
        if length > MAX_MESSAGE_BYTES:
            raise IoServiceError(f"a message of {length} B exceeds the bound of {MAX_MESSAGE_BYTES} B")
        if len(inbox) - cursor - _LENGTH.size < length:
            break
        cursor += _LENGTH.size
        messages.append(bytes(inbox[cursor : cursor + length]))
        cursor += length
    del inbox[:cursor]
    return messages
