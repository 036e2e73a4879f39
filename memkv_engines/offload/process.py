"""The I/O service's child process: ``python -m memkv_engines.offload.process FD``.

It is started with a fresh interpreter (never forked: the engine has threads), talks over the inherited socket, dies
with the engine, and can be killed at any moment: after ``waitpid`` no write into the engine's memory is possible.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys

from memkv_engines.errors import IoServiceError, MemKVError
from memkv_engines.limits import SHUTDOWN_DRAIN_TIMEOUT_S
from memkv_engines.offload.channel import ServiceEnd
from memkv_engines.offload.keeping import Keeper
from memkv_engines.offload.messages import Ready, Reply, Setup, Stop, decode_request, encode
from memkv_engines.offload.pages import Pages, ProcessVmPages
from memkv_engines.offload.service import IoService
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.transports.select import Policy, plan

_PR_SET_PDEATHSIG = 1
# A thread that comes back from the device must not wait the usual 5 ms (longer than a chunk takes) to start the next.
_SWITCH_INTERVAL_S = 0.0005


def main(argv: list[str]) -> int:
    """Serve until the engine says stop or goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the engine, which stops us in order.
    if argv[2:] == ["die-with-parent"]:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _leave_engine_cores()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    end = ServiceEnd(socket.socket(fileno=int(argv[1])))
    messages = end.receive()
    if not messages:
        return 0
    setup = decode_request(messages.pop(0))
    if not isinstance(setup, Setup):
        raise IoServiceError("the first message must be the setup")
    if setup.engine_pid and os.getppid() != setup.engine_pid:
        return 0  # The engine died before we asked to die with it.
    try:
        tier = open_tier(setup)
        pages = _connect_pages(setup)
    except MemKVError as error:
        end.send(encode(Ready(error=str(error), error_kind=type(error).__name__)))
        return 1
    service = IoService(setup, tier, pages, lambda reply: _send(end, reply))
    service.start()
    if not setup.read_only:
        Keeper(tier)
    end.send(encode(Ready(tier_name=tier.name, mode_reason=tier.mode_report.reason)))
    return _serve(end, service, messages)


def open_tier(setup: Setup) -> DirectoryTier:
    """Open the directory tier a setup names, with the transport its policy chooses.

    Raises:
        TierUnavailable: the directory cannot be used.
        ConfigError: the transport that was asked for cannot be had here.
    """
    policy = Policy(setup.transport, setup.gds, setup.nixl_plugin, setup.staging_medium)
    return DirectoryTier(
        setup.tier_path,
        direct_io=setup.direct_io,
        capacity_bytes=setup.capacity_bytes,
        read_only=setup.read_only,
        eviction=setup.eviction,
        transport=plan(policy, setup.tier_path, on_gpu=setup.kv_on_gpu, threads=setup.io_threads),
    )


def _serve(end: ServiceEnd, service: IoService, messages: list[bytes]) -> int:
    while True:
        for data in messages:
            message = decode_request(data)
            if isinstance(message, Stop):
                service.stop(SHUTDOWN_DRAIN_TIMEOUT_S)
                return 0
            service.submit(message)
        messages = end.receive()
        if not messages:
            return 0


def _connect_pages(setup: Setup) -> Pages | None:
    if not setup.groups:
        return None
    pages = ProcessVmPages(setup.engine_pid)
    if pages.read(setup.canary_address, len(setup.canary)) != setup.canary:
        raise IoServiceError("the engine's memory reads differently from outside")
    return pages


def _send(end: ServiceEnd, reply: Reply) -> None:
    # The engine may be gone; the main thread sees end-of-file and ends the process.
    with contextlib.suppress(OSError):
        end.send(encode(reply))


def _leave_engine_cores() -> None:
    # Engines pin their threads before they start us; inheriting that would put all I/O on one busy core.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
