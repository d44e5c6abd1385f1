// The chunk kernels of factor.cuh and sweep.cuh alone, behind the signatures of co_cholesky_f32 and
// co_cholesky_solve_f32 (c_api.h), so that LAPACK's yardsticks can be held against them.
//
// LAPACK's ratio of a solve measures the residual, which only substitution keeps small; the correction multiplies by
// the explicit inverse, whose result is as near to the exact one but leaves a residual of eps cond.  So there are two
// solves: co_simt_cholesky_solve_f32 substitutes, as spd_solve does, and simt_inverse_solve does what the correction
// does.
#include <cstdio>

#include "consistency_ops/c_api.h"
#include "cuda/precondition/substitute.cuh"
#include "cuda/precondition/sweep.cuh"

using namespace consistency_ops;

namespace {

struct CholeskyParams {
  int n;
  float* a;
  int64_t lda;
  int32_t* info;
};

struct SolveParams {
  int n;
  int64_t nrhs;
  const float* l;
  int64_t lda;
  float* b;
  int64_t ldb;
  int32_t* info;
};

// tiles <- the lower triangle of a, both halves of the diagonal tiles, and the identity past n.
CO_DEVICE void load_lower(const Chunk& chunk, const float* a, int64_t lda, bool symmetric) {
  for (int e = static_cast<int>(threadIdx.x); e < chunk.padded() * chunk.padded(); e += static_cast<int>(blockDim.x)) {
    const int row = e / chunk.padded(), column = e % chunk.padded();
    if (row / kTile < column / kTile) continue;
    const int i = symmetric ? max(row, column) : row, j = symmetric ? min(row, column) : column;
    const bool inside = i < chunk.size() && j <= i;
    lower_tile(chunk.tiles, row / kTile, column / kTile)[row % kTile * kTilePitch + column % kTile] =
        inside          ? a[j * lda + i]
        : row == column ? 1.0f
                        : 0.0f;
  }
}

CO_DEVICE float& element(const Chunk& chunk, int row, int column) {
  const int i = max(row, column), j = min(row, column);
  return lower_tile(chunk.tiles, i / kTile, j / kTile)[i % kTile * kTilePitch + j % kTile];
}

template <int kWarps>
void cholesky_kernel(const CholeskyParams& params) {
  CO_DYNAMIC_SHARED(float, tiles);
  CO_SHARED(ChunkShared, shared, [1]);
  const Chunk chunk(shared[0], tiles);
  if (threadIdx.x == 0) shared[0].task.size = params.n;
  __syncthreads();
  load_lower(chunk, params.a, params.lda, true);
  factor<kWarps>(chunk);
  __syncthreads();
  if (threadIdx.x == 0) *params.info = shared[0].scratch.failed_minor;
  if (shared[0].scratch.failed_minor != 0) return;
  for (int e = static_cast<int>(threadIdx.x); e < params.n * params.n; e += kWarps * 32) {
    const int row = e / params.n, column = e % params.n;
    if (row >= column) params.a[column * params.lda + row] = element(chunk, row, column);
  }
}

// tiles <- L and what factor() leaves beside it.
template <int kWarps>
Chunk load_factor(const SolveParams& params, float* tiles, ChunkShared& shared) {
  const Chunk chunk(shared, tiles);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) shared.task.size = params.n;
  __syncthreads();
  load_lower(chunk, params.l, params.lda, false);
  for (int i = thread; i < chunk.padded(); i += kWarps * 32) {
    shared.scratch.inverse_pivot[i] = i < params.n ? 1.0f / params.l[i * params.lda + i] : 1.0f;
  }
  __syncthreads();
  return chunk;
}

// As the correction does it: B <- A^-1 B with the explicit inverse.  `l` of the parameters is A here.
template <int kWarps>
void inverse_solve_kernel(const SolveParams& params) {
  CO_DYNAMIC_SHARED(float, tiles);
  CO_SHARED(ChunkShared, shared, [1]);
  const Chunk chunk(shared[0], tiles);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) shared[0].task.size = params.n;
  __syncthreads();
  load_lower(chunk, params.l, params.lda, true);
  if constexpr (kWarps == 8) {
    factor_and_invert(chunk, tiles + chunk.tile_floats());
  } else {
    factor<kWarps>(chunk);
    __syncthreads();
    if (shared[0].scratch.failed_minor == 0) invert<kWarps>(chunk);
  }
  __syncthreads();
  const int info = shared[0].scratch.failed_minor;
  if (thread == 0) *params.info = info;
  for (int64_t rhs = 0; info == 0 && rhs < params.nrhs; ++rhs) {
    float* b = params.b + rhs * params.ldb;
    float sum = 0.0f;
    if (thread < params.n) {
      for (int k = 0; k < params.n; ++k) sum = fma(element(chunk, thread, k), b[k], sum);
    }
    __syncthreads();
    if (thread < params.n) b[thread] = sum;
  }
}

