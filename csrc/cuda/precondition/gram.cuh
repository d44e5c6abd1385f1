// X^T X of the sampled rows of one chunk, into the lower tiles of shared memory.
//
// Rows pass through a stage in shared memory while the next stage is already on its way in registers, 16 KiB a CTA.
// Four units that are neighbours in memory are loaded and staged at once.  float32 inputs are split in two TF32 numbers
// and take three tensor-core products (high high + high low + low high), which is float32 accuracy.  bfloat16 and
// float16 inputs stay as they are, whose products are exact: half the shared memory, 4 ldmatrix and 8 mma for a tile of
// 32 x 32 and 16 rows, where TF32 would need 32 loads and 16 mma.  Tensor cores round their running sums toward zero,
// so no sum is longer than 512 rows: partial sums are added in shared memory, in the order of the rows, which is more
// accurate than a float32 matrix product and the same on every run; the products of float32 inputs go into sums of
// their own, eight rows at a time.  With `tf32` float32 inputs are rounded to TF32 and take one product too.
//
// Not here, by calculation for an H200 (nothing has been measured):
// cp.async copies 4, 8 or 16 aligned bytes, and group = 1 lays the units of a chunk on any address.  What it is for,
// bytes in flight, the registers do: 16 KiB a CTA, 32 KiB on an SM with two, where 4.3 TB/s over 132 SMs at a latency
// of 700 ns want 22 KiB.
// wgmma: for a transposed product both operands lie in shared memory, in 16-bit types only.  It would take 1.3 passes
// through shared memory for 32 elements of X where the six warps that share operands take 1.8 (of 5.7 in all, by the
// model), for a swizzled stage of its own.
#pragma once

#include "cuda/precondition/chunk.cuh"

namespace consistency_ops {

constexpr int kPartialRows = 512;

// Which four units of which rows a thread loads where four neighbours can be loaded at once: the threads of a row are
// a power of two, so that a thread has the same units in all its rows.  The rows are `step` apart.
template <int kWarps>
struct VectorsOfStage {
  int run, row, step;

