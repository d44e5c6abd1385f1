// What the host decides about a launch of the correction (plan.h).
#include "cuda/precondition/plan.h"

#include <algorithm>

#include "consistency_ops/whitening_cuda.h"

namespace consistency_ops {
namespace {

constexpr int64_t kMaxRows = int64_t{1} << 30;  // of X and of G: row indices have 32 bits, with room for the last stage

// How the work of a launch is divided into tasks, and where these meet in the workspace.
struct Layout {
  LaunchShape shape;
  LayerTasks tasks[kMaxLaunchLayers];
  uint32_t records[kMaxLaunchLayers], packed[kMaxLaunchLayers];  // as in PreconditionParams
  int64_t slab_bytes;                                            // shared memory of the tasks that permute rows
  int64_t bytes;                                                 // of the workspace
};

// The layer's trace is needed before any of its chunks can be factored, and all chunks are summed in this launch.
bool waits_for_trace(const PreconditionLayer& layer, const PreconditionOptions& options) {
  const int32_t both = kStageCovariance | kStageFactor;
  return options.trace_scaling && (options.stages & both) == both && num_chunks(layer, options) > 1;
}

RowMatrix matrix_of_x(const PreconditionLayer& layer, const PreconditionOptions& options) {
  const int64_t rows = options.stages & kStageCovariance ? std::min(rows_of_x(layer), options.max_rows) : 0;
  const int64_t bytes = element_size(layer.x_dtype), run = layer.permutation != nullptr ? 1 : layer.group;
  return {rows, layer.units, num_chunks(layer, options), run * bytes, bytes, layer.x_unit_stride == 1};
}

// The G of `members` layers with the same input, as one matrix.
RowMatrix matrix_of_g(const PreconditionLayer* layers, int members, const PreconditionOptions& options) {
  const int64_t bytes = element_size(layers->g_dtype), run = layers->permutation != nullptr ? 1 : layers->group;
  RowMatrix matrix{0, layers->units, num_chunks(*layers, options), run * bytes, bytes, true};
  for (int m = 0; (options.stages & kStageApply) && m < members; ++m) {
    const PreconditionLayer& layer = layers[m];
    const bool one_tap = rows_of_g(layer) == layer.outputs;
    matrix.rows += rows_of_g(layer);
    matrix.unit_rows = matrix.unit_rows && layer.g_unit_stride == 1 && one_tap && layer.g_dtype == layers->g_dtype;
  }
  return matrix;
}

// The work of the first of `layers` and of those that have its input; nothing for one of the latter.
LayerWork work_of(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                  const CudaTuning& tuning, const WhiteningCall& call) {
  if (layers->same_input) return {};
  const RowMatrix x = matrix_of_x(*layers, options), g = matrix_of_g(layers, run_length(layers, count), options);
  const bool unwhitens = call.mode == Mode::kUnwhitens;  // whose second operand would have to be permuted, too
  const bool waits = call.mode == Mode::kWhitens || waits_for_trace(*layers, options);
  const bool finishes = unwhitens && call.options.keep_norm && call.options.finish;
  return {x.chunks,
          x.rows,
          g.rows,
          waits,
          permutes(x, tuning),
          permutes(g, tuning) && !unwhitens,
          unwhitens,
          finishes ? g.rows : 0};
}

// False if the workspace would be larger than 64 GiB.
bool lay_out(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
             const CudaTuning& tuning, bool clusters, const WhiteningCall& call, Layout& layout) {
  int64_t chunks = 0, longest = 0, permuted = 0;
  for (int64_t l = 0; l < count; ++l) {
    const LayerWork work = work_of(layers + l, count - l, options, tuning, call);
    chunks += work.chunks;
    if (work.chunks > 0) longest = std::max({longest, work.x_rows, work.g_rows});
    if (work.packs_x) permuted += work.x_rows * layers[l].units * element_size(layers[l].x_dtype);
    if (work.permutes_g) permuted += work.g_rows * layers[l].units * element_size(layers[l].g_dtype);
  }
  layout.shape = choose_rung(chunks, longest, permuted, clusters, tuning);
  layout.bytes = layout.slab_bytes = 0;
  int64_t packed_layers = 0, packed_bytes = 0;
  bool tasks_meet = false;
  for (int64_t l = 0; l < count; ++l) {
    const PreconditionLayer& layer = layers[l];
    const LayerWork work = work_of(layers + l, count - l, options, tuning, call);
    const LayerTasks tasks = layout.tasks[l] = tasks_of_layer(work, layout.shape, tuning);
    layout.records[l] = layout.packed[l] = 0;
    const auto want_slab = [&](int64_t element_bytes) {
      const int64_t row = slab_bytes(layer.units, element_bytes, 1), rows = slab_bytes(layer.units, element_bytes, 0);
      layout.slab_bytes = std::max(layout.slab_bytes, std::max(row, rows + kWantedSlabBytes));
    };
    if (tasks.permute_tasks > 0) want_slab(element_size(layer.g_dtype));
    if (tasks.pack_tasks > 0) {
      want_slab(element_size(layer.x_dtype));
      packed_bytes = std::max(packed_bytes, work.x_rows * packed_pitch(layer) * element_size(layer.x_dtype));
      ++packed_layers;
    }
    if (work.chunks == 0 || (tasks.gram_tasks == 0 && tasks.apply_tasks == 0)) continue;
    tasks_meet = true;
    const int64_t at = kCudaCounterBytes + layout.bytes, record = record_floats(all_units(layer), work.chunks);
    if (at / 16 > UINT32_MAX) return false;
    layout.records[l] = static_cast<uint32_t>(at / 16);
    const int64_t floats = tasks.gram_tasks * record + inverse_floats(tasks, record, options.stages);
    layout.bytes += work.chunks * floats * static_cast<int64_t>(sizeof(float));
    layout.bytes += status_bytes(tasks, work.chunks, call.mode);
  }
  if (tasks_meet) layout.bytes += kCudaCounterBytes;
  for (int64_t l = 0, turn = 0; l < count; ++l) {
    if (layout.tasks[l].pack_tasks == 0) continue;
    const int64_t at = layout.bytes + turn++ % 2 * packed_bytes;
    if (at / 16 > UINT32_MAX) return false;
    layout.packed[l] = static_cast<uint32_t>(at / 16);
  }
  layout.bytes += std::min<int64_t>(packed_layers, 2) * packed_bytes;
  layout.slab_bytes = std::min<int64_t>(layout.slab_bytes, kMaxSlabBytes);
  return true;
}

// Large layers first, because the last CTAs to start decide when the launch ends; layers that wait for their trace go
// last.  Layers with the same input stay together.
void put_in_order(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                  const CudaTuning& tuning, const WhiteningCall& call, PreconditionParams& params) {
  PreconditionLayer* ordered = params.layers;
  int64_t firsts[kMaxLaunchLayers], runs = 0;
  LayerWork works[kMaxLaunchLayers];
  for (int64_t l = 0; l < count; l += run_length(layers + l, count - l)) {
    firsts[runs++] = l;
    works[l] = work_of(layers + l, count - l, options, tuning, call);
  }
  std::stable_sort(firsts, firsts + runs, [&](int64_t a, int64_t b) {
    if (works[a].waits_for_trace != works[b].waits_for_trace) return works[b].waits_for_trace;
    return works[a].x_rows + works[a].g_rows > works[b].x_rows + works[b].g_rows;
  });
  for (int64_t r = 0; r < runs; ++r) {
    ordered = std::copy_n(layers + firsts[r], run_length(layers + firsts[r], count - firsts[r]), ordered);
  }
  if (call.whitened == nullptr) return;
  for (int64_t r = 0; r < runs; ++r) {  // of one layer each
    const WhitenedLayer& of = call.whitened[firsts[r]];
    params.whitening.number[r] = static_cast<int32_t>(of.has_gradient - call.has_gradient);
    params.whitening.of_layer[r] =
        call.mode == Mode::kUnwhitens ? const_cast<void*>(of.bias_before) : of.average_weight;
    if (call.mode == Mode::kUnwhitens) params.layers[r].x = of.before;
    if (call.mode == Mode::kWhitens) params.layers[r].covariance = of.average;
  }
}

// Fills first_task; returns the number of tasks, or -1 if their CTAs are more than a grid has.
int64_t number_tasks(PreconditionParams& params) {
  int64_t tasks = 0;
  for (int64_t round = 0; round < params.count + kRounds - 1; ++round) {
    params.first_task[round] = static_cast<int32_t>(tasks);
    for (int role = 0; role < kRoles; ++role) {
      const int64_t l = round - layers_behind(role);
      if (l < 0 || l >= params.count) continue;
      const int64_t chunks = own_chunks(params.layers[l], params.options);
      tasks += count_tasks(params.tasks[l], chunks, params.options.stages, role);
      if (tasks * params.cluster > INT32_MAX) return -1;
    }
  }
  params.first_task[params.count + kRounds - 1] = static_cast<int32_t>(tasks);
  return tasks;
}

int64_t largest_chunk(const PreconditionParams& params) {
  int64_t units = 1;
  for (int l = 0; l < params.count; ++l) {
    const int64_t chunks = own_chunks(params.layers[l], params.options);
    if (chunks > 0) units = std::max(units, (all_units(params.layers[l]) + chunks - 1) / chunks);
  }
  return units;
}

}  // namespace

bool is_valid(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
              const CudaTuning& tuning) {
  if (count < 0 || (count > 0 && layers == nullptr) || options.float64) return false;
  if (options.chunk < 1 || options.chunk > kMaxChunk || options.max_rows < 1 || !(options.damping >= 0)) return false;
  if (options.stages < 1 || options.stages > kStageAll) return false;
  if (options.stages == (kStageCovariance | kStageApply)) return false;
  if (options.triangular && options.stages != kStageFactor && options.stages != kStageApply) return false;
  const int most_ctas = tuning.rung == PreconditionRung::kCluster ? kMaxCluster : kMaxParts;
  if (tuning.ctas < 0 || tuning.ctas > most_ctas) return false;
  if (tuning.counters < -1 || tuning.counters >= kCudaCounterSlots) return false;
  int run = 0;
  for (int64_t l = 0; l < count; ++l) {
    const PreconditionLayer& layer = layers[l];
    if (layer.units < 0 || layer.units >= INT32_MAX || layer.outputs < 0) return false;
    if (rows_of_g(layer) > kMaxRows) return false;
    if (layer.g_dtype == DType::kFloat64 || layer.bias_dtype == DType::kFloat64) return false;
    if (options.stages & kStageApply && layer.outputs > 0 && layer.has_bias && layer.bias_grad == nullptr) return false;
    run = layer.same_input ? run + 1 : 1;
    if (layer.same_input) {
      if (l == 0 || run > kMaxLaunchLayers) return false;
      if (layer.units != layers[l - 1].units || layer.has_bias != layers[l - 1].has_bias) return false;
      continue;
    }
    if (layer.group < 1 || layer.group > options.chunk) return false;
    if (rows_of_x(layer) > kMaxRows || layer.x_dtype == DType::kFloat64) return false;
    if (options.stages == kStageCovariance && layer.covariance == nullptr) return false;
    if (options.stages == kStageFactor && (layer.covariance == nullptr || layer.inverse == nullptr)) return false;
    if (options.stages == kStageApply && (layer.inverse == nullptr || layer.info == nullptr)) return false;
    if (options.stages == (kStageFactor | kStageApply) && layer.covariance == nullptr) return false;
  }
  return true;
}

WhiteningCall call_of(const WhitenedLayer* whitened, int64_t count, const PreconditionOptions& options,
                      const WhiteningOptions& whitening, float* squares) {
  WhiteningCall call;
  call.mode = squares != nullptr ? Mode::kUnwhitens : options.stages == kStageAll ? Mode::kWhitens : Mode::kWhitensBy;
  call.whitened = whitened;
  call.options = whitening;
  call.has_gradient = count > 0 && whitened != nullptr ? whitened->has_gradient : nullptr;
  call.squares = squares;
  return call;
}

bool is_valid(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
              const CudaTuning& tuning, const WhiteningCall& call) {
  PreconditionOptions plain = options;
  plain.triangular = false;
  if (!is_valid(layers, count, plain, tuning) || !options.triangular) return false;
  const bool unwhitens = call.mode == Mode::kUnwhitens;
  if (options.stages != kStageApply && (unwhitens || options.stages != kStageAll)) return false;
  if (!(call.options.decay >= 0 && call.options.decay < 1)) return false;
  for (int64_t l = 0; l < count; ++l) {
    const PreconditionLayer& layer = layers[l];
    const WhitenedLayer& of = call.whitened[l];
    const bool empty = layer.units == 0 || layer.outputs == 0;
    if (layer.same_input || (layer.inverse == nullptr && !empty) || of.has_gradient == nullptr) return false;
    if ((of.average == nullptr) != (of.average_weight == nullptr)) return false;
    if (!unwhitens || empty) continue;
    if (!of.first || of.before == nullptr || (layer.has_bias && of.bias_before == nullptr)) return false;
  }
  return true;
}

int64_t next_launch(const PreconditionLayer* layers, int64_t count) {
  int64_t length = 0;
  while (length < count) {
    const int run = run_length(layers + length, count - length);
    if (length + run > kMaxLaunchLayers) break;
    length += run;
  }
  return length;
}

Status plan_launch(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                   const CudaDevice& device, void* workspace, const CudaTuning& tuning, PreconditionLaunch& launch,
                   const WhiteningCall& call) {
  static thread_local Layout layout;
  PreconditionParams& params = launch.params;
  put_in_order(layers, count, options, tuning, call, params);
  params.whitening.mode = call.mode;
  params.whitening.has_gradient = call.has_gradient;
  params.whitening.squares = call.squares;
  params.whitening.decay = static_cast<float>(call.options.decay);
  params.whitening.entering = static_cast<float>(1 - call.options.decay);
  params.whitening.keep_norm = call.options.keep_norm;
  params.whitening.finish = call.options.finish;
  if (!lay_out(params.layers, count, options, tuning, device.compute_capability >= 90, call, layout)) {
    return Status::kInvalidArgument;
  }
  params.options = options;
  params.workspace = layout.bytes > 0 ? static_cast<char*>(workspace) : nullptr;
  params.counters = tuning.counters;
  params.count = static_cast<int32_t>(count);
  params.cluster = layout.shape.cluster;
  params.tf32 = tuning.tf32;
  params.warpgroups = device.compute_capability == 90;
  std::copy(layout.tasks, layout.tasks + count, params.tasks);
  std::copy(layout.records, layout.records + count, params.records);
  std::copy(layout.packed, layout.packed + count, params.packed);
  const int64_t tasks = number_tasks(params);
  if (tasks < 0) return Status::kInvalidArgument;
  launch.ctas = tasks * params.cluster;
  if (tasks == 0) return Status::kOk;
  const int units = static_cast<int>(largest_chunk(params));
  const CtaShape cta = choose_cta(units, device.shared_bytes, static_cast<int>(layout.slab_bytes));
  if (cta.threads == 0) return Status::kInvalidArgument;
  launch.threads = cta.threads;
  params.tile_floats = cta.tile_floats;
  params.arena_floats = cta.arena_floats;
  params.shared_bytes = cta.shared_bytes;
  return Status::kOk;
}

int64_t workspace_bytes(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                        const CudaTuning& tuning, const WhiteningCall& call) {
  static thread_local Layout layout;
  int64_t largest = 0;
  for (int64_t first = 0, length; first < count; first += length) {
    length = next_launch(layers + first, count - first);
    if (length == 0) return 0;  // refused by precondition_cuda
    for (const bool clusters : {false, true}) {
      lay_out(layers + first, length, options, tuning, clusters, call, layout);
      largest = std::max(largest, layout.bytes);
    }
  }
  return largest;
}

int64_t whitening_workspace_cuda(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                                 const WhiteningOptions& whitening, bool unwhitens, const CudaTuning& tuning) {
  WhiteningCall call;
  call.mode = unwhitens ? Mode::kUnwhitens : options.stages == kStageAll ? Mode::kWhitens : Mode::kWhitensBy;
  call.options = whitening;
  return workspace_bytes(layers, count, options, as_queue(tuning), call);
}

int64_t precondition_workspace_cuda(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                                    const CudaTuning& tuning) {
  return workspace_bytes(layers, count, options, options.triangular ? as_queue(tuning) : tuning, {});
}

}  // namespace consistency_ops
