// Which instruction set the CPU kernels use: chosen once, at the first use.
#include <algorithm>
#include <atomic>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/chunk_kernels.h"

namespace consistency_ops::cpu {

extern const IsaKernels<float> portable_f32;
extern const IsaKernels<double> portable_f64;
#if defined(__x86_64__)
extern const IsaKernels<float> avx2_f32, avx512_f32;
extern const IsaKernels<double> avx2_f64, avx512_f64;
extern const PairKernels avx512bf16_pairs;
#if defined(__linux__)
extern const PairKernels amx_pairs;
#endif
#endif
extern const PairKernels amx_model_pairs;

namespace {

struct Isa {
  const char* name;
  IsaLevel level;
  const IsaKernels<float>* f32;
  const IsaKernels<double>* f64;
  const PairKernels* pairs;
};

constexpr Isa kIsas[] = {
    {"portable", IsaLevel::kPortable, &portable_f32, &portable_f64, nullptr},
#if defined(__x86_64__)
    {"avx2", IsaLevel::kAvx2, &avx2_f32, &avx2_f64, nullptr},
    {"avx512", IsaLevel::kAvx512, &avx512_f32, &avx512_f64, nullptr},
    {"avx512bf16", IsaLevel::kAvx512Bf16, &avx512_f32, &avx512_f64, &avx512bf16_pairs},
#if defined(__linux__)
    {"amx", IsaLevel::kAmx, &avx512_f32, &avx512_f64, &amx_pairs},
#endif
#endif
};

#if defined(__x86_64__) && defined(__linux__)
// Whether the processor has tiles for bfloat16, the system keeps them, and this process may use them.  Linux gives the
// permission on request (since 5.16), to all threads of a process and to its children; it refuses where a thread has an
// alternate signal stack too small for them.
bool has_tiles() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kOsXsave = 1u << 27, kTileStates = 3u << 17;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTile)) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsXsave)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kTileStates) != kTileStates) return false;
  // The first palette: tiles of 16 rows of 64 bytes, eight of them.
  if (!__get_cpuid_count(0x1D, 1, &a, &b, &c, &d) || (b & 0xFFFF) != 64 || (b >> 16) < 8 || (c & 0xFFFF) < 16) {
    return false;
  }
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool has_tiles() { return false; }
#endif

IsaLevel look_for_best_level() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return IsaLevel::kPortable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return IsaLevel::kAvx2;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return IsaLevel::kAvx512;
  return has_tiles() ? IsaLevel::kAmx : IsaLevel::kAvx512Bf16;
#else
  return IsaLevel::kPortable;
#endif
}

// Asked once: a later answer could be another, and the results with it.
IsaLevel best_level() {
  static const IsaLevel best = look_for_best_level();
  return best;
}

// The kernels on tiles with the model of the instructions, the others as they are on a machine with tiles or as near to
// it as this one comes.
const Isa& amx_model() {
  static const Isa model = [] {
    Isa isa = kIsas[static_cast<int>(std::min(best_level(), IsaLevel::kAvx512))];
    isa.name = "amx_model";
    isa.pairs = &amx_model_pairs;
    return isa;
  }();
  return model;
}

std::atomic<const Isa*> chosen{nullptr};

const Isa& isa() {
  const Isa* current = chosen.load(std::memory_order_relaxed);
  if (current == nullptr) {
    current = &kIsas[static_cast<int>(best_level())];
    chosen.store(current, std::memory_order_relaxed);
  }
  return *current;
}

}  // namespace

template <>
const IsaKernels<float>& isa_kernels<float>() {
  return *isa().f32;
}
template <>
const IsaKernels<double>& isa_kernels<double>() {
  return *isa().f64;
}

const PairKernels* pair_kernels() { return isa().pairs; }

const TileKernels* tile_kernels() { return pair_kernels() == nullptr ? nullptr : pair_kernels()->tiles; }

IsaLevel isa_level() { return isa().level; }

const char* isa_name() { return isa().name; }

bool use_isa(const char* name) {
  if (std::strcmp(name, amx_model().name) == 0) {
    chosen.store(&amx_model(), std::memory_order_relaxed);
    return true;
  }
  for (const Isa& candidate : kIsas) {
    if (candidate.level <= best_level() && std::strcmp(candidate.name, name) == 0) {
      chosen.store(&candidate, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace consistency_ops::cpu
