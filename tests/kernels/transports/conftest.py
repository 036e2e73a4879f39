"""Tests with the real NIXL and the real kvikio; no GPU. They run in the environment ``device``."""

from __future__ import annotations

import os

from tests.fake_cuda.control import load

# NIXL writes what its plugins complain of to standard error; the tests provoke a lot of that.
os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
# Before anything imports kvikio, which looks for the CUDA driver once.
load()
