// Faults below a tier, injected between a process and the C library (LD_PRELOAD). See README.md in this folder.
//
// A process that has MEMKV_FAULTS_CONTROL in its environment maps the file it names. The file says what goes wrong
// (see struct Control; control.py writes it) and is where injections are counted, so that counts outlive a process that
// was killed. Only files and folders below Control::root are touched, and every other call goes straight through.
//
// Calls of the C library are caught whatever language they come from. Not caught: io_uring and system calls made by hand.

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <vector>

namespace {

enum Operation : uint32_t { OPEN = 1, CREATE = 2, STAT = 4, READ = 8, WRITE = 16, RENAME = 32, UNLINK = 64 };

enum Action : uint32_t {
  NOTHING = 0,
  FAIL = 1,       // errno, nothing done
  SHORT = 2,      // fewer bytes than asked for, and says so
  FLIP = 3,       // one bit
  MISDIRECT = 4,  // another chunk's bytes are read; another chunk is written over, and this one stays empty
  STALE = 5,      // says all was read, but the end of the buffer holds what it held before
  ZERO = 6,       // the end of what is read or written is zeros
  LOST = 7,       // says it is done, and is not
  DELAY = 8,      // later, or not before the fault is switched off
  KILL = 9,       // the process dies before, in the middle of, or after the call
  THROTTLE = 10,  // all reads and writes together are no faster than bytes_per_s, as on one slow device
};

// What control.py maps too; all fields little-endian, at these offsets.
struct Control {
  std::atomic<uint32_t> action;
  std::atomic<uint32_t> operations;  // bits of Operation
  std::atomic<uint32_t> per_1024;    // chance of each matching call
  std::atomic<int32_t> error;        // of FAIL
  std::atomic<uint32_t> delay_ms;    // of DELAY
  std::atomic<uint32_t> service_only;  // 1: only the I/O process of an engine, not the engine
  std::atomic<uint64_t> seed;
  std::atomic<int64_t> skip;    // matching calls to let through first
  std::atomic<int64_t> budget;  // injections left
  std::atomic<uint64_t> round;  // changes whenever a fault is set: ends delays
  std::atomic<uint64_t> calls;  // matching calls so far, injected or not
  std::atomic<uint64_t> injected;
  std::atomic<uint32_t> everything;  // 1: whatever is below the root, 0: chunks and their temporary files
  char root[1020];
  std::atomic<uint64_t> bytes_per_s;  // of THROTTLE
  std::atomic<uint64_t> busy_until;   // of THROTTLE: CLOCK_MONOTONIC, in ns
};
static_assert(offsetof(Control, seed) == 24 && offsetof(Control, root) == 76);
static_assert(offsetof(Control, bytes_per_s) == 1096 && sizeof(Control) == 1112);

Control *control = nullptr;
bool is_service = false;

// Chunks seen so far, for misdirected calls.
std::mutex seen_lock;
std::vector<std::string> seen;
constexpr size_t MAX_SEEN = 64;
constexpr size_t ALIGN = 4096;

template <typename Function>
Function real(const char *name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

std::string slurp(const char *path) {
  std::string text;
  char part[4096];
  int fd = static_cast<int>(syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC));
  if (fd < 0) return text;
  for (ssize_t n; (n = syscall(SYS_read, fd, part, sizeof part)) > 0;) text.append(part, static_cast<size_t>(n));
  syscall(SYS_close, fd);
  return text;
}

__attribute__((constructor)) void load() {
  const char *path = getenv("MEMKV_FAULTS_CONTROL");
  if (path == nullptr) return;
  int fd = static_cast<int>(syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC));
  if (fd < 0) return;
  void *mapped = mmap(nullptr, sizeof(Control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  syscall(SYS_close, fd);
  if (mapped == MAP_FAILED) return;
  control = static_cast<Control *>(mapped);
  is_service = slurp("/proc/self/cmdline").find("memkv_engines.offload.process") != std::string::npos;
}

std::string path_of(int fd) {
  char target[PATH_MAX];
  std::string link = "/proc/self/fd/" + std::to_string(fd);
  ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link.c_str(), target, sizeof target);
  return n > 0 ? std::string(target, static_cast<size_t>(n)) : std::string();
}

std::string path_of(int dir_fd, const char *name) {
  if (name == nullptr || name[0] == '/' || dir_fd == AT_FDCWD) return name ? name : "";
  return path_of(dir_fd) + "/" + name;
}

bool ends_with(const std::string &text, const char *end) {
  size_t n = strlen(end);
  return text.size() >= n && text.compare(text.size() - n, n, end) == 0;
}

bool is_chunk(const std::string &path) { return ends_with(path, ".kv"); }

bool is_ours(const std::string &path) {
  size_t n = strnlen(control->root, sizeof control->root);
  if (n == 0 || path.compare(0, n, control->root, n) != 0 || (path.size() > n && path[n] != '/')) return false;
  if (control->everything.load()) return true;
  size_t slash = path.rfind('/');
  bool temporary = path.compare(slash + 1, 5, ".tmp-") == 0 && path.compare(slash + 1, 11, ".tmp-probe-") != 0;
  return is_chunk(path) || temporary;
}

uint64_t mix(uint64_t value) {  // splitmix64
  value += 0x9e3779b97f4a7c15u;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
  return value ^ (value >> 31);
}

struct Strike {
  Action action = NOTHING;
  uint64_t random = 0;
  uint64_t round = 0;
};

// Whether this call is to go wrong. It counts as injected from here on.
Strike strike(Operation operation, const std::string &path) {
  Action action = static_cast<Action>(control->action.load());
  if (action == NOTHING || !(control->operations.load() & operation)) return {};
  if (control->service_only.load() && !is_service) return {};
  if (!is_ours(path)) return {};
  uint64_t random = mix(control->seed.load() + 0x10001u * control->calls.fetch_add(1));
  if (control->skip.fetch_sub(1) > 0) return {};
  if (random % 1024 >= control->per_1024.load()) return {};
  if (control->budget.fetch_sub(1) <= 0) return {};
  return {action, mix(random), control->round.load()};
}

void count() { control->injected.fetch_add(1); }

void wait_out(const Strike &hit) {
  timespec tick{0, 2000000};
  for (uint64_t ms = 0; ms < control->delay_ms.load() && control->round.load() == hit.round; ms += 2)
    syscall(SYS_nanosleep, &tick, nullptr);
}

[[noreturn]] void die() {
  for (;;) syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
}

uint64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}

