"""Every bound in one place, with units. Relations between them are asserted at import."""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

# --- chunk format -----------------------------------------------------------
ALIGN_BYTES = 4 * KIB
"""Alignment of header, payload and block stride: what direct I/O and NVMe want."""
HUGE_PAGE_BYTES = 2 * MIB
"""Of x86-64 and most arm64 kernels. Elsewhere staging and pools are only aligned more than needed."""
HASH_BYTES = 32
"""Width of the engine's block hash (sha256)."""
KEY_BYTES = 16
"""Prefix of a block hash used in names and in the index; the header confirms all 32 bytes."""
DIGEST_BYTES = 16
LEAF_BYTES = 16 * KIB
"""Leaf of the checksum tree. Small, so that a GPU hashes leaves in parallel and a CPU stays in L1."""
PROTECTION_KEY_BYTES = 32
MAX_KEY_FILE_BYTES = 4 * KIB
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
EVICT_PAUSE_MAX_S = 30.0
"""The pause doubles up to this while nothing can be removed, as where everything is pinned."""
MAX_VICTIMS_HELD = 65_536
"""Chunks one eviction removes at most; it is what bounds its memory (about 400 B each)."""
UPKEEP_EVERY_S = 600.0
"""How often a keeper looks for expired chunks, and counts what tenants with a quota hold."""
TOUCH_EVERY_NS = 60 * 10**9
"""A chunk's time of use is as coarse as this."""
DRIVE_DOWN_S = 30.0
"""A drive that refused a store is not asked for another one for this long."""
CLOCK_SLACK_S = 3600
"""A file's time further in the future is not believed: a clock jumped, and the chunk counts as old."""
MAX_MANIFEST_BYTES = 64 * KIB
MAX_POLICY_BYTES = 4 * KIB
MAX_QUOTAS_BYTES = 256 * KIB
MAX_TENANTS_WITH_QUOTA = 256
"""Each has a descriptor of its own in every process that stores."""
MAX_TTL_S = 10 * 365 * 86_400
MAX_PRIORITY = 100
"""Priorities go from -100 to 100."""
POLICY_REFRESH_S = 10.0
"""A process sees a changed quota after this long at the latest; costs one ``stat`` each time."""

# --- transports -------------------------------------------------------------
TRANSFER_TIMEOUT_S = 20.0
"""A NIXL transfer that takes longer is given up. Below the default load_timeout_ms, so that one load fails first."""
TRANSFER_POLL_S = 200e-6
"""Between two looks at a NIXL transfer: a tenth of what 4 MiB take, and hundreds of times less CPU than spinning."""
MAX_OVERDUE_TRANSFERS = 64
"""Transfers that may be overdue at a time before no more are started."""
MAX_TRANSFERS_PER_CALL = 64
"""Pieces of one read or write that are under way at a time."""
BOUNCE_BYTES = 1 * MIB
"""Buffer through which memory goes that was not registered (headers, mostly)."""
MAX_CACHED_FILES = 64
"""Files kept open after a GDS read: registering one with cuFile is dear. Evicted ones hold their space so long."""
GDS_PROBE_TIMEOUT_S = 30.0
"""For the process that tries cuFile before anything relies on it."""
GDS_TASK_BYTES = 4 * MIB
GDS_BOUNCE_BYTES = 4 * MIB
"""Per thread of kvikio, page-locked; only the compatibility path uses it."""

# --- I/O service ------------------------------------------------------------
MAX_IO_THREADS = 32
MIN_STAGING_SLOTS = 2
MAX_STAGING_SLOTS = 1024
MAX_IOVECS_PER_CALL = 1024
"""IOV_MAX on Linux."""
MAX_MESSAGE_BYTES = 64 * MIB
MAX_PENDING_STORE_CHUNKS = 4096
LEFTOVER_S = 10.0
"""How long a shed chunk of a request that has ended waits for staging; an idle engine steps for it meanwhile."""
LEFTOVER_BATCH_CHUNKS = 16
LEFTOVER_PAUSE_S = 0.005
"""Before chunks that were shed once more are offered again; doubles while none of them finds room."""
LEFTOVER_PAUSE_MAX_S = 0.5
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
NOTE_USE_EVERY_S = 60.0
"""A chunk that is loaded from memory is opened in the tier at most this often, so that eviction knows of its use."""
MAX_RESIDENTS = 1 << 20
"""Chunks in the memory of an I/O service that the engine's side keeps in mind; of more it learns nothing."""
MAX_USES_NOTED = 4096
"""Such openings that may wait; of more uses the tier learns later."""