// B^T <- B^T L^-T L^-1, 32 right-hand sides at a time, each a row of `side` tiles after those of L.
template <int kWarps>
void solve_kernel(const SolveParams& params) {
  CO_DYNAMIC_SHARED(float, tiles);
  CO_SHARED(ChunkShared, shared, [1]);
  const Chunk chunk = load_factor<kWarps>(params, tiles, shared[0]);
  const int thread = static_cast<int>(threadIdx.x);
  float* rows = tiles + chunk.tile_floats();
  for (int64_t first = 0; first < params.nrhs; first += kTile) {
    const auto at = [&](int r, int u) { return rows + u / kTile * kTileFloats + r * kTilePitch + u % kTile; };
    const auto for_all = [&](auto&& f) {
      for (int e = thread; e < kTile * chunk.padded(); e += kWarps * 32) f(e / chunk.padded(), e % chunk.padded());
      __syncthreads();
    };
    for_all([&](int r, int u) {
      *at(r, u) = first + r < params.nrhs && u < params.n ? params.b[(first + r) * params.ldb + u] : 0.0f;
    });
    substitute<kWarps>(chunk, rows);
    for_all([&](int r, int u) {
      if (first + r < params.nrhs && u < params.n) params.b[(first + r) * params.ldb + u] = *at(r, u);
    });
  }
}

// One CTA, as large as the correction's of this chunk.
template <typename F>
int run(int n, F&& kernel) {
  const int side = padded_units(n) / kTile;
  const size_t bytes = ((lower_tiles(side) + side) * kTileFloats + (n <= 128 ? kSweepFloats : 0)) * sizeof(float);
  try {
    simt::launch(dim3(1), dim3(n <= 128 ? 256 : 512), dim3(1), bytes, kernel);
  } catch (const simt::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return -100;
  }
  return 0;
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
  return run(params.n, [&] { n <= 128 ? cholesky_kernel<8>(params) : cholesky_kernel<16>(params); });
}

namespace {

template <typename F>
int checked_solve(int64_t n, int64_t nrhs, const float* l, int64_t lda, float* b, int64_t ldb, F&& kernel) {
  const int64_t least = n > 1 ? n : 1;
  if (n < 0 || nrhs < 0 || l == nullptr || b == nullptr || lda < least || ldb < least) return CO_ERROR_INVALID_ARGUMENT;
  if (n > kMaxChunk) return CO_ERROR_TOO_LARGE;
  if (n == 0 || nrhs == 0) return 0;
  int32_t info = 0;
  const SolveParams params{static_cast<int>(n), nrhs, l, lda, b, ldb, &info};
  const int status = run(params.n, [&] { kernel(params); });
  return status != 0 ? status : info;
}

}  // namespace

// As co_cholesky_solve_f32.
extern "C" __attribute__((visibility("default"))) int co_simt_cholesky_solve_f32(int64_t n, int64_t nrhs,
                                                                                 const float* l, int64_t lda, float* b,
                                                                                 int64_t ldb) {
  return checked_solve(n, nrhs, l, lda, b, ldb,
                       [&](const auto& params) { n <= 128 ? solve_kernel<8>(params) : solve_kernel<16>(params); });
}

// B <- A^-1 B by the explicit inverse, from the lower triangle of A; or the order of the leading minor that is not
// positive definite, and B stays.
extern "C" __attribute__((visibility("default"))) int simt_inverse_solve(int64_t n, int64_t nrhs, const float* a,
                                                                         int64_t lda, float* b, int64_t ldb) {
  return checked_solve(n, nrhs, a, lda, b, ldb, [&](const auto& params) {
    n <= 128 ? inverse_solve_kernel<8>(params) : inverse_solve_kernel<16>(params);
  });
}
