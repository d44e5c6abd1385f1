// What the launchers of the correction decide on the host, CPU and CUDA, for tests and for benchmarks.model.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/plan.h"
#include "cuda/precondition/plan.h"

namespace py = pybind11;
using namespace consistency_ops;

namespace {

// A dense layer.  `x` and `g` are addresses that nobody reads; what they are aligned to decides about vector loads.
struct Shape {
  int64_t units, rows, outputs, taps = 1;
  int32_t x_dtype = 0, g_dtype = 0, group = 1;
  bool has_bias = false, same_input = false;
  int64_t x = 4096, g = 4096;
};

std::vector<PreconditionLayer> describe(const std::vector<Shape>& shapes) {
  std::vector<PreconditionLayer> layers(shapes.size());
  for (size_t l = 0; l < shapes.size(); ++l) {
    const Shape& from = shapes[l];
    PreconditionLayer& layer = layers[l] = {};
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
    layer.has_bias = from.has_bias;
    layer.bias_grad = from.has_bias ? reinterpret_cast<void*>(from.g) : nullptr;
    layer.bias_stride = 1;
    layer.group = from.group;
    layer.same_input = from.same_input;
    layer.layer = static_cast<uint32_t>(l);
  }
  return layers;
}

PreconditionOptions options_of(int32_t chunk, int64_t max_rows, uint64_t step, bool trace_scaling, bool float64) {
  PreconditionOptions options;
  options.damping = 0.1;
  options.trace_scaling = trace_scaling;
  options.float64 = float64;
  options.chunk = chunk;
  options.max_rows = max_rows;
  options.step = step;
  return options;
}

py::dict cpu_plan(const std::vector<Shape>& shapes, int32_t threads, int32_t chunk, int64_t max_rows, uint64_t step,
                  bool float64, bool pairs) {
  const std::vector<PreconditionLayer> layers = describe(shapes);
  const PreconditionOptions options = options_of(chunk, max_rows, step, false, float64);
  const auto count = static_cast<int64_t>(layers.size());
  const cpu::Plan plan = cpu::make_plan(layers.data(), count, options, threads, pairs);
  py::list planned, tasks;
  for (const cpu::LayerPlan& layer : plan.layers) {
    py::list chunks, runs;
    for (const cpu::ChunkPlan& at : layer.chunks) {
      using namespace py::literals;
      chunks.append(py::dict("size"_a = at.size, "panels"_a = at.panels, "first_panel"_a = at.first_panel,
                             "first_run"_a = at.first_run, "runs"_a = at.num_runs, "row_panels"_a = at.row_panels,
                             "storage"_a = at.storage));
    }
    for (const cpu::Run& run : layer.runs) runs.append(py::make_tuple(run.unit, run.length));
    py::dict one;
    one["head"] = layer.head;
    one["active"] = layer.active;
    one["one_unit"] = layer.one_unit;
    one["rows"] = layer.sample.count;
    one["in_pairs"] = layer.in_pairs;
    one["row_block"] = layer.row_block;
    one["packed_panel"] = layer.packed_panel();
    one["bias_chunk"] = layer.bias_chunk;
    one["chunks"] = chunks;
    one["runs"] = runs;
    planned.append(one);
  }
  for (const cpu::Task& task : plan.tasks) {
    tasks.append(py::make_tuple(static_cast<int>(task.phase), task.layer, task.begin, task.end, task.wait_ticket,
                                task.wait_in_phase));
  }
  py::dict result;
  result["layers"] = planned;
  result["tasks"] = tasks;
  result["storage_elements"] = plan.storage_elements;
  result["packed_elements"] = plan.packed_elements;
  result["thread_bytes"] = cpu::thread_bytes(plan, float64 ? 8 : 4);
  return result;
}

// A launch of whitening: all layers have one average, factor and weight before the step at these addresses.
struct WhiteningPlan {
  int32_t mode = 0;  // Mode of plan.h
  int64_t average = 4096, weight = 4096, has_gradient = 4096, before = 4096, factors = 4096, info = 4096,
          squares = 4096;
};

template <typename T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

py::dict cuda_plan(const std::vector<Shape>& shapes, int32_t chunk, int64_t max_rows, bool trace_scaling, int32_t rung,
                   int32_t ctas, int64_t workspace, int32_t shared_bytes, int32_t architecture,
                   const WhiteningPlan& whitening) {
  std::vector<PreconditionLayer> layers = describe(shapes);
  PreconditionOptions options = options_of(chunk, max_rows, 0, trace_scaling, false);
  WhiteningCall call;
  call.mode = static_cast<Mode>(whitening.mode);
  const std::vector<WhitenedLayer> whitened(
      layers.size(), {at<void>(whitening.average), at<void>(whitening.weight), at<int32_t>(whitening.has_gradient),
                      at<void>(whitening.before), nullptr, true, true});
  if (call.mode != Mode::kCorrects) {
    options.triangular = true;
    options.stages = call.mode == Mode::kWhitens ? kStageAll : kStageApply;
    rung = static_cast<int32_t>(PreconditionRung::kTaskQueue);
    call.whitened = whitened.data();
    call.options.decay = 0.95;
    call.has_gradient = at<int32_t>(whitening.has_gradient);
    call.squares = at<float>(whitening.squares);
    for (PreconditionLayer& layer : layers) {
      layer.inverse = at<void>(whitening.factors);
      layer.info = at<int32_t>(whitening.info);
    }
  }
  const auto count = static_cast<int64_t>(layers.size());
  CudaTuning tuning;
  tuning.rung = static_cast<PreconditionRung>(rung);
  tuning.ctas = ctas;
  if (count > kMaxLaunchLayers) throw std::invalid_argument("more layers than one launch takes");
  const auto launch = std::make_unique<PreconditionLaunch>();
  const Status status = plan_launch(layers.data(), count, options, {shared_bytes, architecture},
                                    reinterpret_cast<void*>(workspace), tuning, *launch, call);
  if (status != Status::kOk) throw std::invalid_argument("the launcher refuses this launch");
  const PreconditionParams& params = launch->params;
  py::list planned;
  for (int64_t l = 0; l < count; ++l) {
    const PreconditionLayer& layer = params.layers[l];
    const int64_t chunks = own_chunks(layer, options);
    py::dict one;
    one["layer"] = layer.layer;
    one["chunks"] = chunks;
    one["units"] = chunks > 0 ? (layer.units + chunks - 1) / chunks : 0;  // of the largest chunk
    one["gram_tasks"] = params.tasks[l].gram_tasks;
    one["apply_tasks"] = params.tasks[l].apply_tasks;
    one["pack_tasks"] = params.tasks[l].pack_tasks;
    one["permute_tasks"] = params.tasks[l].permute_tasks;
    one["finish_tasks"] = params.tasks[l].finish_tasks;
    planned.append(one);
  }
  py::dict result;
  result["layers"] = planned;
  result["ctas"] = launch->ctas;
  result["threads"] = launch->threads;
  result["shared_bytes"] = params.shared_bytes;
  result["cluster"] = params.cluster;
  result["workspace_bytes"] = workspace_bytes(layers.data(), count, options, tuning, call);
  result["parameter"] = py::bytes(reinterpret_cast<const char*>(&params), sizeof(params));
  return result;
}

}  // namespace