// Wait for a turn on a device that moves these bytes after all it was asked for before, whoever asked.
void queue_up(const Strike &hit, size_t bytes) {
  uint64_t cost = static_cast<uint64_t>(1e9 * static_cast<double>(bytes) / static_cast<double>(control->bytes_per_s));
  uint64_t busy = control->busy_until.load(), end;
  do end = std::max(busy, now_ns()) + cost;
  while (!control->busy_until.compare_exchange_weak(busy, end));
  timespec tick{0, 500000};
  while (now_ns() < end && control->round.load() == hit.round) syscall(SYS_nanosleep, &tick, nullptr);
}

// What every kind of call can suffer. True: the caller returns -1 with errno set.
bool fails(const Strike &hit) {
  if (hit.action == FAIL) {
    count();
    errno = control->error.load();
    return true;
  }
  if (hit.action == DELAY) {
    count();
    wait_out(hit);
  }
  if (hit.action == KILL && hit.random % 2 == 0) {
    count();
    die();
  }
  return false;
}

void dies_after(const Strike &hit) {
  if (hit.action == KILL) {
    count();
    die();
  }
}

void remember(const std::string &path) {
  std::lock_guard<std::mutex> hold(seen_lock);
  if (std::find(seen.begin(), seen.end(), path) != seen.end()) return;
  if (seen.size() >= MAX_SEEN) seen.erase(seen.begin());
  seen.push_back(path);
}

// A chunk that is not this one, open; -1 if none is known.
int open_other(const std::string &own, uint64_t random, int flags) {
  std::lock_guard<std::mutex> hold(seen_lock);
  for (size_t i = 0; i < seen.size(); i++) {
    const std::string &path = seen[(random + i) % seen.size()];
    if (path == own) continue;
    int fd = static_cast<int>(syscall(SYS_openat, AT_FDCWD, path.c_str(), flags | O_CLOEXEC));
    if (fd >= 0) return fd;
  }
  return -1;
}

// Aligned memory for a whole vector.
class Bounce {
 public:
  explicit Bounce(size_t bytes) : size_(bytes) {
    if (posix_memalign(&memory_, ALIGN, bytes + ALIGN) != 0) abort();
    memset(memory_, 0, bytes + ALIGN);
  }
  Bounce(const Bounce &) = delete;
  Bounce &operator=(const Bounce &) = delete;
  ~Bounce() { free(memory_); }
  char *data() { return static_cast<char *>(memory_); }

  void gather(const iovec *pieces, int count) {
    char *to = data();
    for (int i = 0; i < count; i++) to = static_cast<char *>(mempcpy(to, pieces[i].iov_base, pieces[i].iov_len));
  }
  void scatter(const iovec *pieces, int count, size_t bytes) {
    char *from = data();
    for (int i = 0; i < count && bytes; i++) {
      size_t part = std::min(bytes, pieces[i].iov_len);
      memcpy(pieces[i].iov_base, from, part);
      from += part;
      bytes -= part;
    }
  }
  size_t size() const { return size_; }

