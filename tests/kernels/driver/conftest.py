"""The fake driver is loaded before anything can ask for a real one; its kernels are the real PTX of sm_90."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fake_cuda.control import FakeCuda, load
from tests.kernels.driver.rig import Engine
from tests.kernels.routes import build_route

_fake = load()


@pytest.fixture(scope="session")
def fake() -> FakeCuda:
    """The loaded fake driver."""
    _fake.set_kernels(build_route("sm_90"))
    return _fake


@pytest.fixture
def engine(fake: FakeCuda) -> Iterator[Engine]:
    """An engine; at the end nothing may be left on the device, and nothing may have been done wrong."""
    engine = Engine(fake)
    yield engine
    if engine.abandoned:
        return
    engine.close()
    report = fake.report()
    assert report.violations == []
    assert not any(report.live.values()), report.live