PYBIND11_MODULE(plans, module) {
  using namespace py::literals;
  py::class_<Shape>(module, "Shape")
      .def(py::init([](int64_t units, int64_t rows, int64_t outputs, int64_t taps, int32_t x_dtype, int32_t g_dtype,
                       int32_t group, bool has_bias, bool same_input, int64_t x, int64_t g) {
             return Shape{units, rows, outputs, taps, x_dtype, g_dtype, group, has_bias, same_input, x, g};
           }),
           "units"_a, "rows"_a, "outputs"_a, "taps"_a = 1, "x_dtype"_a = 0, "g_dtype"_a = 0, "group"_a = 1,
           "has_bias"_a = false, "same_input"_a = false, "x"_a = 4096, "g"_a = 4096);
  py::class_<WhiteningPlan>(module, "WhiteningPlan")
      .def(py::init([](int32_t mode, int64_t average, int64_t weight, int64_t has_gradient, int64_t before,
                       int64_t factors, int64_t info, int64_t squares) {
             return WhiteningPlan{mode, average, weight, has_gradient, before, factors, info, squares};
           }),
           "mode"_a, "average"_a = 4096, "weight"_a = 4096, "has_gradient"_a = 4096, "before"_a = 4096,
           "factors"_a = 4096, "info"_a = 4096, "squares"_a = 4096);
  module.def("cpu_plan", &cpu_plan, "layers"_a, "threads"_a = 1, "chunk"_a = 128, "max_rows"_a = 10000, "step"_a = 0,
             "float64"_a = false, "pairs"_a = false);
  module.def("cuda_plan", &cuda_plan, "layers"_a, "chunk"_a = 128, "max_rows"_a = 10000, "trace_scaling"_a = false,
             "rung"_a = 0, "ctas"_a = 0, "workspace"_a = 4096, "shared_bytes"_a = 227 << 10, "architecture"_a = 90,
             "whitening"_a = WhiteningPlan{});
  module.def(
      "cta",
      [](int units, int shared_bytes) {
        const CtaShape cta = choose_cta(units, shared_bytes);
        return py::make_tuple(cta.threads, cta.tile_floats, cta.arena_floats, cta.shared_bytes);
      },
      "units"_a, "shared_bytes"_a);
}