 private:
  void *memory_ = nullptr;
  size_t size_;
};

size_t total_of(const iovec *pieces, int count) {
  size_t total = 0;
  for (int i = 0; i < count; i++) total += pieces[i].iov_len;
  return total;
}

// A page boundary before the end, possibly 0.
size_t cut_of(size_t bytes, uint64_t random) { return bytes == 0 ? 0 : random % ((bytes + ALIGN - 1) / ALIGN) * ALIGN; }

using Vector = ssize_t (*)(int, const iovec *, int, off_t, int);

ssize_t damaged_read(const Strike &hit, Vector call, int fd, const iovec *pieces, int count_, off_t offset, int flags) {
  size_t want = total_of(pieces, count_);
  if (hit.action == MISDIRECT) {
    int other = open_other(path_of(fd), hit.random, O_RDONLY);
    if (other < 0) return call(fd, pieces, count_, offset, flags);
    Bounce bounce(want);
    syscall(SYS_pread64, other, bounce.data(), want, offset);
    syscall(SYS_close, other);
    bounce.scatter(pieces, count_, want);
    count();
    return static_cast<ssize_t>(want);
  }
  Bounce bounce(want);
  iovec whole{bounce.data(), want};
  ssize_t done = call(fd, &whole, 1, offset, flags);
  if (done <= 0) return done;
  size_t got = static_cast<size_t>(done), cut = cut_of(got, hit.random);
  count();
  if (hit.action == SHORT || hit.action == STALE) {
    bounce.scatter(pieces, count_, cut);
    return static_cast<ssize_t>(hit.action == SHORT ? cut : got);
  }
  if (hit.action == ZERO) memset(bounce.data() + cut, 0, got - cut);
  if (hit.action == FLIP) bounce.data()[hit.random % got] ^= static_cast<char>(1 << (hit.random >> 60) % 8);
  bounce.scatter(pieces, count_, got);
  return done;
}

ssize_t damaged_write(const Strike &hit, Vector call, int fd, const iovec *pieces, int count_, off_t offset, int flags) {
  size_t want = total_of(pieces, count_), cut = cut_of(want, hit.random);
  off_t end = offset + static_cast<off_t>(want);
  Bounce bounce(want);
  bounce.gather(pieces, count_);
  iovec part{bounce.data(), cut};
  if (hit.action == MISDIRECT) {
    int other = open_other(path_of(fd), hit.random, O_WRONLY);
    if (other < 0) return call(fd, pieces, count_, offset, flags);
    syscall(SYS_pwrite64, other, bounce.data(), want, offset);
    syscall(SYS_close, other);
    cut = 0;
  }
  count();
  if (hit.action == FLIP) {
    bounce.data()[hit.random % want] ^= static_cast<char>(1 << (hit.random >> 60) % 8);
    iovec whole{bounce.data(), want};
    return call(fd, &whole, 1, offset, flags);
  }
  // The rest are writes of which only the beginning arrives.
  if (hit.action != LOST && hit.action != MISDIRECT && cut && call(fd, &part, 1, offset, flags) < 0) return -1;
  if (hit.action == KILL) die();
  if (hit.action == SHORT) return static_cast<ssize_t>(cut);
  if (syscall(SYS_ftruncate, fd, end) != 0) return -1;
  return static_cast<ssize_t>(want);
}

ssize_t vector_call(Operation operation, Vector call, int fd, const iovec *pieces, int count_, off_t offset, int flags) {
  if (control == nullptr || control->action.load() == NOTHING) return call(fd, pieces, count_, offset, flags);
  Strike hit = strike(operation, path_of(fd));
  if (fails(hit)) return -1;
  switch (hit.action) {
    case NOTHING:
    case FAIL:
    case DELAY:
      return call(fd, pieces, count_, offset, flags);
    case THROTTLE:
      count();
      queue_up(hit, total_of(pieces, count_));
      return call(fd, pieces, count_, offset, flags);
    case KILL:
      if (operation == READ) dies_after(hit);
      [[fallthrough]];
    default:
      return operation == READ ? damaged_read(hit, call, fd, pieces, count_, offset, flags)
                               : damaged_write(hit, call, fd, pieces, count_, offset, flags);
  }
}

int opened(int dir_fd, const char *name, int flags, mode_t mode) {
  static auto call = real<int (*)(int, const char *, int, ...)>("openat64");
  if (control == nullptr) return call(dir_fd, name, flags, mode);
  bool creates = flags & O_CREAT;
  std::string path = path_of(dir_fd, name);
  if (!creates && is_chunk(path) && is_ours(path)) remember(path);
  Strike hit = strike(creates ? CREATE : OPEN, path);
  if (fails(hit)) return -1;
  int fd = call(dir_fd, name, flags, mode);
  dies_after(hit);
  return fd;
}

