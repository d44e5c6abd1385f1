// Factor and inverse of one chunk of up to 128 units at once: tiles <- A^-1 in one pass over its pivots.
//
// Eight pivots are a panel.  When panel P is done, the symmetric matrix M of a chunk holds, by rows i and columns c
//
//   behind P, i and c        what is left of A:  A - L L^T
//   i behind P, c before it  what is left of L W = I, from which the next rows of W = L^-1 come:  -L W
//   before P, i and c        A^-1 as far as it goes, the sum of W^T W over the rows of W so far
//
// and a panel changes all three by one rule, M -= or += Z Z^T.  Row i of Z is L[i, P] behind the panel and W[P, i]
// before it and in it, and both solve the same triangular system: with the panel's own block of A (8 x 8), from M[i, P]
// or M[P, i], its "cross".  The sum is added where row i is in the panel or before it, else subtracted, and what the
// cross held is used up.
//
// Two groups of four warps work side by side, as far from one another as the data allow.
//
//   pivot warps    A thread an index.  All factor the panel's block alike, each in its own registers, so that a pivot
//                  waits for the one before it only: a root and two products.  Then Z.  The cross of the next panel
//                  gets the products of this one here.  They also hold the diagonal of M in blocks of 16.
//   update warps   hold the rest of M in registers, 14 blocks of 16 x 8 each, and add Z Z^T.  They give the cross of
//                  the panel after the next one away, so they may be a whole panel behind.  What they gave away they
//                  change once more, and clear it then.
//
// Z is split in TF32 numbers once, by whom it comes from.  Products of Z are three TF32 products, which is float32
// accuracy, and four where they become the next panel, because its pivots pass their error on to all that follows.  The
// factor of a panel's block is float32 FMA.  What the whole costs by the model: docs/developer/kernel-model.md.
#pragma once

#include <type_traits>

#include "cuda/precondition/factor.cuh"

