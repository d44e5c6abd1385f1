// The scheduler behind runtime.h.  Compile without -fsanitize=thread; define SIMT_TSAN where the kernels have it.
//
// ThreadSanitizer does not see the scheduler's own accesses, but it intercepts memcpy and memmove everywhere: what runs
// on a fiber must not grow a vector that fibers share, hence the reserve() calls.
#include "simt/runtime.h"

#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN(x) x
#else
#define ASAN(x)
#endif
#if defined(SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#define TSAN(x) x
#else
#define TSAN(x)
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
namespace {

struct Cta;
struct Cluster;

struct Fiber {
  void* stack_pointer = nullptr;
  ucontext_t* context = nullptr;  // where there is no own switch
  char* stack = nullptr;
  Cta* cta = nullptr;
  unsigned rank = 0;
  uint3 index{};
  bool done = false;
  bool sleeps = false;    // in __nanosleep
  unsigned meetings = 0;  // barriers and warp operations
  const char* state = "has not started";
  Site site;
  void* tsan = nullptr;
  void* asan_fake_stack = nullptr;
};

// ThreadSanitizer sees a barrier as a release on arrival and an acquire on leaving.  Two tags alternate, because with
// one an early thread's arrival at the next barrier would order it before a late thread that still leaves this one.
struct Barrier {
  std::vector<Fiber*> waiting;
  unsigned generation = 0;
  char tag[2];
  int any = 0, result[2] = {0, 0};
};

// Threads that have arrived at a barrier of some of the block, waiting or not.
struct NamedBarrier {
  std::vector<Fiber*> waiting;
  int arrived = 0, expected = 0;
  unsigned generation = 0;
  char tag[2];
};

struct WarpGroup {  // the meeting place of the lanes of one mask
  uint32_t mask = 0, arrived = 0;
  unsigned generation = 0;
  char tag[2];
  Resolve resolve = nullptr;
  void* operand[32];
  Fiber* fiber[32];
};

struct Warp {
  std::vector<std::unique_ptr<WarpGroup>> groups;
};

struct Cta {
  Cluster* cluster = nullptr;
  uint3 index{};
  unsigned rank = 0, alive = 0;
  char* shared = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  NamedBarrier named[16];
  char exit_tag = 0;
};

struct Cluster {
  std::vector<Cta> ctas;
  unsigned alive = 0;
  Barrier barrier;
};

constexpr size_t kStaticCapacity = 64 << 10, kGap = 128;

struct Scheduler {
  Options options;
  Stats stats;
  uint64_t random = 0;
  std::vector<Fiber*> runnable;
  Fiber main;
  Fiber* current = nullptr;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  std::string error;
  bool active = false;
  unsigned threads = 0, cluster_size = 1, exits = 0;
  size_t dynamic = 0, static_begin = 0, static_end = 0, arena = 0, main_stack_bytes = 0;
  std::map<const void*, std::pair<size_t, size_t>> statics;  // key -> offset, bytes
  std::vector<char*> free_stacks;
  char launch_tag = 0, end_tag = 0, fence_tag = 0;
} S;

std::mutex launch_mutex;
std::atomic<int64_t> deadline_ms{0};

// Processor time of this process, which other work on the machine does not use up.
int64_t now_ms() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return now.tv_sec * int64_t{1000} + now.tv_nsec / 1000000;
}

