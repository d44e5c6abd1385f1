// G[:, c] <- G[:, c] A_c^-1 for this CTA's part of the rows of G of one layer, in place.
//
// G never lies in shared memory.  A warp corrects 16 rows (gradient_rows.cuh): its lanes load four neighbouring units
// at a time, which are the operand of a matrix instruction as they come, because a product may sum over the units in
// any order that both operands agree on.  The sums of all columns stay in registers until the last unit has been read;
// then four neighbouring units are stored at a time.  So warps need no barrier, and the next units are on their way
// while the last ones are multiplied.
//
// Up to 128 units the products are those of plane_product.cuh.  Chunks above have no room for planes: 16 warps, of
// which two share their rows, multiply by TF32 tensor cores with both operands split as they are read.
//
// A row whose result has an element that is not finite in the gradient's own type is left as it was, in this chunk
// only.  Figures of the model: docs/developer/kernel-model.md.
#pragma once

#include "cuda/precondition/plane_product.cuh"

namespace consistency_ops {

// sum <- 16 rows of G times 128 columns of A^-1, of chunks above 128 units, by the float32 tiles.  kProducts: 3 for
// float32; 2 where G has 16 bits, which TF32 holds; 1 rounds both.  sum[m][n][i]: position 128 half + 16 m + 8 n + 2 t
// + i % 2.
template <int kProducts, int kWarps, DType kType, bool kWhitens>
CO_DEVICE void multiply_tiles(float (&sum)[8][2][4], const LaneRows<kWarps, kType, kWhitens>& rows, const Chunk& chunk,
                              int half) {
  const int lane = fresh_thread() % 32, g = lane / 4, t = lane % 4;
  const auto split = [](float value, float& high, float& low) {
    const SplitFloat parts(value);
    high = kProducts == 1 ? to_tf32(value) : parts.high;
    low = parts.low;
  };
  CO_NO_UNROLL
  for (int k = 0; k < 2 * chunk.side(); ++k) {  // 16 units
    const Triangle triangle = triangle_of<kWhitens>(chunk.task.mode);
    FourUnits<RawOf<kType>> now[2];  // not ahead: its registers are taken, and 16 warps wait in turn
    rows.load(k * 16 + 4 * t, now);
    CO_UNROLL
    for (int s = 0; s < 2; ++s) {  // two of every lane's four
      float left[4], left_low[4];
      CO_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float value = now[i % 2].get(kType, s * 2 + i / 2);
        split(value, left[i], left_low[i]);
        if (kProducts == 2) left[i] = value;
      }
      CO_UNROLL
      for (int n = 0; n < kWarpColumns / kTile; ++n) {
        const int column = half * (kWarpColumns / kTile) + n;
        if (column >= chunk.side() || is_zero(triangle, k / 2, column)) continue;
        const int unit = k % 2 * 16 + 4 * t + s * 2;
        const bool below = reads_below(triangle, k / 2, column);
        const float* tile = lower_tile(chunk.tiles, below ? column : k / 2, below ? k / 2 : column);
        const int by_unit = below ? 1 : kTilePitch, by_column = below ? kTilePitch : 1;
        tile += unit * by_unit + g * by_column;
        CO_UNROLL
        for (int b = 0; b < 4; ++b) {
          float right[2], right_low[2];
          split(tile[b * 8 * by_column], right[0], right_low[0]);
          split(tile[b * 8 * by_column + by_unit], right[1], right_low[1]);
          float term[4] = {};
          if (kProducts > 2) mma_m16n8k8_tf32(term, left_low, right);
          if (kProducts > 1) mma_m16n8k8_tf32(term, left, right_low);
          mma_m16n8k8_tf32(term, left, right);
          add(sum[2 * n + b / 2][b % 2], term);
        }
      }
    }
  }
}

// A result is written where it is smaller than this: it is finite in the gradient's own type, and no sum of tensor
// cores, which round toward zero, that stopped at the largest float32.
CO_DEVICE float written_below(DType dtype) {
  if (dtype == DType::kFloat32) return 0x1.fffff8p127f;
  return dtype == DType::kBFloat16 ? 0x1.ffp127f : 65520.0f;  // half-way to what rounds to infinity
}

