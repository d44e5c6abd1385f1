// Cholesky factorisation and explicit inverse of one chunk, in place in the lower 32 x 32 tiles of shared memory. Where
// the inverse of up to 128 units is all that is wanted, sweep.cuh makes it faster.
//
// The factor is right-looking over tiles: one warp factors the diagonal tile with a row of it in every lane's
// registers, a thread a row solves the tiles below, and warps update what is left, half a tile each.  The 32 pivots of
// a tile are the serial chain: a reciprocal root, three products and a shuffle each.  Two columns at a time go to the
// other lanes through shared memory, which read both at once.  The first warp goes ahead to the next diagonal tile
// while the others still update by the last one.  Then L is inverted, 32 x 32 blocks first and from two inverses the
// block below them, and A^-1 = L^-T L^-1 replaces it.  The inverse costs the same flops as two triangular solves and no
// accuracy that the covariance has (the error of G A^-1 equals that of substitution), and turns the correction into one
// matrix product.
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

struct alignas(8) TwoColumns {  // of one row
  float v[2];
};
static_assert(sizeof(Scratch::row_offset) >= 2 * kTile * sizeof(TwoColumns), "two panels lie there");

// One warp.  tile <- its lower Cholesky factor; returns 0 or the order of the first leading minor that is not positive
// definite (NaN and infinity count).  `panels` has room for two columns, twice.
CO_DEVICE int factor_diagonal_tile(float* tile, float* inverse_pivot, TwoColumns* panels) {
  const int lane = fresh_thread() % 32;
  float row[kTile];
  CO_UNROLL
  for (int c = 0; c < kTile; ++c) row[c] = tile[lane * kTilePitch + c];
  float pivot = __shfl_sync(0xffffffffu, row[0], 0);
  CO_UNROLL
  for (int first = 0; first < kTile; first += 2) {
    CO_UNROLL
    for (int j = first; j < first + 2; ++j) {
      if (!(pivot > 0.0f && is_finite(pivot))) return j + 1;
      const float inverse = inverse_root(pivot);
      row[j] *= inverse;
      if (lane == j) inverse_pivot[j] = inverse;
      tile[lane * kTilePitch + j] = row[j];
      if (j > first) continue;
      // The next pivot's lane has what it needs, so its way through the warp begins before the rest of the update.
      pivot = __shfl_sync(0xffffffffu, fma(-row[j], row[j], row[j + 1]), j + 1);
      row[j + 1] = fma(-row[j], __shfl_sync(0xffffffffu, row[j], j + 1), row[j + 1]);
    }
    if (first + 2 == kTile) continue;
    const int j = first;
    const float diagonal = fma(-row[j + 1], row[j + 1], fma(-row[j], row[j], row[j + 2]));
    pivot = __shfl_sync(0xffffffffu, diagonal, j + 2);
    TwoColumns* const panel = panels + first / 2 % 2 * kTile;  // the other one may still be read
    panel[lane] = {row[j], row[j + 1]};
    __syncwarp();
    CO_UNROLL
    for (int c = j + 2; c < kTile; ++c) {
      const TwoColumns of_c = panel[c];
      row[c] = fma(-row[j + 1], of_c.v[1], fma(-row[j], of_c.v[0], row[c]));
    }
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

// One warp.  Tile (i, j) -= tile (i, k) tile (j, k)^T, `kColumns` columns of it from `first` on.
template <int kColumns>
CO_DEVICE void update_tile(const Chunk& chunk, int i, int j, int k, int first) {
  TileProduct<kColumns> product;
  product.template add<3>(lower_tile(chunk.tiles, i, k), kTilePitch, 1,
                          lower_tile(chunk.tiles, j, k) + first * kTilePitch, 1, kTilePitch);
  float* target = lower_tile(chunk.tiles, i, j) + first;
  product.for_each([&](int row, int column, float sum) { target[row * kTilePitch + column] -= sum; });
}

// Warp 0.
CO_DEVICE void factor_tile(const Chunk& chunk, int k) {
  const int minor = factor_diagonal_tile(lower_tile(chunk.tiles, k, k), chunk.scratch.inverse_pivot + k * kTile,
                                         reinterpret_cast<TwoColumns*>(chunk.scratch.row_offset));
  if (minor != 0 && threadIdx.x == 0) chunk.scratch.failed_minor = k * kTile + minor;
}

// All threads; what precedes the last step ends with a barrier.  tiles <- L; failed_minor <- 0 or the order of
// the leading minor that is not positive definite.
template <int kWarps>
CO_DEVICE void factor(const Chunk& chunk) {
  __syncthreads();  // the matrix, and its last failed_minor has been read
  if (threadIdx.x == 0) chunk.scratch.failed_minor = 0;
  CO_NO_UNROLL
  for (int k = 0; k < chunk.side(); ++k) {
    const int warp = fresh_thread() / 32;
    // Warp 0 goes ahead: it updates the diagonal tile and factors it beside the other updates by the tiles of k - 1.
    if (warp == 0) {
      if (k > 0) update_tile<kTile>(chunk, k, k, k - 1, 0);
      __syncwarp();
      factor_tile(chunk, k);
    } else if (k > 0) {
      CO_NO_UNROLL
      for (int job = warp + 1; job < 2 * lower_tiles(chunk.side() - k); job += kWarps - 1) {  // half a tile each
        int i = 0;
        while (2 * lower_tiles(i + 1) <= job) ++i;
        update_tile<kTile / 2>(chunk, k + i, k + job / 2 - lower_tiles(i), k - 1, job % 2 * (kTile / 2));
      }
    }
    __syncthreads();  // the diagonal tile, and those behind it
    if (chunk.scratch.failed_minor != 0) break;
    if (const int thread = fresh_thread(); thread < (chunk.side() - k - 1) * kTile) {
      solve_row(lower_tile(chunk.tiles, k + 1 + thread / 32, k) + thread % 32 * kTilePitch,
                lower_tile(chunk.tiles, k, k), chunk.scratch.inverse_pivot + k * kTile);
    }
    __syncthreads();  // the tiles below it
  }
}

template <int kColumns>
CO_DEVICE void store_tile(TileProduct<kColumns>& product, float* tile, float sign) {
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

// All threads.  tiles: L -> A^-1, whose diagonal tiles are complete and symmetric; with kTriangular -> L^-1, whose
// diagonal tiles have zeros above the diagonal.
template <int kWarps, bool kTriangular = false>
CO_DEVICE void invert(const Chunk& chunk) {
  constexpr int kParts = kWarps == 4 || kWarps == 8 ? 2 : 1,
                kColumns = kTile / kParts;  // warps that share a tile of the ladder
  const int warp = fresh_thread() / 32, lane = fresh_thread() % 32;
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
  // Ever larger blocks: from W11 = L11^-1 and W22 = L22^-1 of `half` tiles follows W21 = -W22 (L21 W11).
  const int job = warp / kParts, first = warp % kParts * kColumns;
  CO_NO_UNROLL
  for (int level = 0; 1 << level < chunk.side(); ++level) {
    const int half = 1 << level, base = job >> 2 * level << (level + 1), middle = base + half;
    const int i = middle + (job >> level) % half, j = base + job % half;
    __syncthreads();  // the blocks are complete
    TileProduct<kColumns> sum;
    for (int m = j; i < chunk.side() && m < middle; ++m) {
      sum.template add<3>(lower_tile(chunk.tiles, i, m), kTilePitch, 1, lower_tile(chunk.tiles, m, j) + first,
                          kTilePitch, 1);
    }
    __syncthreads();  // L21 has been read
    if (i < chunk.side()) store_tile(sum, lower_tile(chunk.tiles, i, j) + first, 1.0f);
    __syncthreads();
    TileProduct<kColumns> product;
    for (int m = middle; i < chunk.side() && m <= i; ++m) {
      product.template add<3>(lower_tile(chunk.tiles, i, m), kTilePitch, 1, lower_tile(chunk.tiles, m, j) + first,
                              kTilePitch, 1);
    }
    __syncthreads();  // L21 W11 has been read
    if (i < chunk.side()) store_tile(product, lower_tile(chunk.tiles, i, j) + first, -1.0f);
  }
  __syncthreads();
  // A^-1[i][j] = sum_m W[m][i]^T W[m][j], a warp a tile, as many rows at once as there are warps for.
  CO_NO_UNROLL
  for (int begin = 0, last; !kTriangular && begin < chunk.side(); begin = last) {
    int tiles = 0;
    for (last = begin; last < chunk.side() && tiles + last + 1 <= kWarps; ++last) tiles += last + 1;
    int i = begin, j = warp;
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
