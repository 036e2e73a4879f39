"""What LMCache needs in the environment before it is imported."""

from __future__ import annotations

import os

os.environ.update(LMCACHE_TRACK_USAGE="false", LMCACHE_DISABLE_BANNER="1")
# Keys that another process would make as well; the plugin refuses to start without it.
os.environ["PYTHONHASHSEED"] = "0"
