// Rows of G times A^-1 in bfloat16 planes, for chunks of up to 128 units.
//
// A^-1 is split once a chunk, in three planes in the order in which ldmatrix wants them (make_planes).  G is split as
// it comes: float32 in three planes, whose six products have float32's accuracy; float16 in two, which hold it exactly;
// bfloat16 is its own only plane, and two planes of A^-1 serve both 16-bit types.  With `tf32` float32 takes two planes
// and three products.  On sm_90a the four warps of a warpgroup multiply 64 rows together and take A^-1 from shared
// memory themselves (wgmma); elsewhere every warp loads it (ldmatrix, mma).  Where float32 accuracy is asked for, the
// products of 16 units go into sums of their own, because tensor cores cut what they add up toward zero and a long sum
// in them drifts.
#pragma once

#include "cuda/precondition/gradient_rows.cuh"

namespace consistency_ops {

constexpr int kWarpColumns = 128;

// Where a matrix instruction of 16 bits wants unit `p` of a tile: lane t = lane % 4 brings the units 4 t to 4 t + 3 of
// every 16, and the instruction takes the first two of each lane before the last two.  Pairs stay pairs.
CO_DEVICE int plane_place(int p) { return (p & ~15) | (p & 2) << 2 | (p & 12) >> 1 | (p & 1); }

// Element (row, column) of a plane of a tile: rows of 64 bytes, whose four vectors are turned so that eight rows of a
// column of vectors lie in 32 banks.
CO_DEVICE int plane_offset(int row, int column) { return row * kTile + ((column / 8 ^ row / 2 % 4) * 8 | column % 8); }

// All threads of a CTA of 256; begins with a barrier, and the planes may be read after the next one.  The lower tiles
// of A^-1, float32, become three bfloat16 planes each, in place: value = high + middle + low to 2^-26.  Planes are
// larger than tiles, so the second half of the tiles goes first, to where no tile of the first half lies.
CO_DEVICE void make_planes(const Chunk& chunk) {
  constexpr int kMost = (kMaxPlaneTiles + 1) / 2;
  const int count = lower_tiles(chunk.side()), row = fresh_thread() / 16, column = fresh_thread() % 16 * 2;
  uint16_t* const planes = reinterpret_cast<uint16_t*>(chunk.tiles);
  CO_NO_UNROLL
  for (int half = 1; half >= 0; --half) {
    const int first = half == 1 ? count / 2 : 0, tiles = half == 1 ? count - count / 2 : count / 2;
    float value[kMost][2][2];
    CO_UNROLL
    for (int i = 0; i < kMost; ++i) {
      if (i >= tiles) continue;
      CO_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float* from = chunk.tiles + (first + i) * kTileFloats + (r * 16 + row) * kTilePitch + column;
        value[i][r][0] = from[0];
        value[i][r][1] = from[1];
      }
    }
    __syncthreads();  // the tiles have been read, also by those who copied them
    CO_UNROLL
    for (int i = 0; i < kMost; ++i) {
      if (i >= tiles) continue;
      CO_UNROLL
      for (int r = 0; r < 2; ++r) {
        uint16_t* to = planes + (first + i) * kPlaneTile + plane_offset(r * 16 + plane_place(row), plane_place(column));
        float rest[2] = {value[i][r][0], value[i][r][1]};
        CO_UNROLL
        for (int p = 0; p < kPlanes; ++p, to += kTile * kTile) {
          const uint32_t pair = pack_bfloat16(rest[0], rest[1]);
          *reinterpret_cast<uint32_t*>(to) = pair;
          rest[0] -= __uint_as_float(pair << 16);
          rest[1] -= __uint_as_float(pair & 0xffff0000u);
        }
      }
    }
  }
  publish_to_warpgroups();
}

// left[p] <- plane p of the units of both rows, as the left operand of a product of 16 units.
template <DType kType, int kLeft>
CO_DEVICE void split_rows(const FourUnits<RawOf<kType>> (&raw)[2], const Chunk& chunk, uint32_t (&left)[kLeft][4]) {
  CO_UNROLL
  for (int r = 0; r < 2; ++r) {
    if constexpr (kLeft == 1) {
      // A zero that the compiler does not know: it would put the words in order anew before every product.
      left[0][r] = raw[r].word[0] ^ static_cast<uint32_t>(chunk.scratch.failed_minor);
      left[0][r + 2] = raw[r].word[1] ^ static_cast<uint32_t>(chunk.scratch.failed_minor);
    } else {
      float rest[4];
      CO_UNROLL
      for (int i = 0; i < 4; ++i) rest[i] = raw[r].get(kType, i);
      CO_UNROLL
      for (int p = 0; p < kLeft; ++p) {
        CO_UNROLL
        for (int pair = 0; pair < 2; ++pair) {
          const uint32_t bits = left[p][r + 2 * pair] = pack_bfloat16(rest[2 * pair], rest[2 * pair + 1]);
          rest[2 * pair] -= __uint_as_float(bits << 16);
          rest[2 * pair + 1] -= __uint_as_float(bits & 0xffff0000u);
        }
      }
    }
  }
}

