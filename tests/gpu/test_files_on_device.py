"""kvikio with and without GPUDirect Storage on a real device. Not run on a GPU yet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from memkv_engines.errors import ConfigError
from memkv_engines.transports.gds import COMPAT, GPUDIRECT, GdsTransport, what_gpudirect_lacks
from tests.gpu.device import DeviceEngine
from tests.kernels.transports.device_files_suite import DeviceFiles

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[COMPAT, GPUDIRECT])
def transport(request: pytest.FixtureRequest, engine: DeviceEngine) -> Iterator[GdsTransport]:
    """Each way in turn; GPUDirect only where the machine has it (`TMPDIR` must lie on a drive that it serves)."""
    gpudirect = request.param == GPUDIRECT
    lacks = what_gpudirect_lacks() if gpudirect else []
    if lacks:
        pytest.skip(f"GPUDirect Storage lacks {'; '.join(lacks)}")
    transport = GdsTransport(gpudirect=gpudirect, threads=4)
    assert transport.name == request.param
    yield transport
    transport.close()


class TestDeviceFiles(DeviceFiles):
    """On the device."""


def test_gpudirect_is_had_or_refused_with_what_is_missing(engine: DeviceEngine) -> None:
    try:
        transport = GdsTransport(gpudirect=True)
    except ConfigError as error:
        assert "GPUDirect Storage lacks" in str(error)
    else:
        assert transport.name == GPUDIRECT
        transport.close()
