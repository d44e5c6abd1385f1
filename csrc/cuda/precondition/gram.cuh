// X^T X of the sampled rows of one chunk, into the lower tiles of shared memory.
//
// Rows pass through a stage in shared memory while the next stage is already on its way in registers (16 or 8 loads a
// thread).  float32 inputs are split in two TF32 numbers and take three tensor-core products (high high + high low +
// low high), which is float32 accuracy.  bfloat16 and float16 inputs stay as they are, whose products are exact: half
// the shared memory, 3 ldmatrix and 4 mma for a block of 16 x 32 x 16, where TF32 would need 24 loads and 8 mma. Tensor
// cores round their running sums toward zero, so no sum is longer than 512 rows: partial sums are added in shared
// memory, in the order of the rows, which is more accurate than a float32 matrix product and the same on every run.
// With `tf32` float32 inputs are rounded to TF32 and take one product too.
//
// Not here, by calculation for an H200 (nothing has been measured):
// cp.async copies 4, 8 or 16 aligned bytes, and a unit of 16-bit X is 2: the random offset of random.h and group = 1
// lay the units of a chunk on any address.  What it is for, bytes in flight, the registers do: 4096 elements a CTA, 32
// KiB of float32 on an SM with two CTAs, where 4.3 TB/s over 132 SMs at a latency of 700 ns want 22 KiB.  16-bit X has
// 16 KiB in flight; if a GPU shows that to be too little, kStageElements is what to raise.
// wgmma reads both operands of a transposed product from shared memory in 16-bit types only, and the sums would not get
// faster by it: at 62 % of the peak of wgmma, what mma.sync reaches, the covariances of ResNet-50, ViT-B/16 and a Llama
// block take 24, 70 and 26 us of tensor cores beside 87, 281 and 233 us of DRAM.
#pragma once

#include "cuda/precondition/chunk.cuh"

namespace consistency_ops {

constexpr int kPartialRows = 512;

// Whether a lane has one unit in all its rows of a stage: load i of it is then row first_row + i.  That is so where
// units are the fast dimension and a stage is full, with 1, 2, 4 or 8 blocks of 32 units in a row.
template <int kWarps, int kLoads>
struct LaneOfStage {
  int position, first_row;
  bool keeps_unit;

  CO_DEVICE explicit LaneOfStage(const Chunk& chunk) {
    const int warp = fresh_thread() / 32, columns = chunk.padded() / 32;
    position = warp % columns * 32 + fresh_thread() % 32;
    first_row = warp / columns * kLoads;
    keeps_unit = !chunk.input.rows_are_fast && chunk.x_stage() * columns == kWarps * kLoads;
  }
};

template <int kWarps, typename Raw, int kLoads>
CO_DEVICE void fetch_x(uint32_t (&raw)[kLoads], const PreconditionLayer& layer, const Chunk& chunk, int rows) {
  const Raw* x = global_memory(static_cast<const Raw*>(chunk.input.data));
  const uint32_t one = one_bits<Raw>(layer.x_dtype);
  const LaneOfStage<kWarps, kLoads> lane(chunk);
  if (lane.keeps_unit && rows == chunk.x_stage()) {
    const int32_t unit = chunk.scratch.unit[lane.position];
    const Raw* const column = x + max(unit, 0) * chunk.input.unit_stride;
    const int64_t* const row_offset = chunk.scratch.row_offset + lane.first_row;
    CO_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      raw[i] = unit == kBiasUnit ? one : 0;
      if (unit >= 0) raw[i] = column[row_offset[i]];
    }
    return;
  }
  StageWalk<kWarps> walk(chunk.padded(), chunk.input.rows_are_fast);
  CO_UNROLL
  for (int i = 0; i < kLoads; ++i) {
    const int row = walk.row(i);
    const int32_t unit = row < rows ? chunk.scratch.unit[walk.position(i)] : kNoUnit;
    raw[i] = unit == kBiasUnit ? one : 0;
    if (unit >= 0) raw[i] = x[chunk.scratch.row_offset[row] + unit * chunk.input.unit_stride];
  }
}

