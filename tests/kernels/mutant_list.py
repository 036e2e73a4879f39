"""Changes to the kernels' source that the tests must notice, each with what it would break.

`family` says whose checks run: the ordinary pair, the bulk pair, the digests, or all of them. `EQUIVALENT` holds
changes that no test can notice, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

COPY, BULK, DIGEST, ALL, SASS = "copy", "bulk", "digest", "all", "sass"


@dataclass(frozen=True)
class Mutant:
    """One change of the source text.

    Attributes:
        name: What it does.
        family: Whose checks must notice it.
        old: Text that is replaced.
        new: By what.
        occurrence: Which of several occurrences, from 0; -1 for all.
        reason: Why no test can notice it, for those that are equivalent.
    """

    name: str
    family: str
    old: str
    new: str
    occurrence: int = 0
    reason: str = ""

    def apply(self, source: str) -> str:
        """The changed source; raises `ValueError` where the text is not there."""
        if self.occurrence < 0:
            if self.old not in source:
                raise ValueError(f"{self.name}: {self.old!r} is not in the source")
            return source.replace(self.old, self.new)
        at = -1
        for _ in range(self.occurrence + 1):
            at = source.find(self.old, at + 1)
            if at < 0:
                raise ValueError(f"{self.name}: {self.old!r} is not in the source")
        return source[:at] + self.new + source[at + len(self.old) :]


def group(family: str, *rows: tuple[str, str, str] | tuple[str, str, str, int]) -> tuple[Mutant, ...]:
    """Mutants of one family."""
    return tuple(Mutant(row[0], family, row[1], row[2], row[3] if len(row) > 3 else 0) for row in rows)


LOAD_LOOP = "if (k * WARP < left) v[k] = load(from + k * WARP);"
STORE_LOOP = "if (k * WARP < left) store(to + k * WARP, v[k]);"

WALKING = group(
    ALL,
    ("walk: first item from the block", "item(first % items_)", "item(first / items_)"),
    ("walk: first block 0", "block(first / items_)", "block(0)"),
    ("walk: step forgets blocks", "block_step(stride / items_)", "block_step(0)"),
    ("walk: step forgets items", "item_step(stride % items_)", "item_step(0)"),
    ("walk: wraps one late", "if (item >= room) {", "if (item > room) {"),
    ("walk: carry lost", "      ++block;\n", ""),
    ("walk: wraps to 0", "      item -= room;\n", "      item = 0;\n"),
    ("walk: room ignores the step", "const u32 room = items - item_step;", "const u32 room = items;"),
    ("warp: per CTA only", "(blockIdx.x * blockDim.x + threadIdx.x) / WARP; }", "threadIdx.x / WARP; }"),
    ("warp: per CTA without threads", "(blockIdx.x * blockDim.x + threadIdx.x) / WARP; }", "blockIdx.x; }"),
    ("warp: counts CTAs", "return gridDim.x * blockDim.x / WARP;", "return gridDim.x;"),
    ("warp: counts threads", "return gridDim.x * blockDim.x / WARP;", "return gridDim.x * blockDim.x;"),
)

COPYING = group(
    COPY,
    ("hole: only -1", "if (id < 0) return false;", "if (id == -1) return false;"),
    ("hole: -1 is block 0", "if (id < 0) return false;", "if (id < -1) return false;"),
    ("hole: an error", "if (id < 0) return false;", "if (id < 0) { atomicOr(args.error, 1u); return false; }"),
    ("id: bound off by one", "if (id >= (i64)args.num_blocks) {", "if (id > (i64)args.num_blocks) {"),
    ("id: bound dropped", "if (id >= (i64)args.num_blocks) {", "if (false) {"),
    ("id: bound in 32 bits", "if (id >= (i64)args.num_blocks) {", "if ((u32)id >= args.num_blocks) {"),
    ("id: not reported", "if (reporter) atomicOr(args.error, ID_OUT_OF_RANGE);", ""),
    (
        "id: wrong bit",
        "if (reporter) atomicOr(args.error, ID_OUT_OF_RANGE);",
        "if (reporter) atomicOr(args.error, 2u);",
    ),
    ("id: inline ones unsigned", "(i64)args.ids[block]", "(i64)(u32)args.ids[block]"),
    ("id: external ones in 32 bits", "? args.external_ids[block] :", "? (i32)args.external_ids[block] :"),
    ("id: external ones by tile", "? args.external_ids[block] :", "? args.external_ids[item] :"),
    ("id: inline ones by tile", "(i64)args.ids[block]", "(i64)args.ids[item]"),
    ("id: external ones unused", "args.external_ids ? args", "false ? args"),
    ("page: offset in 32 bits", "(u64)id * (u64)tile.block_stride_bytes", "(u32)id * (u32)tile.block_stride_bytes"),
    ("page: block 0 always", "(u64)id * (u64)tile.block_stride_bytes", "0"),
    ("chunk: index in 32 bits", "(args.first_index + block) * (u64)", "(args.first_index + (u32)block) * (u64)"),
    (
        "chunk: offset in 32 bits",
        "(args.first_index + block) * (u64)tile",
        "(args.first_index + (u32)block) * (u32)tile",
    ),
    ("chunk: first index ignored", "(args.first_index + block) * (u64)", "block * (u64)"),
    ("chunk: placed by id", "(args.first_index + block) * (u64)", "(args.first_index + id) * (u64)"),
    ("chunk: tile offset ignored", "= tile.chunk_offset_bytes + (args", "= (args"),
    ("capacity: start unchecked", "if (offset > args.chunk_bytes || tile", "if (tile"),
    ("capacity: end unchecked", "|| tile.length_bytes > args.chunk_bytes - offset) {", ") {"),
    ("capacity: one byte more", "> args.chunk_bytes - offset) {", "> args.chunk_bytes - offset + 1) {"),
    ("capacity: one byte less", "> args.chunk_bytes - offset) {", ">= args.chunk_bytes - offset) {"),
    (
        "capacity: the sum wraps",
        "tile.length_bytes > args.chunk_bytes - offset)",
        "offset + tile.length_bytes > args.chunk_bytes)",
    ),
    (
        "capacity: wrong bit",
        "if (reporter) atomicOr(args.error, CHUNK_OVERFLOW);",
        "if (reporter) atomicOr(args.error, 1u);",
    ),
    ("direction: both gather", "piece.to = DIRECTION == GATHER ? chunk : page;", "piece.to = chunk;"),
    ("direction: read from the target", "piece.from = DIRECTION == GATHER ? page : chunk;", "piece.from = page;"),
    ("length: a byte less", "piece.length_bytes = tile.length_bytes;", "piece.length_bytes = tile.length_bytes - 1u;"),
    ("loads: not predicated", LOAD_LOOP, "v[k] = load(from + k * WARP);"),
    ("stores: not predicated", STORE_LOOP, "store(to + k * WARP, v[k]);"),
    ("stores: one too many", STORE_LOOP, STORE_LOOP.replace("< left", "<= left")),
    (
        "stores: lanes overlap",
        STORE_LOOP,
        STORE_LOOP.replace("to + k * WARP", "to + k * (WARP - 1u)"),
    ),
    ("rounds: step too small", "i += LOADS_IN_FLIGHT * WARP", "i += (LOADS_IN_FLIGHT - 1u) * WARP"),
    ("rounds: step too large", "i += LOADS_IN_FLIGHT * WARP", "i += (LOADS_IN_FLIGHT + 1u) * WARP"),
    ("rounds: start at 0", "for (u32 i = lane; i < count;", "for (u32 i = 0; i < count;"),
    ("lane: half a warp", "const u32 lane = threadIdx.x % WARP;", "const u32 lane = threadIdx.x % 16u;"),
    ("tail: dropped", "if (at < piece.length_bytes) store", "if (false) store"),
    ("tail: a byte more", "if (at < piece.length_bytes) store", "if (at <= piece.length_bytes) store"),
    (
        "tail: starts a byte late",
        "const u32 at = count * (u32)sizeof(T) + lane;",
        "const u32 at = count * (u32)sizeof(T) + lane + 1u;",
    ),
    (
        "count: rounded up",
        "piece.length_bytes / (u32)sizeof(T);",
        "(piece.length_bytes + (u32)sizeof(T) - 1u) / (u32)sizeof(T);",
    ),
    ("width: plan ignored", " | 1u << (piece.log2_access & 31u);", ";"),
    ("width: target ignored", "(u32)(u64)piece.to | (u32)(u64)piece.from | 1u", "(u32)(u64)piece.from | 1u"),
    ("width: source ignored", "(u32)(u64)piece.to | (u32)(u64)piece.from | 1u", "(u32)(u64)piece.to | 1u"),
    ("width: 16 as 8", "warp_copy<Vector>(piece, lane)", "warp_copy<u64>(piece, lane)"),
    ("width: 8 as 16", "warp_copy<u64>(piece, lane)", "warp_copy<Vector>(piece, lane)"),
    ("width: 4 as 1", "warp_copy<u32>(piece, lane)", "warp_copy<u8>(piece, lane)"),
    ("width: 2 as 4", "warp_copy<u16>(piece, lane)", "warp_copy<u32>(piece, lane)"),
    ("width: 1 as 2", "else warp_copy<u8>(piece, lane)", "else warp_copy<u16>(piece, lane)"),
    ("no tiles: divides by 0", "  if (args.tile_count == 0) return;\n", ""),
    (
        "assembly: vector order",
        '"r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory"',
        '"r"(v.y), "r"(v.x), "r"(v.z), "r"(v.w) : "memory"',
    ),
    ("assembly: a byte stored as two", "st.global.cs.u8 [%0], %1;", "st.global.cs.u16 [%0], %1;"),
    ("assembly: two bytes loaded as one", "ld.global.nc.L1::no_allocate.u16 %0", "ld.global.nc.L1::no_allocate.u8 %0"),
    (
        "assembly: four bytes loaded as two",
        "ld.global.nc.L1::no_allocate.u32 %0",
        "ld.global.nc.L1::no_allocate.u16 %0",
    ),
)

DIGESTING = group(
    DIGEST,
    ("secret: a bit of the first word", "0xbe4ba423396cfeb8ull", "0xbe4ba423396cfeb9ull"),
    ("secret: a bit of the last word", "0x7e404bbbcafbd7afull", "0xfe404bbbcafbd7afull"),
    ("secret: shift of unaligned keys", "word >> shift | SECRET[byte / 8u + 1u] << (64u - shift)", "word >> shift"),
    ("start: order", "PRIME64_1, PRIME64_2, PRIME64_3, 0x85", "PRIME64_2, PRIME64_1, PRIME64_3, 0x85"),
    ("fold: high half dropped", "a * b ^ __umul64hi(a, b)", "a * b"),
    ("avalanche: shift", "h ^= h >> 37;", "h ^= h >> 36;"),
    ("1 to 3: middle byte", "read_bytes(p + length / 2u, 1)", "read_bytes(p + (length - 1u) / 2u, 1)"),
    ("1 to 3: length", "(u64)length << 8;", "(u64)length << 9;"),
    ("4 to 8: last word", "read_bytes(p + length - 4u, 4)", "read_bytes(p + 4u, 4)"),
    ("4 to 8: rotation", "(h << 24 | h >> 40)", "(h << 25 | h >> 39)"),
    ("4 to 8: length", "h ^= (h >> 35) + length;", "h ^= (h >> 35);"),
    ("9 to 16: last word", "read_bytes(p + length - 8u, 8)", "read_bytes(p + length - 9u, 8)"),
    ("9 to 16: swap", "swap_32(low) << 32 | swap_32(low >> 32)", "swap_32(low) | swap_32(low >> 32) << 32"),
    ("17 to 128: rounds", "i <= (length - 1u) / 32u", "i <= length / 32u"),
    ("17 to 128: second key", "32u * i + 16u);", "32u * i + 8u);"),
    ("129 to 240: first rounds", "i < 8u; ++i) h", "i < 7u; ++i) h"),
    ("129 to 240: avalanche between", "  h = avalanche(h);\n", ""),
    ("129 to 240: key offset", "16u * (i - 8u) + 3u", "16u * (i - 8u)"),
    ("129 to 240: last key", "p + length - 16u, 119u", "p + length - 16u, 120u"),
    ("rule: 3 and 4", "if (length <= 3u)", "if (length <= 4u)"),
    ("rule: 8 and 9", "if (length <= 8u)", "if (length < 8u)"),
    ("rule: 16 and 17", "if (length <= 16u)", "if (length < 16u)"),
    ("rule: 128 and 129", "if (length <= 128u)", "if (length < 128u)"),
    ("rule: 240 and 241", "if (length > SHORT_BYTES)", "if (length >= SHORT_BYTES)"),
    ("rule: 241 and 242", "if (length > SHORT_BYTES)", "if (length > SHORT_BYTES + 1u)"),
    ("sums: accumulators not crossed", "even += second + ", "even += first + "),
    (
        "sums: signed product",
        "odd += first + (u64)(u32)b * (u32)(b >> 32);",
        "odd += first + (u64)((i64)(i32)b * (i32)(b >> 32));",
    ),
    ("sums: second key", "b = second ^ second_key;", "b = second ^ first_key;"),
    (
        "sums: halves of a vector",
        "add((u64)v.y << 32 | v.x, (u64)v.w << 32 | v.z",
        "add((u64)v.x << 32 | v.y, (u64)v.w << 32 | v.z",
    ),
    ("lane: rows of five", "row(lane / 4u), pair(lane % 4u)", "row(lane / 5u), pair(lane % 4u)"),
    (
        "lane: keys of the upper stripes",
        "high_first(SECRET[row + 2u * pair + 8u])",
        "high_first(SECRET[row + 2u * pair + 7u])",
    ),
    ("lane: which accumulator", "return 2u * pair + row % 2u;", "return 2u * pair + 1u - row % 2u;"),
    ("lane: offset", "STRIPE_BYTES * row + 16u * pair;", "STRIPE_BYTES * row + 8u * pair;"),
    ("total: sends what it keeps", "odd ? sums.even : sums.odd, 4)", "odd ? sums.odd : sums.even, 4)"),
    ("total: rows of 8 dropped", "    mine += __shfl_xor_sync(ALL_LANES, mine, 8);\n", ""),
    ("total: rows of 16 twice", "__shfl_xor_sync(ALL_LANES, mine, 16)", "__shfl_xor_sync(ALL_LANES, mine, 8)"),
    ("scramble: shift", "h ^ h >> 47 ^ scramble_key", "h ^ h >> 46 ^ scramble_key"),
    ("scramble: key", "scramble_key(SECRET[16u + accumulator()])", "scramble_key(SECRET[15u + accumulator()])"),
    ("scramble: prime", "scramble_key) * PRIME32_1", "scramble_key) * PRIME64_1"),
    ("merge: key", "secret_at(11u + 8u * accumulator())", "secret_at(12u + 8u * accumulator())"),
    ("merge: partner", "fold(h, __shfl_xor_sync(ALL_LANES, h, 4))", "fold(h, __shfl_xor_sync(ALL_LANES, h, 8))"),
    ("merge: pairs", "    sum += __shfl_xor_sync(ALL_LANES, sum, 2);\n", ""),
    ("merge: length", "avalanche(length * PRIME64_1 + sum)", "avalanche(sum)"),
    (
        "long: a block too many",
        "const u32 scrambles = (length - 1u) / BLOCK_BYTES;",
        "const u32 scrambles = length / BLOCK_BYTES;",
    ),
    (
        "long: second half of the first block",
        "b = load(vector_at(from + BLOCK_BYTES / 2u));\n    const",
        "b = load(vector_at(from + BLOCK_BYTES / 4u));\n    const",
    ),
    ("long: second block", "c = load(vector_at(from + BLOCK_BYTES))", "c = load(vector_at(from))"),
    (
        "long: blocks in the wrong order",
        "h = lane.scramble(h + first_total);\n    h = lane.scramble(h + second_total);",
        "h = lane.scramble(h + second_total);\n    h = lane.scramble(h + first_total);",
    ),
    ("long: odd block not scrambled", "h = lane.scramble(h + lane.total(sums));", "h = h + lane.total(sums);"),
    ("long: odd block read again", "    from += BLOCK_BYTES;\n", ""),
    (
        "long: a stripe too many",
        "(length - 1u - scrambles * BLOCK_BYTES) / STRIPE_BYTES;",
        "(length - scrambles * BLOCK_BYTES) / STRIPE_BYTES;",
    ),
    ("long: upper stripes bound", "if (lane.row + 8u < stripes)", "if (lane.row + 7u < stripes)"),
    ("long: lower stripes bound", "if (lane.row < stripes)", "if (lane.row <= stripes)"),
    ("long: last stripe's key", "secret_at(121u + 16u * lane.pair)", "secret_at(128u + 16u * lane.pair)"),
    ("long: last stripe by two rows", "if (lane.row == 7u) {", "if (lane.row >= 6u) {"),
    ("long: last stripe taken as aligned", "if (length % 16u == 0) sums", "if (true) sums"),
    ("long: last stripe always by bytes", "if (length % 16u == 0) sums", "if (false) sums"),
    (
        "blocks: stride forgotten",
        "walk.block * args.block_stride_bytes + offset",
        "walk.block * args.block_bytes + offset",
    ),
    (
        "blocks: leaf offset",
        "const u64 offset = (u64)walk.item * LEAF_BYTES;",
        "const u64 offset = (u64)walk.item * (LEAF_BYTES - 16u);",
    ),
    ("blocks: last leaf whole", "left < LEAF_BYTES ? (u32)left : LEAF_BYTES;", "LEAF_BYTES;"),
    ("blocks: leaves counted down", "/ LEAF_BYTES + (args.block_bytes % LEAF_BYTES != 0);", "/ LEAF_BYTES;"),
    ("blocks: leaves counted up", "(args.block_bytes % LEAF_BYTES != 0);", "1u;"),
    (
        "blocks: output order",
        "args.leaves + walk.block * leaves + walk.item;",
        "args.leaves + walk.item * args.block_count + walk.block;",
    ),
    ("blocks: all lanes write", "      if (lane_index == 0) store(out, digest);", "      store(out, digest);"),
    ("blocks: capacity unchecked", "if (!block_fits(args, walk.block)) {", "if (false) {"),
    ("blocks: product may wrap", "__umul64hi(index, args.block_stride_bytes) == 0 &&", "true &&"),
    (
        "blocks: capacity off by one",
        "<= args.chunk_bytes - args.block_bytes;",
        "< args.chunk_bytes - args.block_bytes;",
    ),
    (
        "blocks: a byte beyond",
        "<= args.chunk_bytes - args.block_bytes;",
        "<= args.chunk_bytes - args.block_bytes + 1u;",
    ),
    ("blocks: overflow not reported", "      if (lane_index == 0) atomicOr(args.error, CHUNK_OVERFLOW);\n", ""),
    (
        "guard: alignment of the stride",
        "((u64)args.first_block | args.block_stride_bytes) % 16u",
        "((u64)args.first_block) % 16u",
    ),
    (
        "guard: alignment of the first block",
        "((u64)args.first_block | args.block_stride_bytes) % 16u",
        "(args.block_stride_bytes) % 16u",
    ),
    ("guard: alignment of 8", "args.block_stride_bytes) % 16u == 0;", "args.block_stride_bytes) % 8u == 0;"),
    ("guard: wrong bit", "aligned ? CHUNK_OVERFLOW : UNFIT", "UNFIT"),
    ("guard: block larger than the chunk", "args.block_bytes > args.chunk_bytes || leaves", "leaves"),
    ("guard: leaves beyond 32 bits", " || leaves > 0xffffffffull) {", ") {"),
)

BULK_COPYING = group(
    BULK,
    ("ring: stage of the tail", "const u32 s = loaded % STAGES;", "const u32 s = stored % STAGES;"),
    ("ring: no stage held back", "loaded - stored < STAGES - held", "loaded - stored < STAGES"),
    ("ring: one stage too few held back", "loaded - stored < STAGES - held", "loaded - stored < STAGES - held + 1u"),
    (
        "ring: step of 1",
        "Walk walk(blockIdx.x, gridDim.x, args.tile_count);",
        "Walk walk(blockIdx.x, 1u, args.tile_count);",
    ),
    (
        "ring: all CTAs start at 0",
        "Walk walk(blockIdx.x, gridDim.x, args.tile_count);",
        "Walk walk(0u, gridDim.x, args.tile_count);",
    ),
    (
        "ring: all lanes drive",
        "if (threadIdx.x != 0 || args.tile_count == 0) return;",
        "if (args.tile_count == 0) return;",
    ),
    ("ring: no tiles", "if (threadIdx.x != 0 || args.tile_count == 0) return;", "if (threadIdx.x != 0) return;"),
    ("ring: length of another stage", "lengths[s] = piece.length_bytes;", "lengths[0] = piece.length_bytes;"),
    ("ring: target of another stage", "targets[s] = piece.to;", "targets[0] = piece.to;"),
    (
        "ring: stage size",
        "bulk_store(targets[s], stages + s * STAGE_BYTES,",
        "bulk_store(targets[s], stages + s * 2048u,",
    ),
    ("ring: stages overlap", "#define STAGE_BYTES 4096u", "#define STAGE_BYTES 2048u"),
    ("ring: more stages than shared memory", "#define STAGES 16u", "#define STAGES 32u"),
    ("wait: stores read", "    bulk_wait_read();\n", ""),
    ("wait: stores read, too weak", '"n"(STAGES_HELD) : "memory"', '"n"(STAGES_HELD + 1) : "memory"'),
    ("wait: all stores", "  bulk_wait_all();\n", ""),
    ("wait: only their reads", "cp.async.bulk.wait_group 0;", "cp.async.bulk.wait_group.read 0;"),
    ("wait: loads", "    barrier_wait(&barriers[s], stored / STAGES % 2u);\n", ""),
    ("wait: parity inverted", "stored / STAGES % 2u", "1u - stored / STAGES % 2u"),
    ("wait: parity of the stage", "stored / STAGES % 2u", "stored % 2u"),
    ("wait: another barrier", "barrier_wait(&barriers[s],", "barrier_wait(&barriers[0],"),
    (
        "barrier: one not initialised",
        "for (u32 s = 0; s < STAGES; ++s) barrier_init",
        "for (u32 s = 1; s < STAGES; ++s) barrier_init",
    ),
    ("barrier: not published", "  barrier_publish();\n", ""),
    (
        "barrier: no fence of its initialisation",
        '  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");\n',
        "",
    ),
    ("barrier: no fence between proxies", '  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");\n', ""),
    (
        "barrier: expects too little",
        '"r"(shared_address(barrier)), "r"(length) : "memory");\n  asm',
        '"r"(shared_address(barrier)), "r"(length - 16u) : "memory");\n  asm',
    ),
    ("barrier: arrivals", "mbarrier.init.shared::cta.b64 [%0], 1;", "mbarrier.init.shared::cta.b64 [%0], 2;"),
    ("store: not committed", '  asm volatile("cp.async.bulk.commit_group;" ::: "memory");\n', ""),
    (
        "refuse: nothing",
        "if (bits % 16u || piece.length_bytes == 0 || piece.length_bytes > STAGE_BYTES) {",
        "if (false) {",
    ),
    ("refuse: lengths", "(u32)(u64)piece.from | piece.length_bytes;", "(u32)(u64)piece.from;"),
    ("refuse: targets", "(u32)(u64)piece.to | (u32)(u64)piece.from | piece", "(u32)(u64)piece.from | piece"),
    ("refuse: sources", "(u32)(u64)piece.to | (u32)(u64)piece.from | piece", "(u32)(u64)piece.to | piece"),
    ("refuse: empty tiles", " || piece.length_bytes == 0 ||", " ||"),
    ("refuse: long tiles", " || piece.length_bytes > STAGE_BYTES) {", ") {"),
    ("refuse: wrong bit", "    atomicOr(args.error, UNFIT);\n", "    atomicOr(args.error, CHUNK_OVERFLOW);\n"),
    (
        "refuse: but move",
        "    atomicOr(args.error, UNFIT);\n    return false;",
        "    atomicOr(args.error, UNFIT);\n    return true;",
    ),
    (
        "report: by nobody",
        "locate<DIRECTION>(args, block, item, true, piece)",
        "locate<DIRECTION>(args, block, item, false, piece)",
    ),
    (
        "direction: scatter gathers",
        "memkv_scatter_bulk(const __grid_constant__ CopyArgs args) { copy_tiles_bulk<SCATTER>",
        "memkv_scatter_bulk(const __grid_constant__ CopyArgs args) { copy_tiles_bulk<GATHER>",
    ),
)

VECTOR_LOAD = '"ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"'
WORD_LOADS = " ".join(f"ld.global.nc.L1::no_allocate.u32 %{i}, [%4+{4 * i}];" for i in range(4))
BETWEEN_LOADS_AND_STORES = "\n#pragma unroll\n    for (u32 k = 0; k < LOADS_IN_FLIGHT; ++k)\n      "
LATER_LOADS = (
    "    const Vector c = load(vector_at(from + BLOCK_BYTES)), d = load(vector_at(from + BLOCK_BYTES * 3u / 2u));\n"
)
FIRST_SUMS = """    Sums first = {0, 0}, second = {0, 0};
    first.add(a, lane.low_first, lane.low_second);
    first.add(b, lane.high_first, lane.high_second);
