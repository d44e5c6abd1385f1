// G[:, c] <- G[:, c] A_c^-1 for this CTA's part of the rows of G of one layer, in place.
//
// Rows (output, tap) pass through a stage in shared memory, where A^-1 already is.  A warp multiplies 32 rows by 16
// columns with TF32 tensor-core tiles: A^-1 is split in two TF32 numbers; float32 gradients are split as well (three
// products), 16-bit gradients are TF32 numbers already (two products); with `tf32` both are rounded (one product).  A
// row of the stage whose result has an element that is not finite in the gradient's own type is left as it was, in this
// chunk only.
//
// Not here, by calculation for an H200 (nothing has been measured): 16-bit products for 16-bit gradients.  A step of 8
// k loads 12 x 128 bytes of float32 from shared memory, 12 cycles of an SM, for two TF32 products of some 13 cycles;
// two bfloat16 products of half that would wait for the same loads.  So they pay only where the operands lie in 16
// bits: high and low part of the whole inverse, 64 KiB instead of 41 for a chunk of 128 and 256 instead of 149 for 256,
// which then streams.  That would be worth it for bfloat16 gradients of wide layers: the products of a Llama block take
// some 310 us here beside 233 us of DRAM, and 130 at the peak of wgmma.  float32 gradients are bound by DRAM either way
// (ViT-B/16: some 200 us of products beside 281).  It waits for a GPU that shows which of the two bounds.
#pragma once

#include "cuda/precondition/scheduler.cuh"

