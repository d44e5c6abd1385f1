// What a launch of whitening does beside the steps of a correction: it looks at the gradient, keeps the running average
// of the covariance, and scales and adds displacements that have been mapped back.
//
// Rows enter the average of a layer only where all of its G is finite.  So the gram tasks of a layer also read its G,
// a part each, and leave what they saw in the workspace (GramStatus), where the factor tasks of all chunks find it; L2
// usually still has that part of G when it is corrected.  A factor task changes its chunk of the average in place.  The
// weight of the average is read by all of them, so it is changed by the last CTA of the launch.
//
// The norm of a displacement is known when all of its parts have been multiplied.  So apply tasks leave D L^-1 in the
// weight, and the squares of their part in the workspace (SquareSums); restore tasks add these up in their order,
// scale, and add what the weight was before.
#pragma once

#include <type_traits>

#include "cuda/precondition/chunk_io.cuh"
#include "cuda/precondition/scheduler.cuh"

namespace consistency_ops {

CO_DEVICE bool has_moved(const PreconditionParams& params, const Task& task) {
  return params.whitening.has_gradient[params.whitening.number[task.layer]] != 0;
}

CO_DEVICE int64_t taps_of(const PreconditionLayer& layer) {
  return layer.g_tap_size[0] * layer.g_tap_size[1] * layer.g_tap_size[2];
}

CO_DEVICE int64_t offset_of_row(const PreconditionLayer& layer, uint32_t row) {
  const uint32_t taps = static_cast<uint32_t>(taps_of(layer)), output = row / taps;
  return output * layer.g_output_stride + strided_offset(row - output * taps, layer.g_tap_size, layer.g_tap_stride);
}

// All threads; ends with a barrier.  GradientFlags of `outputs` outputs: of all their units, or with kOwn of
// those of this chunk.
template <int kThreads, bool kOwn>
CO_DEVICE uint32_t look_at_gradient(const PreconditionLayer& layer, const Chunk& chunk, int64_t first,
                                    int64_t outputs) {
  uint32_t flags = 0;
  const auto look = [&](float value) {
    if (value != 0.0f) flags |= kNotZero;
    if (!is_finite(value)) flags |= kNotFinite;
  };
  const int warp = fresh_thread() / 32, lane = fresh_thread() % 32;
  const uint32_t taps = static_cast<uint32_t>(taps_of(layer));
  const uint32_t end = static_cast<uint32_t>(first + outputs) * taps;
  const int units = kOwn ? chunk.size() : static_cast<int>(layer.units);
  CO_NO_UNROLL
  for (uint32_t row = static_cast<uint32_t>(first) * taps + warp; row < end; row += kThreads / 32) {
    const int64_t offset = offset_of_row(layer, row);
    CO_UNROLL_4
    for (int u = lane; u < units; u += 32) {
      const int32_t unit = kOwn ? chunk.scratch.unit[u] : u;
      if (unit >= 0) look(load_element(layer.g_dtype, layer.g, offset + unit * layer.g_unit_stride));
    }
  }
  if (layer.has_bias && (!kOwn || chunk.scratch.has_bias != 0)) {
    CO_NO_UNROLL
    for (int64_t o = first + fresh_thread(); o < first + outputs; o += kThreads) {
      look(load_element(layer.bias_dtype, layer.bias_grad, o * layer.bias_stride));
    }
  }
  const bool not_zero = __ballot_sync(0xffffffffu, flags & kNotZero) != 0;
  const bool not_finite = __ballot_sync(0xffffffffu, flags & kNotFinite) != 0;
  int32_t found = 0;
  if (not_zero) found |= kNotZero;
  if (not_finite) found |= kNotFinite;
  if (lane == 0 && found != 0) atomicOr(&chunk.scratch.gradient, found);
  __syncthreads();  // all have said what they found
  return static_cast<uint32_t>(chunk.scratch.gradient);
}

CO_DEVICE void record_gradient(const PreconditionParams& params, const Task& task, uint32_t flags) {
  if (threadIdx.x != 0 || !(flags & kNotZero)) return;
  atomicOr(params.whitening.has_gradient + params.whitening.number[task.layer], 1);
}

// All threads, at the end of a gram task: what the factor tasks of the layer must know.
template <int kThreads>
CO_DEVICE void report(const PreconditionParams& params, const Chunk& chunk) {
  const PreconditionLayer& layer = params.layers[chunk.task.layer];
  const int parts = chunk.task.of_layer.gram_tasks, number = chunk.task.chunk * parts + chunk.task.part;
  int64_t first = 0, outputs = 0;
  part_of(layer.outputs, number, static_cast<int>(chunk.task.division.chunks) * parts, first, outputs);
  const uint32_t flags = look_at_gradient<kThreads, false>(layer, chunk, first, outputs);
  record_gradient(params, chunk.task, flags);
  const int thread = fresh_thread();
  if (thread >= 32) return;
  float sum = 0.0f;
  const float* average = static_cast<const float*>(layer.covariance);
  if (average != nullptr && chunk.task.part == 0) {
    CO_UNROLL_4
    for (int u = thread; u < chunk.size(); u += 32) {
      sum += average[covariance_offset(params.options, chunk.task.chunk, u, u)];
    }
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (thread == 0) static_cast<GramStatus*>(chunk.records.status)[number] = {sum, flags};
}

// The new weight of a layer's average, behind what its gram tasks have reported.
CO_DEVICE float* new_weight(const PreconditionParams& params, int l) {
  const int64_t grams = own_chunks(params.layers[l], params.options) * params.tasks[l].gram_tasks;
  return reinterpret_cast<float*>(static_cast<GramStatus*>(status_of(params, l)) + grams);
}

// All threads of a factor task, whose tiles are the sum over its rows.  tiles <- the sum of covariances with them, also
// in memory; returns what makes them the average, divided by tau with trace scaling, or -1 if no rows were ever seen.
CO_DEVICE float load_average(const PreconditionParams& params, const Chunk& chunk, int threads) {
  const PreconditionLayer& layer = params.layers[chunk.task.layer];
  const DiagonalSum rows = layer_diagonal(params.options, chunk, nullptr, threads);
  const int thread = fresh_thread(), lane = thread % 32, warp = thread / 32;
  const GramStatus* const status = static_cast<const GramStatus*>(chunk.records.status);
  const int reports = static_cast<int>(chunk.task.division.chunks) * chunk.task.of_layer.gram_tasks;
  float diagonal = 0.0f;
  uint32_t flags = 0;
  CO_NO_UNROLL
  for (int i = thread; i < reports; i += threads) {
    diagonal += status[i].diagonal;
    flags |= status[i].flags;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) diagonal += __shfl_xor_sync(0xffffffffu, diagonal, lanes);
  const bool not_finite = __ballot_sync(0xffffffffu, flags & kNotFinite) != 0;
  __syncthreads();  // the sums of the rows have been read
  if (lane == 0) {
    chunk.scratch.warp_sum[warp] = diagonal;
    chunk.scratch.warp_count[warp] = not_finite ? 1 : 0;
  }
  __syncthreads();
  diagonal = 0.0f;
  bool enters = chunk.input.all_rows > 0 && rows.count == chunk.task.division.units;
  CO_NO_UNROLL
  for (int w = 0; w < threads / 32; ++w) {
    diagonal += chunk.scratch.warp_sum[w];
    enters = enters && chunk.scratch.warp_count[w] == 0;
  }
  const float old_weight = *static_cast<const float*>(params.whitening.of_layer[chunk.task.layer]);
  const float kept = enters ? params.whitening.decay : 1.0f;
  const float weight = enters ? fma(kept, old_weight, params.whitening.entering) : old_weight;
  const float mean = enters ? params.whitening.entering / static_cast<float>(chunk.input.all_rows) : 0.0f;
  if (chunk.task.chunk == 0 && threadIdx.x == 0) *new_weight(params, chunk.task.layer) = weight;
  if (!(weight > 0.0f)) return -1.0f;
  float* const average = static_cast<float*>(layer.covariance);
  if (chunk.scratch.failed_tries > 0) {
    load_matrix(params.options, chunk, average, threads);  // as the first try has left it
  } else {
    for_each_element(chunk, threads, [&](int row, int column, float* element) {
      const bool inside = row < chunk.size() && column < chunk.size();
      const float old =
          inside ? kept * average[covariance_offset(params.options, chunk.task.chunk, row, column)] : 0.0f;
      *element = inside && enters ? fma(mean, *element, old) : old;
    });
    __syncthreads();
    if (enters) store_matrix(params.options, chunk, average, 1.0f, threads);
  }
  const float scale = 1.0f / weight;
  if (!params.options.trace_scaling) return scale;
  const float trace = fma(mean, rows.sum, kept * diagonal) * scale;
  return scale / trace_scale(trace, static_cast<float>(chunk.task.division.units), 1.0f);
}

// All threads of the last CTA of a launch of kWhitens.
CO_DEVICE void update_weights(const PreconditionParams& params, int threads) {
  for (int l = fresh_thread(); l < params.count; l += threads) {
    const PreconditionLayer& layer = params.layers[l];
    if (layer.covariance == nullptr || layer.units == 0 || rows_of_g(layer) == 0) continue;
    *static_cast<float*>(params.whitening.of_layer[l]) = *new_weight(params, l);
  }
}

// Calls f(now, before) for every run of kWidth elements of these outputs of a weight and of what it was before.
template <int kThreads, typename Raw, typename F>
CO_DEVICE void for_each_pair(const PreconditionLayer& layer, const OutputRange& outputs, F&& f) {
  const int warp = fresh_thread() / 32, lane = fresh_thread() % 32;
  const uint32_t taps = static_cast<uint32_t>(taps_of(layer));
  CO_NO_UNROLL
  for (uint32_t row = static_cast<uint32_t>(outputs.begin) * taps + warp; row < outputs.end * taps;
       row += kThreads / 32) {
    const int64_t offset = offset_of_row(layer, row);
    CO_UNROLL_4
    for (int u = lane; u < static_cast<int>(layer.units); u += 32) {
      const int64_t at = offset + u * layer.g_unit_stride;
      f(static_cast<Raw*>(layer.g) + at, static_cast<const Raw*>(layer.x) + at);
    }
  }
}

// All threads of a restore task of kUnwhitens: the norms of the layer, and W <- before + s W for this task's outputs.
template <int kThreads>
CO_DEVICE void finish_displacement(const PreconditionParams& params, const Chunk& chunk) {
  const Task& task = chunk.task;
  const PreconditionLayer& layer = params.layers[task.layer];
  const WhiteningParams& whitening = params.whitening;
  if (!has_moved(params, task)) return;
  const int lane = fresh_thread() % 32;
  const int parts = static_cast<int>(count_chunks(layer, params.options)) * task.of_layer.apply_tasks;
  const SquareSums* const squares = static_cast<const SquareSums*>(chunk.records.status);
  float before = 0.0f, after = 0.0f;  // every warp adds them up for itself
  CO_UNROLL_4
  for (int i = lane; i < parts; i += 32) {
    before += squares[i].before;
    after += squares[i].after;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    before += __shfl_xor_sync(0xffffffffu, before, lanes);
    after += __shfl_xor_sync(0xffffffffu, after, lanes);
  }
  if (task.part == 0 && threadIdx.x == 0) {
    float* const of_layer = whitening.squares + int64_t{2} * whitening.number[task.layer];
    of_layer[0] = before / (kSquareScale * kSquareScale);
    of_layer[1] = after / (kSquareScale * kSquareScale);
  }
  if (!whitening.keep_norm || !whitening.finish) return;
  const float ratio = sqrtf(before / after), scale = is_finite(ratio) ? ratio : 1.0f;
  const OutputRange outputs{task.first_output, task.first_output + task.outputs};
  const auto add = [&](auto* now, const auto* old) {
    using Raw = std::remove_reference_t<decltype(*now)>;
    const float sum = fma(scale, to_float<Raw>(layer.g_dtype, *now), to_float<Raw>(layer.g_dtype, *old));
    *now = from_float<Raw>(layer.g_dtype, sum);
  };
  if (layer.g_dtype == DType::kFloat32) {
    for_each_pair<kThreads, uint32_t>(layer, outputs, add);
  } else {
    for_each_pair<kThreads, uint16_t>(layer, outputs, add);
  }
  const void* const bias_before = whitening.of_layer[task.layer];
  CO_NO_UNROLL
  for (int64_t o = outputs.begin + fresh_thread(); layer.has_bias && o < outputs.end; o += kThreads) {
    const int64_t at = o * layer.bias_stride;
    const float sum = fma(scale, load_element(layer.bias_dtype, layer.bias_grad, at),
                          load_element(layer.bias_dtype, bias_before, at));
    store_element(layer.bias_dtype, layer.bias_grad, at, sum);
  }
}

}  // namespace consistency_ops
