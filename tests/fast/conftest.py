"""Fixtures of several modules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fast.direct_samples import started_direct
from tests.fast.io_samples import JobClient, quick_folder, setup_for, started, started_device
from tests.fast.service_samples import POOLS, Service


@pytest.fixture(scope="module", params=["on", "off", "device", "direct"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with quick_folder() as root:
        setup = setup_for(root, list(POOLS.values()))
        if request.param == "device":
            client: JobClient = started_device(setup)[0]
        elif request.param == "direct":
            client = started_direct(setup)[0]
        else:
            client = started(setup, request.param)
        yield Service(client, root, request.param)
        client.close()


@pytest.fixture
def quick() -> Iterator[Path]:
    """A folder in memory where there is one."""
    with quick_folder() as folder:
        yield folder
