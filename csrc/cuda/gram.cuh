// X^T X of the sampled rows of one chunk, into the lower tiles of shared memory.
//
// Rows pass through a stage in shared memory while the next stage is already on its way in registers (16 loads a thread).
// Products are TF32 tensor-core tiles with float sums.  float32 inputs are split in two TF32 numbers and take three
// products (high high + high low + low high), which is float32 accuracy; bfloat16 and float16 inputs are TF32 numbers
// already and take one.  Tensor cores round their running sums toward zero, so no sum is longer than 512 rows: partial
// sums are added in shared memory, in the order of the rows, which is more accurate than a float32 matrix product and the
// same on every run.
#pragma once

#include "cuda/chunk.cuh"

namespace consistency_ops {

constexpr int kPartialRows = 512;

template <int kWarps, typename Raw>
CO_DEVICE void fetch_x(uint32_t (&raw)[kStageLoads], const PreconditionLayer& layer, const Chunk& chunk, int rows) {
  const Raw* x = static_cast<const Raw*>(layer.x);
  const uint32_t one = sizeof(Raw) == 4 ? 0x3f800000u : layer.x_dtype == DType::kBFloat16 ? 0x3f80u : 0x3c00u;
  StageWalk<kWarps> walk(chunk.padded, rows_are_fast(layer.x_row_stride[kMaxRowDims - 1],
                                                     layer.x_row_size[kMaxRowDims - 1], layer.x_unit_stride));
  CO_UNROLL
  for (int i = 0; i < kStageLoads; ++i) {
    const int row = walk.row();
    raw[i] = 0;
    if (row < rows) {
      const int32_t unit = chunk.shared.unit[walk.position()];
      if (unit >= 0) {
        raw[i] = x[chunk.shared.row_offset[row] + unit * layer.x_unit_stride];
      } else if (unit == kBiasUnit) {
        raw[i] = one;
      }
    }
    walk.next();
  }
}

template <int kWarps>
CO_DEVICE void stage_x(const uint32_t (&raw)[kStageLoads], const PreconditionLayer& layer, const Chunk& chunk,
                       int stage) {
  StageWalk<kWarps> walk(chunk.padded, rows_are_fast(layer.x_row_stride[kMaxRowDims - 1],
                                                     layer.x_row_size[kMaxRowDims - 1], layer.x_unit_stride));
  CO_UNROLL
  for (int i = 0; i < kStageLoads; ++i) {
    const int row = walk.row();
    if (row < stage) chunk.arena[row * x_pitch(chunk.padded) + walk.position()] = to_float(layer.x_dtype, raw[i]);
    walk.next();
  }
}

// A warp's share is up to kUnits blocks of 16 x 32 on or below the diagonal; block u lies in tile row i with
// i (i + 1) <= u < (i + 1) (i + 2).
struct GramBlock {
  int i, j, half;
  CO_DEVICE explicit GramBlock(int u) : i(0) {
    while ((i + 1) * (i + 2) <= u) ++i;
    j = (u - i * (i + 1)) / 2;
    half = (u - i * (i + 1)) % 2;
  }
};

template <bool kSplit>
CO_DEVICE void gram_block(float (&sum)[4][4], const GramBlock& block, const float* stage, int rows, int pitch) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const float* left = stage + t * pitch + block.i * kTile + block.half * 16 + g;
  const float* right = stage + t * pitch + block.j * kTile + g;
  CO_NO_UNROLL
  for (int k = 0; k < rows; k += 8) {
    float a[4], a_low[4];
    CO_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float value = left[i / 2 * 4 * pitch + i % 2 * 8];
      const SplitFloat split(value);
      a[i] = kSplit ? split.high : value;
      a_low[i] = split.low;
    }
    CO_UNROLL
    for (int n = 0; n < 4; ++n) {
      float b[2], b_low[2];
      CO_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float value = right[i * 4 * pitch + n * 8];
        const SplitFloat split(value);
        b[i] = kSplit ? split.high : value;
        b_low[i] = split.low;
      }
      if (kSplit) {
        mma_m16n8k8_tf32(sum[n], a_low, b);
        mma_m16n8k8_tf32(sum[n], a, b_low);
      }
      mma_m16n8k8_tf32(sum[n], a, b);
    }
    left += 8 * pitch;
    right += 8 * pitch;
  }
}

// All threads, at least one row; ends with a barrier.  `Raw` is uint32_t for float32 inputs, uint16_t for 16-bit ones.
template <int kWarps, int kUnits, typename Raw>
CO_DEVICE void gram(const PreconditionLayer& layer, const Chunk& chunk, int arena_floats) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int pitch = x_pitch(chunk.padded), stage = stage_rows(chunk.padded, kWarps * 32, arena_floats);
  const int blocks = chunk.side * (chunk.side + 1);
  const RowSample rows = chunk.shared.rows;
  const auto locate = [&](int64_t first) {  // rows of the stage that begins with sampled row `first`
    if (thread < stage && first + thread < rows.count) {
      chunk.shared.row_offset[thread] =
          strided_offset(rows.offset + (first + thread) * rows.stride, layer.x_row_size, layer.x_row_stride);
    }
  };
  const auto valid = [&](int64_t first) { return static_cast<int>(min(int64_t{stage}, rows.count - first)); };

  uint32_t raw[kStageLoads];
  float sum[kUnits][4][4] = {};
  locate(0);
  __syncthreads();
  fetch_x<kWarps, Raw>(raw, layer, chunk, valid(0));
  for (int64_t first = 0; first < rows.count; first += stage) {
    const int64_t next = first + stage;
    __syncthreads();  // the last stage has been read, and so have its row offsets
    stage_x<kWarps>(raw, layer, chunk, stage);
    locate(next);
    __syncthreads();
    if (next < rows.count) fetch_x<kWarps, Raw>(raw, layer, chunk, valid(next));
    CO_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      if (warp + u * kWarps < blocks) {
        gram_block<sizeof(Raw) == 4>(sum[u], GramBlock(warp + u * kWarps), chunk.arena, stage, pitch);
      }
    }
    if (next % kPartialRows == 0 || next >= rows.count) {
      CO_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        if (warp + u * kWarps >= blocks) continue;
        const GramBlock block(warp + u * kWarps);
        float* tile = lower_tile(chunk.tiles, block.i, block.j) + (block.half * 16 + lane / 4) * kTilePitch + lane % 4 * 2;
        CO_UNROLL
        for (int n = 0; n < 4; ++n) {
          CO_UNROLL
          for (int i = 0; i < 4; ++i) {
            float* element = tile + i / 2 * 8 * kTilePitch + n * 8 + i % 2;
            *element = next <= kPartialRows ? sum[u][n][i] : *element + sum[u][n][i];
            sum[u][n][i] = 0.0f;
          }
        }
      }
    }
  }
  __syncthreads();
}

}  // namespace consistency_ops
