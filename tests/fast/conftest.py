"""Fixtures of several modules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fast.io_samples import (
    setup_for,
    started,
)
from tests.fast.service_samples import POOLS, Service


@pytest.fixture(scope="module", params=["on", "off"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("kv")
    client = started(setup_for(root, list(POOLS.values())), request.param)
    yield Service(client, root, request.param)
    client.close()
