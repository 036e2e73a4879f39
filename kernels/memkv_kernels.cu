// Paged KV blocks <-> one contiguous chunk, and the digests of its leaves.
//
// One source for four compilers: nvcc (the shipped fatbin), NVRTC (no standard headers), a host C++ compiler through
// host_emulation.h, and nvcc -> PTX -> C++ (tests/kernels). README.md has the ABI, the bounds and the arithmetic.
//
// Layout knowledge stays on the host, in a table of tiles planned once per KV pool. The device moves bytes:
//   base + id * block_stride_bytes  <->  chunk + chunk_offset_bytes + (first_index + i) * chunk_stride_bytes

#if defined(MEMKV_HOST_EMULATION)
#include "host_emulation.h"
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#define COPY_THREADS 512
#define DIGEST_THREADS 512
#define BULK_THREADS 32
#define LOADS_IN_FLIGHT 4u
#define WARP 32u
#define ALL_LANES 0xffffffffu
#define MAX_INLINE_IDS 448

enum Error : u32 { ID_OUT_OF_RANGE = 1u, CHUNK_OVERFLOW = 2u, UNFIT = 4u };
enum Direction { GATHER, SCATTER };

// ------------------------------------------------------------------------------------------------------------- ABI

struct __align__(16) Tile {
  u64 base;                // device address of this piece in block 0
  i64 block_stride_bytes;  // from block b to block b + 1
  u64 chunk_offset_bytes;  // of this piece at chunk index 0
  i64 chunk_stride_bytes;  // from chunk index i to i + 1
  u32 length_bytes;
  u32 log2_access;  // 0..4: the widest access that every address of this tile allows
  u64 reserved;
};

struct CopyArgs {
  const Tile* tiles;
  u8* chunk;
  u64 chunk_bytes;          // capacity
  const i64* external_ids;  // instead of `ids` where not null
  u32* error;
  u32 tile_count;
  u32 block_count;
  u32 num_blocks;   // ids must be below
  u32 first_index;  // chunk index of ids[0]
  i32 ids[MAX_INLINE_IDS];
};

struct DigestArgs {
  const u8* first_block;
  u64* leaves;      // out, block-major
  u64 chunk_bytes;  // what may be read from first_block on
  u64 block_bytes;
  u64 block_stride_bytes;
  u32* error;
  u32 block_count;
  u32 reserved;
};

static_assert(sizeof(Tile) == 48, "ABI");
static_assert(sizeof(CopyArgs) == 1848, "ABI");
static_assert(sizeof(DigestArgs) == 56, "ABI");

// --------------------------------------------------------------------------------------------------- memory access

#if !defined(MEMKV_HOST_EMULATION)
struct __align__(16) Vector { u32 x, y, z, w; };

