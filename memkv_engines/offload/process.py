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
import threading
import time

from memkv_engines.config import split_paths
from memkv_engines.errors import IoServiceError, MemKVError
from memkv_engines.limits import SHUTDOWN_DRAIN_TIMEOUT_S, TIER_WATCH_S
from memkv_engines.log import get_logger
from memkv_engines.offload.channel import ServiceEnd
from memkv_engines.offload.keeping import start_keepers
from memkv_engines.offload.messages import Ready, Reply, Setup, Stop, decode_request, encode
from memkv_engines.offload.pages import Pages, ProcessVmPages
from memkv_engines.offload.places import Watch, mount_point, still_there
from memkv_engines.offload.service import IoService
from memkv_engines.tier.directory import DirectoryTier
from memkv_engines.tier.striped import StripedTier, open_directories
from memkv_engines.transports.select import Policy, plan

log = get_logger(__name__)

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
        service = IoService(setup, tier, pages, lambda reply: _send(end, reply))
    except MemKVError as error:
        end.send(encode(Ready(error=str(error), error_kind=type(error).__name__)))
        return 1
    service.start()
    if not setup.read_only:
        start_keepers(tier)
    mount_points = setup.mount_points or tuple(map(mount_point, _paths(setup)))
    places = Watch(_paths(setup), mount_points)
    threading.Thread(target=_end_if_changed, args=(places,), name="memkv-watch", daemon=True).start()
    end.send(encode(Ready(tier.name, tier.mode_report.reason, mount_points, memory=service.memory)))
    return _serve(end, service, messages)


def open_tier(setup: Setup) -> DirectoryTier | StripedTier:
    """Open the directory, or the directories, a setup names, with the transport its policy chooses.

    Raises:
        TierUnavailable: no directory can be used, or none is where it was at the first start.
        ConfigError: the transport that was asked for cannot be had here.
    """
    paths = still_there(_paths(setup), setup.mount_points)
    policy = Policy(setup.transport, setup.gds, setup.nixl_plugin, setup.staging_medium)
    return open_directories(
        paths,
        direct_io=setup.direct_io,
        capacity_bytes=setup.capacity_bytes,
        read_only=setup.read_only,
        eviction=setup.eviction,
        transport=plan(policy, *paths, on_gpu=setup.kv_on_gpu, threads=setup.io_threads),
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


def _paths(setup: Setup) -> list[str]:
    return split_paths(setup.tier_path)


def _end_if_changed(places: Watch) -> None:
    """End this process when its directories are not there any more or others are; the engine starts one for those."""
    while not places.changed:
        time.sleep(TIER_WATCH_S)
    log.warning("the tier's directories have changed: the I/O process ends")
    os._exit(1)


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
