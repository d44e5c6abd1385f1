// The factorisation of factor.cuh alone, behind the signature of co_cholesky_f32 (c_api.h), so that LAPACK's yardsticks
// can be held against it.
#include <cstdio>

#include "consistency_ops/c_api.h"
#include "cuda/factor.cuh"

using namespace consistency_ops;

namespace {

struct CholeskyParams {
  int n;
  float* a;
  int64_t lda;
  int32_t* info;
};

template <int kWarps>
void cholesky_kernel(const CholeskyParams& params) {
  CO_DYNAMIC_SHARED(float, tiles);
  CO_SHARED(ChunkShared, shared, [1]);
  const Chunk chunk{shared[0], tiles, nullptr};
  if (threadIdx.x == 0) shared[0].size = params.n;
  __syncthreads();
  const auto element = [&](int row, int column) -> float& {
    return lower_tile(tiles, row / kTile, column / kTile)[row % kTile * kTilePitch + column % kTile];
  };
  const int stride = kWarps * 32;
  for (int e = static_cast<int>(threadIdx.x); e < chunk.padded() * chunk.padded(); e += stride) {
    const int row = e / chunk.padded(), column = e % chunk.padded();
    if (row / kTile < column / kTile) continue;
    const int i = max(row, column), j = min(row, column);
    element(row, column) = i < params.n ? params.a[j * params.lda + i] : row == column ? 1.0f : 0.0f;
  }
  factor<kWarps>(chunk);
  __syncthreads();
  if (threadIdx.x == 0) *params.info = shared[0].failed_minor;
  if (shared[0].failed_minor != 0) return;
  for (int e = static_cast<int>(threadIdx.x); e < params.n * params.n; e += stride) {
    const int row = e / params.n, column = e % params.n;
    if (row >= column) params.a[column * params.lda + row] = element(row, column);
  }
}

}  // namespace

// As co_cholesky_f32, except that a matrix that fails is left as it was.
extern "C" __attribute__((visibility("default"))) int co_simt_cholesky_f32(int64_t n, float* a, int64_t lda,
                                                                           int32_t* info) {
  if (n < 0 || a == nullptr || info == nullptr || lda < (n > 1 ? n : 1)) return CO_ERROR_INVALID_ARGUMENT;
  if (n > kMaxChunk) return CO_ERROR_TOO_LARGE;
  *info = 0;
  if (n == 0) return 0;
  const CholeskyParams params{static_cast<int>(n), a, lda, info};
  const size_t bytes = lower_tiles(padded_units(params.n) / kTile) * kTileFloats * sizeof(float);
  try {
    const unsigned threads = n <= 128 ? 256 : 512;
    simt::launch(dim3(1), dim3(threads), dim3(1), bytes, [&] {
      if (threads == 256) {
        cholesky_kernel<8>(params);
      } else {
        cholesky_kernel<16>(params);
      }
    });
  } catch (const simt::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return -100;
  }
  return 0;
}
