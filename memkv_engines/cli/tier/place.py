"""The directories a command works in, opened by descriptor, and the namespaces it names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from memkv_engines.config import split_paths
from memkv_engines.errors import ConfigError, TierUnavailable
from memkv_engines.tier import listing


@dataclass
class Root:
    """One open tier directory.

    Attributes:
        path: as it was given.
        fd: its descriptor.
        owners: users whose files are chunks here: this one, the administrator, and who owns the directory.
        unread: folders that could not be listed, with the reason.
        held_bytes: of the chunks that a command went through and left.
    """

    path: str
    fd: int
    owners: frozenset[int]
    unread: list[tuple[str, str]] = field(default_factory=list)
    held_bytes: int = 0

    def note(self, place: str, error: OSError) -> None:
        """Remember a folder that could not be listed."""
        self.unread.append((place, error.strerror or str(error)))


@contextlib.contextmanager
def open_roots(path: str) -> Iterator[list[Root]]:
    """Open every directory of a path.

    Raises:
        ConfigError: it names none.
        TierUnavailable: one cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        roots = []
        parts = split_paths(path)
        if not parts:
            raise ConfigError("no directory is given: name the one that engines have as path")
        for part in parts:
            try:
                fd = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) else str(error)
                raise TierUnavailable(f"{part!r} cannot be opened as a tier directory: {why}") from error
            stack.callback(os.close, fd)
            roots.append(Root(part, fd, frozenset({os.geteuid(), 0, os.fstat(fd).st_uid})))
        yield roots


def chosen(root: Root, wanted: Sequence[str]) -> list[str]:
    """The namespaces of a directory, or those that were named, by a prefix maybe.

    Raises:
        ConfigError: a prefix names more than one.
    """
    folders = listing.namespaces(root.fd, root.note)
    if not wanted:
        return folders
    found = set()
    for prefix in wanted:
        matches = [folder for folder in folders if prefix and folder.startswith(prefix)]
        if len(matches) > 1:
            raise ConfigError(
                f"--namespace {prefix!r} names {len(matches)} namespaces, as {matches[:2]}: give more of it"
            )
        found.update(matches)
    return sorted(found)


def check_named(roots: Sequence[Root], wanted: Sequence[str]) -> None:
    """Every namespace that was named is in one of the directories at least.

    Raises:
        ConfigError: one is not.
    """
    for prefix in wanted:
        if not any(chosen(root, [prefix]) for root in roots):
            raise ConfigError(f"--namespace {prefix!r} names none here: `tier ls` shows which there are")
