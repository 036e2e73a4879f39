"""No line of `gpu/` and of the GPUDirect and NIXL transports is left out, but those that are listed with a reason."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.fake_cuda.build import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("area", ["gpu", "transports"])
def test_every_line_is_executed_or_explained(area: str) -> None:
    command = [sys.executable, "-m", "tests.kernels.unexecuted", area]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "lines executed" in done.stdout