namespace consistency_ops {

constexpr int kPanel = 8;       // pivots
constexpr int kGroup = 128;     // threads of the pivot warps, and of the update warps
constexpr int kMaxSweep = 128;  // units

// Named barriers of the sweep; 0 is that of __syncthreads.  Two of a kind in turn: who arrives may be one panel ahead.
enum SweepBarrier { kFactorsReady = 1, kCrossReady = 3, kPivotWarps = 5 };

struct alignas(8) FloatPair {
  float v[2];
};
// The cross: a matrix of 8 columns in shared memory has rows of 32 bytes, whose halves are exchanged in every other
// four, so that a thread a row reads them, and the lanes of an mma read and write them, without bank conflicts.  Where
// element k of row i lies:
CO_DEVICE int panel_place(int i, int k) { return i * kPanel + (k ^ (i & 4)); }

CO_DEVICE FloatPair& pair_at(float* matrix, int i, int k) {
  return *reinterpret_cast<FloatPair*>(matrix + panel_place(i, k));
}

// Two neighbouring numbers of a row of Z in two TF32 numbers each: a lane's part of the right operand of an mma, k = 2
// t and 2 t + 1 of column g.
struct alignas(16) RightFactor {
  float high[2], low[2];
};
// Z lies so in shared memory: 64 bytes a row, whose quarters are exchanged from one pair of rows to the next, again
// against bank conflicts.  Where columns 2 t and 2 t + 1 of row i lie; that of row i + 8 lies 32 further.
CO_DEVICE RightFactor& factor_at(RightFactor* factors, int i, int t) { return factors[i * 4 + (t ^ (i / 2 & 3))]; }

CO_DEVICE void store_factors(RightFactor* factors, int i, const float (&z)[kPanel]) {
  CO_UNROLL
  for (int t = 0; t < 4; ++t) {
    const SplitFloat first(z[2 * t]), second(z[2 * t + 1]);
    factor_at(factors, i, t) = {{first.high, second.high}, {first.low, second.low}};
  }
}

// Of the left operand: k = 2 t and 2 t + 1 of rows g and g + 8, each times a sign.  That is also what brings the
// numbers to the registers where an mma wants them; copies would cost the same.
struct LeftFactor {
  float high[4], low[4];
  CO_DEVICE LeftFactor() {}
  CO_DEVICE LeftFactor(const RightFactor& upper, float upper_sign, const RightFactor& lower, float lower_sign) {
    CO_UNROLL
    for (int i = 0; i < 2; ++i) {
      high[2 * i] = upper_sign * upper.high[i];
      high[2 * i + 1] = lower_sign * lower.high[i];
      low[2 * i] = upper_sign * upper.low[i];
      low[2 * i + 1] = lower_sign * lower.low[i];
    }
  }
};

// sum += left right, float32-accurate.
CO_DEVICE void multiply(float (&sum)[4], const LeftFactor& left, const RightFactor& right) {
  mma_m16n8k8_tf32(sum, left.low, right.high);
  mma_m16n8k8_tf32(sum, left.high, right.low);
  mma_m16n8k8_tf32(sum, left.high, right.high);
}

// Where the sweep's groups meet, in shared memory: two of a kind, for panels in turn.
struct SweepExchange {
  float cross[2][kMaxSweep * kPanel];
  RightFactor factors[2][kMaxSweep * 4];
};
static_assert(sizeof(SweepExchange) == kSweepFloats * sizeof(float), "planned for");

// z <- this thread's row of Z, from its row of the cross.  Every thread factors the panel's block for itself.
//
// The quick way takes roots from an instruction that is good to 2^-22.9 and wants normal numbers.  The next pivot is
// made from such a root at once, so that it waits for nothing else; everything that stays is made from the root that
// one Newton step has repaired.  It says false where that was not near: no positive normal number, or a pivot that is
// as small as the rounding of what it was left from.  The careful way takes all positive ones, and says in `minor` the
// first that is not (NaN and infinity count), counted from 1.
template <bool kCareful>
CO_DEVICE bool panel_row(const float* cross, int first, int index, float (&z)[kPanel], int& minor) {
  float block[kPanel][kPanel];
  CO_UNROLL
  for (int j = 0; j < kPanel; ++j) {
    CO_UNROLL
    for (int k = 0; k <= j; k += 4) {
      const Float4 of_block = *reinterpret_cast<const Float4*>(cross + panel_place(first + j, k));
      CO_UNROLL
      for (int i = 0; i < 4 && k + i <= j; ++i) block[j][k + i] = of_block.v[i];
    }
  }
  const bool is_inside = index - index % kPanel == first;
  CO_UNROLL
  for (int k = 0; k < kPanel; k += 4) {
    const Float4 of_row = *reinterpret_cast<const Float4*>(cross + panel_place(index, k));
    CO_UNROLL
    for (int i = 0; i < 4; ++i) z[k + i] = !is_inside ? of_row.v[i] : index % kPanel == k + i ? 1.0f : 0.0f;
  }
  bool quick = true;
  float early = block[0][0];  // the next pivot, nearly
  CO_UNROLL
  for (int j = 0; j < kPanel; ++j) {
    const float pivot = block[j][j];
    float root;  // 1 / sqrt(pivot)
    if (kCareful) {
      if (minor == 0 && !(pivot > 0.0f && is_finite(pivot))) minor = j + 1;
      root = inverse_root(pivot);
    } else {
      const float y = inverse_root_approximately(early);
      if (j + 1 < kPanel) {
        const float below = block[j + 1][j] * y;
        early = fma(-below, below, block[j + 1][j + 1]);
      }
      const float rest = fma(-pivot * y, y, 1.0f);
      quick = quick && fabs(rest) < 0x1p-6f;
      root = fma(0.5f * y, rest, y);
    }
    CO_UNROLL
    for (int m = j + 1; m < kPanel; ++m) block[m][j] *= root;
    z[j] *= root;
    CO_UNROLL
    for (int m = j + 1; m < kPanel; ++m) {
      CO_UNROLL
      for (int i = m; i < kPanel; ++i) block[i][m] = fma(-block[i][j], block[m][j], block[i][m]);
      z[m] = fma(-z[j], block[m][j], z[m]);
    }
  }
  return quick;
}

// A block of 16 x 16 on the diagonal of M in the registers of a pivot warp, which has these rows of Z at hand: three
// blocks of 8 x 8, of which a lane has {M[g][2t], M[g][2t + 1]}.
struct DiagonalBlock {
  float first[2] = {}, below[2] = {}, last[2] = {};