// Calls f(tile, half, planes) for every 16 units of a warp's 16 rows of G, which are loaded kAhead such steps before.
template <int kLeft, int kAhead, int kWarps, DType kType, bool kWhitens, typename F>
CO_DEVICE void walk_rows(const LaneRows<kWarps, kType, kWhitens>& rows, const Chunk& chunk, int side, F&& f) {
  const int t = fresh_thread() % 4;
  FourUnits<RawOf<kType>> raw[kAhead > 0 ? kAhead : 1][2];
  CO_UNROLL
  for (int i = 0; i < kAhead; ++i) rows.load(16 * i + 4 * t, raw[i]);
  CO_NO_UNROLL
  for (int k = 0; k < side; ++k) {
    CO_UNROLL
    for (int s = 0; s < 2; ++s) {
      constexpr int kPlaces = kAhead > 0 ? kAhead : 1;
      const int next = k * kTile + (s + kAhead) * 16;
      if (kAhead == 0) rows.load(next + 4 * t, raw[0]);
      uint32_t left[kLeft][4];
      split_rows<kType>(raw[s % kPlaces], chunk, left);
      if (kAhead > 0 && next < side * kTile) rows.load(next + 4 * t, raw[s % kPlaces]);
      f(k, s, left);
    }
  }
}

// sum[first], sum[first + 1] += 16 rows x 16 units times 16 columns of A^-1, whose planes begin at `tile`.  is_below:
// the tile lies on or below the diagonal, and its rows are the columns of the product; else it is read transposed.
template <int kLevels, int kLeft>
CO_DEVICE void multiply_planes_16(float (&sum)[2][4], const uint32_t (&left)[kLeft][4], const uint16_t* tile,
                                  bool is_below) {
  constexpr bool kApart = kLevels == 3;  // float32-accurate; what has fewer planes is not by far
  float term[2][4] = {};
  CO_UNROLL
  for (int q = kLevels - 1; q >= 0; --q) {  // the plane of A^-1; small products first
    uint32_t right[4];
    if (is_below) {
      load_matrices(right, tile + q * kTile * kTile);
    } else {
      load_matrices_transposed(right, tile + q * kTile * kTile);
    }
    CO_UNROLL
    for (int p = kLeft - 1; p >= 0; --p) {
      if (p + q >= kLevels) continue;
      CO_UNROLL
      for (int n = 0; n < 2; ++n) {
        mma_m16n8k16<true>(kApart ? term[n] : sum[n], left[p], right[2 * n], right[2 * n + 1]);
      }
    }
  }
  CO_UNROLL
  for (int n = 0; kApart && n < 2; ++n) add(sum[n], term[n]);
}

// sum <- 16 rows of G times A^-1, by its planes.  kLeft planes of G; products of planes whose numbers add up to less
// than kLevels.  sum[m][n][i] belongs to row i / 2 of the lane's two and to position 16 m + 4 t + 2 n + i % 2.
template <int kLeft, int kLevels, int kWarps, DType kType, bool kWhitens>
CO_DEVICE void multiply_planes(float (&sum)[8][2][4], const LaneRows<kWarps, kType, kWhitens>& rows,
                               const Chunk& chunk) {
  constexpr int kAhead = kLevels == 3 ? 0 : kType == DType::kFloat32 ? 1 : 2;  // three planes leave no registers
  walk_rows<kLeft, kAhead>(rows, chunk, chunk.side(), [&](int k, int s, const uint32_t (&left)[kLeft][4]) {
    const int lane = fresh_thread() % 32, side = chunk.side();
    const uint16_t* const planes = reinterpret_cast<const uint16_t*>(chunk.tiles);
    // Matrices 0 to 3 of ldmatrix: columns 0 and units 0, columns 0 and units 8, columns 8 and units 0, and both 8.
    const uint16_t* const below = planes + plane_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8);
    const uint16_t* const above = planes + plane_offset(lane / 8 % 2 * 8 + lane % 8, lane / 16 * 8);
    // The second 16 units of a tile, or columns: in a row the vectors that lie two further, or back.
    const int below_16 = (lane / 2 % 4 ^ lane / 8 % 2) < 2 ? 16 : -16,
              above_16 = (lane / 2 % 4 ^ lane / 16) < 2 ? 16 : -16;
    const Triangle triangle = triangle_of<kWhitens>(chunk.task.mode);
    CO_UNROLL
    for (int n = 0; n < kWarpColumns / kTile; ++n) {
      if (n >= side || is_zero(triangle, k, n)) continue;
      const bool is_below = reads_below(triangle, k, n);
      const int tile = (is_below ? lower_tiles(n) + k : lower_tiles(k) + n) * kPlaneTile;
      CO_UNROLL
      for (int b = 0; b < 2; ++b) {
        if (n == k && is_zero(triangle, s, b)) continue;
        multiply_planes_16<kLevels>(sum[2 * n + b], left,
                                    is_below ? below + (s == 0 ? 0 : below_16) + tile + b * 16 * kTile
                                             : above + (b == 0 ? 0 : above_16) + tile + s * 16 * kTile,
                                    is_below);
      }
    }
  });
}

