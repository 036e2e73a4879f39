"""The pages of all pools of one rank behind one I/O service: both of SGLang's doors stand on this."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

from memkv_engines.config import Config, split_paths
from memkv_engines.doors.fingerprint import ParameterSums
from memkv_engines.doors.io_client import DevicePages, worker_client
from memkv_engines.errors import MemKVError, TierUnavailable
from memkv_engines.keys import JsonValue
from memkv_engines.limits import CLEAR_TIMEOUT_S, MIN_TRIAL_TOKENS
from memkv_engines.log import get_logger
from memkv_engines.metrics import Counters
from memkv_engines.offload.blocking import BlockingClient
from memkv_engines.offload.messages import Manifest
from memkv_engines.sglang import identity
from memkv_engines.sglang.gating import NO_PAGES, PageGate, PagesInMemory, PrefillWatch
from memkv_engines.sglang.idle_wait import IdleWait
from memkv_engines.sglang.pages import PageStore
from memkv_engines.sglang.pools import PagedPool, measured_pool
from memkv_engines.tier.striped import open_directories

log = get_logger(__name__)


@dataclass(frozen=True)
class Hits:
    """What a look-up found, in pages counted from the first one asked for.

    Attributes:
        by_pool: for each pool with any, the longest prefix it could be used for.
        usable: every prefix length at which all pools that are needed have what they need.
        in_memory: what the pool whose loads are measured has in the I/O service's memory.
    """

    by_pool: dict[str, int]
    usable: frozenset[int]
    in_memory: PagesInMemory = NO_PAGES

    def up_to(self, pages: int) -> Hits:
        """The same of the first pages only."""
        by_pool = {name: min(count, pages) for name, count in self.by_pool.items()} if pages else {}
        return Hits(by_pool, frozenset(end for end in self.usable if end <= pages), self.in_memory)


class PageStores:
    """Fixes the namespace and starts the I/O service. Calls block; any thread.

    Args:
        config: ours.
        storage_config: SGLang's; ranks and the model's name.
        pools: every pool that holds bytes. Where full attention's only numbers pages (DeepSeek V4), it is none of them.
        sums: this rank's weights, where they are not named.
        model_config: SGLang's configuration of the model, or None where it is unknown.
        row_layout: of the device's rows, where the pools do not tell it.
        pages: where the pools lie in device memory; None: in host memory.
        scheduler: SGLang's, whose prefills are measured, and which waits for prefetches; None: none are, none does.
        least_tokens: SGLang loads no fewer.

    Raises:
        ConfigError: the tier cannot be used.
        IdentityError: the weights are unknown.
        GpuUnavailable: the pools lie on a GPU, and no driver or kernels are there to move them.
        LayoutError: no pool holds the KV of full attention.
    """

    def __init__(
        self,
        config: Config,
        storage_config: Any,
        pools: Sequence[PagedPool],
        sums: ParameterSums | None,
        model_config: Any,
        row_layout: JsonValue = None,
        pages: DevicePages | None = None,
        scheduler: Any | None = None,
        least_tokens: int = MIN_TRIAL_TOKENS,
    ) -> None:
        self._config = config
        measured = measured_pool(pools)
        namespace = identity.build_namespace(storage_config, config, pools, sums, model_config, row_layout)
        self._folder = namespace.folder
        self.client = BlockingClient(
            worker_client(config, [pool.spec() for pool in pools], stores=config.policy.store, pages=pages),
            store_timeout_s=config.io.load_timeout_ms / 1000,
        )
        self.client.start()
        self.client.manifest(Manifest(namespace.canonical_json))
        self.gate = _gate(config, measured, pools, least_tokens)
        self._measured = measured.name
        self._prefills = PrefillWatch(scheduler, self.gate.gate, Counters())
        self.idle = IdleWait(scheduler)
        self.by_pool = {pool.name: PageStore(pool, namespace, self.client, config) for pool in pools}
        # Other pools' loads serve the same tokens: they are not worth anything of their own.
        self.by_pool[measured.name].gate = self.gate
        for pool in pools:
            log.info(
                "pool %s: pages of %d B, %d a chunk (%d at most)",
                pool.name,
                pool.block_bytes,
                pool.blocks_per_chunk,
                pool.largest_chunk,
            )
        log.info("I/O service: %s; namespace %s", self.client.description, namespace.folder)

    def hits(self, keys: Sequence[str], transfers: Sequence[PoolTransfer], prefix: Sequence[str]) -> Hits:
        """Which prefixes of some pages every pool can serve. The semantics are those of SGLang's ``HiCacheFile``.

        Args:
            keys: chain hashes of the pages, hexadecimal.
            transfers: the pools beside that of full attention, with their policies.
            prefix: hashes of the pages before.
        """
        kv = self._anchor_pages(keys, transfers, prefix)
        by_pool: dict[str, int] = {PoolName.KV: kv} if kv else {}
        usable = set(range(1, kv + 1))
        for transfer in transfers:
            if not usable:
                break
            ends = self._usable_ends(transfer, keys[:kv], prefix)
            if ends:
                by_pool[transfer.name] = max(ends)
            # A second form of the full pages: it may be missing without making them useless.
            if transfer.hit_policy != PoolHitPolicy.BLOCK_GROUPS:
                usable &= ends
        measured = self.by_pool[self._measured]
        return Hits(by_pool, frozenset(usable), measured.in_memory(keys, prefix) if usable else NO_PAGES)

    def _anchor_pages(self, keys: Sequence[str], transfers: Sequence[PoolTransfer], prefix: Sequence[str]) -> int:
        store = self.by_pool.get(PoolName.KV.value)
        if store is not None:
            return store.leading(keys, prefix)
        # Pages without bytes of their own are all there, if a pool is asked that is derived from them and decides.
        return len(keys) if any(t.hit_policy == PoolHitPolicy.ALL_PAGES for t in transfers) else 0

    def worth_loading(self, hits: Hits, transfers: Sequence[PoolTransfer], before: int) -> Hits:
        """What of it to load, by the cost gate. ``before``: pages before the first, as far as known."""
        longest = max(hits.usable, default=0)
        others = {
            str(t.name): len(t.keys or ()) if t.hit_policy == PoolHitPolicy.TRAILING_PAGES else longest
            for t in transfers
            if str(t.name) != self._measured
        }
        pages = self.gate.worth_loading(before, longest, others, hits.in_memory)
        if pages and not any(end <= pages for end in hits.usable):
            pages = min(hits.usable)  # a part that is no part for some pool would measure nothing
        return hits.up_to(pages)

    def _usable_ends(self, transfer: PoolTransfer, keys: Sequence[str], prefix: Sequence[str]) -> set[int]:
        """Numbers of leading pages after which this pool could go on."""
        store = self.by_pool.get(str(transfer.name))
        if store is None:
            return set()
        if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
            present, need = store.present(keys, prefix), max(1, len(transfer.keys or []))
            return {end for end in range(1, len(keys) + 1) if all(present[max(0, end - need) : end])}
        leading = store.leading(keys, prefix)
        if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
            leading -= leading % max(1, transfer.block_pages)
        return set(range(1, leading + 1))

    def load(self, pool: str, keys: Sequence[str], prefix: Sequence[str], indices: Any) -> list[bool] | None:
        """``PageStore.load`` of a pool; None too where we have no such pool or loads are switched off.

        Pages of an anchor without bytes are in place: what is derived from it says what is usable.
        """
        if not self._config.policy.load:
            return None
        if self._is_numbers_only(pool):
            return [True] * len(keys)
        store = self.by_pool.get(pool)
        return store.load(keys, prefix, indices) if store is not None else None

    def store(self, pool: str, keys: Sequence[str], prefix: Sequence[str], indices: Any) -> list[bool] | None:
        """``PageStore.store`` of a pool; None too where we have no such pool or stores are switched off.

        Of an anchor without bytes there is nothing to store.
        """
        if not self._config.policy.store:
            return None
        if self._is_numbers_only(pool):
            return [True] * len(keys)
        store = self.by_pool.get(pool)
        return store.store(keys, prefix, indices) if store is not None else None

    def _is_numbers_only(self, pool: str) -> bool:
        return pool == PoolName.KV.value and pool not in self.by_pool

    def counters(self) -> dict[str, int]:
        """What was counted so far, the cost gate's decisions included."""
        return {**self.client.counters(), **self.gate.gate.counters.as_dict()}

    def clear(self) -> None:
        """Remove every chunk of this namespace from the tier. Blocks while it lists the folder, bounded.

        Raises:
            TierUnavailable: it failed, or is not done yet and goes on in the background.
        """
        failed: list[Exception] = []

        def remove() -> None:
            try:
                self._remove_all()
            except (MemKVError, OSError) as error:
                failed.append(error)

        # On a thread of its own: a mount that hangs must not take SGLang's scheduler with it.
        thread = threading.Thread(target=remove, name="memkv-clear", daemon=True)
        thread.start()
        thread.join(CLEAR_TIMEOUT_S)
        if thread.is_alive():
            raise TierUnavailable(f"namespace {self._folder} is not empty after {CLEAR_TIMEOUT_S:.0f} s")
        if failed:
            raise TierUnavailable(f"namespace {self._folder} cannot be emptied: {failed[0]}") from failed[0]

    def _remove_all(self) -> None:
        tier = open_directories(split_paths(self._config.tier.path), direct_io="off")
        try:
            for name in list(tier.names(self._folder)):
                tier.remove(self._folder, name)
        finally:
            tier.close()

    def close(self) -> None:
        """End the I/O service."""
        self._prefills.stop()
        self.idle.stop()
        self.client.close()


def _gate(config: Config, measured: PagedPool, pools: Sequence[PagedPool], least_tokens: int) -> PageGate:
    return PageGate(
        enabled=config.policy.cost_gate == "on",
        page_tokens=measured.page_tokens,
        page_bytes={pool.name: pool.block_bytes for pool in (measured, *pools)},
        chunk_pages=measured.blocks_per_chunk,
        least_tokens=least_tokens,
    )