  CO_DEVICE void load(const float* tile, int g, int t) {
    CO_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float* const at = tile + g * kTilePitch + 2 * t + e;
      first[e] = at[0];
      below[e] = at[8 * kTilePitch];
      last[e] = at[8 * kTilePitch + 8];
    }
  }
  CO_DEVICE void store(float* tile, int g, int t) const {
    CO_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int c = 2 * t + e;
      tile[(8 + g) * kTilePitch + c] = tile[c * kTilePitch + 8 + g] = below[e];
      if (g < c) continue;
      tile[g * kTilePitch + c] = tile[c * kTilePitch + g] = first[e];
      tile[(8 + g) * kTilePitch + 8 + c] = tile[(8 + c) * kTilePitch + 8 + g] = last[e];
    }
  }
  // M -= or += Z Z^T of panel p, where `terms` are, with their sign, the products of these rows of Z with the first and
  // last eight of them, which are the eight-th and next eight of all.  The next panel's are used up already.
  CO_DEVICE void update(const float (&terms)[2][4], int eight, int p) {
    CO_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float upper = terms[0][e], lower = terms[0][2 + e], corner = terms[1][2 + e];
      if (eight != p + 1) first[e] += upper;
      if (eight != p + 1 && eight != p) below[e] += lower;
      if (eight != p) last[e] += corner;
    }
  }
  // To the cross of panel `next`, which is the first or the last eight of these rows.
  CO_DEVICE void give(float* cross, int eight, int next, int g, int t) {
    const bool is_first = eight == next;
    pair_at(cross, eight * kPanel + g, 2 * t) = {is_first ? first[0] : 0.0f, is_first ? first[1] : 0.0f};
    pair_at(cross, (eight + 1) * kPanel + g, 2 * t) = {is_first ? below[0] : last[0], is_first ? below[1] : last[1]};
    CO_UNROLL
    for (int e = 0; e < 2; ++e) {
      below[e] = 0.0f;
      (is_first ? first[e] : last[e]) = 0.0f;
    }
  }
};

