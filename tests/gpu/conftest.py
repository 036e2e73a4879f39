"""Fixtures of the tests on a real device; without one every test is skipped, with the reason."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from memkv_engines.errors import GpuUnavailable
from tests.gpu.device import DeviceEngine


def reason_for_no_device() -> str:
    """Why there is no device to test on, empty if there is one."""
    from memkv_engines.gpu.driver import Driver

    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"no CUDA driver: {error}"
    if hasattr(library, "fake_cuda_report"):
        return "the fake driver is loaded in this process; run tests/gpu by itself"
    try:
        Driver(0).close()
    except GpuUnavailable as error:
        return str(error)
    return ""


@pytest.fixture(scope="session")
def device() -> None:
    """A real device."""
    reason = reason_for_no_device()
    if reason:
        pytest.skip(f"needs a CUDA device: {reason}")


@pytest.fixture
def engine(device: None) -> Iterator[DeviceEngine]:
    """An engine on the device."""
    engine = DeviceEngine()
    yield engine
    engine.close()
