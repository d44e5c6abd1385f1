// Cholesky factorisation and explicit inverse of one chunk, in place in the lower 32 x 32 tiles of shared memory.
//
// The factor is right-looking over tiles: one warp factors the diagonal tile with a row of it in every lane's registers
// (a pivot costs one shuffle, one reciprocal root and one pass through shared memory; 32 pivots are the serial chain),
// a thread a row solves the tiles below, and a warp a tile updates what is left.  Then L is inverted tile row by tile
// row and A^-1 = L^-T L^-1 replaces it.  The inverse costs the same flops as two triangular solves and no accuracy that
// the covariance has (the error of G A^-1 equals that of substitution), and turns the correction into one matrix
// product.
//
// Everything here is float32 FMA, so no pivot is lost to TF32: chunk^3 flops, 2.1 M for 128 units or 4 us of one SM at
// its peak, beside a serial chain of four tiles.  In static schedules of sm_90 code a tile takes some 3200 cycles
// or 1.6 us with the column through shared memory, as here, 2.2 us with every broadcast a shuffle and 1.3 us with two
// pivots at a time, which is not built.  That is 10 to 12 us for a chunk of 128 on its own; a whole device has the
// flops of the 181 chunks of ResNet-50 done in 5 us.  Calculated: nothing was measured.
#pragma once

#include "cuda/precondition/chunk.cuh"

namespace consistency_ops {

// 1 / sqrt(x) to one unit in the last place: rsqrt is good to 2^-22.9, one Newton step repairs it.
CO_DEVICE float inverse_root(float x) {
  const float y = rsqrtf(x);
  return fma(y * fma(-x * y, y, 1.0f), 0.5f, y);
}

// One warp.  tile <- its lower Cholesky factor; returns 0 or the order of the first leading minor that is not positive
// definite (NaN and infinity count).
CO_DEVICE int factor_diagonal_tile(float* tile, float* inverse_pivot) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float row[kTile];
  CO_UNROLL
  for (int c = 0; c < kTile; ++c) row[c] = tile[lane * kTilePitch + c];
  CO_UNROLL
  for (int j = 0; j < kTile; ++j) {
    const float pivot = __shfl_sync(0xffffffffu, row[j], j);
    if (!(pivot > 0.0f && is_finite(pivot))) return j + 1;
    const float inverse = inverse_root(pivot);
    row[j] *= inverse;
    tile[lane * kTilePitch + j] = row[j];
    if (lane == j) inverse_pivot[j] = inverse;
    __syncwarp();
    CO_UNROLL
    for (int c = j + 1; c < kTile; ++c) row[c] -= row[j] * tile[c * kTilePitch + j];
  }
  return 0;
}

// One thread a row of a tile below: row <- row L^-T.
CO_DEVICE void solve_row(float* row, const float* factor, const float* inverse_pivot) {
  float x[kTile];
  CO_UNROLL
  for (int j = 0; j < kTile; ++j) {
    float sum = row[j];
    CO_UNROLL
    for (int m = 0; m < j; ++m) sum -= x[m] * factor[j * kTilePitch + m];
    x[j] = sum * inverse_pivot[j];
  }
  CO_UNROLL
  for (int j = 0; j < kTile; ++j) row[j] = x[j];
}

// One warp: a 32 x 32 product, 8 x 4 elements a lane: rows lane / 8 + 4 x, columns 4 (lane % 8) + y, which lie in 32
// banks for every (x, y).
struct TileProduct {
  float sum[8][4] = {};

  // sum += A B with A(r, k) = a[r * kRowA + k * kInnerA], B(k, c) = b[k * kInnerB + c * kColumnB].
  template <int kRowA, int kInnerA, int kInnerB, int kColumnB>
  CO_DEVICE void add(const float* a, const float* b) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    a += lane / 8 * kRowA;
    b += lane % 8 * 4 * kColumnB;
    CO_NO_UNROLL
    for (int k = 0; k < kTile; ++k) {
      float left[8], right[4];
      CO_UNROLL
      for (int x = 0; x < 8; ++x) left[x] = a[x * 4 * kRowA + k * kInnerA];
      CO_UNROLL
      for (int y = 0; y < 4; ++y) right[y] = b[y * kColumnB + k * kInnerB];
      CO_UNROLL
      for (int x = 0; x < 8; ++x) {
        CO_UNROLL
        for (int y = 0; y < 4; ++y) sum[x][y] = fma(left[x], right[y], sum[x][y]);
      }
    }
  }

  template <typename F>
  CO_DEVICE void for_each(F&& f) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    CO_UNROLL
    for (int x = 0; x < 8; ++x) {
      CO_UNROLL
      for (int y = 0; y < 4; ++y) f((lane / 8 + 4 * x) * kTilePitch + lane % 8 * 4 + y, sum[x][y]);
    }
  }
};

