// A CUDA driver that is none: enough of libcuda's C ABI to run our launch path, cuda-bindings and kvikio on a CPU.
//
// Device memory is host memory that is kept account of. Work on a stream runs late: at a wait, a query, or when a seeded
// scheduler feels like it, streams interleaved at random. So an ordering that the caller forgot shows as wrong bytes, and
// what a real driver forgives (memory freed or unregistered under a copy, a kernel's stray access) is a violation.
// Not modelled: time, several devices, managed memory, graphs (a stream only knows that it is capturing).
#include "fake_cuda.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

enum Error : CUresult {
  OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700,
  ALREADY_REGISTERED = 712, NOT_REGISTERED = 713, UNKNOWN = 999,
};
enum Lateness { RANDOM = 0, LATE = 1, EAGER = 2 };
enum Kind { DEVICE, PINNED, REGISTERED };
const char* const LIVE_NAMES[] = {"device", "pinned", "registered", "streams", "events", "modules", "contexts"};
constexpr size_t DEVICE_OFFSET = 512;  // as badly aligned as a real allocation may be
constexpr size_t PAGE = 4096;
constexpr size_t GRAVEYARD_BYTES = size_t(256) << 20;

struct Op { std::function<bool()> ready; std::function<void()> run; };
struct Stream {
  bool blocking = true, stalled = false, alive = true;
  int capturing = 0, priority = 0;
  uint64_t submitted = 0, finished = 0;
  std::deque<Op> queue;
};
struct Event { uint64_t recorded = 0, reached = 0; bool alive = true; };
struct Memory { size_t size; Kind kind; };
struct Module { void* so; bool alive = true; };
struct Function { Module* module; std::string name; unsigned param_bytes; unsigned shared_limit = 49152; };
struct Failure { uint64_t nth; CUresult error; bool forever; };
using Launch = int (*)(const char*, const void*, uint32_t, uint32_t, uint64_t);

struct State {
  std::recursive_mutex mutex;
  uint64_t random = 88172645463325252ull;
  int lateness = RANDOM, driver_version = 13000, initialized = 0, retained = 0, attached_modules = 0;
  bool allow_pageable = true;
  CUresult sticky = OK;
  size_t memory_limit = size_t(8) << 30, device_bytes = 0, grave_bytes = 0;
  std::vector<std::unique_ptr<Stream>> streams;  // [0] is the legacy default stream
  std::vector<std::unique_ptr<Event>> events;
  std::vector<std::unique_ptr<Module>> modules;
  std::vector<std::unique_ptr<Function>> functions;
  std::map<uint64_t, Memory> memory;
  std::map<uint64_t, size_t> graves;  // freed, still mapped: what touches them is reported, not a crash
  std::deque<uint64_t> grave_order;
  std::map<std::string, uint64_t> calls;
  std::map<std::string, Failure> failures;
  std::map<int, int> attributes;
  std::vector<std::string> violations;
  std::string kernels;
  uint64_t baseline[7] = {0, 0, 0, 1, 0, 0, 0};  // what was live at the last reset
  uint64_t executed = 0, launches = 0, fail_op_nth = 0;
  CUresult fail_op_error = OK;
  State() { streams.emplace_back(new Stream); }
};

State& st() { static State* s = new State; return *s; }
thread_local std::vector<CUcontext> contexts;
CUcontext const PRIMARY = reinterpret_cast<CUcontext>(0x10);

uint64_t rnd() { auto& x = st().random; x ^= x << 13; x ^= x >> 7; x ^= x << 17; return x; }

void violate(const std::string& what) { if (st().violations.size() < 256) st().violations.push_back(what); }

std::string hex(uint64_t v) { char b[32]; snprintf(b, sizeof b, "0x%llx", (unsigned long long)v); return b; }

// ---------------------------------------------------------------------------------------------------- scheduler
// Runs the next operation of a stream drawn from all that could go on; false if none can.
bool step() {
  auto& s = st();
  if (s.sticky) return false;  // a broken context runs nothing more
  std::vector<Stream*> able;
  for (auto& stream : s.streams) {
    if (stream->stalled || stream->queue.empty()) continue;
    auto& ready = stream->queue.front().ready;
    if (!ready || ready()) able.push_back(stream.get());
  }
  if (able.empty()) return false;
  Stream& stream = *able[rnd() % able.size()];
  Op op = std::move(stream.queue.front());
  stream.queue.pop_front();
  if (s.fail_op_nth && --s.fail_op_nth == 0) s.sticky = s.fail_op_error; else op.run();
  ++s.executed;
  ++stream.finished;
  return true;
}

template <typename F> CUresult settle(const char* who, F&& done) {
  while (!done()) {
    if (step()) continue;
    if (st().sticky) return st().sticky;
    violate(std::string(who) + ": waits for what never comes");
    return UNKNOWN;
  }
  return st().sticky;
}