// The pivot warps.
CO_DEVICE void sweep_pivots(const Chunk& chunk, SweepExchange& exchange) {
  const int padded = chunk.padded(), index = fresh_thread(), lane = index % 32, g = lane / 4, t = lane % 4;
  const bool has_row = index < padded;
  if (has_row) {  // the first two panels' cross, as the matrix has it
    CO_UNROLL
    for (int p = 0; p < 2; ++p) {
      const float* row = lower_tile(chunk.tiles, index / kTile, 0) + index % kTile * kTilePitch + p * kPanel;
      CO_UNROLL
      for (int k = 0; k < kPanel; k += 4) {
        Float4 four;
        CO_UNROLL
        for (int i = 0; i < 4; ++i) four.v[i] = index < p * kPanel ? 0.0f : row[k + i];
        *reinterpret_cast<Float4*>(exchange.cross[p] + panel_place(index, k)) = four;
      }
    }
  }
  DiagonalBlock diagonal[2];
  const auto of_tile = [&](int m) {  // found twice: no register is left to keep it in
    const int i = fresh_thread() / kTile;
    return lower_tile(chunk.tiles, i, i) + m * 16 * (kTilePitch + 1);
  };
  CO_UNROLL
  for (int m = 0; m < 2; ++m) {  // of the first 16 rows all is in the cross of the first two panels
    if (has_row && index - lane + m > 0) diagonal[m].load(of_tile(m), g, t);
  }
  int failed_minor = 0;
  float term[2][2][4] = {};  // what `diagonal` still gets of the last panel
  const auto multiply_own = [&](int m, const LeftFactor& left, const RightFactor(&own)[2]) {
    CO_UNROLL
    for (int n = 0; n < 2; ++n) {
      CO_UNROLL
      for (int i = 0; i < 4; ++i) term[m][n][i] = 0.0f;
      multiply(term[m][n], left, own[n]);
    }
  };
  const int panels = padded / kPanel, eight = index / kTile * 4;
  CO_NO_UNROLL
  for (int p = 0; p < panels; ++p) {
    const int first = p * kPanel;
    RightFactor* const factors = exchange.factors[p % 2];
    float* const cross = exchange.cross[(p + 1) % 2];  // of the next panel
    barrier_sync(kPivotWarps, kGroup);
    CO_UNROLL
    for (int m = 0; m < 2; ++m) diagonal[m].update(term[m], eight + 2 * m, p - 1);
    if (has_row) {
      float z[kPanel];
      int minor = 0;
      if (!panel_row<false>(exchange.cross[p % 2], first, index, z, minor)) {
        panel_row<true>(exchange.cross[p % 2], first, index, z, minor);
        if (failed_minor == 0 && minor != 0) failed_minor = first + minor;
      }
      store_factors(factors, index, z);
    }
    barrier_arrive(kFactorsReady + p % 2, 2 * kGroup);
    if (p + 1 == panels) break;
    if (p == 0) {  // the cross of the second panel is there
      barrier_sync(kPivotWarps, kGroup);
    } else {
      CO_UNROLL
      for (int m = 0; m < 2; ++m) {
        const int of_block = eight + 2 * m;
        if (has_row && (of_block == p + 1 || of_block == p)) diagonal[m].give(cross, of_block, p + 1, g, t);
      }
      barrier_sync(kCrossReady + (p + 1) % 2, 2 * kGroup);
    }
    if (!has_row) continue;
    const RightFactor right = (&factor_at(factors, g, t))[(p + 1) * 32];
    const RightFactor* const mine = &factor_at(factors, index - lane + g, t);
    FloatPair* const my_cross = &pair_at(cross, index - lane + g, 2 * t);
    RightFactor own[2][2];
    FloatPair rest[2][2];
    float sign[2][2];  // of the sum's terms; the cross is what rows behind p lose
    LeftFactor left[2];
    CO_UNROLL
    for (int m = 0; m < 2; ++m) {
      CO_UNROLL
      for (int r = 0; r < 2; ++r) {
        own[m][r] = mine[(2 * m + r) * 32];
        rest[m][r] = my_cross[(2 * m + r) * 32];
        sign[m][r] = eight + 2 * m + r > p ? -1.0f : 1.0f;
      }
      left[m] = LeftFactor(own[m][0], sign[m][0], own[m][1], sign[m][1]);
    }
    float high[2][4] = {}, low[2][4] = {}, other[2][4] = {};
    CO_UNROLL
    for (int m = 0; m < 2; ++m) {
      mma_m16n8k8_tf32(low[m], left[m].low, right.high);
      mma_m16n8k8_tf32(other[m], left[m].low, right.low);
      mma_m16n8k8_tf32(other[m], left[m].high, right.low);
      mma_m16n8k8_tf32(high[m], left[m].high, right.high);
    }
    CO_UNROLL
    for (int m = 0; m < 2; ++m) {
      CO_UNROLL
      for (int r = 0; r < 2; ++r) {
        FloatPair& pair = rest[m][r];
        CO_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int i = 2 * r + e;
          const float nearly = fma(-sign[m][r], high[m][i], pair.v[e]);  // exact where a pivot almost vanishes
          pair.v[e] = fma(-sign[m][r], low[m][i] + other[m][i], nearly);
        }
        my_cross[(2 * m + r) * 32] = pair;
      }
      multiply_own(m, left[m], own[m]);
    }
  }
  if (has_row) {  // the last panel
    __syncwarp();
    const RightFactor* const mine = &factor_at(exchange.factors[(panels - 1) % 2], index - lane + g, t);
    CO_UNROLL
    for (int m = 0; m < 2; ++m) {
      const RightFactor own[2] = {mine[2 * m * 32], mine[(2 * m + 1) * 32]};
      multiply_own(m, LeftFactor(own[0], 1.0f, own[1], 1.0f), own);
      diagonal[m].update(term[m], eight + 2 * m, panels - 1);
      diagonal[m].store(of_tile(m), g, t);
    }
  }
  if (index == 0) chunk.scratch.failed_minor = failed_minor;
}