// All threads; what precedes the last step ends with a barrier.  tiles <- L; failed_minor <- 0 or the order of
// the leading minor that is not positive definite.
template <int kWarps>
CO_DEVICE void factor(const Chunk& chunk) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  if (thread == 0) chunk.scratch.failed_minor = 0;
  for (int k = 0; k < chunk.side(); ++k) {
    float* diagonal = lower_tile(chunk.tiles, k, k);
    float* inverse_pivot = chunk.scratch.inverse_pivot + k * kTile;
    __syncthreads();
    if (warp == 0) {
      const int minor = factor_diagonal_tile(diagonal, inverse_pivot);
      if (minor != 0 && thread == 0) chunk.scratch.failed_minor = k * kTile + minor;
    }
    __syncthreads();
    if (chunk.scratch.failed_minor != 0) break;
    const int below = chunk.side() - k - 1;
    if (thread < below * kTile) {
      solve_row(lower_tile(chunk.tiles, k + 1 + warp, k) + thread % 32 * kTilePitch, diagonal, inverse_pivot);
    }
    __syncthreads();
    for (int tile = warp; tile < lower_tiles(below); tile += kWarps) {
      int i = 0;
      while (lower_tiles(i + 1) <= tile) ++i;
      const int j = tile - lower_tiles(i);
      TileProduct product;
      product.add<kTilePitch, 1, 1, kTilePitch>(lower_tile(chunk.tiles, k + 1 + i, k),
                                                lower_tile(chunk.tiles, k + 1 + j, k));
      float* target = lower_tile(chunk.tiles, k + 1 + i, k + 1 + j);
      product.for_each([&](int at, float sum) { target[at] -= sum; });
    }
  }
}

// All threads.  tiles: L -> A^-1, whose diagonal tiles are complete.
template <int kWarps>
CO_DEVICE void invert(const Chunk& chunk) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (warp < chunk.side()) {  // W = L^-1: the diagonal tiles, a column a lane
    float* tile = lower_tile(chunk.tiles, warp, warp);
    const float* inverse_pivot = chunk.scratch.inverse_pivot + warp * kTile;
    float column[kTile];
    CO_UNROLL
    for (int r = 0; r < kTile; ++r) {
      float sum = r == lane ? 1.0f : 0.0f;
      CO_UNROLL
      for (int m = 0; m < r; ++m) sum -= tile[r * kTilePitch + m] * column[m];
      column[r] = sum * inverse_pivot[r];
    }
    __syncwarp();
    CO_UNROLL
    for (int r = 0; r < kTile; ++r) tile[r * kTilePitch + lane] = column[r];
  }
  for (int i = 1; i < chunk.side(); ++i) {  // W[i][j] = -W[i][i] sum_m L[i][m] W[m][j], a warp a tile
    __syncthreads();
    TileProduct sum;
    for (int m = warp; m < i; ++m) {
      sum.add<kTilePitch, 1, kTilePitch, 1>(lower_tile(chunk.tiles, i, m), lower_tile(chunk.tiles, m, warp));
    }
    __syncthreads();  // row i of L has been read
    if (warp < i) {
      float* tile = lower_tile(chunk.tiles, i, warp);
      sum.for_each([&](int at, float value) { tile[at] = value; });
      __syncwarp();
      TileProduct product;
      product.add<kTilePitch, 1, kTilePitch, 1>(lower_tile(chunk.tiles, i, i), tile);
      __syncwarp();
      product.for_each([&](int at, float value) { tile[at] = -value; });
    }
  }
  __syncthreads();
  for (int i = 0; i < chunk.side(); ++i) {  // A^-1[i][j] = sum_m W[m][i]^T W[m][j], a warp a tile
    TileProduct sum;
    if (warp <= i) {
      for (int m = i; m < chunk.side(); ++m) {
        sum.add<1, kTilePitch, kTilePitch, 1>(lower_tile(chunk.tiles, m, i), lower_tile(chunk.tiles, m, warp));
      }
    }
    __syncthreads();  // row i of W has been read, and no later row of the result needs it
    if (warp <= i) {
      float* tile = lower_tile(chunk.tiles, i, warp);
      sum.for_each([&](int at, float value) { tile[at] = value; });
    }
  }
  __syncthreads();
}

}  // namespace consistency_ops