// d = or += 64 rows x 16 units times 32 columns of A^-1, whose planes begin at `tile`.  Begin and end stand with the
// products between two branches, or the compiler waits after every single one.
template <bool kTransposed, int kLevels, int kLeft>
CO_DEVICE void multiply_planes_32(float (&d)[16], const uint32_t (&left)[kLeft][4], const uint16_t* tile, bool adds) {
  begin_warpgroup_products();
  CO_UNROLL
  for (int q = kLevels - 1; q >= 0; --q) {  // the plane of A^-1; small products first
    CO_UNROLL
    for (int p = kLeft - 1; p >= 0; --p) {
      if (p + q >= kLevels) continue;
      wgmma_m64n32k16<kTransposed>(d, left[p], tile + q * kTile * kTile, adds || q + 1 < kLevels);
    }
  }
  end_warpgroup_products();
}

// The same as multiply_planes by the four warps of a warpgroup, which take A^-1 from shared memory themselves.
template <int kLeft, int kLevels, int kWarps, DType kType, bool kWhitens>
CO_DEVICE void multiply_planes_together(float (&sum)[8][2][4], const LaneRows<kWarps, kType, kWhitens>& rows,
                                        const Chunk& chunk) {
  constexpr bool kApart = kLevels == 3;  // as in multiply_planes_16
  constexpr int kAhead = kType == DType::kFloat32 ? 1 : 2;
  // The compiler must know that no warp goes a way of its own here, or it puts the products one after the other.
  const int side = __shfl_sync(0xffffffffu, chunk.side(), 0);
  const auto triangle =
      static_cast<Triangle>(__shfl_sync(0xffffffffu, static_cast<int>(triangle_of<kWhitens>(chunk.task.mode)), 0));
  const uint16_t* const planes = reinterpret_cast<const uint16_t*>(chunk.tiles);
  walk_rows<kLeft, kAhead>(rows, chunk, side, [&](int k, int s, const uint32_t (&left)[kLeft][4]) {
    CO_UNROLL
    for (int n = 0; n < kWarpColumns / kTile; ++n) {
      if (n >= side || is_zero(triangle, k, n)) continue;
      float term[16];
      float (&total)[16] = reinterpret_cast<float (&)[16]>(sum[2 * n]);
      float (&target)[16] = kApart ? term : total;
      if (reads_below(triangle, k, n)) {
        multiply_planes_32<false, kLevels>(target, left, planes + (lower_tiles(n) + k) * kPlaneTile + s * 16, !kApart);
      } else {
        multiply_planes_32<true, kLevels>(target, left, planes + (lower_tiles(k) + n) * kPlaneTile + s * 16 * kTile,
                                          !kApart);
      }
      CO_UNROLL
      for (int i = 0; kApart && i < 16; ++i) add_now(total[i], term[i]);
    }
  });
}

// The same, whichever way the device has.
template <int kLeft, int kLevels, int kWarps, DType kType, bool kWhitens>
CO_DEVICE void multiply_by_planes(float (&sum)[8][2][4], const LaneRows<kWarps, kType, kWhitens>& rows,
                                  const Chunk& chunk) {
  if (by_warpgroups(chunk.task.warpgroups)) {
    multiply_planes_together<kLeft, kLevels>(sum, rows, chunk);
  } else {
    multiply_planes<kLeft, kLevels>(sum, rows, chunk);
  }
}

}  // namespace consistency_ops