"""
REDUCTION = "    h += lane.total(first) * 0;\n"

SLOW = group(
    SASS,
    ("slow: one load in flight", "#define LOADS_IN_FLIGHT 4u", "#define LOADS_IN_FLIGHT 1u"),
    ("slow: vectors as words", VECTOR_LOAD, f'"{WORD_LOADS}"'),
    ("slow: registers for three CTAs", "__launch_bounds__(DIGEST_THREADS, 2)", "__launch_bounds__(DIGEST_THREADS, 3)"),
    ("slow: two loads at a time in a digest", LATER_LOADS + FIRST_SUMS, FIRST_SUMS + REDUCTION + LATER_LOADS),
)

MUTANTS: tuple[Mutant, ...] = (*WALKING, *COPYING, *DIGESTING, *BULK_COPYING, *SLOW)

EQUIVALENT: tuple[Mutant, ...] = (
    Mutant(
        "slow: loads between stores",
        SASS,
        LOAD_LOOP + BETWEEN_LOADS_AND_STORES + STORE_LOOP,
        "if (k * WARP < left) { v[k] = load(from + k * WARP); store(to + k * WARP, v[k]); }",
        reason="ptxas moves non-coherent loads over stores: four are in flight all the same",
    ),
    Mutant(
        "slow: registers without a bound",
        SASS,
        "__launch_bounds__(COPY_THREADS, 2)",
        "__launch_bounds__(COPY_THREADS)",
        -1,
        reason="a bound for the worst case: this release of ptxas stays below it unasked",
    ),
)
