"""Every bound in one place, with units. Relations between them are asserted at import."""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

# --- chunk format -----------------------------------------------------------
ALIGN_BYTES = 4 * KIB
"""Alignment of header, payload and block stride: what direct I/O and NVMe want."""
HASH_BYTES = 32
"""Width of the engine's block hash (sha256)."""
KEY_BYTES = 16
"""Prefix of a block hash used in names and in the index; the header confirms all 32 bytes."""
DIGEST_BYTES = 16
LEAF_BYTES = 16 * KIB
"""Leaf of the checksum tree. Small, so that a GPU hashes leaves in parallel and a CPU stays in L1."""
MAX_BLOCKS_PER_CHUNK = 4096
MAX_BLOCK_BYTES = 1 * GIB
MAX_CHUNK_BYTES = 2 * GIB

# --- choosing the chunk -----------------------------------------------------
MIN_CHUNK_TARGET_BYTES = 2 * MIB
MAX_CHUNK_TARGET_BYTES = 16 * MIB
DEFAULT_CHUNK_TARGET_BYTES = 4 * MIB

# --- tier -------------------------------------------------------------------
BUCKET_HEX_DIGITS = 3
"""Chunks of one namespace are spread over 16**3 folders by the first digits of their first hash."""
MAX_OPEN_BUCKETS = 256
MAX_VARIANTS_EXAMINED = 16
MAX_BUCKET_ENTRIES_LISTED = 65_536
TEMPORARY_MAX_AGE_S = 15 * 60
EVICT_ABOVE_SHARE = 0.95
"""Share of the capacity from which chunks are evicted, and the share they are evicted down to."""
EVICT_TO_SHARE = 0.90
EVICT_PAUSE_S = 1.0
"""Between two evictions of one process: a listing of the whole directory is not for free."""
TOUCH_EVERY_S = 60.0
"""A chunk's time of use is as coarse as this."""
MAX_MANIFEST_BYTES = 64 * KIB

# --- I/O service ------------------------------------------------------------
MAX_IO_THREADS = 32
MIN_STAGING_SLOTS = 2
MAX_STAGING_SLOTS = 1024
MAX_IOVECS_PER_CALL = 1024
"""IOV_MAX on Linux."""
MAX_MESSAGE_BYTES = 64 * MIB
MAX_PENDING_STORE_CHUNKS = 4096
MAX_OUTBOX_BYTES = 64 * MIB
SERVICE_START_TIMEOUT_S = 30.0
SERVICE_REAP_TIMEOUT_S = 2.0
MAX_DYING_SERVICES = 4
"""Killed I/O processes that a device keeps from ending; with so many of them no other is started."""
SERVICE_RESTART_BACKOFF_S = 1.0
"""Before a lost service is started again; doubles until one of its loads is answered."""
SERVICE_RESTART_BACKOFF_MAX_S = 60.0
TRIAL_LOAD_S = 2.0
"""Deadline of the one load that a service may have at a time until it has proved itself, and what its size adds."""
TRIAL_LOAD_BYTES_PER_S = 200 * MIB
STORE_SILENCE_S = 300.0
"""A service that has stores and answers none of them for so long is started again. Stores stand back while loads are
pending, up to two seconds a chunk."""
TIER_WATCH_S = 2.0
"""How often an I/O process looks whether its directory is still the one at its path."""
SHUTDOWN_DRAIN_TIMEOUT_S = 10.0

# --- scheduler side ---------------------------------------------------------
INDEX_WAYS = 8
MILESTONE_CHUNKS = 16
"""One entry for every so many chunks of a prefix that is known as a whole."""
MAX_KNOWN_VARIANTS = 65_536
MAX_KNOWN_MISSES = 65_536
MAX_BAD_CHUNKS = 65_536
MAX_PROBES_IN_FLIGHT = 1024
PROBE_SILENCE_S = 1.0
"""After a probe ran past its deadline none is sent for this long (doubling), until one is answered."""
PROBE_SILENCE_MAX_S = 30.0
MAX_PROBE_SEGMENTS = 65_536
MAX_SLIDING_WINDOW_CANDIDATES = 16

# --- SGLang ------------------------------------------------------------------
MAX_REMEMBERED_PAGES = 65_536
"""Page hashes whose predecessor is remembered, per pool (about 200 bytes each)."""
MAX_REMEMBERED_WALKS = 64
"""Look-ups whose chunks are remembered until they are loaded, per pool."""
CLEAR_TIMEOUT_S = 60.0
"""Longest that SGLang waits for the removal of a namespace."""

assert LEAF_BYTES % ALIGN_BYTES == 0
assert MIN_CHUNK_TARGET_BYTES <= DEFAULT_CHUNK_TARGET_BYTES <= MAX_CHUNK_TARGET_BYTES
assert MAX_CHUNK_TARGET_BYTES < MAX_BLOCK_BYTES < MAX_CHUNK_BYTES
assert KEY_BYTES <= HASH_BYTES
assert DIGEST_BYTES == 16, "FORMAT.md fixes 128-bit digests"
assert MAX_VARIANTS_EXAMINED <= MAX_BUCKET_ENTRIES_LISTED