uint64_t next_random() {  // splitmix64
  uint64_t z = (S.random += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

void fiber_main();

#if defined(__x86_64__)
// swapcontext makes a system call each time; this saves what the ABI asks of a callee and is eight times faster.
__attribute__((naked, noinline)) void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "subq $8, %rsp\n stmxcsr (%rsp)\n fnstcw 4(%rsp)\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "ldmxcsr (%rsp)\n fldcw 4(%rsp)\n addq $8, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

void prepare(Fiber& fiber) {
  auto top = reinterpret_cast<uintptr_t>(fiber.stack + S.options.stack) & ~uintptr_t{63};
  auto* slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // the return address of fiber_main, never used; keeps its stack aligned as after a call
  *--slot = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 7; ++i) *--slot = nullptr;
  uint32_t control[2];
  asm volatile("stmxcsr %0\n fnstcw %1" : "=m"(control[0]), "=m"(control[1]));
  std::memcpy(slot, control, sizeof control);
  fiber.stack_pointer = slot;
}

void switch_context(Fiber& from, Fiber& to) { switch_stack(&from.stack_pointer, to.stack_pointer); }
#else
void prepare(Fiber& fiber) {
  fiber.context = new ucontext_t;
  getcontext(fiber.context);
  fiber.context->uc_stack = {fiber.stack, 0, S.options.stack};
  fiber.context->uc_link = nullptr;
  makecontext(fiber.context, fiber_main, 0);
}

void switch_context(Fiber& from, Fiber& to) {
  if (from.context == nullptr) from.context = new ucontext_t;
  swapcontext(from.context, to.context);
}
#endif

void switch_to(Fiber& from, Fiber& to) {
  ++S.stats.switches;
  ASAN(__sanitizer_start_switch_fiber(from.done ? nullptr : &from.asan_fake_stack, to.stack,
                                      &to == &S.main ? S.main_stack_bytes : S.options.stack);)
  TSAN(__tsan_switch_to_fiber(to.tsan, 1);)
  switch_context(from, to);
  ASAN(__sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);)
}

void wait(const char* state, Site site) {
  Fiber* fiber = S.current;
  ++fiber->meetings;
  fiber->state = state;
  fiber->site = site;
  switch_to(*fiber, S.main);
  fiber->state = "runs";
}

void leave(Fiber* fiber) {
  Cta* cta = fiber->cta;
  TSAN(__tsan_release(&cta->exit_tag);)
  --cta->alive;
  --cta->cluster->alive;
  ++S.exits;
  if (cta->alive == 0) {
    TSAN(__tsan_acquire(&cta->exit_tag);)
    // The shared memory of a CTA that has exited is gone: a late read through the cluster must show.
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(cta->shared, S.arena);
#else
    std::memset(cta->shared, 0xff, S.arena);
#endif
  }
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &S.main_stack_bytes);
  S.main.stack = static_cast<char*>(const_cast<void*>(bottom));
#endif
  Fiber* fiber = S.current;
  fiber->state = "runs";
  TSAN(__tsan_acquire(&S.launch_tag);)
  S.body(S.argument);
  leave(fiber);
  TSAN(__tsan_release(&S.end_tag);)
  fiber->done = true;
  fiber->state = "has exited";
  switch_to(*fiber, S.main);
  std::abort();
}

char* map_memory(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("simt: out of memory");
  return static_cast<char*>(p);
}

char* take_stack() {
  if (!S.free_stacks.empty()) {
    char* stack = S.free_stacks.back();
    S.free_stacks.pop_back();
    return stack;
  }
  char* stack = map_memory(S.options.stack);
  mprotect(stack, 4096, PROT_NONE);  // a stack overflow ends in a fault, not in a neighbour's stack
  return stack;
}

// A stack and its guard page are two of the 65,530 mappings that a process may have, which the rest of it needs too.
// ThreadSanitizer keeps none: a fresh mapping has no history of accesses.
#if defined(SIMT_TSAN)
constexpr size_t kKeptStacks = 0;
#else
constexpr size_t kKeptStacks = 2048;
#endif

constexpr size_t kMostFibers = 16384;  // at once, where no number of resident clusters is asked for

void return_stack(char* stack) {
  ASAN(__asan_unpoison_memory_region(stack, S.options.stack);)
  if (S.free_stacks.size() < kKeptStacks) {
    S.free_stacks.push_back(stack);
  } else {
    munmap(stack, S.options.stack);
  }
}