template <int kWarps, typename Raw, int kLoads>
CO_DEVICE void stage_x(const uint32_t (&raw)[kLoads], const Chunk& chunk, int rows) {
  const LaneOfStage<kWarps, kLoads> lane(chunk);
  if (lane.keeps_unit && rows == chunk.x_stage()) {
    const int pitch = x_pitch(chunk.padded());
    int at = lane.first_row * pitch + lane.position;
    CO_UNROLL
    for (int i = 0; i < kLoads; ++i, at += pitch) {
      if constexpr (sizeof(Raw) == 2) {
        reinterpret_cast<Raw*>(chunk.arena)[at] = static_cast<Raw>(raw[i]);
      } else {
        chunk.arena[at] = chunk.task.tf32 ? to_tf32(__uint_as_float(raw[i])) : __uint_as_float(raw[i]);
      }
    }
    return;
  }
  StageWalk<kWarps> walk(chunk.padded(), chunk.input.rows_are_fast);
  CO_UNROLL
  for (int i = 0; i < kLoads; ++i) {
    const int row = walk.row(i);
    if (row >= chunk.x_stage()) continue;
    const int at = row * x_pitch(chunk.padded()) + walk.position(i);
    if constexpr (sizeof(Raw) == 2) {
      reinterpret_cast<Raw*>(chunk.arena)[at] = static_cast<Raw>(raw[i]);
    } else {
      chunk.arena[at] = chunk.task.tf32 ? to_tf32(__uint_as_float(raw[i])) : __uint_as_float(raw[i]);
    }
  }
}

// Blocks of 16 x 32 on or below the diagonal, a tile row i from i (i + 1) on.
CO_DEVICE int gram_blocks(const Chunk& chunk) { return chunk.side() * (chunk.side() + 1); }

// In shared memory, because the coordinates of a warp's blocks would take registers that the sums need.
CO_DEVICE void locate_gram_blocks(const Chunk& chunk) {
  const int b = fresh_thread();
  if (b >= gram_blocks(chunk)) return;
  int i = 0;
  while ((i + 1) * (i + 2) <= b) ++i;
  const int within = b - i * (i + 1);
  chunk.scratch.gram_block[b] = (i * kTile + within % 2 * 16) + (within / 2 * kTile << 16);
}

template <bool kSplit>
CO_DEVICE void gram_block(float (&sum)[4][4], int32_t block, const Chunk& chunk) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int pitch = x_pitch(chunk.padded());
  const float* left = chunk.arena + t * pitch + (block & 0xffff) + g;
  const float* right = chunk.arena + t * pitch + (block >> 16) + g;
  CO_NO_UNROLL
  for (int k = chunk.x_stage(); k > 0; k -= 8) {
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

// The same for a stage of 16-bit numbers.  They lie [row][unit] and the mma wants pairs of rows of one unit, which is
// what ldmatrix makes when it transposes.
template <bool kBFloat16>
CO_DEVICE void gram_block_16(float (&sum)[4][4], int32_t block, const Chunk& chunk) {
  const int lane = static_cast<int>(threadIdx.x) % 32, pitch = x_pitch(chunk.padded());
  // Matrices 0 .. 3: rows 0 and units 0, rows 0 and units 8, rows 8 and units 0, rows 8 and units 8.
  const uint16_t* stage =
      reinterpret_cast<const uint16_t*>(chunk.arena) + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8;
  const uint16_t *left = stage + (block & 0xffff), *right = stage + (block >> 16);
  CO_NO_UNROLL
  for (int k = chunk.x_stage(); k > 0; k -= 16) {
    uint32_t a[4], b[4];
    load_matrices_transposed(a, left);
    CO_UNROLL
    for (int n = 0; n < 4; n += 2) {
      load_matrices_transposed(b, right + n * 8);
      mma_m16n8k16<kBFloat16>(sum[n], a, b[0], b[2]);
      mma_m16n8k16<kBFloat16>(sum[n + 1], a, b[1], b[3]);
    }
    left += 16 * pitch;
    right += 16 * pitch;
  }
}

// tiles <- or += sum; sum <- 0.
CO_DEVICE void add_partial(float (&sum)[4][4], int32_t block, const Chunk& chunk, bool first) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = block & 0xffff, column = block >> 16;
  float* tile =
      lower_tile(chunk.tiles, row / kTile, column / kTile) + (row % kTile + lane / 4) * kTilePitch + lane % 4 * 2;
  CO_UNROLL
  for (int n = 0; n < 4; ++n) {
    CO_UNROLL
    for (int i = 0; i < 4; ++i) {
      float* element = tile + i / 2 * 8 * kTilePitch + n * 8 + i % 2;
      *element = first ? sum[n][i] : *element + sum[n][i];
      sum[n][i] = 0.0f;
    }
  }
}