# --- scheduler side ---------------------------------------------------------
INDEX_WAYS = 8
MILESTONE_CHUNKS = 16
"""One entry for every so many chunks of a prefix that is known as a whole."""
MAX_KNOWN_VARIANTS = 65_536
MAX_VARIANT_HASH_BYTES = 64 << 20
"""Of block hashes that a scheduler keeps to tell which chunks share a prompt's beginning."""
MAX_KNOWN_MISSES = 65_536
MAX_BAD_CHUNKS = 65_536
MAX_PROBES_IN_FLIGHT = 1024
PROBE_SILENCE_S = 1.0
"""After a probe ran past its deadline none is sent for this long (doubling), until one is answered."""
PROBE_SILENCE_MAX_S = 30.0
MAX_PROBE_SEGMENTS = 65_536
IDLE_LOOKUP_WAIT_S = 0.005
"""How long a step of an engine that has nothing to run waits for look-ups."""
IDLE_LOAD_WAIT_S = 0.005
"""How long such a step waits for a load, in each worker; in SGLang, an idle scheduler for a prefetch."""
MAX_SLIDING_WINDOW_CANDIDATES = 16

# --- cost gate --------------------------------------------------------------
ESTIMATE_HALF_LIFE_SAMPLES = 3.0
ESTIMATE_HALF_LIFE_S = 20.0
"""Half of what is known of a cost fades with so many samples, or in so long."""
ESTIMATE_CLIP = 8.0
"""A sample counts at most so many times what was expected."""
ESTIMATE_WARM_UP_STEPS = 1
MIN_PREFILL_SPAN_TOKENS = 16
"""What a step computes less of a request is decoding."""
MIN_PREFILL_SAMPLE_TOKENS = 256
"""In a smaller step the fixed costs of a step are most of it: it would tell nothing of a long prompt."""
PRIOR_PREFILL_BYTES_PER_S = 200 * MIB
"""KV that a prefill is assumed to produce on each rank before one was measured. A guess: 135M parameters on one CPU
core produced 16 MB/s; an 8B model at 20,000 tokens/s would produce 2.6 GB/s."""
COLD_LOAD_S = 0.25
"""Before a prefill was measured, a load may take this long whatever it brings."""
NEGLIGIBLE_LOAD_S = 0.005
RESUME_GAIN = 0.2
"""Share of the recompute time that a load must be predicted to save before it is made again."""
MIN_TRIAL_TOKENS = 256
"""SGLang does not load less (``prefetch_threshold``)."""
TRIAL_SHARE = 0.15
"""Share of a request's recompute time that a trial is predicted to take, and every other one half of that."""
TRIAL_PAUSE_S = 5.0
TRIAL_DUTY = 0.05
"""Share of all time that trials may take, where even the smallest is slow."""
MAX_TRIAL_OFFERS = 64
STOP_MARGIN = 1.25
"""A load that is seen to take so many times what it saves is stopped."""
STOP_FLOOR_S = 0.1
OVERDUE_SLACK_S = 1.0
"""While a load is so much later than its stop, the tier counts as slow: no other load begins. An engine may learn of a
load's end only when its step is over."""
FORGET_LOAD_S = 120.0
"""A load that nobody has heard of for so long keeps no other from being made."""
MAX_STEPS_TIMED = 64