std::unique_ptr<Cluster> start_cluster(unsigned id, dim3 grid, dim3 block, dim3 shape) {
  auto cluster = std::make_unique<Cluster>();
  const dim3 clusters(grid.x / shape.x, grid.y / shape.y, grid.z / shape.z);
  const unsigned cx = id % clusters.x, cy = id / clusters.x % clusters.y, cz = id / clusters.x / clusters.y;
  cluster->ctas = std::vector<Cta>(S.cluster_size);
  cluster->alive = S.threads * S.cluster_size;
  cluster->barrier.waiting.reserve(cluster->alive);
  for (unsigned rank = 0; rank < S.cluster_size; ++rank) {
    Cta& cta = cluster->ctas[rank];
    ++S.stats.ctas;
    cta.cluster = cluster.get();
    cta.rank = rank;
    cta.alive = S.threads;
    cta.index = {cx * shape.x + rank % shape.x, cy * shape.y + rank / shape.x % shape.y,
                 cz * shape.z + rank / shape.x / shape.y};
    cta.shared = map_memory(S.arena);
    std::memset(cta.shared, 0xff, S.arena);  // NaN as float, bfloat16 and half, -1 as an integer
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(cta.shared, S.arena);
    __asan_unpoison_memory_region(cta.shared, S.dynamic);
    for (const auto& entry : S.statics)
      __asan_unpoison_memory_region(cta.shared + entry.second.first, entry.second.second);
#endif
    cta.barrier.waiting.reserve(S.threads);
    for (NamedBarrier& barrier : cta.named) barrier.waiting.reserve(S.threads);
    cta.warps = std::vector<Warp>((S.threads + 31) / 32);
    for (Warp& warp : cta.warps) warp.groups.reserve(32);
    cta.fibers = std::vector<Fiber>(S.threads);
    for (unsigned t = 0; t < S.threads; ++t) {
      Fiber& fiber = cta.fibers[t];
      fiber.cta = &cta;
      fiber.rank = t;
      fiber.index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
      fiber.stack = take_stack();
      prepare(fiber);
      TSAN(fiber.tsan = __tsan_create_fiber(0);)
      S.runnable.push_back(&fiber);
    }
  }
  return cluster;
}

void stop_cluster(Cluster& cluster) {
  for (Cta& cta : cluster.ctas) {
    for (Fiber& fiber : cta.fibers) {
      return_stack(fiber.stack);
      delete fiber.context;
      TSAN(__tsan_destroy_fiber(fiber.tsan);)
    }
    ASAN(__asan_unpoison_memory_region(cta.shared, S.arena);)
    munmap(cta.shared, S.arena);
  }
}

// A thread that sleeps runs when no other can, or sometimes: else a spin would starve the thread that it waits for.
Fiber* draw() {
  size_t chosen = 0;
  if (S.options.order == Order::kRandom) {
    for (int tries = 0; tries < 8; ++tries) {
      chosen = next_random() % S.runnable.size();
      if (!S.runnable[chosen]->sleeps) break;
    }
  } else {
    const bool ascending = S.options.order == Order::kAscending;
    for (size_t i = 1; i < S.runnable.size(); ++i) {
      const Fiber *one = S.runnable[i], *other = S.runnable[chosen];
      if (one->sleeps != other->sleeps ? other->sleeps : (one->rank < other->rank) == ascending) chosen = i;
    }
  }
  std::swap(S.runnable[chosen], S.runnable.back());
  Fiber* fiber = S.runnable.back();
  S.runnable.pop_back();
  fiber->sleeps = false;
  return fiber;
}

// How many threads stand where.
std::string where_all_stand(const std::vector<std::unique_ptr<Cluster>>& live) {
  std::map<std::string, std::pair<int, std::string>> places;
  for (const auto& cluster : live) {
    for (const Cta& cta : cluster->ctas) {
      for (const Fiber& fiber : cta.fibers) {
        std::string place = fiber.state;
        if (!fiber.done && fiber.site.line)
          place += std::string(" at ") + fiber.site.file + ":" + std::to_string(fiber.site.line);
        auto& entry = places[place];
        if (entry.first++ == 0) {
          entry.second = "block " + std::to_string(cta.index.x) + " thread " + std::to_string(fiber.rank);
        }
      }
    }
  }
  std::string text;
  for (const auto& place : places) {
    text += "\n  " + std::to_string(place.second.first) + " threads: " + place.first + " (e.g. " + place.second.second +
            ")";
  }
  return text;
}