// The bias gradient of a chunk that has its unit: every row of G has a copy of its output's, corrected like the row,
// and their mean goes back.  One thread adds the copies of an output with several taps, in the order of the rows.
template <bool kWhitens>
struct BiasCopies {
  CO_DEVICE static bool unwhitens(const Chunk& chunk) { return kWhitens && chunk.task.mode == Mode::kUnwhitens; }
  CO_DEVICE static float displacement(const PreconditionLayer& layer, const Chunk& chunk, int64_t at) {
    const float now = load_element(layer.bias_dtype, layer.bias_grad, at);
    return round_to(layer.bias_dtype, now - load_element(layer.bias_dtype, chunk.scratch.part.bias_before, at));
  }
  CO_DEVICE static void load(const PreconditionLayer& layer, const Chunk& chunk, int first) {
    const GradientPart& part = chunk.scratch.part;
    if (const int place = fresh_thread(); place < kRoundRows && first + place < part.end) {
      const int64_t at = (first + place) / part.taps * layer.bias_stride;
      chunk.scratch.bias_copies()[place] =
          unwhitens(chunk) ? displacement(layer, chunk, at) : load_element(layer.bias_dtype, layer.bias_grad, at);
    }
  }
  CO_DEVICE static void write(const PreconditionLayer& layer, const Chunk& chunk, int output, float value,
                              float (&squares)[2]) {
    const int64_t at = output * layer.bias_stride;
    if (unwhitens(chunk)) {
      value = round_to(layer.bias_dtype, value);
      add_square(squares[0], displacement(layer, chunk, at));
      add_square(squares[1], value);
      if (chunk.task.adds) value += load_element(layer.bias_dtype, chunk.scratch.part.bias_before, at);
    }
    store_element(layer.bias_dtype, layer.bias_grad, at, value);
  }
  CO_DEVICE static void store(const PreconditionLayer& layer, const Chunk& chunk, int first, float (&squares)[2]) {
    const int thread = fresh_thread(), taps = chunk.scratch.part.taps;
    const int count = min(kRoundRows, chunk.scratch.part.end - first);
    if (taps == 1) {
      if (thread >= count) return;
      write(layer, chunk, first + thread, chunk.scratch.bias_copies()[thread], squares);
    } else if (thread == 0) {
      float sum = chunk.scratch.bias_sum;  // of an output that began in the last round
      int tap = first % taps;
      for (int place = 0; place < count; ++place) {
        sum = (tap == 0 ? 0.0f : sum) + chunk.scratch.bias_copies()[place];
        if (++tap < taps) continue;
        write(layer, chunk, (first + place) / taps, sum / static_cast<float>(taps), squares);
        tap = 0;
      }
      chunk.scratch.bias_sum = sum;
    }
  }
};

// written <- whether the whole rows may be written, from what each lane found in its own elements of them.
CO_DEVICE void join_written(bool (&written)[2]) {
  const int quad = fresh_thread() % 32 / 4;
  CO_UNROLL
  for (int r = 0; r < 2; ++r) written[r] = (__ballot_sync(0xffffffffu, written[r]) >> 4 * quad & 15u) == 15u;
}

// The sums of a warp with 16 rows.
template <int kWarps, DType kType, bool kWhitens>
CO_DEVICE void multiply_rows(float (&sum)[8][2][4], const LaneRows<kWarps, kType, kWhitens>& rows, const Chunk& chunk,
                             int half) {
  if constexpr (kWarps > 8) {
    if (chunk.task.tf32) {
      multiply_tiles<1>(sum, rows, chunk, half);
    } else {
      multiply_tiles<kType == DType::kFloat32 ? 3 : 2>(sum, rows, chunk, half);
    }
  } else if constexpr (kType == DType::kFloat16) {
    multiply_by_planes<2, 2>(sum, rows, chunk);
  } else if constexpr (kType == DType::kBFloat16) {
    multiply_by_planes<1, 2>(sum, rows, chunk);
  } else if (chunk.task.tf32) {
    multiply_by_planes<2, 2>(sum, rows, chunk);
  } else {
    multiply_by_planes<3, 3>(sum, rows, chunk);
  }
}

// Whether this warp, or its warpgroup, has rows in the round that begins at row `first`.
template <int kWarps>
CO_DEVICE bool is_busy(const Chunk& chunk, int first) {
  const int together = kWarps == 8 && by_warpgroups(chunk.task.warpgroups) ? 4 : kWarps / 8;  // warps
  return first + fresh_thread() / 32 / together * (kWarps == 8 ? together : 1) * kWarpRows < chunk.scratch.part.end;
}

