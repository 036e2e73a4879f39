"""Real long texts that every machine with Python has: the language reference that ships with the interpreter."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Document:
    """A text with a title.

    Attributes:
        title: What it is about; different for every document.
        body: The text itself.
    """

    title: str
    body: str


def documents(count: int, min_chars: int) -> list[Document]:
    """Returns different documents of at least `min_chars` characters each, always the same ones in the same order.

    Args:
        count: How many.
        min_chars: The shortest length that will do. Chapters that are shorter are joined with the ones after them.

    Raises:
        LookupError: This Python ships with less text than that.
    """
    found: list[Document] = []
    titles: list[str] = []
    bodies: list[str] = []
    for chapter in chapters():
        titles.append(chapter.title)
        bodies.append(chapter.body)
        if sum(map(len, bodies)) >= min_chars:
            found.append(Document(" and ".join(titles), "\n\n".join(bodies)))
            titles, bodies = [], []
        if len(found) == count:
            return found
    raise LookupError(f"found only {len(found)} of {count} documents of {min_chars} characters")


def chapters() -> Iterator[Document]:
    """Yields the language reference, longest chapter first, then the docstrings of the standard library."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        yield Document(f"the chapter '{name}' of the Python reference", topics[name])
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        if text := _docstrings(path):
            yield Document(f"the module '{path.stem}' of the Python library", text)


def _docstrings(path: Path) -> str:
    """Returns all docstrings of a module, joined; empty where it has none or cannot be parsed."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners))
    return "\n\n".join(text for text in texts if text)
