// Runs CUDA C++ kernels on the CPU: the scheduler's interface.
//
// Every CUDA thread is a fiber and all fibers share one OS thread, so a launch is a sequence of short runs: a thread
// runs until its next barrier, warp operation, atomic or fence, then the scheduler draws the next runnable thread of
// any resident CTA from a seeded generator.  A missing barrier therefore shows as wrong numbers under some seed, and
// the same seed shows it again.  Shared memory starts as NaN bytes, separate arrays lie in poisoned gaps
// (AddressSanitizer), and with SIMT_TSAN every CUDA thread is a ThreadSanitizer fiber whose only synchronisation is
// what the kernel asked for.
//
// runtime.cpp is always compiled without -fsanitize=thread; what the kernels see of CUDA is in cuda_host.h.
// Not modelled: PTX bodies, the rounding of tensor cores, weak memory order beyond happens-before, code generation,
// speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace simt {

enum class Order : int32_t { kRandom = 0, kAscending = 1, kDescending = 2 };

struct Options {
  uint64_t seed = 1;
  Order order = Order::kRandom;
  uint32_t resident = 2;  // clusters in flight at once; 0: all of them, up to 16,384 threads
  uint64_t shared_limit =
      227 << 10;               // bytes a CTA, static + dynamic (sm_90 and sm_100: 227 KiB, sm_80: 163, sm_86: 99)
  uint64_t stack = 128 << 10;  // bytes a CUDA thread
  uint32_t timeout_s = 120;    // of one launch, processor time
  bool clusters = true;        // what clusters_fit answers
};

struct Stats {  // of the last launch
  uint64_t switches = 0, ctas = 0, block_barriers = 0, warp_operations = 0, atomics = 0, shared_bytes = 0;
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where in the kernel an operation stands, for reports.
struct Site {
  const char* file = "";
  int line = 0;
};

Options& options();
Stats& stats();

// Runs body(argument) once for every thread of the grid.  Throws Error for an invalid configuration, a deadlock, a
// divergent barrier, misuse of a warp operation, too much shared memory, or the time limit.
void launch(dim3 grid, dim3 block, dim3 cluster, size_t dynamic_shared, void (*body)(void*), void* argument);

// For the calling CUDA thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
unsigned thread_rank();   // in its block
unsigned cluster_rank();  // of its block in the cluster
unsigned cluster_size();
uint64_t random_bits();
void yield();
void sleep();  // as yield(), but others come first
void atomic_point();
void fence();
void block_barrier(Site site);
int block_barrier_or(int value, Site site);
void cluster_barrier(Site site);
// Barrier `number` (1 to 15) of `threads` threads of the block, of which only those wait that say so.
void named_barrier(int number, int threads, bool waits, Site site);

// All lanes of `mask` meet; the last one calls resolve(lanes, mask) with every lane's `operand`, then all go on.
// Without `resolve` (__syncwarp) it orders memory; what a resolve needs from memory its lane reads before it.
using Resolve = void (*)(void* const lanes[32], uint32_t mask);
void warp_operation(uint32_t mask, void* operand, Resolve resolve, Site site);

// For access.cpp: where a pointer of the calling CUDA thread leads, which CTA runs, how often the thread has met
// others.
enum class Space { kStack, kShared, kGlobal, kNone };  // kNone: no kernel runs
Space space_of(const void* pointer);
const void* block_key();
unsigned meetings();

void* static_shared(const void* key, size_t bytes, size_t alignment);  // one copy a CTA, at the same offset in all
void* dynamic_shared();
void* map_shared_rank(void* pointer, unsigned rank);

}  // namespace simt
