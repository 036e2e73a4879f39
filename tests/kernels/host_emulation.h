// Lets memkv_kernels.cu compile as ordinary C++ and run on a CPU. Lanes of kernels with warp collectives are fibers.
#pragma once
#include <ucontext.h>

#include "simt_runtime.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __global__
#define __constant__ static const
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (simt::thread().tid)
#define blockIdx (simt::thread().ctaid)
#define blockDim (simt::thread().ntid)
#define gridDim (simt::thread().nctaid)

struct __align__(16) Vector { unsigned x, y, z, w; };
template <typename T> inline T load(const T* p) { return simt::load<T>((uint64_t)p); }
template <typename T> inline void store(T* p, T v) { simt::store<T>((uint64_t)p, v); }
inline unsigned atomicOr(unsigned* p, unsigned v) { return simt::atomic_or((uint64_t)p, v); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}

// Runs one kernel; as fibers where its lanes exchange values, as plain calls where not.
class HostProgram {
 public:
  HostProgram(void (*kernel)(const void*), const void* args, bool collective)
      : kernel_(kernel), args_(args), collective_(collective), lanes_(collective ? simt::WARP : 0) { current_ = this; }

  void start(uint32_t lane) {
    if (!collective_) return;
    Fiber& fiber = lanes_[lane];
    fiber.stack.resize(STACK_BYTES);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &HostProgram::entry, 0);
  }

  bool run(uint32_t lane) {
    if (!collective_) { kernel_(args_); return true; }
    lane_ = lane;
    enter(lane);
    return lanes_[lane].done;
  }

  void end_cta() {}

  static unsigned long long exchange(unsigned long long value, int lane_xor, uint32_t site) {
    const uint32_t lane = current_->lane_;
    simt::collective(lane) = {site, (uint32_t)lane_xor, value, 0};
    current_->leave(lane);
    return simt::collective(lane).result;
  }

 private:
  static constexpr size_t STACK_BYTES = 256 << 10;
  struct Fiber { ucontext_t context; std::vector<char> stack; bool done; };

  static void entry() {
    arrived(nullptr, true);
    const uint32_t lane = current_->lane_;
    current_->kernel_(current_->args_);
    current_->lanes_[lane].done = true;
    current_->leave(lane);
  }

  void enter(uint32_t lane) {
    Fiber& fiber = lanes_[lane];
    swap(&main_, &fiber.context, fiber.stack.data(), fiber.stack.size(), false);
  }

  void leave(uint32_t lane) { swap(&lanes_[lane].context, &main_, main_stack_, main_stack_bytes_, true); }

  // AddressSanitizer has to be told of every change of stacks. Fibers are entered from the main stack only, so that is
  // where they return to.
  static void swap(ucontext_t* from, ucontext_t* to, const void* stack, size_t bytes, bool from_fiber) {
    void* fake = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake, stack, bytes);
#else
    (void)stack, (void)bytes;
#endif
    swapcontext(from, to);
    arrived(fake, from_fiber);
  }

  static void arrived(void* fake, bool in_fiber) {
#if defined(__SANITIZE_ADDRESS__)
    const void* stack;
    size_t bytes;
    __sanitizer_finish_switch_fiber(fake, &stack, &bytes);
    if (in_fiber) current_->main_stack_ = stack, current_->main_stack_bytes_ = bytes;
#else
    (void)fake, (void)in_fiber;
#endif
  }

  inline static HostProgram* current_ = nullptr;
  void (*kernel_)(const void*);
  const void* args_;
  bool collective_;
  uint32_t lane_ = 0;
  ucontext_t main_;
  const void* main_stack_ = nullptr;
  size_t main_stack_bytes_ = 0;
  std::vector<Fiber> lanes_;
};

inline unsigned long long shuffle_xor(unsigned, unsigned long long v, int lane_xor, uint32_t site) {
  return HostProgram::exchange(v, lane_xor, site);
}
#define __shfl_xor_sync(mask, value, lane_xor) shuffle_xor(mask, value, lane_xor, __LINE__)