  CO_DEVICE explicit VectorsOfStage(const Chunk& chunk) {
    const int side = chunk.side(), log = side <= 1 ? 3 : side <= 2 ? 4 : side <= 4 ? 5 : 6;  // of the threads of a row
    run = fresh_thread() & ((1 << log) - 1);
    row = fresh_thread() >> log;
    step = kWarps * 32 >> log;
  }
};

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

template <int kWarps, typename Raw, int kWords>
CO_DEVICE void fetch_x(uint32_t (&raw)[kWords], const PreconditionLayer& layer, const Chunk& chunk, int rows) {
  constexpr int kVector = sizeof(Raw);  // words of four units
  const Raw* x = global_memory(static_cast<const Raw*>(chunk.input.data));
  const uint32_t one = one_bits<Raw>(layer.x_dtype);
  if (chunk.by_runs()) {
    const VectorsOfStage<kWarps> mine(chunk);
    const int32_t unit = mine.run < chunk.padded() / 4 ? chunk.scratch.run[mine.run] : kNoUnit;
    const Raw* const column = x + max(unit, 0);
    CO_UNROLL
    for (int i = 0; i < kWords / kVector; ++i) {
      const int row = mine.row + i * mine.step;
      FourUnits<Raw> four{};
      if (unit >= 0 && row < rows) {
        four = *reinterpret_cast<const FourUnits<Raw>*>(column + chunk.scratch.row_offset[row]);
      }
      CO_UNROLL
      for (int w = 0; w < kVector; ++w) raw[i * kVector + w] = four.word[w];
    }
    return;
  }
  const LaneOfStage<kWarps, kWords> lane(chunk);
  if (lane.keeps_unit && rows == chunk.x_stage()) {
    const int32_t unit = chunk.scratch.unit[lane.position];
    const Raw* const column = x + max(unit, 0) * chunk.input.unit_stride;
    const int64_t* const row_offset = chunk.scratch.row_offset + lane.first_row;
    CO_UNROLL
    for (int i = 0; i < kWords; ++i) {
      raw[i] = unit == kBiasUnit ? one : 0;
      if (unit >= 0) raw[i] = column[row_offset[i]];
    }
    return;
  }
  StageWalk<kWarps> walk(chunk.padded(), chunk.input.rows_are_fast);
  CO_UNROLL
  for (int i = 0; i < kWords; ++i) {
    const int row = walk.row(i);
    const int32_t unit = row < rows ? chunk.scratch.unit[walk.position(i)] : kNoUnit;
    raw[i] = unit == kBiasUnit ? one : 0;
    if (unit >= 0) raw[i] = x[chunk.scratch.row_offset[row] + unit * chunk.input.unit_stride];
  }
}

// Element `at` of the stage.
template <typename Raw>
CO_DEVICE void stage_element(const Chunk& chunk, int at, uint32_t bits) {
  if constexpr (sizeof(Raw) == 2) {
    reinterpret_cast<Raw*>(chunk.arena())[at] = static_cast<Raw>(bits);
  } else {
    chunk.arena()[at] = chunk.task.tf32 ? to_tf32(__uint_as_float(bits)) : __uint_as_float(bits);
  }
}

template <int kWarps, typename Raw, int kWords>
CO_DEVICE void stage_x(const uint32_t (&raw)[kWords], const Chunk& chunk, int rows) {
  constexpr int kVector = sizeof(Raw);
  const int pitch = x_pitch(chunk.padded());
  if (chunk.by_runs()) {
    const VectorsOfStage<kWarps> mine(chunk);
    if (mine.run >= chunk.padded() / 4) return;
    CO_UNROLL
    for (int i = 0; i < kWords / kVector; ++i) {
      const int row = mine.row + i * mine.step;
      if (row >= chunk.x_stage()) continue;
      FourUnits<Raw> four;
      CO_UNROLL
      for (int w = 0; w < kVector; ++w) {
        const uint32_t word = raw[i * kVector + w];
        four.word[w] = kVector == 4 && chunk.task.tf32 ? __float_as_uint(to_tf32(__uint_as_float(word))) : word;
      }
      *reinterpret_cast<FourUnits<Raw>*>(reinterpret_cast<Raw*>(chunk.arena()) + row * pitch + mine.run * 4) = four;
    }
    return;
  }
  const LaneOfStage<kWarps, kWords> lane(chunk);
  if (lane.keeps_unit && rows == chunk.x_stage()) {
    int at = lane.first_row * pitch + lane.position;
    CO_UNROLL
    for (int i = 0; i < kWords; ++i, at += pitch) stage_element<Raw>(chunk, at, raw[i]);
    return;
  }
  StageWalk<kWarps> walk(chunk.padded(), chunk.input.rows_are_fast);
  CO_UNROLL
  for (int i = 0; i < kWords; ++i) {
    const int row = walk.row(i);
    if (row < chunk.x_stage()) stage_element<Raw>(chunk, row * pitch + walk.position(i), raw[i]);
  }
}

// Blocks of 16 x 32 on or below the diagonal; two in turn are a tile.
CO_DEVICE int gram_blocks(const Chunk& chunk) { return chunk.side() * (chunk.side() + 1); }

// In shared memory, because the coordinates of a warp's blocks would take registers that the sums need.  Of 128 units
// the first four warps have a tile in whose rows one of the last two diagonal tiles lies, whose four blocks are left
// over: they read nothing more for these.
CO_DEVICE void locate_gram_blocks(const Chunk& chunk) {
  constexpr uint64_t kRows = 0x3210313322, kColumns = 0x3210201010;  // of ten tiles, the first in the lowest digit
  const int b = fresh_thread(), tile = b / 2;
  if (b >= gram_blocks(chunk)) return;
  int i = 0;
  while (lower_tiles(i + 1) <= tile) ++i;
  int j = tile - lower_tiles(i);
  if (chunk.side() == 4) {
    i = static_cast<int>(kRows >> 4 * tile & 15);
    j = static_cast<int>(kColumns >> 4 * tile & 15);
  }
  chunk.scratch.gram_block[b] = (i * kTile + b % 2 * 16) + (j * kTile << 16);
}

// sum += kRows blocks, one below the other, from the one at `block` on, of the rows of this stage.
template <bool kSplit, int kRows>
CO_DEVICE void gram_blocks_32(float (*sum)[4][4], int32_t block, const Chunk& chunk) {
  const int lane = fresh_thread() % 32, g = lane / 4, t = lane % 4;
  const int pitch = x_pitch(chunk.padded());
  const float* left = chunk.arena() + t * pitch + (block & 0xffff) + g;
  const float* right = chunk.arena() + t * pitch + (block >> 16) + g;
  CO_NO_UNROLL
  for (int k = chunk.scratch.staged_rows; k > 0; k -= 8) {
    float a[kRows][4], a_low[kRows][4];
    CO_UNROLL
    for (int m = 0; m < kRows; ++m) {
      CO_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float value = left[i / 2 * 4 * pitch + i % 2 * 8 + m * 16];
        const SplitFloat split(value);
        a[m][i] = kSplit ? split.high : value;
        a_low[m][i] = split.low;
      }
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
      CO_UNROLL
      for (int m = 0; m < kRows; ++m) {
        if (kSplit) {
          float term[4] = {};
          mma_m16n8k8_tf32(term, a_low[m], b);
          mma_m16n8k8_tf32(term, a[m], b_low);
          mma_m16n8k8_tf32(term, a[m], b);
          add(sum[m][n], term);
        } else {
          mma_m16n8k8_tf32(sum[m][n], a[m], b);
        }
      }
    }
    left += 8 * pitch;
    right += 8 * pitch;
  }
}

