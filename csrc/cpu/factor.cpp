// The factor tasks of a launch: one chunk is damped, factored and inverted.
#include <algorithm>
#include <type_traits>

#include "consistency_ops/damping.h"
#include "cpu/chunk_storage.h"
#include "cpu/few_rows.h"
#include "cpu/launch.h"

namespace consistency_ops::cpu {

namespace {

// To a layer and those after it that have its input.
void report(const PreconditionLayer& layer, int64_t members, int64_t c, int info, double damping) {
  for (const PreconditionLayer* member = &layer; member != &layer + members; ++member) {
    if (member->damping_used != nullptr) member->damping_used[c] = static_cast<float>(damping);
    if (member->info != nullptr) member->info[c] = info;
  }
}

}  // namespace

template <typename T>
double Launch<T>::multiplier(const Task& task) const {
  const LayerPlan& plan = plan_.layers[task.layer];
  const double mean = options_.stages & kStageCovariance ? 1.0 / static_cast<double>(plan.sample.count) : 1.0;
  if (!options_.trace_scaling) return mean;
  DiagonalSum total;
  for (const DiagonalSum& diagonal : states_[task.layer].diagonals) {
    total.sum += diagonal.sum;
    total.count += diagonal.count;
  }
  return mean / trace_scale(total.sum, total.count, mean);
}

template <typename T>
void Launch<T>::factor(const Task& task, const Scratch<T>& s) {
  const PreconditionLayer& layer = layers_[task.layer];
  const LayerPlan& plan = plan_.layers[task.layer];
  const int64_t c = task.begin;
  const ChunkPlan& chunk = plan.chunks[c];
  LayerState& state = states_[task.layer];
  if (!(options_.stages & kStageFactor)) {
    state.info[c] = layer.info[c];
    if (state.info[c] == 0) to_tiles(task.layer, c, s);
    return;
  }
  const ChunkKernels<T>& kernels = isa_kernels<T>().chunk;
  T* matrix = this->matrix(chunk);
  const int64_t height = int64_t{chunk.panels} * kPanel, elements = height * height;
  double multiplied = 1;
  double damping = options_.damping;
  int info = 0, tries = kMaxTries;
  if (whitened_ == nullptr || whitened_[task.layer].average == nullptr) {
    if (plan.sample.count > 0 || !(options_.stages & kStageCovariance)) multiplied = multiplier(task);
  } else {
    const double tau = average(task.layer, c);
    if (options_.trace_scaling) multiplied = 1 / trace_scale(tau, 1, 1.0);
  }
  if (whitened_ != nullptr && !seen(task.layer)) {  // given up, as a matrix of NaN
    info = 1;
    tries = 0;
    damping = damping_of_try<double>(options_.damping, kMaxTries - 1);
  }
  const T scale = static_cast<T>(multiplied);
  if (chunk.row_panels > 0) {
    state.few_rows[c] = factor_few(chunk, state.diagonals[c], plan.sample.count, scale, s);
    if (state.few_rows[c]) {
      report(layer, plan.members, c, info, damping);
      return;
    }
  }
  for (int failed = 0; failed < tries; ++failed) {
    damping = damping_of_try<double>(options_.damping, failed);
    for (int64_t j = 0; j < height; j += kPanel) {  // the upper blocks, a panel at a time
      const int64_t begin = j * height, end = begin + (j + kPanel) * kPanel;
      for (int64_t e = begin; e < end; ++e) s.factor[e] = matrix[e] * scale;
    }
    for (int64_t k = 0; k < int64_t{chunk.panels} * kPanel; ++k) {
      T& pivot = s.factor[diagonal_index(chunk, k)];
      pivot = k < chunk.size ? pivot + static_cast<T>(damping) : T(1);
    }
    info = kernels.factor(s.factor, chunk.panels, s.inverse_diagonal);
    if (info == 0) break;
  }
  state.info[c] = info;
  report(layer, plan.members, c, info, damping);
  if (info == 0 && options_.triangular) {
    kernels.invert_factor(s.factor, s.inverse_diagonal, chunk.panels, matrix);
  } else if (info == 0) {
    kernels.invert(s.factor, s.inverse_diagonal, chunk.panels, s.inverse_factor, matrix);
  }
  if (layer.inverse != nullptr) {
    if (info != 0) std::fill(matrix, matrix + elements, T(0));
    if (options_.triangular) {
      to_dense_lower(chunk, matrix, options_.chunk, dense(layer.inverse, c));
    } else {
      to_dense(chunk, matrix, T(1), options_.chunk, dense(layer.inverse, c));
    }
  }
  // What is applied is the transpose of what is kept.
  if (whitened_ != nullptr && info == 0) transpose(chunk, matrix);
  if (info == 0) to_tiles(task.layer, c, s);
}

template <typename T>
void Launch<T>::to_tiles(int64_t l, int64_t c, const Scratch<T>& s) {
  const ChunkPlan& chunk = plan_.layers[l].chunks[c];
  if (chunk.tiles < 0) return;
  if constexpr (std::is_same_v<T, float>) {
    const float* inverse = matrix(chunk);
    if (chunk.tiles == chunk.storage) {
      std::copy_n(inverse, int64_t{chunk.panels} * chunk.panels * kBlock, s.factor);
      inverse = s.factor;
    }
    uint16_t* tiles = reinterpret_cast<uint16_t*>(storage_ + chunk.tiles);
    states_[l].tile_scale[c] = plan_.tiles->split(inverse, chunk.panels, tiles);
  }
}

template <typename T>
bool Launch<T>::factor_few(const ChunkPlan& chunk, const DiagonalSum& diagonal, int64_t rows, T scale,
                           const Scratch<T>& s) {
  const ChunkKernels<T>& kernels = isa_kernels<T>().chunk;
  T* storage = matrix(chunk);
  const bool fits = diagonal.count == chunk.size && scale * diagonal.sum <= kFewRowsCondition<T> * options_.damping;
  if (fits && factor_few_rows(chunk, rows, scale, static_cast<T>(options_.damping), kernels, storage, s.factor,
                              s.inverse_diagonal)) {
    return true;
  }
  const int64_t height = int64_t{chunk.panels} * kPanel;
  kernels.gram(storage, rows, int64_t{chunk.row_panels} * kPanel, chunk.size, false, s.inverse_factor);
  std::copy_n(s.inverse_factor, height * height, storage);
  return false;
}

template void Launch<float>::factor(const Task&, const Scratch<float>&);
template void Launch<double>::factor(const Task&, const Scratch<double>&);

}  // namespace consistency_ops::cpu