// All threads, after a part of the outputs: its squares to those of its warp.
CO_DEVICE void add_squares(const Chunk& chunk, float (&squares)[2]) {
  const int lane = fresh_thread() % 32, warp = fresh_thread() / 32;
  CO_UNROLL
  for (int side = 0; side < 2; ++side) {
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      squares[side] += __shfl_xor_sync(0xffffffffu, squares[side], lanes);
    }
    if (lane == 0) chunk.scratch.warp_sum[2 * warp + side] += squares[side];
  }
}

// All threads, between barriers; after begin_member, and up to 128 units after make_planes.
template <int kWarps, DType kType, bool kWhitens>
CO_DEVICE void apply(const PreconditionLayer& layer, const Chunk& chunk) {
  constexpr bool kByPlanes = kWarps == 8;
  constexpr int kHalves = kWarps / 8;  // warps that share their rows
  CO_NO_UNROLL
  for (int first = chunk.scratch.part.first; first < chunk.scratch.part.end; first += kRoundRows) {
    if (kHalves > 1 || chunk.scratch.has_bias != 0) {
      __syncthreads();  // the flags and copies of the last rows have been read
      if (const int thread = fresh_thread(); thread < kRoundRows) chunk.scratch.not_finite[thread] = 0;
      if (chunk.scratch.has_bias != 0) BiasCopies<kWhitens>::load(layer, chunk, first);
      __syncthreads();
    }
    const LaneRows<kWarps, kType, kWhitens> rows(layer, chunk, first);
    float sum[8][2][4] = {};
    const bool multiplies = !rows.unwhitens() || chunk.scratch.failed_minor == 0;
    if (multiplies && is_busy<kWarps>(chunk, first)) multiply_rows(sum, rows, chunk, fresh_thread() / 32 % kHalves);
    const float limit = written_below(kType);
    bool written[2] = {multiplies, multiplies};
    CO_UNROLL
    for (int m = 0; m < 8; ++m) {
      CO_UNROLL
      for (int i = 0; i < 8; ++i) written[i % 4 / 2] = written[i % 4 / 2] && fabs(sum[m][i / 4][i % 4]) < limit;
    }
    join_written(written);
    if (kHalves > 1) {
      CO_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (is_busy<kWarps>(chunk, first) && !written[r])
          atomicOr(&chunk.scratch.not_finite[place_of_lane<kWarps>() + 8 * r], 1);
      }
      __syncthreads();  // all rows have been read, and the flags are complete
      CO_UNROLL
      for (int r = 0; r < 2; ++r) written[r] = chunk.scratch.not_finite[place_of_lane<kWarps>() + 8 * r] == 0;
    }
    float squares[2] = {};
    CO_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (r >= rows.inside || !(written[r] || rows.unwhitens())) continue;
      const int t = fresh_thread() % 4;
      CO_UNROLL
      for (int m = 0; m < 8; ++m) {
        if constexpr (kByPlanes) {
          if (m * 16 >= chunk.padded()) continue;
          const float value[4] = {sum[m][0][2 * r], sum[m][0][2 * r + 1], sum[m][1][2 * r], sum[m][1][2 * r + 1]};
          if (rows.unwhitens()) {
            rows.move(r, m * 16 + 4 * t, value, written[r], squares);
          } else {
            rows.store(r, m * 16 + 4 * t, value);
          }
        } else {
          CO_UNROLL
          for (int n = 0; n < 2; ++n) {
            const int position = fresh_thread() / 32 % kHalves * kWarpColumns + m * 16 + n * 8 + 2 * t;
            if (position >= chunk.padded()) continue;
            const float value[2] = {sum[m][n][2 * r], sum[m][n][2 * r + 1]};
            if (rows.unwhitens()) {
              rows.move(r, position, value, written[r], squares);
            } else {
              rows.store(r, position, value);
            }
          }
        }
      }
    }
    if (chunk.scratch.has_bias != 0) {
      __syncthreads();  // the copies are complete
      BiasCopies<kWhitens>::store(layer, chunk, first, squares);
    }
    if (rows.unwhitens()) add_squares(chunk, squares);
  }
}

}  // namespace consistency_ops
