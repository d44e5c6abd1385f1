// The one matrix product of the factorisation, the inverse and the correction: 32 x 32 (or 32 x 16) by one warp.
#pragma once

#include "cuda/precondition/chunk.cuh"

namespace consistency_ops {

// One warp.  sum += A B over 32 k, by TF32 tensor cores.  Three products are float32-accurate (high high + high low +
// low high); two, where A has 16-bit numbers, which are TF32 numbers already; one rounds both.
//
// An mma sums over k in any order that both operands agree on.  Here the lanes with t = lane % 4 take k = 8 t + 2 s and
// the next one in step s, so every load of a tile, whose pitch is 1 modulo 32, lies in 32 banks, along rows and along
// columns, and so does every load of G, whose pitch is odd.
template <int kColumns>
struct TileProduct {
  static constexpr int kBlocks = kColumns / 8;
  float sum[2][kBlocks][4] = {};

  // A(r, k) = a[r * row_a + k * inner_a], B(k, c) = b[k * inner_b + c * column_b].  Of A only `rows`, a power of two
  // and at least 8, are read; they come again in the rows of the sum behind them.
  template <int kProducts>
  CO_DEVICE void add(const float* a, int row_a, int inner_a, const float* b, int inner_b, int column_b,
                     int rows = kTile) {
    const int lane = fresh_thread() % 32, g = lane / 4, t = lane % 4;
    a += g * row_a + 8 * t * inner_a;
    b += g * column_b + 8 * t * inner_b;
    CO_NO_UNROLL
    for (int step = 0; step < 4; ++step) {
      float left[2][4], left_low[2][4];
      CO_UNROLL
      for (int m = 0; m < 2; ++m) {
        CO_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float value = a[((m * 16 + i % 2 * 8) & (rows - 1)) * row_a + i / 2 * inner_a];
          split<kProducts == 2>(value, kProducts, left[m][i], left_low[m][i]);
        }
      }
      CO_UNROLL
      for (int n = 0; n < kBlocks; ++n) {
        float right[2], right_low[2];
        CO_UNROLL
        for (int i = 0; i < 2; ++i) {
          const float value = b[i * inner_b + n * 8 * column_b];
          split<false>(value, kProducts, right[i], right_low[i]);
        }
        CO_UNROLL
        for (int m = 0; m < 2; ++m) {
          float term[4] = {};
          if (kProducts > 2) mma_m16n8k8_tf32(term, left_low[m], right);
          if (kProducts > 1) mma_m16n8k8_tf32(term, left[m], right_low);
          mma_m16n8k8_tf32(term, left[m], right);
          consistency_ops::add(sum[m][n], term);
        }
        keep_order();
      }
      a += 2 * inner_a;
      b += 2 * inner_b;
    }
  }

  // Calls f(row, column, element).
  template <typename F>
  CO_DEVICE void for_each(F&& f) {
    const int lane = fresh_thread() % 32;
    CO_UNROLL
    for (int m = 0; m < 2; ++m) {
      CO_UNROLL
      for (int n = 0; n < kBlocks; ++n) {
        CO_UNROLL
        for (int i = 0; i < 4; ++i) {
          f(m * 16 + i / 2 * 8 + lane / 4, n * 8 + lane % 4 * 2 + i % 2, sum[m][n][i]);
        }
      }
    }
  }

 private:
  template <bool kExact>
  static CO_DEVICE void split(float value, int products, float& high, float& low) {
    const SplitFloat parts(value);
    high = kExact ? value : products == 1 ? to_tf32(value) : parts.high;
    low = parts.low;
  }
};

}  // namespace consistency_ops