// All threads; ends with a barrier.  tiles <- the sum over this CTA's part of the rows, zero if there is none.  `Raw`
// is uint32_t for float32 inputs, uint16_t for 16-bit ones.
template <int kWarps, int kUnits, typename Raw>
CO_DEVICE void gram(const PreconditionLayer& layer, const Chunk& chunk) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const auto locate = [&](int first) {  // the rows of the stage that begins with sampled row `first`
    const int thread = fresh_thread();
    if (thread < chunk.x_stage() && first + thread < chunk.x_rows()) {
      const int64_t row = chunk.input.sample.offset + (first + thread) * chunk.input.sample.stride;
      chunk.scratch.row_offset[thread] =
          chunk.input.data == layer.x ? strided_offset(static_cast<uint32_t>(row), layer.x_row_size, layer.x_row_stride)
                                      : row * chunk.input.packed_pitch;
    }
  };

  uint32_t raw[kStageElements / (kWarps * 32)];
  float sum[kUnits][4][4] = {};
  locate_gram_blocks(chunk);
  // Turn t writes stage t - 1 to shared memory, has stage t fetched into registers, and multiplies stage t - 1.
  CO_NO_UNROLL
  for (int next = 0;; next += chunk.x_stage()) {
    __syncthreads();  // stage t - 2 has been read, and the row offsets of stage t - 1
    if (next > 0) stage_x<kWarps, Raw>(raw, chunk, min(chunk.x_stage(), chunk.x_rows() - next + chunk.x_stage()));
    locate(next);
    __syncthreads();
    if (next == 0 || next < chunk.x_rows())
      fetch_x<kWarps, Raw>(raw, layer, chunk, min(chunk.x_stage(), chunk.x_rows() - next));
    if (next == 0) continue;
    CO_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      if (warp + u * kWarps < gram_blocks(chunk)) {
        const int32_t block = chunk.scratch.gram_block[warp + u * kWarps];
        if constexpr (sizeof(Raw) == 2) {
          if (layer.x_dtype == DType::kBFloat16) {
            gram_block_16<true>(sum[u], block, chunk);
          } else {
            gram_block_16<false>(sum[u], block, chunk);
          }
        } else if (chunk.task.tf32) {
          gram_block<false>(sum[u], block, chunk);
        } else {
          gram_block<true>(sum[u], block, chunk);
        }
      }
    }
    if (next % kPartialRows == 0 || next >= chunk.x_rows()) {
      CO_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        if (warp + u * kWarps < gram_blocks(chunk))
          add_partial(sum[u], chunk.scratch.gram_block[warp + u * kWarps], chunk, next <= kPartialRows);
      }
    }
    if (next >= chunk.x_rows()) break;
  }
  __syncthreads();
}

// All threads of a cluster; ends with a barrier.  tiles <- the sum over its CTAs, in the order of their ranks.  A CTA
// adds its part of the elements and writes the sums to all, so between the barriers one thread alone touches an
// element, in any of the shared memories.
CO_DEVICE void sum_over_cluster(const Chunk& chunk, int threads) {
  Float4* const tiles = reinterpret_cast<Float4*>(chunk.tiles);
  const int ranks = chunk.task.cluster;
  cluster_barrier();  // all have their partial sums
  CO_NO_UNROLL
  for (int e = chunk.task.rank * threads + fresh_thread(); e < chunk.tile_floats() / 4; e += ranks * threads) {
    Float4 sum = load_cluster(tiles + e, 0);
    CO_UNROLL_4
    for (int rank = 1; rank < ranks; ++rank) add(sum, load_cluster(tiles + e, rank));
    CO_UNROLL_4
    for (int rank = 0; rank < ranks; ++rank) store_cluster(tiles + e, rank, sum);
  }
  cluster_barrier();  // the sums have arrived, and nobody touches the tiles of another CTA any more
}

}  // namespace consistency_ops
