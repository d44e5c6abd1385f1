// Includes the file that CO_KERNELS names once for every instruction set, each time in a namespace of its own and with
// CO_VECTOR_BYTES, the width of one vector register.  For kernels that share a file with the code that calls them; the
// larger ones have a file an instruction set (isa_*.cpp).  The file may call no inline function of another header:
// its code would be generated for this instruction set and shared with callers that may not run it.
//
// CO_BEST(name) is then `name` of the instruction set in use.

namespace portable {
#define CO_VECTOR_BYTES 16
#include CO_KERNELS
#undef CO_VECTOR_BYTES
}  // namespace portable

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define CO_VECTOR_BYTES 32
#include CO_KERNELS
#undef CO_VECTOR_BYTES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
namespace avx512 {
#define CO_VECTOR_BYTES 64
#include CO_KERNELS
#undef CO_VECTOR_BYTES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define CO_BEST(name)                                        \
  (cpu::isa_level() >= cpu::IsaLevel::kAvx512 ? avx512::name \
   : cpu::isa_level() >= cpu::IsaLevel::kAvx2 ? avx2::name   \
                                              : portable::name)
#else
#define CO_BEST(name) (portable::name)
#endif