// 16 rows of M, the kRow-th, in the registers of one update warp: blocks of 16 x 8 up to the diagonal, of which lane
// 4 g + t has {M[g][2t], M[g][2t + 1], M[g + 8][2t], M[g + 8][2t + 1]}.
template <int kRow>
struct SweepRows {
  static constexpr int kColumns = 2 * kRow;
  float sum[kColumns > 0 ? kColumns : 1][4] = {};

  // Half of the lanes take the lower of their two rows first, because those lie in other banks: 2 and 3 passes, not 4.
  template <typename F>
  CO_DEVICE static void for_each(const Chunk& chunk, F&& f) {
    const int lane = fresh_thread() % 32, g = lane / 4, t = lane % 4;
    float* const tiles = lower_tile(chunk.tiles, kRow / 2, 0) + kRow % 2 * 16 * kTilePitch + 2 * t;
    const bool upper_first = g % 4 < 2;
    float* const first = tiles + (upper_first ? g : g + 8) * kTilePitch;
    float* const second = tiles + (upper_first ? g + 8 : g) * kTilePitch;
    CO_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const int offset = c / 4 * kTileFloats + c % 4 * kPanel;
      CO_UNROLL
      for (int e = 0; e < 2; ++e) f(upper_first, c, e, first[offset + e], second[offset + e]);
    }
  }

  CO_DEVICE void load(const Chunk& chunk) {
    for_each(chunk, [&](bool upper_first, int c, int e, float& first, float& second) {
      if (c < 2) return;  // the first two panels' cross is with the pivot warps
      const float a = first, b = second;
      sum[c][e] = upper_first ? a : b;
      sum[c][2 + e] = upper_first ? b : a;
    });
  }

  CO_DEVICE void store(const Chunk& chunk) {
    for_each(chunk, [&](bool upper_first, int c, int e, float& first, float& second) {
      first = upper_first ? sum[c][e] : sum[c][2 + e];
      second = upper_first ? sum[c][2 + e] : sum[c][e];
    });
    if (kRow % 2 == 0) return;
    const int lane = fresh_thread() % 32, g = lane / 4, t = lane % 4;  // the other half of a diagonal tile
    float* const tile = lower_tile(chunk.tiles, kRow / 2, kRow / 2) + 2 * t * kTilePitch + 16 + g;
    CO_UNROLL
    for (int c = 0; c < 2; ++c) {
      CO_UNROLL
      for (int i = 0; i < 4; ++i) {
        tile[(c * 8 + i % 2) * kTilePitch + i / 2 * 8] = sum[kRow == 0 ? 0 : 2 * kRow - 2 + c][i];
      }
    }
  }

  // M += Z Z^T of panel p in the rows before its end, M -= Z Z^T behind it.  `mine` is this lane's part of the first
  // eight rows of Z.  Two columns at a time do not wait for one another.
  // `padded` units of the chunk, which reach behind every column here: asking parts the loop in pieces, over which the
  // compiler does not spread the operands of later products, whose registers it does not have.
  CO_DEVICE void update(const RightFactor* mine, int p, int padded) {
    if (kColumns == 0) return;
    const LeftFactor left(mine[2 * kRow * 32], 2 * kRow > p ? -1.0f : 1.0f, mine[(2 * kRow + 1) * 32],
                          2 * kRow + 1 > p ? -1.0f : 1.0f);
    CO_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      if (c % 2 == 0 && c * kPanel >= padded) break;
      const RightFactor right = mine[c * 32];
      float term[4] = {};
      multiply(term, left, right);
      add(sum[c], term);
    }
  }

  // What belonged to the cross of panel kNext has been used up; the panel before has changed it, which counts for
  // nothing.
  template <int kNext>
  CO_DEVICE void clear() {
    CO_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      CO_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (c == kNext || 2 * kRow + i / 2 == kNext) sum[c][i] = 0.0f;
      }
    }
  }

  // The cross of panel kNext: its columns in the rows from it on, its rows in the columns before it.
  template <int kNext>
  CO_DEVICE void give(float* cross) {
    const int lane = fresh_thread() % 32, g = lane / 4, t = lane % 4;
    if constexpr (kNext < kColumns) {
      CO_UNROLL
      for (int r = 0; r < 2; ++r) {
        pair_at(cross, (2 * kRow + r) * kPanel + g, 2 * t) = {sum[kNext][2 * r], sum[kNext][2 * r + 1]};
      }
    }
    if constexpr (kNext / 2 == kRow) {
      CO_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        CO_UNROLL
        for (int e = 0; e < 2; ++e) {
          cross[panel_place(c * kPanel + 2 * t + e, g)] = c + 1 == kNext ? 0.0f : sum[c][kNext % 2 * 2 + e];
        }
      }
    }
  }
};

