"""Fixtures of several modules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memkv_engines.cli import main
from tests.fast.cli_tier_samples import Directory, Run, filled
from tests.fast.direct_samples import started_direct
from tests.fast.io_samples import JobClient, quick_folder, setup_for, started, started_device
from tests.fast.service_samples import POOLS, Service
from tests.fast.tier_samples import mode_works


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


@pytest.fixture
def direct(tmp_path: Path) -> Path:
    """A folder that takes direct I/O."""
    if not mode_works(tmp_path, "direct"):
        pytest.skip("this file system takes no direct I/O")
    return tmp_path


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    """A tier directory with chunks in two namespaces."""
    return filled(tmp_path / "kv")


@pytest.fixture
def run(directory: Directory, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``memkv-engines tier`` on it; exit code and what it printed."""

    def call(what: str, *options: str, as_json: bool = True) -> tuple[int, Any]:
        code = main.main(["tier", what, str(directory.root), *options, *(["--json"] if as_json else [])])
        printed = capsys.readouterr().out
        return code, json.loads(printed) if as_json else printed

    return call