// The same for a stage of 16-bit numbers.  They lie [row][unit] and the mma wants pairs of rows of one unit, which is
// what ldmatrix makes when it transposes.  kDiagonal: the tile is on the diagonal, and its right operand is the left
// one.  kExtra: the third sum is the upper or lower half of the diagonal tile in the same rows.
template <bool kBFloat16, int kRows, bool kDiagonal, bool kExtra>
CO_DEVICE void gram_blocks_16(float (*sum)[4][4], int32_t block, const Chunk& chunk, bool is_lower) {
  const int lane = fresh_thread() % 32, pitch = x_pitch(chunk.padded());
  // Matrices 0 .. 3 of the left operand: rows 0 and units 0, rows 0 and units 8, rows 8 and units 0, rows 8 and units
  // 8; of the right one, which takes them in pairs, the second and the third change places.
  const uint16_t* const stage = reinterpret_cast<const uint16_t*>(chunk.arena()) + lane % 8 * pitch;
  const uint16_t* left = stage + lane / 16 * 8 * pitch + lane / 8 % 2 * 8 + (block & 0xffff);
  const uint16_t* right = stage + lane / 8 % 2 * 8 * pitch + lane / 16 * 8 + (block >> 16);
  CO_UNROLL_2
  for (int k = chunk.scratch.staged_rows; k > 0; k -= 16) {
    uint32_t a[kRows][4], b[2][4];
    CO_UNROLL
    for (int m = 0; m < kRows; ++m) load_matrices_transposed(a[m], left + m * 16);
    CO_UNROLL
    for (int n = 0; !kDiagonal && n < 2; ++n) load_matrices_transposed(b[n], right + n * 16);
    CO_UNROLL
    for (int n = 0; n < 4; ++n) {
      const uint32_t first = kDiagonal ? a[n / 2 % kRows][n % 2] : b[n / 2][n % 2 * 2],
                     second = kDiagonal ? a[n / 2 % kRows][n % 2 + 2] : b[n / 2][n % 2 * 2 + 1];
      CO_UNROLL
      for (int m = 0; m < kRows; ++m) mma_m16n8k16<kBFloat16>(sum[m][n], a[m], first, second);
    }
    if constexpr (kExtra) {
      uint32_t half[4];
      CO_UNROLL
      for (int i = 0; i < 4; ++i) half[i] = is_lower ? a[1][i] : a[0][i];
      CO_UNROLL
      for (int n = 0; n < 4; ++n) mma_m16n8k16<kBFloat16>(sum[2][n], half, a[n / 2][n % 2], a[n / 2][n % 2 + 2]);
    }
    left += 16 * pitch;
    right += 16 * pitch;
  }
}

