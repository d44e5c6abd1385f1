// Which instruction set the CPU kernels use: chosen once, at the first use.
#include <atomic>
#include <cstring>

#include "consistency_ops/c_api.h"
#include "cpu/chunk_kernels.h"

namespace consistency_ops::cpu {

extern const IsaKernels<float> portable_f32;
extern const IsaKernels<double> portable_f64;
#if defined(__x86_64__)
extern const IsaKernels<float> avx2_f32, avx512_f32;
extern const IsaKernels<double> avx2_f64, avx512_f64;
#endif

namespace {

struct Isa {
  const char* name;
  bool available;
  const IsaKernels<float>* f32;
  const IsaKernels<double>* f64;
};

const Isa* all_isas(int* count) {
  static const Isa isas[] = {
#if defined(__x86_64__)
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl"),
       &avx512_f32, &avx512_f64},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &avx2_f32, &avx2_f64},
#endif
      {"portable", true, &portable_f32, &portable_f64},
  };
  *count = sizeof(isas) / sizeof(isas[0]);
  return isas;
}

std::atomic<const Isa*> chosen{nullptr};

const Isa& isa() {
  const Isa* current = chosen.load(std::memory_order_relaxed);
  if (current == nullptr) {
    int count;
    current = all_isas(&count);
    while (!current->available) ++current;  // the portable entry ends the list
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

const char* isa_name() { return isa().name; }

bool use_isa(const char* name) {
  int count;
  const Isa* isas = all_isas(&count);
  for (int i = 0; i < count; ++i) {
    if (isas[i].available && std::strcmp(isas[i].name, name) == 0) {
      chosen.store(&isas[i], std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace consistency_ops::cpu

const char* co_cpu_isa(void) { return consistency_ops::cpu::isa_name(); }

int co_set_cpu_isa(const char* name) {
  return name != nullptr && consistency_ops::cpu::use_isa(name) ? 0 : CO_ERROR_INVALID_ARGUMENT;
}
