// The kernels on tiles for Intel's AMX (AMX-TILE and AMX-BF16): the only file with its instructions.
//
// They are written as assembly, not as the compilers' intrinsics: g++ 12 believes that _tile_loadconfig reads 8 bytes
// and drops the stores of the other 56, and that a tile load reads no memory.  The configuration belongs to a thread;
// it is released after every task, because a thread that holds tiles has 8 KiB more to save at each switch.
#include "cpu/chunk_kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#if defined(__clang__)
#pragma clang attribute push(                                                                            \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#endif

#define CO_TILE_BEGIN() configure()
#define CO_TILE_END() asm volatile("tilerelease" ::: "memory")
#define CO_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t::)
#define CO_TILE_LOAD(t, from, pitch) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t::"r"(from), "r"(int64_t{pitch}) : "memory")
#define CO_TILE_STORE(t, to, pitch) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"(int64_t{pitch}) : "memory")
#define CO_TILE_MULTIPLY(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::)

namespace consistency_ops::cpu {
namespace amx {

struct alignas(64) Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// All eight tiles with 16 rows of 64 bytes.
static void configure() {
  Configuration all = {};
  all.palette = 1;
  for (int t = 0; t < 8; ++t) {
    all.row_bytes[t] = 64;
    all.rows[t] = 16;
  }
  asm volatile("ldtilecfg %0" ::"m"(all) : "memory");
}

#include "cpu/pair_pack.inl"
#include "cpu/tile_kernels.inl"
}  // namespace amx

extern const TileKernels amx_tiles;
extern const PairKernels amx_pairs;
const TileKernels amx_tiles = {amx::begin, amx::end, amx::split, amx::correct};
const PairKernels amx_pairs = {amx::pack, amx::gram, &amx_tiles};

}  // namespace consistency_ops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__ && __linux__