namespace consistency_ops {

constexpr int kApplyJobs =
    2;  // of a warp: (64 / 32 rows) * (128 / 16 columns) / 8 warps, or (32 / 32) * (256 / 16) / 16

// Calls f(row, unit, position in the stage) for every element of the stage.
template <int kWarps, typename F>
CO_DEVICE void for_each_g(const PreconditionLayer& layer, const Chunk& chunk, int rows, F&& f) {
  StageWalk<kWarps> walk(chunk.padded(), rows_are_fast(layer.g_tap_stride[kMaxTapDims - 1],
                                                       layer.g_tap_size[kMaxTapDims - 1], layer.g_unit_stride));
  const int steps = walk.steps(rows);
  CO_UNROLL_4
  for (int i = 0; i < steps; ++i) {
    const int row = walk.row(i), position = walk.position(i);
    if (row < rows) f(row, chunk.scratch.unit[position], row * g_pitch(chunk.padded()) + position);
  }
}

constexpr int kPrefetchRows = 256;  // 128 KiB of float32 a CTA, 34 MB in all: what L2 holds beside the rest

// Asks L2 for the first rows of these outputs, a sector at a time, a row a warp.
template <int kWarps>
CO_DEVICE void prefetch_g(const PreconditionLayer& layer, const Chunk& chunk, const OutputRange& outputs) {
  constexpr uintptr_t kSector = 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t taps = static_cast<uint32_t>(layer.g_tap_size[0] * layer.g_tap_size[1] * layer.g_tap_size[2]);
  const int rows = static_cast<int>(min(int64_t{kPrefetchRows}, (outputs.end - outputs.begin) * taps));
  const int64_t bytes = element_size(layer.g_dtype);
  CO_NO_UNROLL
  for (int r = warp; r < rows; r += kWarps) {
    const uint32_t output = static_cast<uint32_t>(r) / taps;
    const int64_t offset =
        (outputs.begin + output) * layer.g_output_stride +
        strided_offset(static_cast<uint32_t>(r) - output * taps, layer.g_tap_size, layer.g_tap_stride);
    const uintptr_t row = reinterpret_cast<uintptr_t>(layer.g) + static_cast<uintptr_t>(offset * bytes);
    const auto sector = [&](int32_t unit) {
      return (row + static_cast<uintptr_t>(unit * layer.g_unit_stride * bytes)) / kSector;
    };
    CO_NO_UNROLL
    for (int p = lane; p < chunk.size(); p += 32) {
      const int32_t unit = chunk.scratch.unit[p], before = p > 0 ? chunk.scratch.unit[p - 1] : kNoUnit;
      if (unit >= 0 && (before < 0 || sector(unit) != sector(before))) {
        prefetch_l2(static_cast<const char*>(layer.g) + offset * bytes + unit * layer.g_unit_stride * bytes);
      }
    }
  }
}

// sum += rows [32 half, 32 half + 32) of the stage times columns [16 block, 16 block + 16) of A^-1.
//
// An mma sums over k in any order that both operands agree on.  Here the lanes with t = lane % 4 take k = 8 t + 2 s and
// the next one in step s of a tile: so every load of the inverse, whose pitch is 1 modulo 32, lies in 32 banks, along
// rows and along columns, and so does every load of G, whose pitch is odd.
template <int kProducts>
CO_DEVICE void multiply_block(float (&sum)[2][2][4], const Chunk& chunk, int half, int block, int rows) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int pitch = g_pitch(chunk.padded()), column = block % 2 * 16 + g;
  const float* left = chunk.arena + (half * 32 + g) * pitch + 8 * t;
  for (int tile = 0; tile < chunk.side(); ++tile) {
    // Only lower tiles are stored: above the diagonal the transposed tile is read.
    const bool lower = tile >= block / 2;
    const float* inverse = lower ? lower_tile(chunk.tiles, tile, block / 2) : lower_tile(chunk.tiles, block / 2, tile);
    const int k_stride = lower ? kTilePitch : 1, column_stride = lower ? 1 : kTilePitch;
    CO_NO_UNROLL
    for (int k = 0; k < 8; k += 2) {
      float b[2][2], b_low[2][2];
      CO_UNROLL
      for (int n = 0; n < 2; ++n) {
        CO_UNROLL
        for (int i = 0; i < 2; ++i) {
          const SplitFloat split(inverse[(8 * t + k + i) * k_stride + (column + n * 8) * column_stride]);
          b[n][i] = split.high;
          b_low[n][i] = split.low;
        }
      }
      CO_UNROLL
      for (int m = 0; m < 2; ++m) {
        float a[4], a_low[4];
        CO_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = m * 16 + i % 2 * 8;
          const float value = half * 32 + g + row < rows ? left[row * pitch + tile * kTile + k + i / 2] : 0.0f;
          const SplitFloat split(value);
          a[i] = kProducts == 2 ? value : split.high;  // two: 16-bit gradients
          a_low[i] = split.low;
        }
        CO_UNROLL
        for (int n = 0; n < 2; ++n) {
          if (kProducts > 2) mma_m16n8k8_tf32(sum[m][n], a_low, b[n]);
          if (kProducts > 1) mma_m16n8k8_tf32(sum[m][n], a, b_low[n]);
          mma_m16n8k8_tf32(sum[m][n], a, b[n]);
        }
      }
    }
  }
}

// Every tap of an output holds a corrected copy of its bias gradient; their mean goes back.  Sums run over the stages
// in the order of the rows, in one thread where an output has several taps.
struct BiasMean {
  float sum = 0.0f;
  int tap = 0;

  CO_DEVICE void add_stage(const PreconditionLayer& layer, const Chunk& chunk, int position, int rows, int taps) {
    const int thread = fresh_thread();
    const float* copies = chunk.arena + position;
    const int pitch = g_pitch(chunk.padded());
    if (taps == 1) {
      if (thread < rows) {
        store_element(layer.bias_dtype, layer.bias_grad, chunk.scratch.bias_offset[thread], copies[thread * pitch]);
      }
    } else if (thread == 0) {
      for (int row = 0; row < rows; ++row) {
        sum += copies[row * pitch];
        if (++tap < taps) continue;
        store_element(layer.bias_dtype, layer.bias_grad, chunk.scratch.bias_offset[row],
                      sum / static_cast<float>(taps));
        sum = 0.0f;
        tap = 0;
      }
    }
  }
};

