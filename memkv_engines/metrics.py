"""Counters with declared names. Plain integers; the adapters hand them to the engine's metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

COUNTERS: dict[str, str] = {
    "load_jobs": "load jobs finished, successful or not",
    "load_jobs_failed": "load jobs in which at least one chunk was unusable",
    "load_chunks": "chunks read and verified",
    "load_rereads": "chunks that were wrong when read, and right when read once more",
    "load_blocks": "blocks written into the engine's pages",
    "load_bytes": "bytes read from the tier, headers and padding included",
    "load_memory_bytes": "bytes of chunks taken from the level of memory before the tier, without a read",
    "load_microseconds": "time from submission to completion, summed over load jobs",
    "store_chunks": "chunks published",
    "store_blocks": "blocks published",
    "store_bytes": "bytes submitted to the device for chunks, headers included",
    "store_payload_bytes": "payload bytes submitted to the device, padding included",
    "store_present": "chunks not written because the tier already had them",
    "store_shed": "chunks that found no room in staging; each is offered again while its pages hold it",
    "store_leftovers": "shed chunks that were offered again after their request had ended",
    "store_leftovers_lost": "shed chunks given up: their pages were needed, or there was no room for ten seconds",
    "store_full": "chunks dropped because the tier was full",
    "store_failed": "chunks dropped because of an I/O error",
    "gather_microseconds": "time the engine waited for gathers at the step fence",
    "miss_missing": "runs of a load that met no object",
    "miss_truncated": "runs that met a short object",
    "miss_damaged": "runs that met a wrong checksum",
    "miss_foreign": "runs that met an object of another namespace, key or geometry",
    "miss_version": "runs that met an unknown format version",
    "miss_unauthenticated": "runs that met an object without a MAC although there is a key",
    "miss_other_key": "runs that met an object protected with another key",
    "miss_forged": "runs that met an object made or changed by somebody without the key",
    "miss_io_error": "runs that failed in the transport",
    "miss_io_service": "runs lost because the I/O service failed or ran past its deadline",
    "probe_requests": "look-ups sent to the background prober",
    "probe_timeouts": "look-ups that ran past their deadline and became misses",
    "lookup_hit_tokens": "tokens advertised to the engine as external hits",
    "load_stopped": "loads that were stopped because recomputing the rest was faster",
    "gate_faster": "hits loaded because recomputing was predicted to be slower",
    "gate_negligible": "hits loaded because that was predicted to take next to no time",
    "gate_unmeasured": "hits loaded because no load had been measured yet",
    "gate_trial": "hits of which a leading part was loaded to measure the tier again",
    "gate_memory": "hits of which only what lies in memory was loaded, which may be all",
    "gate_slower": "hits not loaded because recomputing was predicted to be faster",
    "gate_declined_tokens": "tokens of hits that were not loaded for that reason",
    "gate_flips": "times the cost gate changed its mind about hits of some length",
    "gate_error_microseconds": "difference between predicted and actual time, summed over loads that were predicted",
    "io_service_restarts": "times the I/O service was started again",
    "boundary_errors": "unexpected exceptions stopped at the engine boundary",
}


class Counters:
    """A bag of the declared counters. Not thread-safe: each owner has its own and they are merged."""

    def __init__(self) -> None:
        self._values: dict[str, int] = {}

    def add(self, name: str, amount: int = 1) -> None:
        """Increase a declared counter.

        Raises:
            KeyError: ``name`` is not declared in ``COUNTERS`` (our bug, not the user's).
        """
        if name not in COUNTERS:
            raise KeyError(f"undeclared counter {name!r}")
        self._values[name] = self._values.get(name, 0) + amount

    def merge(self, other: Mapping[str, int]) -> None:
        """Add another bag; unknown names (a newer peer) are ignored."""
        for name, amount in other.items():
            if name in COUNTERS:
                self._values[name] = self._values.get(name, 0) + int(amount)

    def drain(self) -> dict[str, int]:
        """Return what was counted since the last drain and start again from zero."""
        values, self._values = self._values, {}
        return values

    def __getitem__(self, name: str) -> int:
        return self._values.get(name, 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def as_dict(self) -> dict[str, int]:
        """A copy of the non-zero counters."""
        return dict(self._values)
