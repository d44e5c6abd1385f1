// Cholesky factorisation and explicit inverse of one chunk, in place in the lower 32 x 32 tiles of shared memory.
//
// The factor is right-looking over tiles: one warp factors the diagonal tile with a row of it in every lane's registers
// (a pivot costs one shuffle and one reciprocal root; the rest of its update goes through shared memory meanwhile; 32
// pivots are the serial chain), a thread a row solves the tiles below, and a warp a tile updates what is left.  Then L
// is inverted, 32 x 32 blocks first and from two inverses the block below them, and A^-1 = L^-T L^-1 replaces it.  The
// inverse costs the same flops as two triangular solves and no accuracy that the covariance has (the error of G A^-1
// equals that of substitution), and turns the correction into one matrix product.
//
// Products of tiles are three TF32 products (tile_product.cuh), which is float32 accuracy; pivots, panels and the
// inverses of diagonal tiles are float32 FMA.  What the whole costs by the model: docs/developer/kernel-model.md.
#pragma once

#include "cuda/precondition/tile_product.cuh"

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
  float pivot = __shfl_sync(0xffffffffu, row[0], 0);
  CO_UNROLL
  for (int j = 0; j < kTile; ++j) {
    if (!(pivot > 0.0f && is_finite(pivot))) return j + 1;
    const float inverse = inverse_root(pivot);
    row[j] *= inverse;
    tile[lane * kTilePitch + j] = row[j];
    if (lane == j) inverse_pivot[j] = inverse;
    // The next pivot's lane has what it needs, so its way through the warp begins before the rest of the update.
    if (j + 1 < kTile) pivot = __shfl_sync(0xffffffffu, fma(-row[j], row[j], row[j + 1]), j + 1);
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
      TileProduct<kTile> product;
      product.template add<3>(lower_tile(chunk.tiles, k + 1 + i, k), kTilePitch, 1,
                              lower_tile(chunk.tiles, k + 1 + j, k), 1, kTilePitch);
      float* target = lower_tile(chunk.tiles, k + 1 + i, k + 1 + j);
      product.for_each([&](int row, int column, float sum) { target[row * kTilePitch + column] -= sum; });
    }
  }
}

CO_DEVICE void store_tile(TileProduct<kTile>& product, float* tile, float sign) {
  product.for_each([&](int row, int column, float value) { tile[row * kTilePitch + column] = sign * value; });
}

// high low + low high is not low high + high low in floats, so the two triangles differ by rounding; of a matrix in
// device memory the lower one is kept (store_matrix), and who goes on with the tiles must have the same bits.
CO_DEVICE void store_symmetric_tile(TileProduct<kTile>& product, float* tile) {
  product.for_each([&](int row, int column, float value) {
    if (row < column) return;
    tile[row * kTilePitch + column] = value;
    tile[column * kTilePitch + row] = value;
  });
}

// All threads.  tiles: L -> A^-1, whose diagonal tiles are complete and symmetric.
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
  // Ever larger blocks: from W11 = L11^-1 and W22 = L22^-1 of `half` tiles follows W21 = -W22 (L21 W11), a warp a tile.
  for (int level = 0; 1 << level < chunk.side(); ++level) {
    const int half = 1 << level, base = warp >> 2 * level << (level + 1), middle = base + half;
    const int i = middle + (warp >> level) % half, j = base + warp % half;
    __syncthreads();  // the blocks are complete
    TileProduct<kTile> sum;
    for (int m = j; i < chunk.side() && m < middle; ++m) {
      sum.template add<3>(lower_tile(chunk.tiles, i, m), kTilePitch, 1, lower_tile(chunk.tiles, m, j), kTilePitch, 1);
    }
    __syncthreads();  // L21 has been read
    if (i < chunk.side()) store_tile(sum, lower_tile(chunk.tiles, i, j), 1.0f);
    __syncthreads();
    TileProduct<kTile> product;
    for (int m = middle; i < chunk.side() && m <= i; ++m) {
      product.template add<3>(lower_tile(chunk.tiles, i, m), kTilePitch, 1, lower_tile(chunk.tiles, m, j), kTilePitch,
                              1);
    }
    __syncthreads();  // L21 W11 has been read
    if (i < chunk.side()) store_tile(product, lower_tile(chunk.tiles, i, j), -1.0f);
  }
  __syncthreads();
  // A^-1[i][j] = sum_m W[m][i]^T W[m][j], a warp a tile, as many rows at once as there are warps for.
  for (int first = 0, last; first < chunk.side(); first = last) {
    int tiles = 0;
    for (last = first; last < chunk.side() && tiles + last + 1 <= kWarps; ++last) tiles += last + 1;
    int i = first, j = warp;
    while (j > i) j -= ++i;
    const bool busy = warp < tiles;
    TileProduct<kTile> sum;
    for (int m = i; busy && m < chunk.side(); ++m) {
      sum.template add<3>(lower_tile(chunk.tiles, m, i), 1, kTilePitch, lower_tile(chunk.tiles, m, j), kTilePitch, 1);
    }
    __syncthreads();  // these rows of W have been read, and no later row of the result needs them
    if (busy && i != j) store_tile(sum, lower_tile(chunk.tiles, i, j), 1.0f);
    if (busy && i == j) store_symmetric_tile(sum, lower_tile(chunk.tiles, i, i));
  }
  __syncthreads();
}

}  // namespace consistency_ops
