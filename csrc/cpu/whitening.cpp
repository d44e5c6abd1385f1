// Whitening: a gradient times L^-T, and the displacement that an optimizer made of it times L^-1 (whitening.h), with
// the running average of the covariance that L comes from.
#include "cpu/whitening.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <vector>

#include "cpu/launch.h"

namespace consistency_ops {

namespace cpu {

template <typename T>
void Launch<T>::look_at_average(int64_t l, int64_t c, const DiagonalSum& diagonal) {
  LayerState& state = states_[l];
  const ChunkPlan& chunk = plan_.layers[l].chunks[c];
  if (diagonal.count != chunk.size) state.finite.store(false, std::memory_order_relaxed);
  if (whitened_[l].average == nullptr) return;
  const int64_t width = options_.chunk;
  const T* average = static_cast<const T*>(whitened_[l].average) + c * width * width;
  double sum = 0;
  for (int64_t k = 0; k < chunk.size; ++k) sum += average[k * width + k];
  state.averaged[c] = sum;
}

template <typename T>
double Launch<T>::average(int64_t l, int64_t c) {
  const LayerPlan& plan = plan_.layers[l];
  const ChunkPlan& chunk = plan.chunks[c];
  const WhitenedLayer& of = whitened_[l];
  const bool enters = entered(l);
  const double mean = enters ? (1 - decay_) / static_cast<double>(plan.sample.count) : 0;
  const double old_weight = *static_cast<const T*>(of.average_weight);
  const double weight = enters ? decay_ * old_weight + (1 - decay_) : old_weight;
  if (!(weight > 0)) return 0;
  const double kept = enters ? decay_ : 1;
  double sum = 0;
  for (size_t i = 0; i < plan.chunks.size(); ++i) {
    sum += kept * states_[l].averaged[i];
    if (enters) sum += mean * states_[l].diagonals[i].sum;
  }
  const int64_t width = options_.chunk, height = int64_t{chunk.panels} * kPanel;
  const T a = static_cast<T>(kept), b = static_cast<T>(mean), inverse_weight = static_cast<T>(1 / weight);
  T* stored = static_cast<T*>(of.average) + c * width * width;
  for (int64_t i = 0; i < chunk.size; ++i) {
    for (int64_t first = i / kPanel * kPanel; first < chunk.size; first += kPanel) {
      T* row = storage_ + chunk.storage + first * height + i * kPanel;
      const int64_t lanes = std::min<int64_t>(kPanel, chunk.size - first);
      for (int64_t j = 0; j < lanes; ++j) {
        T total = a * stored[i * width + first + j];
        if (enters) total += b * row[j];
        stored[i * width + first + j] = total;
        row[j] = total * inverse_weight;
      }
    }
  }
  for (int64_t i = 1; i < chunk.size; ++i) {
    for (int64_t j = 0; j < i; ++j) stored[i * width + j] = stored[j * width + i];
  }
  return sum / weight / static_cast<double>(plan.units);
}

template <typename T>
bool Launch<T>::seen(int64_t l) const {
  if (whitened_[l].average == nullptr) return plan_.layers[l].sample.count > 0;
  return entered(l) || *static_cast<const T*>(whitened_[l].average_weight) > 0;
}

template void Launch<float>::look_at_average(int64_t, int64_t, const DiagonalSum&);
template void Launch<double>::look_at_average(int64_t, int64_t, const DiagonalSum&);
template double Launch<float>::average(int64_t, int64_t);
template double Launch<double>::average(int64_t, int64_t);
template bool Launch<float>::seen(int64_t) const;
template bool Launch<double>::seen(int64_t) const;

namespace {

template <typename T>
Status whiten(const PreconditionLayer* layers, const WhitenedLayer* whitened, const std::vector<char>& finite,
              const PreconditionOptions& options, double decay, const Plan& plan, const ThreadPool& pool) {
  auto after = [&](const Launch<T>& launch) {
    if (options.stages == kStageApply) return;
    for (size_t l = 0; l < plan.layers.size(); ++l) {
      if (whitened[l].average == nullptr || !plan.layers[l].active || !launch.entered(l)) continue;
      T* weight = static_cast<T*>(whitened[l].average_weight);
      *weight = static_cast<T>(decay * *weight + (1 - decay));
    }
  };
  return run<T>(layers, options, plan, pool, {whitened, decay, false, finite.data()}, after);
}

template <typename T>
Status unwhiten(const PreconditionLayer* layers, const WhitenedLayer* whitened, const PreconditionOptions& options,
                const WhiteningOptions& whitening, const Plan& plan, double* squares, const ThreadPool& pool) {
  const auto count = static_cast<int64_t>(plan.layers.size());
  std::vector<T> scale(count, T(1));
  auto after = [&](const Launch<T>& launch) {
    int64_t end;
    for (int64_t l = 0; l < count; l = end) {
      Squares sum;
      for (end = l; end < count && (end == l || !whitened[end].first); ++end) {
        const Squares of_group = launch.squares(end);
        sum.before += of_group.before;
        sum.after += of_group.after;
      }
      squares[2 * l] = sum.before;
      squares[2 * l + 1] = sum.after;
      const double ratio = std::sqrt(sum.before / sum.after);
      if (!whitening.keep_norm || !(sum.after > 0) || !(ratio - ratio == 0)) continue;
      std::fill(scale.begin() + l, scale.begin() + end, static_cast<T>(ratio));
    }
  };
  const Status status = run<T>(layers, options, plan, pool, {whitened, 0, true, nullptr}, after);
  if (status != Status::kOk || !whitening.finish) return status;
  std::atomic<int64_t> next{0};
  auto finish = [&](int64_t) {
    for (int64_t at = next.fetch_add(1); at < static_cast<int64_t>(plan.tasks.size()); at = next.fetch_add(1)) {
      const Task& task = plan.tasks[at];
      if (task.phase != Phase::kApply || !whitened[task.layer].moves) continue;
      add_scaled<T>(layers[task.layer], whitened[task.layer], task.begin, task.end - task.begin, scale[task.layer]);
    }
  };
  if (is_serial(plan, layers, pool)) {
    finish(0);
  } else {
    pool.run(
        pool.context, pool.threads,
        [](void* argument, int64_t thread) { (*static_cast<decltype(finish)*>(argument))(thread); }, &finish);
  }
  return Status::kOk;
}

bool valid_whitening(const PreconditionLayer* layers, const WhitenedLayer* whitened, int64_t count,
                     const PreconditionOptions& options, bool unwhitens) {
  if (!options.triangular || (options.stages != kStageApply && (unwhitens || options.stages != kStageAll))) {
    return false;
  }
  PreconditionOptions plain = options;
  plain.triangular = false;
  if (!valid(layers, count, plain)) return false;
  for (int64_t l = 0; l < count; ++l) {
    const PreconditionLayer& layer = layers[l];
    const WhitenedLayer& of = whitened[l];
    const bool empty = layer.units == 0 || layer.outputs == 0;
    if (layer.same_input || (layer.inverse == nullptr && !empty)) return false;
    if ((of.average == nullptr) != (of.average_weight == nullptr)) return false;
    if (unwhitens && !empty && (of.before == nullptr || (layer.has_bias && of.bias_before == nullptr))) return false;
  }
  return true;
}

}  // namespace
}  // namespace cpu

Status whiten_cpu(const PreconditionLayer* layers, const WhitenedLayer* whitened, int64_t count,
                  const PreconditionOptions& options, const WhiteningOptions& whitening, const ThreadPool& pool) {
  if (!cpu::valid_whitening(layers, whitened, count, options, false)) return Status::kInvalidArgument;
  if (!(whitening.decay >= 0 && whitening.decay < 1)) return Status::kInvalidArgument;
  try {
    const cpu::Plan plan =
        cpu::make_plan(layers, count, options, std::max(1, pool.threads), cpu::pair_kernels() != nullptr, true);
    std::vector<char> finite(count);
    for (int64_t l = 0; l < count; ++l) {
      if (!plan.layers[l].active) cpu::write_defaults(layers[l], options);
      if (whitened[l].has_gradient != nullptr && cpu::has_gradient(layers[l])) *whitened[l].has_gradient = 1;
      finite[l] = whitened[l].average == nullptr || cpu::is_finite(layers[l]);
    }
    return options.float64 ? cpu::whiten<double>(layers, whitened, finite, options, whitening.decay, plan, pool)
                           : cpu::whiten<float>(layers, whitened, finite, options, whitening.decay, plan, pool);
  } catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
  }
}

Status unwhiten_cpu(const PreconditionLayer* layers, const WhitenedLayer* whitened, int64_t count,
                    const PreconditionOptions& options, const WhiteningOptions& whitening, double* squares,
                    const ThreadPool& pool) {
  if (!cpu::valid_whitening(layers, whitened, count, options, true)) return Status::kInvalidArgument;
  try {
    std::fill(squares, squares + 2 * count, 0.0);
    const cpu::Plan plan = cpu::make_plan(layers, count, options, std::max(1, pool.threads), false);
    return options.float64 ? cpu::unwhiten<double>(layers, whitened, options, whitening, plan, squares, pool)
                           : cpu::unwhiten<float>(layers, whitened, options, whitening, plan, squares, pool);
  } catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
  }
}

}  // namespace consistency_ops
