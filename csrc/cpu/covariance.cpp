// The covariance tasks of a launch: X^T X of some chunks, or the matrices that the caller has brought.
#include <algorithm>
#include <type_traits>

#include "cpu/chunk_storage.h"
#include "cpu/few_rows.h"
#include "cpu/launch.h"

namespace consistency_ops::cpu {

namespace {

constexpr uint32_t kPairOfOnes = 0x3F803F80;  // 1, 1 in bfloat16

}  // namespace

template <typename T>
void Launch<T>::covariance(const Task& task, const Scratch<T>& s) {
  const PreconditionLayer& layer = layers_[task.layer];
  const LayerPlan& plan = plan_.layers[task.layer];
  const bool computed = options_.stages & kStageCovariance;
  if (computed) {
    accumulate(task, s);
  } else if (options_.stages & kStageFactor) {
    for (int64_t c = task.begin; c < task.end; ++c) {
      from_dense(plan.chunks[c], dense(layer.covariance, c), options_.chunk, T(1), matrix(plan.chunks[c]));
    }
  } else {
    for (int64_t c = task.begin; c < task.end; ++c) {
      const ChunkPlan& chunk = plan.chunks[c];
      if (whitened_ != nullptr && !unwhitens_) {
        from_dense_transposed(chunk, dense(layer.inverse, c), options_.chunk, matrix(chunk));
      } else {
        from_dense(chunk, dense(layer.inverse, c), options_.chunk, T(1), matrix(chunk));
      }
    }
    return;
  }
  for (int64_t c = task.begin; c < task.end; ++c) {
    const ChunkPlan& chunk = plan.chunks[c];
    const T* sums = matrix(chunk);
    DiagonalSum diagonal;
    for (int64_t k = 0; k < chunk.size && (!computed || plan.sample.count > 0); ++k) {
      const T moment = chunk.row_panels > 0 ? few_rows_moment(chunk, sums, k) : sums[diagonal_index(chunk, k)];
      if (moment - moment != 0) continue;  // NaN or Inf
      diagonal.sum += moment;
      ++diagonal.count;
    }
    states_[task.layer].diagonals[c] = diagonal;
    if (whitened_ != nullptr) look_at_average(task.layer, c, diagonal);
    if (computed && layer.covariance != nullptr) {
      to_dense(chunk, sums, T(1) / static_cast<T>(plan.sample.count), options_.chunk, dense(layer.covariance, c));
    }
  }
}

template <typename T>
void Launch<T>::accumulate(const Task& task, const Scratch<T>& s) {
  const PreconditionLayer& layer = layers_[task.layer];
  const LayerPlan& plan = plan_.layers[task.layer];
  const IsaKernels<T>& kernels = isa_kernels<T>();
  const GatherKernels<T>& gather = kernels.gather[static_cast<int>(layer.x_dtype)];
  const PairKernels* pairs = plan.in_pairs ? pair_kernels() : nullptr;
  const TileScope tiles(pairs == nullptr ? nullptr : pairs->tiles);
  const int32_t first_panel = plan.chunks[task.begin].first_panel;
  const ChunkPlan& last = plan.chunks[task.end - 1];
  const Run* runs = plan.runs.data() + plan.chunks[task.begin].first_run;
  const int64_t num_runs = last.first_run + last.num_runs - plan.chunks[task.begin].first_run;

  // The lanes that no run writes: the padding of every chunk, and the bias unit; in as many rows as a block has.
  const int64_t read = plan.packed_rows(std::min(plan.row_block, plan.sample.count));
  for (int64_t c = task.begin; c < task.end; ++c) {
    const ChunkPlan& chunk = plan.chunks[c];
    const int64_t panel = chunk.first_panel - first_panel + chunk.panels - 1;
    T* tail = s.packed + panel * plan.packed_panel();
    for (int64_t lane = chunk.size - (chunk.panels - 1) * kPanel; lane < kPanel; ++lane) {
      for (int64_t k = 0; k < read; ++k) tail[k * kPanel + lane] = 0;
    }
    if (c == plan.bias_chunk) {
      T* ones = s.packed + (chunk.first_panel - first_panel + plan.bias_column / kPanel) * plan.packed_panel() +
                plan.bias_column % kPanel;
      for (int64_t k = 0; k < read; ++k) ones[k * kPanel] = 1;
      if (pairs != nullptr) {
        uint32_t* words = reinterpret_cast<uint32_t*>(ones);
        for (int64_t k = 0; k < read; ++k) words[k * kPanel] = kPairOfOnes;
      }
    }
  }

  for (int64_t row = 0; row < plan.sample.count; row += plan.row_block) {
    const int64_t rows = std::min(plan.row_block, plan.sample.count - row);
    sampled_offsets(layer, plan, row, rows, s.row_offset);
    T* block = s.packed - first_panel * plan.packed_panel();
    if constexpr (std::is_same_v<T, float>) {
      if (pairs != nullptr) {
        accumulate_pairs(*pairs, task, s, rows, row > 0, runs, num_runs);
        continue;
      }
    }
    gather.pack(layer.x, s.row_offset, rows, layer.x_unit_stride, layer.units, runs, num_runs, block);
    for (int64_t c = task.begin; c < task.end; ++c) {
      const ChunkPlan& chunk = plan.chunks[c];
      const T* packed = s.packed + (chunk.first_panel - first_panel) * plan.packed_panel();
      if (chunk.row_panels > 0) {
        store_few_rows(chunk, packed, plan.packed_panel(), rows, matrix(chunk));
      } else {
        kernels.chunk.gram(packed, rows, plan.pitch(), chunk.size, row > 0, matrix(chunk));
      }
    }
  }
}

template <typename T>
void Launch<T>::accumulate_pairs(const PairKernels& pairs, const Task& task, const Scratch<float>& s, int64_t rows,
                                 bool add, const Run* runs, int64_t num_runs) {
  const PreconditionLayer& layer = layers_[task.layer];
  const LayerPlan& plan = plan_.layers[task.layer];
  const int32_t first_panel = plan.chunks[task.begin].first_panel;
  uint32_t* packed = reinterpret_cast<uint32_t*>(s.packed);
  pairs.pack(layer.x, s.row_offset, rows, layer.x_unit_stride, layer.units, runs, num_runs,
             packed - first_panel * plan.packed_panel());
  for (int64_t c = task.begin; c < task.end; ++c) {
    const ChunkPlan& chunk = plan.chunks[c];
    const int64_t at = (chunk.first_panel - first_panel) * plan.packed_panel();
    if (c == plan.bias_chunk && rows % 2 != 0) {
      const int64_t bias = at + plan.bias_column / kPanel * plan.packed_panel() + plan.bias_column % kPanel;
      packed[bias + rows / 2 * kPanel] = kPairOfOnes & 0xFFFF;
    }
    pairs.gram(packed + at, plan.packed_rows(rows), plan.pitch(), chunk.panels, add, matrix(chunk));
  }
}

template void Launch<float>::covariance(const Task&, const Scratch<float>&);
template void Launch<double>::covariance(const Task&, const Scratch<double>&);

}  // namespace consistency_ops::cpu
