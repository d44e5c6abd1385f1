// Which instruction set the CPU kernels use: chosen once, at the first use.
#include <atomic>
#include <cstring>

#include "cpu/chunk_kernels.h"

namespace consistency_ops::cpu {

extern const IsaKernels<float> portable_f32;
extern const IsaKernels<double> portable_f64;
#if defined(__x86_64__)
extern const IsaKernels<float> avx2_f32, avx512_f32;
extern const IsaKernels<double> avx2_f64, avx512_f64;
extern const PairKernels avx512bf16_pairs;
#endif

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
#endif
};

IsaLevel best_level() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return IsaLevel::kPortable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return IsaLevel::kAvx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? IsaLevel::kAvx512Bf16 : IsaLevel::kAvx512;
#else
  return IsaLevel::kPortable;
#endif
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

IsaLevel isa_level() { return isa().level; }

const char* isa_name() { return isa().name; }

bool use_isa(const char* name) {
  for (const Isa& candidate : kIsas) {
    if (candidate.level <= best_level() && std::strcmp(candidate.name, name) == 0) {
      chosen.store(&candidate, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace consistency_ops::cpu