// Ends the process when a thread spins without ever reaching the scheduler, where no error can be raised.  A thread and
// not a signal: Python and the sanitizers own the signals.
void start_watchdog() {
  static std::once_flag once;
  std::call_once(once, [] {
    std::thread([] {
      for (;;) {
        std::this_thread::sleep_for(std::chrono::milliseconds(200));
        const int64_t deadline = deadline_ms.load();
        if (deadline == 0 || now_ms() < deadline) continue;
        const char text[] = "simt: watchdog: a thread spins without a barrier, warp operation, atomic or fence\n";
        if (write(2, text, sizeof text - 1) < 0) {
        }
        _exit(124);
      }
    }).detach();
  });
}

void arrive(Barrier& barrier, size_t expected, const char* name, Site site) {
  if (!barrier.waiting.empty()) {
    const Fiber* other = barrier.waiting.front();
    if (other->site.line != site.line || std::strcmp(other->site.file, site.file) != 0) {
      fail("divergent %s: thread %u of block %u is at %s:%d while thread %u waits at %s:%d", name, S.current->rank,
           S.current->cta->index.x, site.file, site.line, other->rank, other->site.file, other->site.line);
    }
  }
  barrier.waiting.push_back(S.current);
  [[maybe_unused]] char* tag = &barrier.tag[barrier.generation & 1];
  TSAN(__tsan_release(tag);)
  if (barrier.waiting.size() == expected) {
    barrier.result[barrier.generation & 1] = barrier.any;
    barrier.any = 0;
    for (Fiber* fiber : barrier.waiting) S.runnable.push_back(fiber);
    barrier.waiting.clear();
    ++barrier.generation;
    ++S.stats.block_barriers;
  }
  wait(name, site);
  TSAN(__tsan_acquire(tag);)
}

void check_configuration(dim3 grid, dim3 block, dim3 cluster, size_t dynamic) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) throw Error("simt: invalid block size");
  if (!grid.x || !grid.y || !grid.z || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) {
    throw Error("simt: invalid grid size");
  }
  if (!cluster.x || !cluster.y || !cluster.z || grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z ||
      cluster.x * cluster.y * cluster.z > 8) {
    throw Error("simt: invalid cluster size");
  }
  if (dynamic > S.options.shared_limit) throw Error("simt: dynamic shared memory is over the limit");
}

}  // namespace

Options& options() { return S.options; }
Stats& stats() { return S.stats; }
uint64_t random_bits() { return next_random(); }
unsigned thread_rank() { return S.current->rank; }
unsigned cluster_rank() { return S.current->cta->rank; }
unsigned cluster_size() { return S.cluster_size; }
void* dynamic_shared() { return S.current->cta->shared; }

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (S.current == nullptr) throw Error(text);
  if (S.error.empty()) S.error = text;
  wait("failed", {});
  std::abort();  // the scheduler does not resume a thread after an error
}

void yield() {
  S.runnable.push_back(S.current);
  switch_to(*S.current, S.main);
}

void sleep() {
  S.current->sleeps = true;
  yield();
}

void atomic_point() {
  ++S.stats.atomics;
  yield();
}

void fence() {
  TSAN(__tsan_release(&S.fence_tag); __tsan_acquire(&S.fence_tag);)
  yield();
}

void block_barrier(Site site) { arrive(S.current->cta->barrier, S.threads, "__syncthreads", site); }

int block_barrier_or(int value, Site site) {
  Barrier& barrier = S.current->cta->barrier;
  const unsigned generation = barrier.generation;
  barrier.any |= value != 0;
  block_barrier(site);
  return barrier.result[generation & 1];
}

void cluster_barrier(Site site) {
  Cluster* cluster = S.current->cta->cluster;
  arrive(cluster->barrier, size_t{S.threads} * S.cluster_size, "cluster barrier", site);
}