int stated(int dir_fd, const char *name, struct stat64 *into, int flags) {
  static auto call = real<int (*)(int, const char *, struct stat64 *, int)>("fstatat64");
  if (control == nullptr || control->action.load() == NOTHING) return call(dir_fd, name, into, flags);
  Strike hit = strike(STAT, path_of(dir_fd, name));
  if (fails(hit)) return -1;
  int done = call(dir_fd, name, into, flags);
  dies_after(hit);
  return done;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int memkv_faults_loaded() { return control != nullptr; }

EXPORT int openat(int dir_fd, const char *name, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return opened(dir_fd, name, flags, mode);
}

EXPORT int openat64(int dir_fd, const char *name, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return opened(dir_fd, name, flags, mode);
}

EXPORT int open64(const char *name, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  return opened(AT_FDCWD, name, flags, mode);
}

EXPORT int fstatat64(int dir_fd, const char *name, struct stat64 *into, int flags) {
  return stated(dir_fd, name, into, flags);
}

EXPORT int fstatat(int dir_fd, const char *name, struct stat *into, int flags) {
  return stated(dir_fd, name, reinterpret_cast<struct stat64 *>(into), flags);
}

EXPORT int stat64(const char *name, struct stat64 *into) { return stated(AT_FDCWD, name, into, 0); }

EXPORT ssize_t preadv64v2(int fd, const iovec *pieces, int count_, off_t offset, int flags) {
  static auto call = real<Vector>("preadv64v2");
  return vector_call(READ, call, fd, pieces, count_, offset, flags);
}

EXPORT ssize_t preadv2(int fd, const iovec *pieces, int count_, off_t offset, int flags) {
  return preadv64v2(fd, pieces, count_, offset, flags);
}

EXPORT ssize_t preadv64(int fd, const iovec *pieces, int count_, off_t offset) {
  return preadv64v2(fd, pieces, count_, offset, 0);
}

EXPORT ssize_t preadv(int fd, const iovec *pieces, int count_, off_t offset) {
  return preadv64v2(fd, pieces, count_, offset, 0);
}

EXPORT ssize_t pread64(int fd, void *into, size_t bytes, off_t offset) {
  iovec piece{into, bytes};
  return preadv64v2(fd, &piece, 1, offset, 0);
}

EXPORT ssize_t pread(int fd, void *into, size_t bytes, off_t offset) { return pread64(fd, into, bytes, offset); }

EXPORT ssize_t pwritev64v2(int fd, const iovec *pieces, int count_, off_t offset, int flags) {
  static auto call = real<Vector>("pwritev64v2");
  return vector_call(WRITE, call, fd, pieces, count_, offset, flags);
}

EXPORT ssize_t pwritev2(int fd, const iovec *pieces, int count_, off_t offset, int flags) {
  return pwritev64v2(fd, pieces, count_, offset, flags);
}

EXPORT ssize_t pwritev64(int fd, const iovec *pieces, int count_, off_t offset) {
  return pwritev64v2(fd, pieces, count_, offset, 0);
}

EXPORT ssize_t pwritev(int fd, const iovec *pieces, int count_, off_t offset) {
  return pwritev64v2(fd, pieces, count_, offset, 0);
}

EXPORT ssize_t pwrite64(int fd, const void *from, size_t bytes, off_t offset) {
  iovec piece{const_cast<void *>(from), bytes};
  return pwritev64v2(fd, &piece, 1, offset, 0);
}

EXPORT ssize_t pwrite(int fd, const void *from, size_t bytes, off_t offset) {
  return pwrite64(fd, from, bytes, offset);
}

EXPORT int renameat(int from_fd, const char *from, int to_fd, const char *to) {
  static auto call = real<int (*)(int, const char *, int, const char *)>("renameat");
  if (control == nullptr) return call(from_fd, from, to_fd, to);
  std::string path = path_of(to_fd, to);
  Strike hit = strike(RENAME, path);
  if (fails(hit)) return -1;
  if (hit.action == LOST) {
    count();
    return 0;
  }
  int done = call(from_fd, from, to_fd, to);
  if (done == 0 && is_chunk(path) && is_ours(path)) remember(path);
  dies_after(hit);
  return done;
}

EXPORT int unlinkat(int dir_fd, const char *name, int flags) {
  static auto call = real<int (*)(int, const char *, int)>("unlinkat");
  if (control == nullptr || control->action.load() == NOTHING) return call(dir_fd, name, flags);
  Strike hit = strike(UNLINK, path_of(dir_fd, name));
  if (fails(hit)) return -1;
  int done = call(dir_fd, name, flags);
  dies_after(hit);
  return done;
}
