"""What the engine's side is told of its jobs, and what of it is counted."""

from __future__ import annotations

from dataclasses import dataclass, field

from memkv_engines.metrics import COUNTERS, Counters
from memkv_engines.offload.messages import IN_TIER, STOPPED, LoadDone, StoreDone

_MISS_COUNTERS = frozenset(name for name in COUNTERS if name.startswith("miss_"))
_STORE_COUNTERS = {
    "stored": "store_chunks",
    "present": "store_present",
    "shed": "store_shed",
    "full": "store_full",
    "failed": "store_failed",
}


@dataclass(frozen=True)
class LoadResult:
    """Answer to a load: per run its good leading blocks and why it stopped there.

    ``read_bytes`` were read from the tier, and ``memory_bytes`` taken from the level of memory before it, in
    ``seconds`` from its submission on; 0 where that is not known.
    """

    job_id: int
    good_blocks: tuple[int, ...]
    kinds: tuple[str, ...]
    read_bytes: int = field(default=0, compare=False)
    seconds: float = field(default=0.0, compare=False)
    memory_bytes: int = field(default=0, compare=False)

    @classmethod
    def of(cls, reply: LoadDone) -> LoadResult:
        """From the service's answer."""
        seconds = reply.elapsed_us / 1e6
        return cls(reply.job_id, reply.good_blocks, reply.kinds, reply.read_bytes, seconds, reply.memory_bytes)

    @property
    def measures(self) -> bool:
        """Whether it tells how fast loads are: nothing was wrong, though it may have been stopped."""
        return self.read_bytes + self.memory_bytes > 0 and not {*self.kinds} - {"", STOPPED}


@dataclass(frozen=True)
class StoreResult:
    """Answer to a store: per chunk ``stored | present | shed | full | failed``."""

    job_id: int
    outcomes: tuple[str, ...]

    @property
    def lost(self) -> list[str]:
        """Outcomes of the chunks that are not in the tier, in their order."""
        return [outcome for outcome in self.outcomes if outcome not in IN_TIER]


def count_load(counters: Counters, reply: LoadDone) -> None:
    """Count a load that was answered."""
    count = counters.add
    count("load_jobs")
    count("load_blocks", sum(reply.good_blocks))
    count("load_bytes", reply.read_bytes)
    count("load_memory_bytes", reply.memory_bytes)
    count("load_microseconds", reply.elapsed_us)
    count("load_chunks", reply.chunks)
    count("load_rereads", reply.reread)
    if STOPPED in reply.kinds:
        count("load_stopped")
    failures = [kind for kind in reply.kinds if kind and kind != STOPPED]
    if failures:
        count("load_jobs_failed")
    for kind in failures:
        count(f"miss_{kind}" if f"miss_{kind}" in _MISS_COUNTERS else "miss_io_error")


def count_store(counters: Counters, reply: StoreDone) -> None:
    """Count a store that was answered."""
    for outcome in reply.outcomes:
        counters.add(_STORE_COUNTERS.get(outcome, "store_failed"))
    counters.add("store_bytes", reply.written_bytes)
    counters.add("store_payload_bytes", reply.payload_bytes)