void named_barrier(int number, int threads, bool waits, Site site) {
  if (number < 1 || number > 15) fail("%s:%d: there is no named barrier %d", site.file, site.line, number);
  if (threads <= 0 || threads % 32 != 0 || static_cast<unsigned>(threads) > S.threads) {
    fail("%s:%d: a barrier of %d threads", site.file, site.line, threads);
  }
  NamedBarrier& barrier = S.current->cta->named[number];
  if (barrier.arrived == 0) barrier.expected = threads;
  if (barrier.expected != threads) {
    fail("%s:%d: barrier %d of %d threads, where others meet as %d", site.file, site.line, number, threads,
         barrier.expected);
  }
  [[maybe_unused]] char* tag = &barrier.tag[barrier.generation & 1];
  TSAN(__tsan_release(tag);)
  if (waits) barrier.waiting.push_back(S.current);
  if (++barrier.arrived == barrier.expected) {
    for (Fiber* fiber : barrier.waiting) S.runnable.push_back(fiber);
    barrier.waiting.clear();
    barrier.arrived = 0;
    ++barrier.generation;
    ++S.stats.block_barriers;
  }
  if (waits) {
    wait("named barrier", site);
    TSAN(__tsan_acquire(tag);)
  } else {
    ++S.current->meetings;
    yield();
  }
}

// To ThreadSanitizer only __syncwarp, which has nothing to resolve, orders memory: shuffles, votes and matrix
// instructions exchange registers.  Those lie on the lanes' stacks here, so what resolve() does to them is not looked
// at.
void warp_operation(uint32_t mask, void* operand, Resolve resolve, Site site) {
  Fiber* fiber = S.current;
  const unsigned lane = fiber->rank & 31;
  if (!(mask >> lane & 1))
    fail("%s:%d: lane %u is not in the mask %08x that it passes", site.file, site.line, lane, mask);
  WarpGroup* group = nullptr;
  for (auto& candidate : fiber->cta->warps[fiber->rank / 32].groups) {
    if (candidate->mask == mask) {
      group = candidate.get();
    } else if (candidate->arrived & mask) {
      fail("%s:%d: lane %u passes mask %08x while lanes of the overlapping mask %08x wait", site.file, site.line, lane,
           mask, candidate->mask);
    }
  }
  if (group == nullptr) {
    auto& groups = fiber->cta->warps[fiber->rank / 32].groups;
    groups.push_back(std::make_unique<WarpGroup>());
    group = groups.back().get();
    group->mask = mask;
  }
  if (group->arrived != 0 && group->resolve != resolve) {
    fail("%s:%d: lane %u is at another warp operation than the lanes that wait for it", site.file, site.line, lane);
  }
  group->resolve = resolve;
  group->operand[lane] = operand;
  group->fiber[lane] = fiber;
  group->arrived |= 1u << lane;
  [[maybe_unused]] char* tag = &group->tag[group->generation & 1];
  TSAN(if (resolve == nullptr) __tsan_release(tag);)
  if (group->arrived == mask) {
    if (resolve != nullptr) {
      TSAN(AnnotateIgnoreReadsBegin(site.file, site.line); AnnotateIgnoreWritesBegin(site.file, site.line);)
      resolve(group->operand, mask);
      TSAN(AnnotateIgnoreWritesEnd(site.file, site.line); AnnotateIgnoreReadsEnd(site.file, site.line);)
    }
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1) S.runnable.push_back(group->fiber[i]);
    }
    group->arrived = 0;
    ++group->generation;
    ++S.stats.warp_operations;
  }
  wait("warp operation", site);
  TSAN(if (resolve == nullptr) __tsan_acquire(tag);)
}

Space space_of(const void* pointer) {
  if (S.current == nullptr) return Space::kNone;
  const char* p = static_cast<const char*>(pointer);
  if (p >= S.current->stack && p < S.current->stack + S.options.stack) return Space::kStack;
  for (const Cta& cta : S.current->cta->cluster->ctas) {
    if (p >= cta.shared && p < cta.shared + S.arena) return Space::kShared;
  }
  return Space::kGlobal;
}