void push(Stream* stream, std::function<void()> run, std::function<bool()> ready = nullptr) {
  auto& s = st();
  Stream* legacy = s.streams[0].get();
  std::vector<std::pair<Stream*, uint64_t>> before;  // the legacy stream and blocking streams wait for each other
  if (stream == legacy) {
    for (auto& other : s.streams)
      if (other.get() != legacy && other->blocking) before.push_back({other.get(), other->submitted});
  } else if (stream->blocking) {
    before.push_back({legacy, legacy->submitted});
  }
  ++stream->submitted;
  stream->queue.push_back({[before, ready] {
    for (auto& b : before) if (b.first->finished < b.second) return false;
    return !ready || ready();
  }, std::move(run)});
  if (s.lateness == EAGER) while (step()) {}
}

Stream* find_stream(CUstream handle) {
  auto& s = st();
  if (!handle || handle == reinterpret_cast<CUstream>(1) || handle == reinterpret_cast<CUstream>(2)) return s.streams[0].get();
  for (auto& stream : s.streams) if (stream.get() == handle && stream->alive) return stream.get();
  violate("use of a stream that does not exist");
  return nullptr;
}
Event* find_event(CUevent handle) {
  for (auto& event : st().events) if (event.get() == handle && event->alive) return event.get();
  violate("use of an event that does not exist");
  return nullptr;
}

