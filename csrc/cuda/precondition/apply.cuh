// G[:, c] <- G[:, c] A_c^-1 for this CTA's part of the rows of G of one layer, in place.
//
// Rows (output, tap) pass through a stage in shared memory, where A^-1 already is.  A warp multiplies 32 rows by 32
// columns (16 in CTAs of 512 threads) with TF32 tensor-core tiles: A^-1 is split in two TF32 numbers; float32 gradients
// are split as well (three products), 16-bit gradients are TF32 numbers already (two products); with `tf32` both are
// rounded (one product).  A row of the stage whose result has an element that is not finite in the gradient's own type
// is left as it was, in this chunk only.
//
// What the loads and stores cost is addresses, so a lane keeps its units through a stage, and one address is a row's
// offset and a unit's.  Figures of the model: docs/developer/kernel-model.md.
#pragma once

#include "cuda/precondition/scheduler.cuh"
#include "cuda/precondition/tile_product.cuh"

namespace consistency_ops {

constexpr int kLoadsInFlight = 8;  // of a lane

// How the lanes of a CTA cover a stage of G.  A warp takes 1 x 32 elements of a row where units are the fast dimension
// in memory, 8 x 4 where rows are (taps of a convolution).  Where the blocks of a row divide evenly among the warps, a
// lane has the same few units in all its rows, which `fixed` says; elsewhere StageWalk finds them anew.
template <int kWarps>
struct LaneOfG {
  bool tall, fixed;
  int columns, across, column;  // blocks along a row; warps that share a row; this warp's first block
  int first, count;             // its first row, and how many: the next is 1 or, if tall, 8 further

