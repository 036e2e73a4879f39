// What translated PTX (ptx2c.py) calls: the state spaces, and a model of the bulk copy engine.
//
// Bulk copies run in two modes. Eager: bytes move at issue. Lazy: they move at the last moment that the waits allow, so
// a missing or too weak wait shows as wrong data or as a violation. Either way a stage may not be refilled before its
// store has read it, nor stored before its load has been waited for.
#pragma once
#include <deque>

#include "simt_runtime.h"

template <typename T, int N> struct alignas(sizeof(T) * N) Pack { T e[N]; };

struct Stop {};  // a deadlock ends the launch

static const uint32_t STATIC_SHARED_BYTES = 4096, DYNAMIC_SHARED_BYTES = 4 * 16384;

struct BulkEngine {
  struct Barrier { uint32_t phases = 0; int64_t pending = 0; bool arrived = false, ready = false; };
  struct Load { uint32_t to; uint64_t from; uint32_t bytes, barrier; };
  struct Store { uint64_t to; uint32_t from, bytes; bool read; };

  uint8_t shared[STATIC_SHARED_BYTES + DYNAMIC_SHARED_BYTES];
  Barrier barriers[STATIC_SHARED_BYTES / 8];
  std::deque<Load> loads;
  std::vector<Store> open;
  std::deque<std::vector<Store>> groups;
  uint32_t unfenced = 0, spins = 0;  // bit 0: barrier initialisation, bit 1: proxy
  bool unwritten = false;  // stores that were waited for with .read only
  bool lazy = false;

  static void fail(int32_t kind, uint64_t a, uint32_t n) { simt::machine().report(kind, a, n); }
  Barrier& barrier(uint32_t a) {
    if (a % 8 || a >= STATIC_SHARED_BYTES) { fail(simt::BARRIER_MISUSE, a, 8); throw Stop(); }
    return barriers[a / 8];
  }
  void flip(Barrier& b) {
    if (b.arrived && b.pending == 0) { b.phases++; b.arrived = false; }
  }
  void init(uint32_t a, uint32_t count) {
    if (count != 1) fail(simt::BARRIER_MISUSE, a, count);
    barrier(a) = Barrier();
    barrier(a).ready = true;
    unfenced = 3;
  }
  void expect(uint32_t a, uint32_t bytes) {
    Barrier& b = barrier(a);
    if (!b.ready || b.arrived || unfenced) fail(simt::BARRIER_MISUSE, a, bytes);
    b.pending += bytes;
    b.arrived = true;
    flip(b);
  }
  void move(const Load& l) {
    for (uint32_t i = 0; i < l.bytes; i += 16) {
      const auto v = simt::load<Pack<uint64_t, 2>>(l.from + i);
      std::memcpy(shared + l.to + i, &v, 16);
    }
    barrier(l.barrier).pending -= l.bytes;
    flip(barrier(l.barrier));
  }
  void move(Store& s) {
    for (uint32_t i = 0; i < s.bytes; i += 16) {
      Pack<uint64_t, 2> v;
      std::memcpy(&v, shared + s.from + i, 16);
      simt::store(s.to + i, v);
    }
    s.read = true;
  }
  static bool inside(uint32_t a, uint32_t n) {
    return a >= STATIC_SHARED_BYTES && n <= DYNAMIC_SHARED_BYTES &&
           a - STATIC_SHARED_BYTES <= DYNAMIC_SHARED_BYTES - n;
  }
  void load(uint32_t to, uint64_t from, uint32_t n, uint32_t barrier) {
    if ((from | to | n) % 16 || n == 0) return fail(simt::BULK_LOAD_UNALIGNED, from, n);
    if (!inside(to, n)) return fail(simt::STAGE_OUT_OF_BOUNDS, to, n);
    for (const auto& group : groups)
      for (const Store& s : group)
        if (!s.read && to < s.from + s.bytes && s.from < to + n) fail(simt::STAGE_OVERWRITTEN, to, n);
    const Load l = {to, from, n, barrier};
    if (lazy) loads.push_back(l);
    else move(l);
  }
  void store(uint64_t to, uint32_t from, uint32_t n) {
    if ((to | from | n) % 16 || n == 0) return fail(simt::BULK_STORE_UNALIGNED, to, n);
    if (!inside(from, n)) return fail(simt::STAGE_OUT_OF_BOUNDS, from, n);
    for (const Load& l : loads)
      if (from < l.to + l.bytes && l.to < from + n) fail(simt::STAGE_NOT_LOADED, from, n);
    open.push_back({to, from, n, false});
  }
  void commit() {
    groups.push_back(open);
    open.clear();
    if (!lazy) for (Store& s : groups.back()) move(s);
  }
  // `reads_only`: the stages of the older groups have been read; their bytes may still be on the way.
  void wait(uint32_t keep, bool reads_only) {
    while (groups.size() > keep) {
      for (Store& s : groups.front()) if (!s.read) move(s);
      groups.pop_front();
      unwritten = true;
    }
    if (!reads_only && keep == 0) unwritten = false;
  }
  bool try_wait(uint32_t a, uint32_t parity) {
    Barrier& b = barrier(a);
    if (!b.ready || unfenced) fail(simt::BARRIER_MISUSE, a, parity);
    if ((b.phases & 1) != parity) return true;
    for (size_t i = 0; i < loads.size(); ++i) {
      if (loads[i].barrier != a) continue;
      const Load l = loads[i];
      loads.erase(loads.begin() + i);
      move(l);
      return false;
    }
    if (++spins > 1000) { fail(simt::DEADLOCK, a, parity); throw Stop(); }
    return false;
  }
  void end() {
    if (!loads.empty()) fail(simt::LOADS_LEFT, 0, (uint32_t)loads.size());
    if (unwritten || !groups.empty() || !open.empty()) fail(simt::STORES_LEFT, 0, (uint32_t)groups.size());
    reset();
  }
  void reset() {
    loads.clear(), open.clear(), groups.clear();
    for (Barrier& b : barriers) b = Barrier();
    std::memset(shared, 0xEE, sizeof shared);
    unfenced = spins = 0;
    unwritten = false;
  }
};
static BulkEngine bulk;