// -------------------------------------------------------------------------------------------------------- calls
CUresult enter(const char* name, bool needs_context) {
  auto& s = st();
  uint64_t count = ++s.calls[name];
  (void)count;
  auto f = s.failures.find(name);
  if (f != s.failures.end() && (f->second.nth <= 1)) {
    CUresult error = f->second.error;
    if (!f->second.forever) s.failures.erase(f);
    return error;
  }
  if (f != s.failures.end()) --f->second.nth;
  if (needs_context) {
    if (!s.initialized) return NOT_INITIALIZED;
    if (contexts.empty() || !contexts.back() || !s.retained) return INVALID_CONTEXT;
    if (s.sticky) return s.sticky;
    if (s.lateness == RANDOM && rnd() % 4 == 0) step();
  }
  return OK;
}
#define ENTER_ANY(name) \
  std::lock_guard<std::recursive_mutex> lock_(st().mutex); \
  if (CUresult error_ = enter(#name, false)) return error_
#define ENTER(name) \
  std::lock_guard<std::recursive_mutex> lock_(st().mutex); \
  if (CUresult error_ = enter(#name, true)) return error_

// ------------------------------------------------------------------------------------------------------- memory
const std::pair<const uint64_t, Memory>* owner(uint64_t address, size_t size) {
  auto& memory = st().memory;
  auto next = memory.upper_bound(address);
  if (next == memory.begin()) return nullptr;
  --next;
  return address + size <= next->first + next->second.size ? &*next : nullptr;
}
bool buried(uint64_t address) {
  for (auto& g : st().graves) if (address >= g.first && address < g.first + g.second) return true;
  return false;
}
bool is_kind(uint64_t address, size_t size, bool device) {
  auto* o = owner(address, size);
  return o && (o->second.kind == DEVICE) == device;
}

void* map_memory(size_t size, size_t offset) {
  void* p = mmap(nullptr, size + offset, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<char*>(p) + offset;
}
void bury(uint64_t address, size_t size, size_t offset) {
  auto& s = st();
  memset(reinterpret_cast<void*>(address), 0xDD, size);
  s.graves[address] = size;
  s.grave_order.push_back(address);
  s.grave_bytes += size;
  (void)offset;
  while (s.grave_bytes > GRAVEYARD_BYTES) {
    uint64_t oldest = s.grave_order.front();
    s.grave_order.pop_front();
    uint64_t start = oldest & ~uint64_t(PAGE - 1);
    munmap(reinterpret_cast<void*>(start), s.graves[oldest] + (oldest - start));
    s.grave_bytes -= s.graves[oldest];
    s.graves.erase(oldest);
  }
}

enum Side { HOST_SIDE, DEVICE_SIDE, ANY_SIDE };

// Whether a copy may name this memory at all; the caller's mistake is an error as with the real driver.
bool side_fits(uint64_t address, size_t size, Side side) {
  if (side == HOST_SIDE) return address != 0;
  if (side == ANY_SIDE) return address != 0;
  return is_kind(address, size, true);
}
// Whether memory that a queued copy was given is still there when it runs.
bool still_there(uint64_t address, size_t size, bool was_known, const char* role) {
  if (!was_known) return true;  // pageable memory: the caller's own
  if (owner(address, size)) return true;
  violate(std::string(role) + " of a copy was freed or unregistered before the copy ran: " + hex(address));
  return false;
}

CUresult queue_copy(Stream* stream, uint64_t to, uint64_t from, size_t size, Side to_side, Side from_side) {
  if (!stream) return INVALID_HANDLE;
  if (!side_fits(to, size, to_side) || !side_fits(from, size, from_side)) return INVALID_VALUE;
  if (buried(to) || buried(from)) { violate("copy of freed memory"); return INVALID_VALUE; }
  bool to_known = owner(to, size), from_known = owner(from, size);
  if (stream->capturing) violate("copy into a capturing stream");
  if ((!to_known || !from_known) && !st().allow_pageable) violate("asynchronous copy of memory that is not pinned");
  std::shared_ptr<std::vector<uint8_t>> staged;
  if (!from_known) staged = std::make_shared<std::vector<uint8_t>>((uint8_t*)from, (uint8_t*)from + size);
  push(stream, [=] {
    if (!still_there(to, size, to_known, "destination") || !still_there(from, size, from_known, "source")) return;
    memmove((void*)to, staged ? (void*)staged->data() : (void*)from, size);
  });
  if (!to_known) return settle("copy to pageable memory", [=] { return stream->queue.empty(); });
  return OK;
}
CUresult copy_now(uint64_t to, uint64_t from, size_t size, Side to_side, Side from_side) {
  Stream* legacy = st().streams[0].get();
  if (CUresult error = queue_copy(legacy, to, from, size, to_side, from_side)) return error;
  return settle("synchronous copy", [=] { return legacy->queue.empty(); });
}
CUresult queue_fill(Stream* stream, uint64_t to, size_t pitch, uint8_t value, size_t width, size_t height) {
  if (!stream) return INVALID_HANDLE;
  size_t span = height ? (height - 1) * pitch + width : 0;
  if (span && !is_kind(to, span, true)) return INVALID_VALUE;
  if (height > 1 && pitch < width) return INVALID_VALUE;
  if (stream->capturing) violate("fill in a capturing stream");
  push(stream, [=] {
    if (!span || !still_there(to, span, true, "destination")) return;
    for (size_t row = 0; row < height; ++row) memset((void*)(to + row * pitch), value, width);
  });
  return OK;
}

// ------------------------------------------------------------------------------------------------------ kernels
unsigned known_param_bytes(void* so, const char* name) {
  static const std::set<std::string> kernels = {
      "memkv_gather", "memkv_scatter", "memkv_gather_bulk", "memkv_scatter_bulk", "memkv_leaf_digests"};
  auto ask = (unsigned (*)(const char*))dlsym(so, "memkv_argument_bytes");
  return ask && kernels.count(name) ? ask(name) : 0;
}

struct KernelViolation { int32_t kind, width; uint64_t address; uint32_t cta, thread; };

void run_kernel(Function* function, const std::vector<uint8_t>& params, unsigned grid, unsigned block) {
  auto& s = st();
  void* so = function->module->so;
  auto launch = (Launch)dlsym(so, "memkv_launch");
  auto reset = (void (*)(int))dlsym(so, "memkv_reset");
  auto allow = (void (*)(uint64_t, uint64_t, int))dlsym(so, "memkv_allow");
  auto found = (int (*)(KernelViolation*, int))dlsym(so, "memkv_violations");
  if (!launch || !reset || !allow || !found) { violate("the kernel library lacks entry points"); s.sticky = UNKNOWN; return; }
  reset(1);
  for (auto& m : s.memory) allow(m.first, m.second.size, 3);
  KernelViolation bad = {};
  int rc = launch(function->name.c_str(), params.data(), grid, block, rnd() | 1);
  if (rc || found(&bad, 1)) {
    violate("kernel " + function->name + (rc ? ": could not run" : ": access violation " + std::to_string(bad.kind) + " of " +
            std::to_string(bad.width) + " B at " + hex(bad.address)));
    s.sticky = ILLEGAL_ADDRESS;
  }
}

bool looks_like_image(const void* image) {
  const unsigned char* p = static_cast<const unsigned char*>(image);
  if (!p) return false;
  uint32_t magic;
  memcpy(&magic, p, 4);
  return magic == 0xBA55ED50u || !memcmp(p, "\x7f" "ELF", 4) || !memcmp(p, "//", 2) || !memcmp(p, ".ver", 4) || *p == '\n';
}

int default_attribute(int a) {
  switch (a) {
    case 1: return 1024;        // threads per block
    case 5: return 2147483647;  // grid x
    case 8: return 49152;       // shared memory per block
    case 10: return 32;         // warp
    case 16: return 132;        // multiprocessors
    case 19: case 41: case 99: return 1;  // maps host memory, unified addresses, host pointers of registered memory
    case 39: return 2048;       // threads per multiprocessor
    case 40: return 3;          // copy engines
    case 75: return 9;          // compute capability
    case 97: return 232448;     // shared memory per block, opt-in
    default: return 0;
  }
}

}  // namespace

#include "fake_cuda_api.inc"
#include "fake_cuda_control.inc"
