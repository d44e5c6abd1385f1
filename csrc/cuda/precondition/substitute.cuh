// Solving with the factor that factor.cuh leaves in shared memory: B^T <- B^T L^-T L^-1, 32 right-hand sides at a time.
//
// The correction multiplies by the explicit inverse instead, whose result is as near to the exact one but leaves a
// residual of eps cond; only substitution keeps LAPACK's ratio of the residual, and spd_solve is held to it.
#pragma once

#include "cuda/precondition/factor.cuh"

namespace consistency_ops {

// One thread a row of one diagonal tile: row <- row L^-1.  solve_row from the other end.
CO_DEVICE void solve_row_backward(float* row, const float* factor, const float* inverse_pivot) {
  float x[kTile];
  CO_UNROLL
  for (int j = kTile - 1; j >= 0; --j) {
    float sum = row[j];
    CO_UNROLL
    for (int m = kTile - 1; m > j; --m) sum -= x[m] * factor[m * kTilePitch + j];
    x[j] = sum * inverse_pivot[j];
  }
  CO_UNROLL
  for (int j = 0; j < kTile; ++j) row[j] = x[j];
}

CO_DEVICE void subtract_from(float* tile, TileProduct<kTile>& product) {
  product.for_each([&](int row, int column, float sum) { tile[row * kTilePitch + column] -= sum; });
}

// All threads, after a barrier; ends with one.  rows: `side` tiles; row r of tile k has elements 32 k .. of right-hand
// side r.
template <int kWarps>
CO_DEVICE void substitute(const Chunk& chunk, float* rows) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, side = chunk.side();
  CO_NO_UNROLL
  for (int k = 0; k < side; ++k) {
    float* mine = rows + k * kTileFloats;
    if (warp == 0) {
      solve_row(mine + lane * kTilePitch, lower_tile(chunk.tiles, k, k), chunk.scratch.inverse_pivot + k * kTile);
    }
    __syncthreads();
    for (int j = k + 1 + warp; j < side; j += kWarps) {
      TileProduct<kTile> product;
      product.template add<3>(mine, kTilePitch, 1, lower_tile(chunk.tiles, j, k), 1, kTilePitch);
      subtract_from(rows + j * kTileFloats, product);
    }
    __syncthreads();
  }
  CO_NO_UNROLL
  for (int k = side - 1; k >= 0; --k) {
    float* mine = rows + k * kTileFloats;
    if (warp == 0) {
      solve_row_backward(mine + lane * kTilePitch, lower_tile(chunk.tiles, k, k),
                         chunk.scratch.inverse_pivot + k * kTile);
    }
    __syncthreads();
    for (int j = warp; j < k; j += kWarps) {
      TileProduct<kTile> product;
      product.template add<3>(mine, kTilePitch, 1, lower_tile(chunk.tiles, k, j), kTilePitch, 1);
      subtract_from(rows + j * kTileFloats, product);
    }
    __syncthreads();
  }
}

}  // namespace consistency_ops