const void* block_key() { return S.current->cta; }
unsigned meetings() { return S.current->meetings; }

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  auto found = S.statics.find(key);
  if (found == S.statics.end()) {
    const size_t offset = (S.static_end + alignment - 1) / alignment * alignment;
    S.static_end = offset + bytes + kGap;
    if (S.static_end > S.arena) fail("static shared memory is over %zu bytes", kStaticCapacity);
    found = S.statics.emplace(key, std::make_pair(offset, bytes)).first;
    S.stats.shared_bytes += bytes;
    if (S.stats.shared_bytes > S.options.shared_limit) {
      fail("%zu bytes of shared memory are over the limit of %zu", size_t(S.stats.shared_bytes),
           size_t(S.options.shared_limit));
    }
  }
  char* address = S.current->cta->shared + found->second.first;
  ASAN(__asan_unpoison_memory_region(address, bytes);)
  return address;
}

void* map_shared_rank(void* pointer, unsigned rank) {
  Cta* cta = S.current->cta;
  const auto offset = static_cast<size_t>(static_cast<char*>(pointer) - cta->shared);
  if (offset >= S.arena) fail("map_shared_rank: the pointer is not into this CTA's shared memory");
  if (rank >= S.cluster_size) fail("map_shared_rank: rank %u in a cluster of %u", rank, S.cluster_size);
  return cta->cluster->ctas[rank].shared + offset;
}

void launch(dim3 grid, dim3 block, dim3 cluster, size_t dynamic, void (*body)(void*), void* argument) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  check_configuration(grid, block, cluster, dynamic);
  S.threads = block.x * block.y * block.z;
  S.cluster_size = cluster.x * cluster.y * cluster.z;
  S.random = S.options.seed;
  S.body = body;
  S.argument = argument;
  S.dynamic = dynamic;
  S.static_begin = S.static_end = (dynamic + kGap + 1023) / 1024 * 1024;
  S.arena = (S.static_begin + kStaticCapacity + 4095) / 4096 * 4096;
  S.statics.clear();
  S.error.clear();
  S.runnable.clear();
  S.stats = {};
  S.stats.shared_bytes = dynamic;
  blockDim = block;
  gridDim = grid;
  const size_t clusters = size_t{grid.x} * grid.y * grid.z / S.cluster_size;
  const size_t most = std::max<size_t>(1, kMostFibers / (S.cluster_size * S.threads));
  const size_t resident = S.options.resident ? S.options.resident : std::min<size_t>(clusters, most);
  std::vector<unsigned> order(clusters);
  for (size_t i = 0; i < clusters; ++i) order[i] = static_cast<unsigned>(i);
  if (S.options.order == Order::kRandom) {
    for (size_t i = clusters; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  }
  TSAN(S.main.tsan = __tsan_get_current_fiber(); __tsan_release(&S.launch_tag);)
  const int64_t limit = now_ms() + 1000 * int64_t{S.options.timeout_s};
  start_watchdog();
  deadline_ms = limit + 2000;
  S.runnable.reserve(std::min(resident, clusters) * S.cluster_size * S.threads);
  std::vector<std::unique_ptr<Cluster>> live, finished;  // freed at the end, when the launch is ordered before us
  for (size_t next = 0;;) {
    for (size_t i = 0; i < live.size();) {
      if (live[i]->alive) {
        ++i;
        continue;
      }
      stop_cluster(*live[i]);
      finished.push_back(std::move(live[i]));
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(i));
    }
    while (live.size() < resident && next < clusters)
      live.push_back(start_cluster(order[next++], grid, block, cluster));
    if (live.empty() || !S.error.empty()) break;
    if (S.runnable.empty()) {
      S.error = "deadlock: no thread can run" + where_all_stand(live);
      break;
    }
    if (now_ms() > limit) {
      S.error = "time limit of the launch" + where_all_stand(live);
      break;
    }
    const unsigned exits = S.exits;
    for (int turns = 0; turns < 65536 && S.exits == exits && !S.runnable.empty() && S.error.empty(); ++turns) {
      Fiber* fiber = draw();
      S.current = fiber;
      threadIdx = fiber->index;
      blockIdx = fiber->cta->index;
      switch_to(S.main, *fiber);
    }
  }
  deadline_ms = 0;
  for (auto& cluster_left : live) stop_cluster(*cluster_left);
  S.current = nullptr;
  TSAN(__tsan_acquire(&S.end_tag);)
  if (!S.error.empty()) throw Error("simt: " + S.error);
}

}  // namespace simt
