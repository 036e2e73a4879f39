"""Asks a process that has imported vLLM (`engine_runner.py`) for an engine's process."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence

from tests.engines.forking import ForkedProcess

START_TIMEOUT_S = 60.0


def forked(parent: str, environment: Mapping[str, str], descriptors: Sequence[int]) -> ForkedProcess:
    """Returns a new process.

    Args:
        parent: the socket of the process to fork from, which is ready.
        environment: of the new process.
        descriptors: of requests, answers and output.
    """
    order = json.dumps({"environment": dict(environment)}).encode() + b"\n"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(START_TIMEOUT_S)
        connection.connect(parent)
        sent = socket.send_fds(connection, [order], descriptors)
        connection.sendall(order[sent:])
        answer, received, _, _ = socket.recv_fds(connection, 1 << 12, 1)
    assert received, "the forked process ended at once"
    return ForkedProcess(json.loads(answer)["pid"], received[0])
