"""Walk a prefix chain in the tier: which stored chunks cover the leading blocks of a prompt.

At each position the exact full chunk is asked for first; where that is missing, variants that start at the block are
listed, newest first, and the one that shares most leading blocks is taken. On a grid, a probe that begins inside a
chunk has already been moved back to its start by the caller. Where chunks start anywhere, earlier blocks are tried.
"""

from __future__ import annotations

import mmap

import msgspec

from memkv_engines.chunk.codec import Geometry, decode_header
from memkv_engines.chunk.protection import Protection
from memkv_engines.errors import ChunkError, IoServiceError, MemKVError
from memkv_engines.keys import ChunkName, Shard, namespace_folder
from memkv_engines.limits import KEY_BYTES, MAX_BLOCKS_PER_CHUNK, MAX_PROBE_SEGMENTS
from memkv_engines.offload.messages import Probe, Segment, split_hashes
from memkv_engines.tier.base import Tier

_MAX_VARIANT_LISTINGS = 16
_MAX_LISTINGS_ANYWHERE = 4096


class ChainWalk:
    """One probe. Blocking; for a background thread.

    Args:
        probe: what to look for.
        tier: where.
        protection: the reader's; variants without it are not believed.
    """

    def __init__(self, probe: Probe, tier: Tier, protection: Protection | None = None) -> None:
        self._tier, self._protection = tier, protection
        self._folder = namespace_folder(probe.namespace)
        self._namespace = probe.namespace
        self._group = probe.group
        self._hashes = split_hashes(probe.hashes)
        self._full = probe.blocks_per_chunk
        # Positions below are relative to the first hash that came along.
        self._start = probe.start
        self._position = probe.wanted
        self._anywhere, self._survey = probe.anywhere, probe.survey
        self._reach = probe.largest_chunk - 1 if probe.anywhere else 0
        self._need_from = probe.need_from - probe.start
        self._shards = [Shard(*s).text for s in probe.shards]
        self._listings = _MAX_LISTINGS_ANYWHERE if probe.anywhere else _MAX_VARIANT_LISTINGS
        if probe.exact:
            self._listings = 0
        if self._full < 1 or not self._shards or probe.start < 0 or not 0 <= probe.wanted <= len(self._hashes):
            raise IoServiceError("malformed probe")

    def run(self) -> list[Segment]:
        """Segments in order; empty if nothing is stored."""
        segments: list[Segment] = []
        after_gap = False
        while self._position < len(self._hashes) and len(segments) < MAX_PROBE_SEGMENTS:
            segment = self._exact() or self._best_variant(self._position)
            if segment is None and not after_gap:
                # A chunk that reaches over a missing block does not exist, so behind one there is none to look for.
                segment = self._reaching_here()
            after_gap = segment is None
            if segment is None:
                if not self._survey:
                    break
                self._position += 1
                continue
            segments.append(msgspec.structs.replace(segment, position=segment.position + self._start))
            self._position = segment.position + segment.take
            if segment.take < segment.block_count and not self._anywhere:
                break  # The prompt ends or diverges inside this chunk.
        return segments

    def _reaching_here(self) -> Segment | None:
        """A chunk that starts at an earlier block and covers this one; the nearest start wins."""
        for start in range(self._position - 1, max(-1, self._position - 1 - self._reach), -1):
            segment = self._best_variant(start)
            if segment is not None and start + segment.take > self._position:
                return segment
        return None

    def _exact(self) -> Segment | None:
        stop = self._position + self._full
        if stop > len(self._hashes):
            return None
        first, last = self._hashes[self._position][:KEY_BYTES], self._hashes[stop - 1][:KEY_BYTES]
        names = [ChunkName(first, last, self._full, 0, self._group, text) for text in self._shards]
        if not all(self._tier.exists(self._folder, names)):
            return None
        return Segment(self._position, last, self._full, 0, self._full)

    def _best_variant(self, position: int) -> Segment | None:
        if not self._listings:
            return None
        self._listings -= 1
        first = self._hashes[position][:KEY_BYTES]
        best: Segment | None = None
        for name in self._tier.variants(self._folder, first, self._group, self._shards[0]):
            if name.holes > max(0, self._need_from - position):
                continue  # It lacks blocks that are needed.
            blocks = self._blocks_of(name, position)
            take = self._shared_blocks(blocks, position)
            if take > (best.take if best else name.holes) and self._others_have(name):
                rest = b"" if take == name.block_count else b"".join(blocks)
                best = Segment(position, name.last, name.block_count, name.holes, take, rest)
        return best

    def _others_have(self, name: ChunkName) -> bool:
        names = [
            ChunkName(name.first, name.last, name.block_count, name.holes, name.group, text)
            for text in self._shards[1:]
        ]
        return all(self._tier.exists(self._folder, names))

    def _blocks_of(self, name: ChunkName, position: int) -> list[bytes]:
        """Chain hashes of the blocks of a stored chunk; none if its header cannot be believed."""
        own = self._hashes[position : position + name.block_count]
        if len(own) == name.block_count and own[-1][:KEY_BYTES] == name.last:
            return own
        header_bytes = Geometry(min(name.block_count, MAX_BLOCKS_PER_CHUNK), 1, 1).header_bytes
        try:
            # An anonymous map is page-aligned, which direct I/O needs.
            with self._tier.open(self._folder, name) as reader, mmap.mmap(-1, header_bytes) as buffer:
                view = memoryview(buffer)
                try:
                    reader.read([view], 0)
                    header = decode_header(bytes(view), self._protection)
                finally:
                    view.release()
        except (ChunkError, MemKVError):
            return []
        if header.key.namespace_digest != self._namespace or header.key.name != name:
            return []
        return [entry.chain_hash for entry in header.blocks]

    def _shared_blocks(self, blocks: list[bytes], position: int) -> int:
        """How many leading blocks of a stored chunk are the prompt's."""
        shared = 0
        for stored, mine in zip(blocks, self._hashes[position : position + len(blocks)], strict=False):
            if stored != mine:
                break
            shared += 1
        return shared