template <bool kBFloat16, int kRows, bool kExtra>
CO_DEVICE void multiply_stage_16(float (*sum)[4][4], int32_t block, const Chunk& chunk, bool is_lower) {
  if constexpr (kExtra) {
    gram_blocks_16<kBFloat16, kRows, false, true>(sum, block, chunk, is_lower);
  } else if (kRows == 2 && (block & 0xffff) == block >> 16) {
    gram_blocks_16<kBFloat16, kRows, kRows == 2, false>(sum, block, chunk, false);
  } else {
    gram_blocks_16<kBFloat16, kRows, false, false>(sum, block, chunk, false);
  }
}

// kExtra: with the block of the diagonal tile in the same rows, of which there is one for every half.
template <int kRows, typename Raw, bool kExtra = false>
CO_DEVICE void multiply_stage(float (*sum)[4][4], int first, const PreconditionLayer& layer, const Chunk& chunk,
                              bool is_lower = false) {
  if (first >= gram_blocks(chunk)) return;
  const int32_t block = chunk.scratch.gram_block[first];
  if constexpr (sizeof(Raw) == 2) {
    if (layer.x_dtype == DType::kBFloat16) {
      multiply_stage_16<true, kRows, kExtra>(sum, block, chunk, is_lower);
    } else {
      multiply_stage_16<false, kRows, kExtra>(sum, block, chunk, is_lower);
    }
  } else if (chunk.task.tf32) {
    gram_blocks_32<false, kRows>(sum, block, chunk);
  } else {
    gram_blocks_32<true, kRows>(sum, block, chunk);
  }
}

// tiles <- or += sum; sum <- 0.
CO_DEVICE void add_partial(float (&sum)[4][4], int32_t block, const Chunk& chunk, bool first) {
  const int lane = fresh_thread() % 32;
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
  // A warp has whole tiles, which share their right operand, and of what is left a block.
  const auto block_of = [](int u) {
    const int warp = fresh_thread() / 32, before = u / 2 * 2 * kWarps;
    return u + 1 == kUnits && kUnits % 2 == 1 ? before + warp : before + warp * 2 + u % 2;
  };
  // The rows of the stage that begins with sampled row `first`; and how many the stage before it has, which is
  // multiplied next: zeros fill them up to a whole product.
  const auto locate = [&](int first) {
    constexpr int kStep = sizeof(Raw) == 2 ? 16 : 8;  // rows of a product
    const int thread = fresh_thread();
    if (thread == 0) {
      const int staged = min(chunk.x_stage(), chunk.x_rows() - first + chunk.x_stage());
      chunk.scratch.staged_rows = (staged + kStep - 1) / kStep * kStep;
    }
    if (thread < chunk.x_stage() && first + thread < chunk.x_rows()) {
      const int64_t row = chunk.x_row(first + thread);
      chunk.scratch.row_offset[thread] =
          chunk.input.data == layer.x ? strided_offset(static_cast<uint32_t>(row), layer.x_row_size, layer.x_row_stride)
                                      : row * chunk.input.packed_pitch;
    }
  };

  uint32_t raw[kStageWords / (kWarps * 32)] = {};  // or its registers would be kept for it while a try is factored
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
      // The sums of 16 warps leave no registers for the operands of two blocks; for float32 only sm_90a's compiler
      // does.
      const bool pairs = kWarps == 8 && (sizeof(Raw) == 2 || by_warpgroups(chunk.task.warpgroups));
      // The block of a diagonal tile that is left over for this warp goes with its tile, where that costs no loads.
      constexpr bool kJoins = kWarps == 8 && kUnits == 3 && sizeof(Raw) == 2;
      const bool joins = kJoins && chunk.side() == 4 && fresh_thread() / 32 < 4;
      if (!pairs || (u % 2 == 0 && u + 1 == kUnits)) {
        if (!joins) multiply_stage<1, Raw>(sum + u, block_of(u), layer, chunk);
      } else if (u % 2 == 0) {
        if (joins) {
          multiply_stage<2, Raw, kJoins>(sum, block_of(u), layer, chunk, fresh_thread() / 32 % 2 == 1);
        } else {
          multiply_stage<2, Raw>(sum + u, block_of(u), layer, chunk);
        }
      }
    }
    if (next % kPartialRows == 0 || next >= chunk.x_rows()) {
      CO_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        if (block_of(u) < gram_blocks(chunk))
          add_partial(sum[u], chunk.scratch.gram_block[block_of(u)], chunk, next <= kPartialRows);
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