template <typename T> static inline T read_space(const uint8_t* base, uint64_t bytes, uint64_t a, int32_t kind) {
  T v = 0;
  if (a % sizeof(T) || a > bytes || sizeof(T) > bytes - a) simt::machine().report(kind, a, sizeof(T));
  else std::memcpy(&v, base + a, sizeof(T));
  return v;
}
template <typename T> static inline T shared_load(uint32_t a) {
  return read_space<T>(bulk.shared, sizeof bulk.shared, a, simt::SHARED_OUT_OF_BOUNDS);
}
template <typename T> static inline void shared_store(uint32_t a, T v) {
  if (a % sizeof(T) || a > sizeof bulk.shared - sizeof(T)) bulk.fail(simt::SHARED_OUT_OF_BOUNDS, a, sizeof(T));
  else std::memcpy(bulk.shared + a, &v, sizeof(T));
}

// Division by zero has some result on the device; nothing may depend on it.
template <typename T> static inline bool divides(T b) {
  if (!b) simt::machine().report(simt::DIVIDED_BY_ZERO, 0, sizeof(T));
  return b;
}
template <typename T> static inline T divide(T a, T b) { return divides(b) ? a / b : (T)-1; }
template <typename T> static inline T remainder(T a, T b) { return divides(b) ? a % b : a; }
static inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> (4 * i) & 15;
    uint32_t v = bytes >> (8 * (s & 7)) & 255;
    if (s & 8) v = v & 128 ? 255 : 0;
    out |= v << (8 * i);
  }
  return out;
}
template <typename T> static inline T insert_bits(T a, T b, uint32_t at, uint32_t count) {
  const uint32_t bits = sizeof(T) * 8;
  at &= 255, count &= 255;
  T out = b;
  for (uint32_t i = 0; i < count && at + i < bits; ++i)
    out = (out & ~((T)1 << (at + i))) | ((a >> i & 1) << (at + i));
  return out;
}
static inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t n) {
  n &= 31;
  return n ? high << n | low >> (32 - n) : high;
}
static inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t n) {
  n &= 31;
  return n ? low >> n | high << (32 - n) : low;
}
// Shuffles are modelled for whole warps only.
static inline void whole_warp(uint32_t clamp, uint32_t mask) {
  if (clamp != 31 || mask != 0xffffffffu) simt::machine().report(simt::DIVERGED, mask, clamp);
}
static inline uint64_t multiply_high(uint64_t a, uint64_t b) { return (unsigned __int128)a * b >> 64; }

// `Lane` is a translated kernel with the registers of one lane.
template <typename Lane> struct PtxProgram {
  const uint8_t* param;
  std::vector<Lane> lanes = std::vector<Lane>(simt::WARP);
  void start(uint32_t lane) { lanes[lane] = Lane(); }
  bool run(uint32_t lane) { return lanes[lane].run(param, lane); }
  void end_cta() { bulk.end(); }
};
template <typename Lane> static int run_ptx(const void* param, uint32_t grid, uint32_t block, uint64_t seed) {
  PtxProgram<Lane> program{(const uint8_t*)param};
  bulk.reset();
  try {
    simt::launch(grid, block, seed, program);
  } catch (const Stop&) {
    bulk.reset();
  }
  return 0;
}

MEMKV_EXPORT void memkv_bulk_mode(int lazy) { bulk.lazy = lazy; }
