"""Gather and scatter on every route: the functional suite."""

from __future__ import annotations

import pytest

from tests.kernels.copy_suite import BULK, ORDINARY, Check, Variant
from tests.kernels.routes import Route


@pytest.mark.parametrize("check", ORDINARY, ids=lambda check: check.__name__)
def test_ordinary_pair(route: Route, check: Check) -> None:
    check(Variant(route))


@pytest.mark.parametrize("check", BULK, ids=lambda check: check.__name__)
def test_bulk_pair(bulk: Variant, check: Check) -> None:
    check(bulk)
