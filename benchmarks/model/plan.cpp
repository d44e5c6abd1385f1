// The launcher's own plan of a launch, and the bytes of its kernel's parameter, for benchmarks.model.
#include "cuda/precondition/plan.h"

#include <cstring>

using namespace consistency_ops;

struct ModelLayer {
  int64_t x, rows, units, g, outputs, taps, x_dtype, g_dtype, group, same_input;
};

struct ModelLaunch {
  int64_t layers, trace, rung, ctas_a_chunk, workspace;
};

struct ModelPlan {
  int64_t ctas, threads, shared_bytes, cluster, workspace_bytes, parameter_bytes;
  int64_t tasks[kMaxLaunchLayers]
               [7];  // first layer's number, chunks, units of a chunk; gram, apply, pack, permute tasks
};

// 0, or -1 where the launcher refuses.  `parameter` has room for 32,764 bytes.
extern "C" __attribute__((visibility("default"))) int model_plan(const ModelLaunch* how, const ModelLayer* layers,
                                                                 ModelPlan* plan, char* parameter) {
  static PreconditionLayer described[kMaxLaunchLayers];
  static PreconditionLaunch launch;
  if (how->layers > kMaxLaunchLayers) return -1;
  for (int64_t l = 0; l < how->layers; ++l) {
    const ModelLayer& from = layers[l];
    PreconditionLayer& layer = described[l] = {};
    layer.x = reinterpret_cast<const void*>(from.x);
    layer.g = reinterpret_cast<void*>(from.g);
    layer.x_row_size[0] = layer.x_row_size[1] = layer.x_row_size[2] = 1;
    layer.x_row_size[3] = from.rows;
    layer.x_row_stride[3] = from.units;
    layer.x_unit_stride = 1;
    layer.units = from.units;
    layer.outputs = from.outputs;
    layer.g_tap_size[0] = layer.g_tap_size[1] = 1;
    layer.g_tap_size[2] = from.taps;
    layer.g_tap_stride[2] = 1;
    layer.g_unit_stride = from.taps;
    layer.g_output_stride = from.units * from.taps;
    layer.x_dtype = static_cast<DType>(from.x_dtype);
    layer.g_dtype = static_cast<DType>(from.g_dtype);
    layer.group = static_cast<int32_t>(from.group);
    layer.same_input = from.same_input != 0;
    layer.layer = static_cast<uint32_t>(l);
  }
  PreconditionOptions options;
  options.damping = 0.1;
  options.trace_scaling = how->trace != 0;
  CudaTuning tuning;
  tuning.rung = static_cast<PreconditionRung>(how->rung);
  tuning.ctas = static_cast<int32_t>(how->ctas_a_chunk);
  const CudaDevice h200{227 << 10, 90};
  plan->workspace_bytes = precondition_workspace_cuda(described, how->layers, options, tuning);
  void* const workspace = reinterpret_cast<void*>(how->workspace);
  if (plan_launch(described, how->layers, options, h200, workspace, tuning, launch) != Status::kOk) return -1;
  const PreconditionParams& params = launch.params;
  plan->ctas = launch.ctas;
  plan->threads = launch.threads;
  plan->shared_bytes = params.shared_bytes;
  plan->cluster = params.cluster;
  plan->parameter_bytes = sizeof(params);
  for (int64_t l = 0; l < how->layers; ++l) {
    const PreconditionLayer& layer = params.layers[l];
    const int64_t chunks = own_chunks(layer, options);
    const LayerTasks& tasks = params.tasks[l];
    const int64_t row[7] = {layer.layer,
                            chunks,
                            chunks > 0 ? (layer.units + chunks - 1) / chunks : 0,
                            tasks.gram_tasks,
                            tasks.apply_tasks,
                            tasks.pack_tasks,
                            tasks.permute_tasks};
    std::memcpy(plan->tasks[l], row, sizeof(row));
  }
  std::memcpy(parameter, &params, sizeof(params));
  return 0;
}
