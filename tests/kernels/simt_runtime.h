// A stand-in for the SIMT machine on a CPU: who runs when, and a checker that every global access goes through.
//
// Shared by both ways to run the kernels here: the .cu as host C++ (host_emulation.h) and PTX translated to C++
// (ptx2c.py). CTAs, warps and lanes take turns in an order drawn from a seed, so nothing may depend on who goes first.
// A lane runs until it ends or meets a warp collective; when all lanes of its warp are there, values are exchanged.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace simt {

constexpr uint32_t WARP = 32;

struct Dim3 { uint32_t x, y, z; };
struct Thread { Dim3 tid, ctaid, ntid, nctaid; };
inline Thread& thread() { static Thread t; return t; }

// ---------------------------------------------------------------------------------------------------- the checker

enum Permission : uint8_t { READ = 1, WRITE = 2 };
enum Kind : int32_t {
  UNALIGNED = 1, OUT_OF_BOUNDS, NOT_READABLE, NOT_WRITABLE, WRITTEN_TWICE, READ_AFTER_WRITE, WRITE_AFTER_READ,
  DIVERGED, PARAMETER_OUT_OF_BOUNDS, CONSTANT_OUT_OF_BOUNDS, SHARED_OUT_OF_BOUNDS, DIVIDED_BY_ZERO,
  BARRIER_MISUSE = 101, BULK_LOAD_UNALIGNED, STAGE_OUT_OF_BOUNDS, STAGE_OVERWRITTEN, BULK_STORE_UNALIGNED,
  STAGE_NOT_LOADED, DEADLOCK, LOADS_LEFT, STORES_LEFT
};

// A range of memory that the launch may touch. A shadow byte per byte: 1 was read, 2 was written.
struct Range { uint64_t base, size; uint8_t permission; std::vector<uint8_t> shadow; };
struct Violation { int32_t kind; uint32_t width; uint64_t address; uint32_t cta, tid; };

struct Machine {
  std::vector<Range> ranges;
  std::vector<Violation> violations;
  uint64_t loads[5] = {0}, stores[5] = {0};  // by log2 of the width
  size_t last = 0;
  bool check = false;

  void report(int32_t kind, uint64_t address, uint32_t width) {
    if (violations.size() < 64) violations.push_back({kind, width, address, thread().ctaid.x, thread().tid.x});
  }

  Range* find(uint64_t a, uint64_t n) {
    auto holds = [&](const Range& r) { return a >= r.base && a - r.base <= r.size && n <= r.size - (a - r.base); };
    if (last < ranges.size() && holds(ranges[last])) return &ranges[last];
    for (size_t i = 0; i < ranges.size(); ++i)
      if (holds(ranges[i])) { last = i; return &ranges[i]; }
    return nullptr;
  }

  // False: the access must not be carried out.
  bool access(uint64_t a, uint32_t n, bool write) {
    (write ? stores : loads)[n == 16 ? 4 : n == 8 ? 3 : n == 4 ? 2 : n == 2 ? 1 : 0]++;
    if (a % n) return report(UNALIGNED, a, n), false;
    if (!check) return true;
    Range* r = find(a, n);
    if (!r) return report(OUT_OF_BOUNDS, a, n), false;
    if (!(r->permission & (write ? WRITE : READ))) return report(write ? NOT_WRITABLE : NOT_READABLE, a, n), false;
    uint8_t* s = r->shadow.data() + (a - r->base);
    for (uint32_t i = 0; i < n; ++i) {
      const int32_t kind = !write ? (s[i] & 2 ? READ_AFTER_WRITE : 0)
                                  : s[i] & 2 ? WRITTEN_TWICE : s[i] & 1 ? WRITE_AFTER_READ : 0;
      if (kind) { report(kind, a + i, n); break; }
    }
    for (uint32_t i = 0; i < n; ++i) s[i] |= write ? 2 : 1;
    return true;
  }
};
inline Machine& machine() { static Machine m; return m; }

