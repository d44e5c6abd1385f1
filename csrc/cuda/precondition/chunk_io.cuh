// The covariance or inverse of a chunk between shared and device memory, its trace scale and its damping.
//
// What a caller sees (PreconditionLayer's covariance and inverse) is [chunks, chunk, chunk] row-major.  What CTAs of
// one launch tell each other through the workspace is the tiles as they lie in shared memory, 16 bytes a thread: 41 KiB
// for 128 units instead of 64, and no index to compute.
#pragma once

#include "consistency_ops/damping.h"
#include "cuda/precondition/chunk.cuh"

namespace consistency_ops {

CO_DEVICE int64_t covariance_offset(const PreconditionOptions& options, int chunk, int row, int column) {
  return (static_cast<int64_t>(chunk) * options.chunk + row) * options.chunk + column;
}

// Calls f(row, column, address) for the lower tiles, whose diagonal ones are complete.
template <typename F>
CO_DEVICE void for_each_element(const Chunk& chunk, int threads, F&& f) {
  int i = 0, j = 0;
  CO_NO_UNROLL
  for (int tile = 0; tile < lower_tiles(chunk.side()); ++tile) {
    CO_NO_UNROLL
    for (int e = fresh_thread(); e < kTile * kTile; e += threads) {
      f(i * kTile + e / kTile, j * kTile + e % kTile,
        chunk.tiles + tile * kTileFloats + e / kTile * kTilePitch + e % kTile);
    }
    if (++j > i) {
      ++i;
      j = 0;
    }
  }
}

// tiles * scale -> [chunk, chunk] row-major, both triangles, or zeros in the upper one if it is `lower`; zeros past the
// chunk's own units, and everywhere if scale is 0.  The CTAs of a cluster hold the same tiles and write a part each.
CO_DEVICE void store_matrix(const PreconditionOptions& options, const Chunk& chunk, float* matrices, float scale,
                            int threads, bool lower = false) {
  CO_NO_UNROLL
  for (int e = chunk.task.rank * threads + fresh_thread(); e < options.chunk * options.chunk;
       e += chunk.task.cluster * threads) {
    const int row = e / options.chunk, column = e % options.chunk;
    const int i = max(row, column), j = min(row, column);
    const float value = lower_tile(chunk.tiles, min(i, chunk.padded() - 1) / kTile,
                                   min(j, chunk.padded() - 1) / kTile)[i % kTile * kTilePitch + j % kTile];
    const bool inside = i < chunk.size() && scale != 0.0f && !(lower && row < column);
    matrices[covariance_offset(options, chunk.task.chunk, row, column)] = inside ? value * scale : 0.0f;
  }
}

CO_DEVICE void load_matrix(const PreconditionOptions& options, const Chunk& chunk, const float* matrices, int threads) {
  for_each_element(chunk, threads, [&](int row, int column, float* element) {
    const bool inside = row < chunk.size() && column < chunk.size();
    *element = inside ? matrices[covariance_offset(options, chunk.task.chunk, row, column)] : 0.0f;
  });
  __syncthreads();
}

// tiles -> workspace.  The CTAs of a cluster write a part each.
CO_DEVICE void store_tiles(const Chunk& chunk, float* record, int threads) {
  CO_NO_UNROLL
  for (int e = chunk.task.rank * threads + fresh_thread(); e < chunk.tile_floats() / 4;
       e += chunk.task.cluster * threads) {
    global_memory(reinterpret_cast<Float4*>(record))[e] = reinterpret_cast<const Float4*>(chunk.tiles)[e];
  }
}

// tiles <- the sum of `count` records, in their order.  All threads; ends with a barrier.
CO_DEVICE void load_tiles(const Chunk& chunk, const float* records, int count, int threads) {
  const int stride = chunk.records.floats / 4;
  CO_NO_UNROLL
  for (int e = fresh_thread(); e < chunk.tile_floats() / 4; e += threads) {
    const Float4* from = global_memory(reinterpret_cast<const Float4*>(records)) + e;
    Float4 sum = *from;
    CO_UNROLL_4
    for (int r = 1; r < count; ++r) add(sum, from[static_cast<int64_t>(r) * stride]);
    reinterpret_cast<Float4*>(chunk.tiles)[e] = sum;
  }
  __syncthreads();
}

// The finite elements of a diagonal.
struct DiagonalSum {
  float sum;
  int32_t count;
};

// Of the covariance of the layer as it is stored: in this chunk's own tiles where that is the whole layer, else in the
// partial covariances in the workspace, else in `covariance`.  The order of the sum depends only on the shape of the
// layer and on its number of gram tasks.
CO_DEVICE DiagonalSum layer_diagonal(const PreconditionOptions& options, const Chunk& chunk, const float* covariance,
                                     int threads) {
  const int thread = fresh_thread(), lane = thread % 32, warp = thread / 32;
  const Division& division = chunk.task.division;
  const int gram_tasks = chunk.task.of_layer.gram_tasks;
  float sum = 0.0f;
  int32_t count = 0;
  const auto add_finite = [&](float value) {
    if (!is_finite(value)) return;
    sum += value;
    ++count;
  };
  CO_NO_UNROLL
  for (int64_t e = thread; e < division.chunks * options.chunk; e += threads) {
    const int c = static_cast<int>(e / options.chunk), u = static_cast<int>(e % options.chunk);
    const int64_t size =
        chunk_begin(division.units, division.chunks, c + 1) - chunk_begin(division.units, division.chunks, c);
    if (u >= size) continue;
    const int in_tiles = lower_tiles(u / kTile + 1) * kTileFloats - kTileFloats + u % kTile * (kTilePitch + 1);
    if (division.chunks == 1) {
      add_finite(chunk.tiles[in_tiles]);
    } else if (gram_tasks > 0) {
      const float* record =
          global_memory(chunk.records.gram) + static_cast<int64_t>(c) * gram_tasks * chunk.records.floats;
      float value = record[in_tiles];
      for (int s = 1; s < gram_tasks; ++s) value += record[static_cast<int64_t>(s) * chunk.records.floats + in_tiles];
      add_finite(value);
    } else {
      add_finite(covariance[covariance_offset(options, c, u, u)]);
    }
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    count += __shfl_xor_sync(0xffffffffu, count, lanes);
  }
  if (lane == 0) {
    chunk.scratch.warp_sum[warp] = sum;
    chunk.scratch.warp_count[warp] = count;
  }
  __syncthreads();
  sum = 0.0f;
  count = 0;
  CO_NO_UNROLL
  for (int w = 0; w < threads / 32; ++w) {
    sum += chunk.scratch.warp_sum[w];
    count += chunk.scratch.warp_count[w];
  }
  return {sum, count};
}

// tau of the layer (damping.h), whose covariance is `multiplier` times what is stored.
CO_DEVICE float layer_trace_scale(const PreconditionOptions& options, const Chunk& chunk, const float* covariance,
                                  float multiplier, int threads) {
  const DiagonalSum diagonal = layer_diagonal(options, chunk, covariance, threads);
  return trace_scale(diagonal.sum, diagonal.count, multiplier);
}

// tiles <- tiles * scale + damping I, and the identity past the chunk's own units.  A lane has elements of one column
// of every tile.
template <int kWarps>
CO_DEVICE void damp(const Chunk& chunk, float scale, float damping) {
  constexpr int kRows = kTile / kWarps;
  const int lane = fresh_thread() % 32, warp = fresh_thread() / 32, size = chunk.size();
  float* at = chunk.tiles + warp * kTilePitch + lane;
  int i = 0, j = 0;
  CO_UNROLL_2
  for (int left = lower_tiles(chunk.side()); left > 0; --left, at += kTileFloats) {
    float value[kRows];
    CO_UNROLL
    for (int r = 0; r < kRows; ++r) value[r] = at[r * kWarps * kTilePitch];
    CO_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int row = warp + r * kWarps;
      const bool diagonal = i == j && row == lane, inside = row < size - i * kTile && lane < size - j * kTile;
      const float one = diagonal ? 1.0f : 0.0f;
      at[r * kWarps * kTilePitch] = inside ? fma(value[r], scale, diagonal ? damping : 0.0f) : one;
    }
    if (++j > i) {
      ++i;
      j = 0;
    }
  }
}

}  // namespace consistency_ops
