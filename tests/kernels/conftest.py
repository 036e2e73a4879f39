"""Routes that are built once per session (and kept in build/kernels/), with the compiler they need."""

from __future__ import annotations

import functools

import pytest

from tests.kernels import toolchain
from tests.kernels.copy_suite import Variant
from tests.kernels.routes import PTX_ROUTES, Route, build_route

BULK_ROUTES = tuple(name for name in PTX_ROUTES if name != "sm_80")


@functools.cache
def loaded(name: str) -> Route:
    return Route(name, build_route(name))


@pytest.fixture(scope="session", autouse=True)
def compiler() -> toolchain.Toolchain:
    """The compiler and the disassembler; gets the wheels where a machine has neither."""
    try:
        return toolchain.toolchain()
    except toolchain.ToolchainMissing:
        toolchain.install()
        return toolchain.toolchain()


@pytest.fixture(scope="session", params=["host", *PTX_ROUTES, "nvrtc"])
def route(request: pytest.FixtureRequest, compiler: toolchain.Toolchain) -> Route:
    """Every way to run the kernels."""
    return loaded(request.param)


@pytest.fixture(scope="session", params=[f"{name}-{mode}" for name in BULK_ROUTES for mode in ("eager", "lazy")])
def bulk(request: pytest.FixtureRequest, compiler: toolchain.Toolchain) -> Variant:
    """The bulk pair on every target that has it, in both modes of the copy engine."""
    name, _, mode = request.param.partition("-")
    return Variant(loaded(name), bulk=True, lazy=mode == "lazy")


@pytest.fixture(scope="session", params=["host", "sm_90"])
def searched(request: pytest.FixtureRequest, compiler: toolchain.Toolchain) -> Route:
    """Two routes for random search: the source as C++, and the PTX of one target."""
    return loaded(request.param)


@pytest.fixture(scope="session", params=["eager", "lazy"])
def searched_bulk(request: pytest.FixtureRequest, compiler: toolchain.Toolchain) -> Variant:
    """The bulk pair of one target for random search."""
    return Variant(loaded("sm_90"), bulk=True, lazy=request.param == "lazy")
