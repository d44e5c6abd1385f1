// What the CTA of one chunk keeps in shared memory, and how it walks over rows and units.
#pragma once

#include "consistency_ops/precondition.h"
#include "cuda/port.cuh"
#include "cuda/precondition_plan.h"

namespace consistency_ops {

constexpr int32_t kBiasUnit = -1;  // its input is 1, its gradient lies in bias_grad
constexpr int32_t kNoUnit = -2;    // padding of the chunk to whole tiles

struct ChunkShared {
  int64_t row_offset[kMaxStageRows];   // of the stage that is loaded, in elements
  int64_t bias_offset[kMaxApplyRows];
  int32_t unit[kMaxChunk];             // at every position of the chunk
  float inverse_pivot[kMaxChunk];      // 1 / L[i][i]
  int32_t not_finite[kMaxApplyRows];   // rows of the stage whose result must not be written
  float warp_sum[32];
  int32_t warp_count[32];
  Division division;
  RowSample rows;
  int32_t layer, chunk, stages;
  int32_t failed_minor;
};

// One chunk, as every thread of its CTA sees it.
struct Chunk {
  ChunkShared& shared;
  float* tiles;  // tile (i, j), j <= i, of the symmetric or lower triangular matrix
  float* arena;
  int size, padded, side;  // units, padded to whole tiles, tiles along an edge
};

CO_DEVICE float* lower_tile(float* tiles, int i, int j) { return tiles + (lower_tiles(i) + j) * kTileFloats; }

// Element offset of index `index` of a space of sizes `size`, the last dimension fastest.
template <int kDims>
CO_DEVICE int64_t strided_offset(int64_t index, const int64_t (&size)[kDims], const int64_t (&stride)[kDims]) {
  int64_t offset = 0;
  CO_UNROLL
  for (int i = kDims - 1; i > 0; --i) {
    if (size[i] == 1) continue;
    int64_t quotient;
    if (index >> 31 == 0 && size[i] >> 31 == 0) {  // a 64-bit division costs four times as much
      quotient = static_cast<uint32_t>(index) / static_cast<uint32_t>(size[i]);
    } else {
      quotient = index / size[i];
    }
    offset += (index - quotient * size[i]) * stride[i];
    index = quotient;
  }
  return offset + index * stride[0];
}

// How the lanes of a CTA cover a stage of rows x padded units: a warp takes 1 x 32 elements where units are the fast
// dimension in memory, 8 x 4 where rows are (NCHW inputs, convolution weights), so that it touches whole sectors.
template <int kWarps>
struct StageWalk {
  int row_block, column_block, row_step, column_step, columns, lane_row, lane_unit, block_rows, block_units;

  CO_DEVICE StageWalk(int padded, bool rows_are_fast) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    block_rows = rows_are_fast ? 8 : 1;
    block_units = rows_are_fast ? 4 : 32;
    lane_row = rows_are_fast ? lane % 8 : 0;
    lane_unit = rows_are_fast ? lane / 8 : lane;
    columns = padded / block_units;
    row_block = warp / columns;
    column_block = warp % columns;
    row_step = kWarps / columns;
    column_step = kWarps % columns;
  }
  CO_DEVICE int row() const { return row_block * block_rows + lane_row; }
  CO_DEVICE int position() const { return column_block * block_units + lane_unit; }
  CO_DEVICE void next() {
    row_block += row_step;
    column_block += column_step;
    if (column_block >= columns) {
      column_block -= columns;
      ++row_block;
    }
  }
};

// True where consecutive rows are closer together in memory than consecutive units.
CO_DEVICE bool rows_are_fast(int64_t row_stride, int64_t row_size, int64_t unit_stride) {
  const int64_t row = row_stride < 0 ? -row_stride : row_stride, unit = unit_stride < 0 ? -unit_stride : unit_stride;
  return row_size > 1 && row < unit;
}

CO_DEVICE float to_float(DType dtype, uint32_t bits) {
  if (dtype == DType::kFloat32) return __uint_as_float(bits);
  return dtype == DType::kBFloat16 ? bfloat16_to_float(static_cast<uint16_t>(bits))
                                   : float16_to_float(static_cast<uint16_t>(bits));
}

CO_DEVICE uint32_t from_float(DType dtype, float value) {
  if (dtype == DType::kFloat32) return __float_as_uint(value);
  return dtype == DType::kBFloat16 ? float_to_bfloat16(value) : float_to_float16(value);
}

CO_DEVICE float load_element(DType dtype, const void* base, int64_t offset) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(base)[offset];
  return to_float(dtype, static_cast<const uint16_t*>(base)[offset]);
}

CO_DEVICE void store_element(DType dtype, void* base, int64_t offset, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(base)[offset] = value;
  } else {
    static_cast<uint16_t*>(base)[offset] = static_cast<uint16_t>(from_float(dtype, value));
  }
}

CO_DEVICE bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }

// value = high + low to 2^-22 of value, both TF32.
struct SplitFloat {
  float high, low;
  CO_DEVICE explicit SplitFloat(float value) : high(to_tf32(value)), low(to_tf32(value - high)) {}
};

}  // namespace consistency_ops