template <typename T> inline T load(uint64_t a) {
  T v;
  std::memset(&v, 0, sizeof(T));
  if (machine().access(a, sizeof(T), false)) std::memcpy(&v, (const void*)a, sizeof(T));
  return v;
}
template <typename T> inline void store(uint64_t a, const T& v) {
  if (machine().access(a, sizeof(T), true)) std::memcpy((void*)a, &v, sizeof(T));
}
// Several threads may meet at the error word, so it has no shadow.
inline uint32_t atomic_or(uint64_t a, uint32_t v) {
  if (a % 4) return machine().report(UNALIGNED, a, 4), 0;
  if (machine().check) {
    Range* r = machine().find(a, 4);
    if (!r) return machine().report(OUT_OF_BOUNDS, a, 4), 0;
    if (!(r->permission & WRITE)) return machine().report(NOT_WRITABLE, a, 4), 0;
  }
  uint32_t old;
  std::memcpy(&old, (const void*)a, 4);
  const uint32_t now = old | v;
  std::memcpy((void*)a, &now, 4);
  return old;
}

// -------------------------------------------------------------------------------------------------- the scheduler

// What a lane that stopped at a butterfly shuffle asks for, and gets.
struct Collective { uint32_t site = 0, lane_xor = 0; uint64_t value = 0, result = 0; };
inline Collective& collective(uint32_t lane) { static Collective c[WARP]; return c[lane]; }

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ull) {}
  // The order in which `n` things take turns: as they stand where the seed is 0.
  std::vector<uint32_t> order(uint32_t n) {
    std::vector<uint32_t> out(n);
    for (uint32_t i = 0; i < n; ++i) out[i] = i;
    for (uint32_t i = n; state_ && i > 1; --i) {
      state_ ^= state_ << 13; state_ ^= state_ >> 7; state_ ^= state_ << 17;
      std::swap(out[i - 1], out[state_ % i]);
    }
    return out;
  }
 private:
  uint64_t state_;
};

// `Program` has: start(lane) before a lane's first turn; run(lane), which returns true when the lane has ended and
// false when it has stopped at a collective; and end_cta().
template <typename Program> void run_warp(Program& program, const std::vector<uint32_t>& order, Thread warp) {
  std::vector<uint32_t> alive;
  auto turn = [&](uint32_t lane) {
    thread() = warp;
    thread().tid.x += lane;
    if (!program.run(lane)) alive.push_back(lane);
  };
  for (uint32_t lane : order) { program.start(lane); turn(lane); }
  while (!alive.empty()) {
    const Collective& first = collective(alive[0]);
    bool together = alive.size() == WARP;
    for (uint32_t lane : alive)
      together &= collective(lane).site == first.site && collective(lane).lane_xor == first.lane_xor;
    if (!together) { machine().report(DIVERGED, first.site, (uint32_t)alive.size()); return; }
    for (uint32_t lane : alive) collective(lane).result = collective((lane ^ first.lane_xor) % WARP).value;
    std::vector<uint32_t> stopped;
    stopped.swap(alive);
    for (uint32_t lane : stopped) turn(lane);
  }
}

template <typename Program> void launch(uint32_t grid, uint32_t block, uint64_t seed, Program& program) {
  Random random(seed);
  for (uint32_t cta : random.order(grid)) {
    for (uint32_t warp : random.order((block + WARP - 1) / WARP)) {
      const Thread first = {{warp * WARP, 0, 0}, {cta, 0, 0}, {block, 1, 1}, {grid, 1, 1}};
      run_warp(program, random.order(std::min(WARP, block - warp * WARP)), first);
    }
    program.end_cta();
  }
}

}  // namespace simt

#define MEMKV_EXPORT extern "C" __attribute__((visibility("default")))

// Forgets ranges, violations and counts. Without `check` any address may be touched, as a plain run needs.
MEMKV_EXPORT void memkv_reset(int check) {
  simt::machine() = simt::Machine();
  simt::machine().check = check;
}
MEMKV_EXPORT void memkv_allow(uint64_t base, uint64_t size, int permission) {
  simt::machine().ranges.push_back(
      {base, size, (uint8_t)permission, std::vector<uint8_t>(simt::machine().check ? size : 0)});
}
MEMKV_EXPORT int memkv_violations(simt::Violation* out, int max) {
  const auto& all = simt::machine().violations;
  std::copy_n(all.begin(), std::min<size_t>(all.size(), max), out);
  return (int)all.size();
}
MEMKV_EXPORT void memkv_counts(uint64_t* out) {
  std::copy_n(simt::machine().loads, 5, out);
  std::copy_n(simt::machine().stores, 5, out + 5);
}
