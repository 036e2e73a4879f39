"""Which page came before which, as far as this process has seen.

A look-up that starts inside a chunk needs the hashes of the pages before it. SGLang passes hashes of earlier pages,
but with a prefetch (0.5.23) only those of the matched node's ancestors, not of the node itself, and in the oldest
interface none. What was stored here, and the block tables of chunks that were found, fill the gap. A wrong or missing
link costs a miss: every block's hash is verified.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence

from memkv_engines.limits import MAX_REMEMBERED_PAGES


class ChainMemory:
    """Predecessors of page hashes; bounded, thread-safe."""

    def __init__(self, capacity: int = MAX_REMEMBERED_PAGES) -> None:
        self._capacity = capacity
        self._parents: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def learn(self, chain: Sequence[bytes]) -> None:
        """Take in consecutive hashes."""
        with self._lock:
            for before, page in itertools.pairwise(chain):
                self._parents[page] = before
                self._parents.move_to_end(page)
            while len(self._parents) > self._capacity:
                self._parents.popitem(last=False)

    def context(self, page: bytes, passed: Sequence[bytes], count: int) -> list[bytes]:
        """Up to so many hashes before a page, in order, from what was seen and what SGLang passes.

        What was seen is trusted more than what is passed, which may leave out the pages just before; but it may begin
        later.

        Args:
            page: the page.
            passed: earlier pages as SGLang names them, in order, from the prompt's start on.
            count: how far back to go.
        """
        seen = self.before(page, count)
        if not seen:
            return list(passed[-count:]) if count else []
        missing = count - len(seen)
        if missing and seen[0] in passed:
            end = len(passed) - 1 - passed[::-1].index(seen[0])
            return [*passed[max(0, end - missing) : end], *seen]
        return seen

    def before(self, page: bytes, count: int) -> list[bytes]:
        """Up to so many hashes before a page, in order, as far as they were seen."""
        found: list[bytes] = []
        with self._lock:
            while len(found) < count and page in self._parents:
                page = self._parents[page]
                found.append(page)
        return found[::-1]