// All threads.  `Raw` is uint32_t for float32 gradients, uint16_t for 16-bit ones.
template <int kWarps, typename Raw>
CO_DEVICE void apply(const PreconditionLayer& layer, const Chunk& chunk, const OutputRange& outputs, int stage) {
  constexpr int kProducts = sizeof(Raw) == 4 ? 3 : 2;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int pitch = g_pitch(chunk.padded());
  const int taps = static_cast<int>(layer.g_tap_size[0] * layer.g_tap_size[1] * layer.g_tap_size[2]);
  const int last_row = static_cast<int>(outputs.end) * taps;
  Raw* const g = static_cast<Raw*>(layer.g);
  const int64_t unit_stride = layer.g_unit_stride;
  const DType dtype = layer.g_dtype;
  int bias_position = -1;
  for (int p = 0; layer.has_bias && p < chunk.size(); ++p) {
    if (chunk.scratch.unit[p] == kBiasUnit) bias_position = p;
  }
  BiasMean bias;

  for (int first = static_cast<int>(outputs.begin) * taps; first < last_row; first += stage) {
    const int rows = min(stage, last_row - first);
    __syncthreads();  // the last stage has been written back
    if (const int thread = fresh_thread(); thread < rows) {
      const uint32_t row = static_cast<uint32_t>(first + thread), output = row / static_cast<uint32_t>(taps);
      chunk.scratch.row_offset[thread] =
          output * layer.g_output_stride +
          strided_offset(row - output * static_cast<uint32_t>(taps), layer.g_tap_size, layer.g_tap_stride);
      chunk.scratch.bias_offset[thread] = output * layer.bias_stride;
      chunk.scratch.not_finite[thread] = 0;
    }
    __syncthreads();
    for_each_g<kWarps>(layer, chunk, rows, [&](int row, int32_t unit, int at) {
      float value = 0.0f;
      if (unit >= 0) {
        value = to_float<Raw>(dtype, g[chunk.scratch.row_offset[row] + unit * unit_stride]);
      } else if (unit == kBiasUnit) {
        value = load_element(layer.bias_dtype, layer.bias_grad, chunk.scratch.bias_offset[row]);
      }
      chunk.arena[at] = value;
    });
    __syncthreads();

    const int blocks = chunk.padded() / 16, jobs = blocks * ((rows + 31) / 32);
    float sum[kApplyJobs][2][2][4] = {};
    const auto for_each_result = [&](auto&& f) {  // f(row, position in the stage, element)
      CO_UNROLL
      for (int j = 0; j < kApplyJobs; ++j) {
        const int job = warp + j * kWarps;
        if (job >= jobs) continue;
        CO_UNROLL
        for (int e = 0; e < 16; ++e) {
          const int row = job / blocks * 32 + e / 8 * 16 + e / 2 % 2 * 8 + lane / 4;
          const int position = job % blocks * 16 + e / 4 % 2 * 8 + lane % 4 * 2 + e % 2;
          if (row < rows) f(row, row * pitch + position, sum[j][e / 8][e / 4 % 2][e % 4]);
        }
      }
    };
    CO_UNROLL
    for (int j = 0; j < kApplyJobs; ++j) {
      const int job = warp + j * kWarps;
      if (job >= jobs) continue;
      if (chunk.task.tf32) {
        multiply_block<1>(sum[j], chunk, job / blocks, job % blocks, rows);
      } else {
        multiply_block<kProducts>(sum[j], chunk, job / blocks, job % blocks, rows);
      }
    }
    for_each_result([&](int row, int, float& value) {
      value = to_float<Raw>(dtype, from_float<Raw>(dtype, value));
      if (!is_finite(value)) atomicOr(&chunk.scratch.not_finite[row], 1);
    });
    __syncthreads();  // the stage has been read, and the flags are complete
    for_each_result([&](int row, int at, float value) {
      if (chunk.scratch.not_finite[row] == 0) chunk.arena[at] = value;
    });
    __syncthreads();
    for_each_g<kWarps>(layer, chunk, rows, [&](int row, int32_t unit, int at) {
      if (unit < 0 || chunk.scratch.not_finite[row] != 0) return;
      g[chunk.scratch.row_offset[row] + unit * unit_stride] = from_float<Raw>(dtype, chunk.arena[at]);
    });
    if (bias_position >= 0) bias.add_stage(layer, chunk, bias_position, rows, taps);
  }
}

}  // namespace consistency_ops
