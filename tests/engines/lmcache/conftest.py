"""LMCache in this process."""

from __future__ import annotations

import os
import warnings

os.environ.update(LMCACHE_TRACK_USAGE="false", LMCACHE_DISABLE_BANNER="1")
# Keys that another process would make as well; the plugin refuses to start without it.
os.environ["PYTHONHASHSEED"] = "0"

with warnings.catch_warnings():
    # Importing LMCache warns of its dependencies' plans, before any test's own filter applies.
    warnings.simplefilter("ignore")
    import tests.engines.lmcache.backends
    import tests.engines.lmcache.levels  # noqa: F401
