// Entry points over the very same .cu, compiled as C++ (MEMKV_SOURCE is its path).
#define MEMKV_HOST_EMULATION 1
#include MEMKV_SOURCE

MEMKV_EXPORT unsigned memkv_argument_bytes(const char* name) {
  return std::strcmp(name, "memkv_leaf_digests") ? sizeof(CopyArgs) : sizeof(DigestArgs);
}

MEMKV_EXPORT int memkv_launch(const char* name, const void* args, uint32_t grid, uint32_t block, uint64_t seed) {
  struct Kernel { const char* name; void (*run)(const void*); bool collective; };
  static const Kernel kernels[] = {
      {"memkv_gather", [](const void* a) { memkv_gather(*(const CopyArgs*)a); }, false},
      {"memkv_scatter", [](const void* a) { memkv_scatter(*(const CopyArgs*)a); }, false},
      {"memkv_leaf_digests", [](const void* a) { memkv_leaf_digests(*(const DigestArgs*)a); }, true},
  };
  for (const Kernel& kernel : kernels) {
    if (std::strcmp(kernel.name, name)) continue;
    HostProgram program(kernel.run, args, kernel.collective);
    simt::launch(grid, block, seed, program);
    return 0;
  }
  return -1;
}