// f(std::integral_constant<int, n>) for n from kFirst to kLast: four branches for sixteen of them.
template <int kFirst, int kLast, typename F>
CO_DEVICE void for_constant(int n, F&& f) {
  if constexpr (kFirst == kLast) {
    f(std::integral_constant<int, kFirst>{});
  } else {
    constexpr int kMiddle = (kFirst + kLast) / 2;
    if (n <= kMiddle) {
      for_constant<kFirst, kMiddle>(n, f);
    } else {
      for_constant<kMiddle + 1, kLast>(n, f);
    }
  }
}

// Update warp kWarp, with the kWarp-th rows of M from above and from below of 128 units.
template <int kWarp>
CO_DEVICE void sweep_updates(const Chunk& chunk, SweepExchange& exchange) {
  const int panels = chunk.padded() / kPanel, lane = fresh_thread() % 32;
  const int padded = padded_units(*const_cast<const volatile int32_t*>(&chunk.task.size));  // nothing is known of it
  SweepRows<kWarp> upper;
  SweepRows<7 - kWarp> lower;
  const bool has_upper = 2 * kWarp < panels, has_lower = 2 * (7 - kWarp) < panels;
  if (has_upper) upper.load(chunk);
  if (has_lower) lower.load(chunk);
  CO_NO_UNROLL
  for (int p = 0; p < panels; ++p) {
    barrier_sync(kFactorsReady + p % 2, 2 * kGroup);
    const RightFactor* const mine = &factor_at(exchange.factors[p % 2], lane / 4, lane % 4);
    if (has_lower) lower.update(mine, p, padded);
    if (has_upper) upper.update(mine, p, padded);
    if (p + 1 == panels) break;
    for_constant<2, kMaxSweep / kPanel>(p + 2, [&](auto next) {
      constexpr int kNext = decltype(next)::value;
      if (has_lower) {
        lower.template give<kNext>(exchange.cross[p % 2]);
        lower.template clear<kNext - 1>();
      }
      if (has_upper) {
        upper.template give<kNext>(exchange.cross[p % 2]);
        upper.template clear<kNext - 1>();
      }
    });
    if (p + 2 < panels) barrier_arrive(kCrossReady + p % 2, 2 * kGroup);
  }
  if (has_upper) upper.store(chunk);
  if (has_lower) lower.store(chunk);
}

// All threads, 256.  tiles: A -> A^-1, whose diagonal tiles are complete and symmetric; failed_minor <- 0 or the order
// of the leading minor that is not positive definite, and then the tiles mean nothing.  `shared` has kSweepFloats.
// Ends with a barrier.
CO_DEVICE void factor_and_invert(const Chunk& chunk, float* shared) {
  __syncthreads();  // the matrix, and its last failed_minor has been read
  auto& exchange = *reinterpret_cast<SweepExchange*>(shared);
  if (fresh_thread() < kGroup) {
    sweep_pivots(chunk, exchange);
  } else {
    for_constant<0, 3>(fresh_thread() / 32 - kGroup / 32,
                       [&](auto warp) { sweep_updates<decltype(warp)::value>(chunk, exchange); });
  }
  __syncthreads();
}

}  // namespace consistency_ops