  CO_DEVICE LaneOfG(const PreconditionLayer& layer, const Chunk& chunk, int rows)
      : tall(
            rows_are_fast(layer.g_tap_stride[kMaxTapDims - 1], layer.g_tap_size[kMaxTapDims - 1], layer.g_unit_stride)),
        columns(tall ? chunk.padded() / 4 : chunk.padded() / 32),
        across(min(columns, kWarps)),
        column(fresh_thread() / 32 % across),
        count((tall ? rows / 8 : rows) / (kWarps / across)) {
    first = fresh_thread() / 32 / across * count * (tall ? 8 : 1) + (tall ? fresh_thread() % 8 : 0);
    fixed = columns % across == 0 && kWarps % across == 0 && count > 0 && count % kLoadsInFlight == 0;
  }
  // Calls f(unit, position) for the lane's units.
  template <typename F>
  CO_DEVICE void for_each_unit(const Chunk& chunk, F&& f) {
    const int lane = fresh_thread() % 32;
    CO_NO_UNROLL
    for (int c = column; c < columns; c += across) {
      const int position = tall ? c * 4 + lane / 8 : c * 32 + lane;
      f(chunk.scratch.unit[position], position);
    }
  }
};

// Calls f(row, unit, position in the stage) for every element of the stage.
template <int kWarps, typename F>
CO_DEVICE void for_each_g(const Chunk& chunk, bool tall, int rows, F&& f) {
  StageWalk<kWarps> walk(chunk.padded(), tall);
  const int steps = walk.steps(rows);
  CO_NO_UNROLL
  for (int i = 0; i < steps; ++i) {
    const int row = walk.row(i), position = walk.position(i);
    if (row < rows) f(row, chunk.scratch.unit[position], row * g_pitch(chunk.padded()) + position);
  }
}

// `count` rows of one unit, `kStep` apart, from G to the stage and back.
template <int kStep, typename Raw>
CO_DEVICE void load_unit(const Raw* column, const int64_t* row_offset, DType dtype, float* to, int pitch, int count) {
  CO_NO_UNROLL
  for (; count > 0; count -= kLoadsInFlight) {
    Raw raw[kLoadsInFlight];
    CO_UNROLL
    for (int i = 0; i < kLoadsInFlight; ++i) raw[i] = column[row_offset[i * kStep]];
    CO_UNROLL
    for (int i = 0; i < kLoadsInFlight; ++i) {
      *to = to_float<Raw>(dtype, raw[i]);
      to += kStep * pitch;
    }
    row_offset += kLoadsInFlight * kStep;
  }
}

template <int kStep, typename Raw>
CO_DEVICE void store_unit(Raw* column, const int64_t* row_offset, DType dtype, const float* from, int pitch,
                          int count) {
  CO_NO_UNROLL
  for (; count > 0; count -= kLoadsInFlight) {
    CO_UNROLL
    for (int i = 0; i < kLoadsInFlight; ++i) {
      column[row_offset[i * kStep]] = from_float<Raw>(dtype, *from);
      from += kStep * pitch;
    }
    row_offset += kLoadsInFlight * kStep;
  }
}

// arena <- the first `rows` rows of the stage of `stage`.  The place of the bias is left alone.
template <int kWarps, typename Raw>
CO_DEVICE void load_stage(const PreconditionLayer& layer, const Chunk& chunk, int rows, int stage) {
  const Raw* const g = global_memory(static_cast<const Raw*>(layer.g));
  const int64_t unit_stride = layer.g_unit_stride;
  const DType dtype = layer.g_dtype;
  const int pitch = g_pitch(chunk.padded());
  LaneOfG<kWarps> lane(layer, chunk, rows);
  if (lane.fixed && rows == stage) {
    lane.for_each_unit(chunk, [&](int32_t unit, int position) {
      float* const to = chunk.arena + lane.first * pitch + position;
      if (unit < 0) {
        for (int i = 0; unit == kNoUnit && i < lane.count; ++i) to[i * (lane.tall ? 8 : 1) * pitch] = 0.0f;
      } else if (lane.tall) {
        load_unit<8>(g + unit * unit_stride, chunk.scratch.row_offset + lane.first, dtype, to, pitch, lane.count);
      } else {
        load_unit<1>(g + unit * unit_stride, chunk.scratch.row_offset + lane.first, dtype, to, pitch, lane.count);
      }
    });
    return;
  }
  for_each_g<kWarps>(chunk, lane.tall, rows, [&](int row, int32_t unit, int at) {
    if (unit == kBiasUnit) return;
    chunk.arena[at] = unit < 0 ? 0.0f : to_float<Raw>(dtype, g[chunk.scratch.row_offset[row] + unit * unit_stride]);
  });
}

// And back: the first `rows` rows of the stage of `stage`, except those that must not be written: a 16-bit NaN would
// come back from float as another one.
template <int kWarps, typename Raw>
CO_DEVICE void store_stage(const PreconditionLayer& layer, const Chunk& chunk, int rows, int stage) {
  Raw* const g = global_memory(static_cast<Raw*>(layer.g));
  const int64_t unit_stride = layer.g_unit_stride;
  const DType dtype = layer.g_dtype;
  const int pitch = g_pitch(chunk.padded());
  LaneOfG<kWarps> lane(layer, chunk, rows);
  if (lane.fixed && rows == stage && chunk.scratch.any_not_finite == 0) {
    lane.for_each_unit(chunk, [&](int32_t unit, int position) {
      const float* const from = chunk.arena + lane.first * pitch + position;
      if (unit < 0) return;
      if (lane.tall) {
        store_unit<8>(g + unit * unit_stride, chunk.scratch.row_offset + lane.first, dtype, from, pitch, lane.count);
      } else {
        store_unit<1>(g + unit * unit_stride, chunk.scratch.row_offset + lane.first, dtype, from, pitch, lane.count);
      }
    });
    return;
  }
  for_each_g<kWarps>(chunk, lane.tall, rows, [&](int row, int32_t unit, int at) {
    if (unit < 0 || chunk.scratch.not_finite[row] != 0) return;
    g[chunk.scratch.row_offset[row] + unit * unit_stride] = from_float<Raw>(dtype, chunk.arena[at]);
  });
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

// sum += rows [32 half, 32 half + 32) of the stage times columns [first, first + kColumns) of A^-1, of which only lower
// tiles are stored: above the diagonal the transposed tile is read.
template <int kProducts, int kColumns>
CO_DEVICE void multiply_block(TileProduct<kColumns>& product, const Chunk& chunk, int half, int first, int stage) {
  const int pitch = g_pitch(chunk.padded()), column = first / kTile, within = first % kTile;
  const float* left = chunk.arena + half * 32 * pitch;
  CO_NO_UNROLL
  for (int tile = 0; tile < chunk.side(); ++tile, left += kTile) {
    if (tile >= column) {
      product.template add<kProducts>(left, pitch, 1, lower_tile(chunk.tiles, tile, column) + within, kTilePitch, 1,
                                      min(stage, kTile));
    } else {
      product.template add<kProducts>(left, pitch, 1, lower_tile(chunk.tiles, column, tile) + within * kTilePitch, 1,
                                      kTilePitch, min(stage, kTile));
    }
  }
}

// A result is written where it is smaller than this: it is finite in the gradient's own type, and no sum of tensor
// cores, which round toward zero, that stopped at the largest float32.
CO_DEVICE float written_below(DType dtype) {
  if (dtype == DType::kFloat32) return 0x1.fffff8p127f;
  return dtype == DType::kBFloat16 ? 0x1.ffp127f : 65520.0f;  // half-way to what rounds to infinity
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
  constexpr int kColumns = kWarps == 8 ? 32 : 16;  // one block a warp: 64 rows x 128 columns, or 32 x 256
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int pitch = g_pitch(chunk.padded());
  const int taps = static_cast<int>(layer.g_tap_size[0] * layer.g_tap_size[1] * layer.g_tap_size[2]);
  const int last_row = static_cast<int>(outputs.end) * taps;
  const DType dtype = layer.g_dtype;
  int bias_position = -1;
  for (int p = 0; layer.has_bias && p < chunk.size(); ++p) {
    if (chunk.scratch.unit[p] == kBiasUnit) bias_position = p;
  }
  BiasMean bias;

  for (int first = static_cast<int>(outputs.begin) * taps; first < last_row; first += stage) {
    const int rows = min(stage, last_row - first);
    __syncthreads();  // the last stage has been read and written back
    if (const int thread = fresh_thread(); thread < rows) {
      const uint32_t row = static_cast<uint32_t>(first + thread);
      const uint32_t output = row / static_cast<uint32_t>(taps);
      chunk.scratch.row_offset[thread] =
          output * layer.g_output_stride +
          strided_offset(row - output * static_cast<uint32_t>(taps), layer.g_tap_size, layer.g_tap_stride);
      chunk.scratch.bias_offset[thread] = output * layer.bias_stride;
      chunk.scratch.not_finite[thread] = 0;
      if (thread == 0) chunk.scratch.any_not_finite = 0;
      if (bias_position >= 0) {
        chunk.arena[thread * pitch + bias_position] =
            load_element(layer.bias_dtype, layer.bias_grad, chunk.scratch.bias_offset[thread]);
      }
    }
    __syncthreads();
    load_stage<kWarps, Raw>(layer, chunk, rows, stage);
    __syncthreads();

    const int blocks = chunk.padded() / kColumns, half = warp / blocks, column = warp % blocks * kColumns;
    const bool busy = half * 32 < rows;
    TileProduct<kColumns> product;
    if (busy) {
      if (chunk.task.tf32) {
        multiply_block<1>(product, chunk, half, column, stage);
      } else {
        multiply_block<kProducts>(product, chunk, half, column, stage);
      }
      const float limit = written_below(dtype);
      bool is_written = true;
      product.for_each([&](int, int, float value) { is_written = is_written && fabs(value) < limit; });
      if (!is_written) {
        atomicOr(&chunk.scratch.any_not_finite, 1);
        product.for_each([&](int row, int, float value) {
          if (!(fabs(value) < limit)) atomicOr(&chunk.scratch.not_finite[half * 32 + row], 1);
        });
      }
    }
    __syncthreads();  // the stage has been read, and the flags are complete
    if (busy) {
      product.for_each([&](int row, int at, float value) {
        row += half * 32;
        if (row < rows && chunk.scratch.not_finite[row] == 0) chunk.arena[row * pitch + column + at] = value;
      });
    }
    __syncthreads();
    store_stage<kWarps, Raw>(layer, chunk, rows, stage);
    if (bias_position >= 0) bias.add_stage(layer, chunk, bias_position, rows, taps);
  }
}

}  // namespace consistency_ops