// Loads: data that nobody writes while the kernel runs, read once. Stores: not read again on this device soon.
__device__ __forceinline__ Vector load(const Vector* p) {
  Vector v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ u64 load(const u64* p) {
  u64 v;
  asm volatile("ld.global.nc.L1::no_allocate.u64 %0, [%1];" : "=l"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ u32 load(const u32* p) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ u16 load(const u16* p) {
  u16 v;
  asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ u8 load(const u8* p) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.u8 %0, [%1];" : "=r"(v) : "l"(p));
  return (u8)v;
}
__device__ __forceinline__ void store(Vector* p, Vector v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};"
               :: "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store(u64* p, u64 v) {
  asm volatile("st.global.cs.u64 [%0], %1;" :: "l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ void store(u32* p, u32 v) {
  asm volatile("st.global.cs.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void store(u16* p, u16 v) {
  asm volatile("st.global.cs.u16 [%0], %1;" :: "l"(p), "h"(v) : "memory");
}
__device__ __forceinline__ void store(u8* p, u8 v) {
  asm volatile("st.global.cs.u8 [%0], %1;" :: "l"(p), "r"((u32)v) : "memory");
}
#endif

// ------------------------------------------------------------------------------------------------------ walking

// Work is a matrix of blocks x items (tiles or leaves). A worker starts at `first` and goes on by `stride`, block-major,
// without a division per step and without a product that could overflow.
struct Walk {
  u64 block;
  u32 item, items, item_step, block_step;

  __device__ __forceinline__ Walk(u32 first, u32 stride, u32 items_)
      : block(first / items_), item(first % items_), items(items_), item_step(stride % items_),
        block_step(stride / items_) {}

  __device__ __forceinline__ void next() {
    block += block_step;
    const u32 room = items - item_step;
    if (item >= room) {
      item -= room;
      ++block;
    } else {
      item += item_step;
    }
  }
};

__device__ __forceinline__ u32 this_warp() { return (blockIdx.x * blockDim.x + threadIdx.x) / WARP; }
__device__ __forceinline__ u32 warp_count() { return gridDim.x * blockDim.x / WARP; }

// -------------------------------------------------------------------------------------------- gather and scatter

struct Piece {
  u8* to;
  const u8* from;
  u32 length_bytes;
  u32 log2_access;
};

// Finds what one tile of one block moves. False: nothing, and `reporter` has noted why where that is an error.
template <Direction DIRECTION>
__device__ __forceinline__ bool locate(const CopyArgs& args, u64 block, u32 item, bool reporter, Piece& piece) {
  const i64 id = args.external_ids ? args.external_ids[block] : (i64)args.ids[block];
  if (id < 0) return false;  // a hole
  if (id >= (i64)args.num_blocks) {
    if (reporter) atomicOr(args.error, ID_OUT_OF_RANGE);
    return false;
  }
  const Tile tile = args.tiles[item];
  const u64 offset = tile.chunk_offset_bytes + (args.first_index + block) * (u64)tile.chunk_stride_bytes;
  if (offset > args.chunk_bytes || tile.length_bytes > args.chunk_bytes - offset) {
    if (reporter) atomicOr(args.error, CHUNK_OVERFLOW);
    return false;
  }
  u8* page = (u8*)(tile.base + (u64)id * (u64)tile.block_stride_bytes);
  u8* chunk = args.chunk + offset;
  piece.to = DIRECTION == GATHER ? chunk : page;
  piece.from = DIRECTION == GATHER ? page : chunk;
  piece.length_bytes = tile.length_bytes;
  piece.log2_access = tile.log2_access;
  return true;
}

// One warp moves `length` bytes by accesses of T, of which both addresses are multiples.
template <typename T>
__device__ __forceinline__ void warp_copy(const Piece& piece, u32 lane) {
  const u32 count = piece.length_bytes / (u32)sizeof(T);
  // All loads are issued before the first store. The last round is predicated, so that a short tile has as many in
  // flight as a long one.
#pragma unroll 1
  for (u32 i = lane; i < count; i += LOADS_IN_FLIGHT * WARP) {
    const T* from = (const T*)piece.from + i;
    T* to = (T*)piece.to + i;
    const u32 left = count - i;
    T v[LOADS_IN_FLIGHT];
#pragma unroll
    for (u32 k = 0; k < LOADS_IN_FLIGHT; ++k)
      if (k * WARP < left) v[k] = load(from + k * WARP);
#pragma unroll
    for (u32 k = 0; k < LOADS_IN_FLIGHT; ++k)
      if (k * WARP < left) store(to + k * WARP, v[k]);
  }
  if (sizeof(T) > 1) {
    const u32 at = count * (u32)sizeof(T) + lane;  // fewer than sizeof(T) bytes are left
    if (at < piece.length_bytes) store(piece.to + at, load(piece.from + at));
  }
}

template <Direction DIRECTION>
__device__ __forceinline__ void copy_tiles(const CopyArgs& args) {
  if (args.tile_count == 0) return;
  const u32 lane = threadIdx.x % WARP;
#pragma unroll 1
  for (Walk walk(this_warp(), warp_count(), args.tile_count); walk.block < args.block_count; walk.next()) {
    Piece piece;
    if (!locate<DIRECTION>(args, walk.block, walk.item, lane == 0, piece)) continue;
    // The host plans the width; an address that does not allow it is moved more narrowly instead of faulting.
    const u32 bits = (u32)(u64)piece.to | (u32)(u64)piece.from | 1u << (piece.log2_access & 31u);
    if (bits % 16u == 0) warp_copy<Vector>(piece, lane);
    else if (bits % 8u == 0) warp_copy<u64>(piece, lane);
    else if (bits % 4u == 0) warp_copy<u32>(piece, lane);
    else if (bits % 2u == 0) warp_copy<u16>(piece, lane);
    else warp_copy<u8>(piece, lane);
  }
}

extern "C" __global__ void __launch_bounds__(COPY_THREADS, 2)
memkv_gather(const __grid_constant__ CopyArgs args) { copy_tiles<GATHER>(args); }

extern "C" __global__ void __launch_bounds__(COPY_THREADS, 2)
memkv_scatter(const __grid_constant__ CopyArgs args) { copy_tiles<SCATTER>(args); }

// ------------------------------------------------------------------------------------------- XXH3-64 of the leaves

#define LEAF_BYTES 16384u
#define BLOCK_BYTES 1024u  // XXH3's own block: 16 stripes, then a scramble
#define STRIPE_BYTES 64u
#define SHORT_BYTES 240u   // up to here XXH3 has other rules

#define PRIME32_1 0x9E3779B1u
#define PRIME64_1 0x9E3779B185EBCA87ull
#define PRIME64_2 0xC2B2AE3D27D4EB4Full
#define PRIME64_3 0x165667B19E3779F9ull

// XXH3's default secret as little-endian words, and what its eight accumulators start from.
__constant__ u64 SECRET[24] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull};
__constant__ u64 START[8] = {0xC2B2AE3Dull, PRIME64_1, PRIME64_2, PRIME64_3, 0x85EBCA77C2B2AE63ull, 0x85EBCA77ull,
                             0x27D4EB2F165667C5ull, PRIME32_1};

__device__ __forceinline__ u64 secret_at(u32 byte) {
  const u32 shift = byte % 8u * 8u;
  const u64 word = SECRET[byte / 8u];
  return shift ? word >> shift | SECRET[byte / 8u + 1u] << (64u - shift) : word;
}

__device__ __forceinline__ u64 fold(u64 a, u64 b) { return a * b ^ __umul64hi(a, b); }

__device__ __forceinline__ u64 avalanche(u64 h) {
  h ^= h >> 37;
  h *= 0x165667919E3779F9ull;
  return h ^ h >> 32;
}

// Short leaves have no alignment to rely on and end a block, so there is one per block at most: one lane, byte loads.
__device__ __forceinline__ u64 read_bytes(const u8* p, u32 count) {
  u64 v = 0;
#pragma unroll
  for (u32 i = 0; i < count; ++i) v |= (u64)load(p + i) << (8u * i);
  return v;
}

__device__ __forceinline__ u64 mix_16(const u8* p, u32 secret_byte) {
  return fold(read_bytes(p, 8) ^ secret_at(secret_byte), read_bytes(p + 8, 8) ^ secret_at(secret_byte + 8u));
}

__device__ __forceinline__ u64 swap_32(u64 v) {
  return (v >> 24 & 0xffu) | (v >> 8 & 0xff00u) | (v << 8 & 0xff0000u) | (v << 24 & 0xff000000u);
}

__device__ __forceinline__ u64 digest_1_to_3(const u8* p, u32 length) {
  const u64 word = read_bytes(p, 1) << 16 | read_bytes(p + length / 2u, 1) << 24 | read_bytes(p + length - 1u, 1) |
                   (u64)length << 8;
  u64 h = word ^ ((SECRET[0] ^ SECRET[0] >> 32) & 0xffffffffu);
  h ^= h >> 33;
  h *= PRIME64_2;
  h ^= h >> 29;
  h *= PRIME64_3;
  return h ^ h >> 32;
}

__device__ __forceinline__ u64 digest_4_to_8(const u8* p, u32 length) {
  u64 h = (read_bytes(p + length - 4u, 4) | read_bytes(p, 4) << 32) ^ SECRET[1] ^ SECRET[2];
  h ^= (h << 49 | h >> 15) ^ (h << 24 | h >> 40);
  h *= 0x9FB21C651E98DF25ull;
  h ^= (h >> 35) + length;
  h *= 0x9FB21C651E98DF25ull;
  return h ^ h >> 28;
}

__device__ __forceinline__ u64 digest_9_to_16(const u8* p, u32 length) {
  const u64 low = read_bytes(p, 8) ^ SECRET[3] ^ SECRET[4];
  const u64 high = read_bytes(p + length - 8u, 8) ^ SECRET[5] ^ SECRET[6];
  const u64 swapped = swap_32(low) << 32 | swap_32(low >> 32);
  return avalanche(length + swapped + high + fold(low, high));
}

__device__ __forceinline__ u64 digest_17_to_128(const u8* p, u32 length) {
  u64 h = length * PRIME64_1;
#pragma unroll 1
  for (u32 i = 0; i <= (length - 1u) / 32u; ++i) {
    h += mix_16(p + 16u * i, 32u * i);
    h += mix_16(p + length - 16u * (i + 1u), 32u * i + 16u);
  }
  return avalanche(h);
}

__device__ __forceinline__ u64 digest_129_to_240(const u8* p, u32 length) {
  u64 h = length * PRIME64_1;
#pragma unroll 1
  for (u32 i = 0; i < 8u; ++i) h += mix_16(p + 16u * i, 16u * i);
  h = avalanche(h);
#pragma unroll 1
  for (u32 i = 8; i < length / 16u; ++i) h += mix_16(p + 16u * i, 16u * (i - 8u) + 3u);
  return avalanche(h + mix_16(p + length - 16u, 119u));
}

__device__ __forceinline__ u64 digest_short(const u8* p, u32 length) {
  if (length <= 3u) return digest_1_to_3(p, length);
  if (length <= 8u) return digest_4_to_8(p, length);
  if (length <= 16u) return digest_9_to_16(p, length);
  if (length <= 128u) return digest_17_to_128(p, length);
  return digest_129_to_240(p, length);
}

// What one lane adds up: 16 of the 64 bytes of a stripe, which feed the accumulators 2 * pair and 2 * pair + 1.
struct Sums {
  u64 even, odd;

  __device__ __forceinline__ void add(u64 first, u64 second, u64 first_key, u64 second_key) {
    const u64 a = first ^ first_key, b = second ^ second_key;
    even += second + (u64)(u32)a * (u32)(a >> 32);
    odd += first + (u64)(u32)b * (u32)(b >> 32);
  }
  __device__ __forceinline__ void add(Vector v, u64 first_key, u64 second_key) {
    add((u64)v.y << 32 | v.x, (u64)v.w << 32 | v.z, first_key, second_key);
  }
};

// A lane of the warp that digests a leaf. Lane 4 * row + pair reads piece `pair` of the stripes `row` and `row + 8` of
// each XXH3 block, so that a warp's load is 512 contiguous bytes. Inside a block the stripes only add up, in any order;
// the total of accumulator 2 * pair + row % 2 ends up in this lane (and in three others, which do the same work).
struct Lane {
  u32 row, pair;
  u64 low_first, low_second, high_first, high_second;  // keys of the stripes `row` and `row + 8`
  u64 scramble_key, start;

  __device__ __forceinline__ explicit Lane(u32 lane)
      : row(lane / 4u), pair(lane % 4u), low_first(SECRET[row + 2u * pair]), low_second(SECRET[row + 2u * pair + 1u]),
        high_first(SECRET[row + 2u * pair + 8u]), high_second(SECRET[row + 2u * pair + 9u]),
        scramble_key(SECRET[16u + accumulator()]), start(START[accumulator()]) {}

  __device__ __forceinline__ u32 accumulator() const { return 2u * pair + row % 2u; }
  __device__ __forceinline__ u32 offset() const { return STRIPE_BYTES * row + 16u * pair; }

  __device__ __forceinline__ u64 total(const Sums& sums) const {
    const bool odd = row % 2u;
    u64 mine = odd ? sums.odd : sums.even;
    mine += __shfl_xor_sync(ALL_LANES, odd ? sums.even : sums.odd, 4);
    mine += __shfl_xor_sync(ALL_LANES, mine, 8);
    mine += __shfl_xor_sync(ALL_LANES, mine, 16);
    return mine;
  }

  __device__ __forceinline__ u64 scramble(u64 h) const { return (h ^ h >> 47 ^ scramble_key) * PRIME32_1; }

  // Every lane gets the digest that the eight accumulators make.
  __device__ __forceinline__ u64 merge(u64 h, u32 length) const {
    h ^= secret_at(11u + 8u * accumulator());
    u64 sum = fold(h, __shfl_xor_sync(ALL_LANES, h, 4));
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
    return avalanche(length * PRIME64_1 + sum);
  }
};

__device__ __forceinline__ const Vector* vector_at(const u8* p) { return (const Vector*)p; }

// A warp digests a leaf of more than 240 bytes that starts at a multiple of 16.
__device__ __forceinline__ u64 digest_long(const u8* leaf, u32 length, const Lane& lane) {
  const u32 scrambles = (length - 1u) / BLOCK_BYTES;
  const u8* from = leaf + lane.offset();
  u64 h = lane.start;
  u32 i = 0;
  // Two XXH3 blocks a round: four loads before their first use, and two independent reductions.
#pragma unroll 1
  for (; i + 2u <= scrambles; i += 2u, from += 2u * BLOCK_BYTES) {
    const Vector a = load(vector_at(from)), b = load(vector_at(from + BLOCK_BYTES / 2u));
    const Vector c = load(vector_at(from + BLOCK_BYTES)), d = load(vector_at(from + BLOCK_BYTES * 3u / 2u));
    Sums first = {0, 0}, second = {0, 0};
    first.add(a, lane.low_first, lane.low_second);
    first.add(b, lane.high_first, lane.high_second);
    second.add(c, lane.low_first, lane.low_second);
    second.add(d, lane.high_first, lane.high_second);
    const u64 first_total = lane.total(first), second_total = lane.total(second);
    h = lane.scramble(h + first_total);
    h = lane.scramble(h + second_total);
  }
  if (i < scrambles) {
    Sums sums = {0, 0};
    const Vector a = load(vector_at(from)), b = load(vector_at(from + BLOCK_BYTES / 2u));
    sums.add(a, lane.low_first, lane.low_second);
    sums.add(b, lane.high_first, lane.high_second);
    h = lane.scramble(h + lane.total(sums));
    from += BLOCK_BYTES;
  }
  // Up to 15 stripes are left, and then the last 64 bytes once more, at any alignment and with a key of their own.
  const u32 stripes = (length - 1u - scrambles * BLOCK_BYTES) / STRIPE_BYTES;
  Sums sums = {0, 0};
  if (lane.row < stripes) sums.add(load(vector_at(from)), lane.low_first, lane.low_second);
  if (lane.row + 8u < stripes) sums.add(load(vector_at(from + BLOCK_BYTES / 2u)), lane.high_first, lane.high_second);
  if (lane.row == 7u) {
    const u8* last = leaf + length - STRIPE_BYTES + 16u * lane.pair;
    const u64 first_key = secret_at(121u + 16u * lane.pair), second_key = secret_at(129u + 16u * lane.pair);
    if (length % 16u == 0) sums.add(load(vector_at(last)), first_key, second_key);
    else sums.add(read_bytes(last, 8), read_bytes(last + 8, 8), first_key, second_key);
  }
  return lane.merge(h + lane.total(sums), length);
}

// True when block `index` lies inside what may be read; no product or sum here can wrap.
__device__ __forceinline__ bool block_fits(const DigestArgs& args, u64 index) {
  return __umul64hi(index, args.block_stride_bytes) == 0 &&
         index * args.block_stride_bytes <= args.chunk_bytes - args.block_bytes;
}

extern "C" __global__ void __launch_bounds__(DIGEST_THREADS, 2)
memkv_leaf_digests(const __grid_constant__ DigestArgs args) {
  const u32 lane_index = threadIdx.x % WARP;
  const u64 leaves = args.block_bytes / LEAF_BYTES + (args.block_bytes % LEAF_BYTES != 0);
  if (args.block_count == 0 || leaves == 0) return;
  const bool aligned = ((u64)args.first_block | args.block_stride_bytes) % 16u == 0;
  if (!aligned || args.block_bytes > args.chunk_bytes || leaves > 0xffffffffull) {
    if (blockIdx.x == 0 && threadIdx.x == 0) atomicOr(args.error, aligned ? CHUNK_OVERFLOW : UNFIT);
    return;
  }
  const Lane lane(lane_index);
#pragma unroll 1
  for (Walk walk(this_warp(), warp_count(), (u32)leaves); walk.block < args.block_count; walk.next()) {
    if (!block_fits(args, walk.block)) {
      if (lane_index == 0) atomicOr(args.error, CHUNK_OVERFLOW);
      continue;
    }
    const u64 offset = (u64)walk.item * LEAF_BYTES;
    const u8* leaf = args.first_block + walk.block * args.block_stride_bytes + offset;
    const u64 left = args.block_bytes - offset;
    const u32 length = left < LEAF_BYTES ? (u32)left : LEAF_BYTES;
    u64* out = args.leaves + walk.block * leaves + walk.item;
    if (length > SHORT_BYTES) {
      const u64 digest = digest_long(leaf, length, lane);
      if (lane_index == 0) store(out, digest);
    } else if (lane_index == 0) {
      store(out, digest_short(leaf, length));
    }
  }
}

// ------------------------------------------------------------------------- gather and scatter by bulk copies, sm_90+

// One thread per CTA drives a ring of stages through shared memory: global -> stage -> global.
#define STAGE_BYTES 4096u
#define STAGES 16u
#define STAGES_HELD 4u  // stages whose store may still be reading while later ones are loaded

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u64* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_publish() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "WAIT_%=:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n\t"
      "@p bra DONE_%=;\n\tbra WAIT_%=;\n\t"
      "DONE_%=:\n\t}"
      :: "r"(shared_address(barrier)), "r"(parity) : "memory");
}
__device__ __forceinline__ void bulk_load(void* to, const void* from, u32 length, u64* barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(shared_address(barrier)), "r"(length) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(shared_address(to)), "l"(from), "r"(length), "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void bulk_store(void* to, const void* from, u32 length) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               :: "l"(to), "r"(shared_address(from)), "r"(length) : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(STAGES_HELD) : "memory");
}
__device__ __forceinline__ void bulk_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

template <Direction DIRECTION>
__device__ __forceinline__ bool locate_bulk(const CopyArgs& args, u64 block, u32 item, Piece& piece) {
  if (!locate<DIRECTION>(args, block, item, true, piece)) return false;
  const u32 bits = (u32)(u64)piece.to | (u32)(u64)piece.from | piece.length_bytes;
  if (bits % 16u || piece.length_bytes == 0 || piece.length_bytes > STAGE_BYTES) {
    atomicOr(args.error, UNFIT);
    return false;
  }
  return true;
}

template <Direction DIRECTION>
__device__ __forceinline__ void copy_tiles_bulk(const CopyArgs& args) {
  extern __shared__ __align__(128) u8 stages[];
  __shared__ __align__(8) u64 barriers[STAGES];
  __shared__ u8* targets[STAGES];
  __shared__ u32 lengths[STAGES];
  if (threadIdx.x != 0 || args.tile_count == 0) return;
#pragma unroll 1
  for (u32 s = 0; s < STAGES; ++s) barrier_init(&barriers[s]);
  barrier_publish();
  Walk walk(blockIdx.x, gridDim.x, args.tile_count);
  u32 loaded = 0, stored = 0;  // tiles whose load, whose store has been issued
#pragma unroll 1
  for (;;) {
    const u32 held = stored < STAGES_HELD ? stored : STAGES_HELD;
#pragma unroll 1
    for (; loaded - stored < STAGES - held && walk.block < args.block_count; walk.next()) {
      Piece piece;
      if (!locate_bulk<DIRECTION>(args, walk.block, walk.item, piece)) continue;
      const u32 s = loaded % STAGES;
      targets[s] = piece.to;
      lengths[s] = piece.length_bytes;
      bulk_load(stages + s * STAGE_BYTES, piece.from, piece.length_bytes, &barriers[s]);
      ++loaded;
    }
    if (stored == loaded) break;
    const u32 s = stored % STAGES;
    barrier_wait(&barriers[s], stored / STAGES % 2u);
    bulk_store(targets[s], stages + s * STAGE_BYTES, lengths[s]);
    ++stored;
    // Only the newest stores may still be reading their stages.
    bulk_wait_read();
  }
  bulk_wait_all();
}

extern "C" __global__ void __launch_bounds__(BULK_THREADS)
memkv_gather_bulk(const __grid_constant__ CopyArgs args) { copy_tiles_bulk<GATHER>(args); }

extern "C" __global__ void __launch_bounds__(BULK_THREADS)
memkv_scatter_bulk(const __grid_constant__ CopyArgs args) { copy_tiles_bulk<SCATTER>(args); }

#endif
