"""What `tests/gpu` asks of kvikio and the mover on a device, on the fake driver and kvikio's compatibility path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from memkv_engines.transports.gds import GdsTransport
from tests.fake_cuda.control import load
from tests.kernels.driver.rig import Engine
from tests.kernels.routes import build_route
from tests.kernels.transports.device_files_suite import DeviceFiles


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """One for all tests: kvikio keeps its streams for ever, so the driver is reset once."""
    fake = load()
    fake.set_kernels(build_route("host"))
    engine = Engine(fake)
    yield engine
    engine.close()
    assert fake.report().violations == []


@pytest.fixture
def transport(engine: Engine) -> Iterator[GdsTransport]:
    """kvikio without GPUDirect."""
    transport = GdsTransport(gpudirect=False, threads=4)
    yield transport
    transport.close()


class TestDeviceFiles(DeviceFiles):
    """On the fake."""