# --- GPU --------------------------------------------------------------------
GPU_MIN_DRIVER = 12_000
GPU_BATCH_COPY_DRIVER = 12_080
"""From this driver on one call submits many copies (cuMemcpyBatchAsync)."""
GPU_TILE_BYTES = 4 * KIB
"""Longest piece that one warp moves; the kernels' bulk variant has stages of this size."""
GPU_INLINE_IDS = 448
"""Block ids that travel inside a launch's arguments; more blocks are more launches."""
GPU_COPY_CTAS = 8
"""Multiprocessors that a copy may occupy. 4 carried 183 GB/s on a GB300 (sglang#40278); the rest is the engine's."""
GPU_DIGEST_CTAS = 16
GPU_MAX_CTAS = 64
GPU_COPY_ENGINE_MIN_BYTES = 28 * KIB
"""Pieces from here on go to the copy engine in one batch: 40-52 GB/s at 28-64 KiB, 5-7 below (H100, vllm#42212)."""
GPU_SINGLE_COPY_MIN_BYTES = 128 * KIB
"""The same without batch copies: a call costs about 2.3 us (FlexKV), in which a 50 GB/s link carries 115 KB."""
GPU_DEFAULT_SLOTS = 8
GPU_MAX_SLOTS = 64
GPU_STAGING_BYTES = 128 * MIB
"""Device memory for staging, within the bounds on slots: a step stores no more than fits."""
GPU_MAX_TICKETS = 256
"""Copies in flight, whether they hold a device slot or not."""
GPU_DRAIN_TIMEOUT_S = 10.0
GPU_POLL_MIN_S = 20e-6
GPU_POLL_MAX_S = 1e-3

# --- SGLang ------------------------------------------------------------------
MAX_REMEMBERED_PAGES = 65_536
"""Page hashes whose predecessor is remembered, per pool (about 200 bytes each)."""
MAX_REMEMBERED_WALKS = 64
"""Look-ups whose chunks are remembered until they are loaded, per pool."""
CLEAR_TIMEOUT_S = 60.0
"""Longest that SGLang waits for the removal of a namespace."""

# --- LMCache -----------------------------------------------------------------
MAX_OBJECT_SIZES = 8
"""Sizes of LMCache's objects that one process moves; each has an I/O service and staging of its own."""
MAX_OBJECT_JOB_BYTES = 1 * GIB
"""Objects of a load that go to the I/O service at a time: what ``load_timeout_ms`` must be enough for."""
SMALL_OBJECT_BYTES = MIN_CHUNK_TARGET_BYTES
"""Objects below this are stored, with a line in the log that LMCache's chunk size should be larger."""
BAD_OBJECT_S = 60.0
"""An object that failed to load is not found again for so long, unless it is stored anew."""
MAX_REMEMBERED_LAYOUTS = 1024
"""Namespaces and layouts of objects that one process keeps in mind."""

# --- patches for engines -------------------------------------------------------
MAX_PATCH_BYTES = MIB
MAX_PATCHED_FILE_BYTES = 16 * MIB

assert LEAF_BYTES % ALIGN_BYTES == 0
assert MIN_CHUNK_TARGET_BYTES <= DEFAULT_CHUNK_TARGET_BYTES <= MAX_CHUNK_TARGET_BYTES
assert MAX_CHUNK_TARGET_BYTES < MAX_BLOCK_BYTES < MAX_CHUNK_BYTES
assert KEY_BYTES <= HASH_BYTES
assert NOTE_USE_EVERY_S * 10**9 >= TOUCH_EVERY_NS
assert GPU_TILE_BYTES % 16 == 0 and GPU_TILE_BYTES <= ALIGN_BYTES
assert GPU_COPY_ENGINE_MIN_BYTES <= GPU_SINGLE_COPY_MIN_BYTES
assert GPU_COPY_CTAS <= GPU_DIGEST_CTAS <= GPU_MAX_CTAS
assert GPU_DEFAULT_SLOTS <= GPU_MAX_SLOTS <= GPU_MAX_TICKETS
assert STOP_MARGIN > 1 and NEGLIGIBLE_LOAD_S < STOP_FLOOR_S <= COLD_LOAD_S
assert DIGEST_BYTES == 16, "FORMAT.md fixes 128-bit digests"
assert MAX_VARIANTS_EXAMINED <= MAX_BUCKET_ENTRIES_LISTED
