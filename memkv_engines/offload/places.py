"""Where the directories of a tier are: later starts must find them there, and an I/O process notices when they go.

Only the first start makes directories. A later one that did so might write below the mount point of a file system that
is gone, and fill the one underneath.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from memkv_engines.errors import TierUnavailable


def mount_point(path: str) -> str:
    """The nearest folder above a path, or the path itself, at which its file system is mounted; empty if there is none.

    Blocks on a mount that hangs.
    """
    here = os.path.realpath(path)
    try:
        while here != os.path.dirname(here) and os.stat(here).st_dev == os.stat(os.path.dirname(here)).st_dev:
            here = os.path.dirname(here)
    except OSError:
        return ""
    return here


def still_there(paths: Sequence[str], mount_points: Sequence[str]) -> list[str]:
    """Those of a tier's directories that are where they were.

    Args:
        paths: of the directories.
        mount_points: those of the first start, empty for one that was not there; none at all at the first start.

    Raises:
        TierUnavailable: none is.
    """
    if not mount_points:
        return list(paths)
    found = []
    for path, before in zip(paths, mount_points, strict=True):
        # One that nobody has seen so far counts as there once somebody has made it.
        if os.path.isdir(path) and before in ("", mount_point(path)):
            found.append(path)
    if not found:
        pairs = zip(paths, mount_points, strict=True)
        gone = ", ".join(f"{path} on the file system mounted at {before or 'nothing'}" for path, before in pairs)
        raise TierUnavailable(f"the tier is gone: it was {gone}")
    return found


class Watch:
    """Tells when another directory, or none, is at one of the paths, or one is back that was not there.

    Args:
        paths: of the directories.
        mount_points: as for ``still_there``.
    """

    def __init__(self, paths: Sequence[str], mount_points: Sequence[str]) -> None:
        self._paths, self._mount_points = list(paths), list(mount_points)
        self._first = self._look()

    @property
    def changed(self) -> bool:
        """Whether it is so. Blocks on a mount that hangs."""
        return self._look() != self._first

    def _look(self) -> list[tuple[int, int] | None]:
        return [self._identity(number, path) for number, path in enumerate(self._paths)]

    def _identity(self, number: int, path: str) -> tuple[int, int] | None:
        try:
            info = os.stat(path)
        except OSError:
            return None
        if self._mount_points and self._mount_points[number] not in ("", mount_point(path)):
            return None
        return info.st_dev, info.st_ino
