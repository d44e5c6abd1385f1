// Corrects three layers, two of them with one input, through the C++ interface, on two threads, and compares with a
// solve in double.
#include <consistency_ops/precondition.h>

#include <cmath>
#include <cstdio>
#include <thread>
#include <vector>

namespace co = consistency_ops;

namespace {

// The simplest possible pool: one new thread a task.
void run(void*, int64_t tasks, void (*task)(void*, int64_t), void* argument) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < tasks; ++i) threads.emplace_back(task, argument, i);
  for (std::thread& thread : threads) thread.join();
}

struct Layer {
  int64_t rows, units, outputs;
  std::vector<float> x, g, original;
  std::vector<int32_t> info;
  std::vector<float> damping_used;
};

Layer make_layer(int64_t rows, int64_t units, int64_t outputs) {
  Layer layer{rows, units, outputs, {}, {}, {}, std::vector<int32_t>(1, -1), std::vector<float>(1)};
  uint32_t state = 1;
  auto random = [&state] {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / (1 << 23) - 1.0f;
  };
  for (int64_t i = 0; i < rows * units; ++i) layer.x.push_back(random());
  for (int64_t i = 0; i < outputs * units; ++i) layer.g.push_back(random());
  layer.original = layer.g;
  return layer;
}

co::PreconditionLayer describe(Layer& layer, uint32_t index) {
  co::PreconditionLayer problem{};
  problem.x = layer.x.data();
  problem.g = layer.g.data();
  problem.units = layer.units;
  problem.outputs = layer.outputs;
  for (int64_t& size : problem.x_row_size) size = 1;
  for (int64_t& size : problem.g_tap_size) size = 1;
  problem.x_row_size[co::kMaxRowDims - 1] = layer.rows;
  problem.x_row_stride[co::kMaxRowDims - 1] = layer.units;
  problem.x_unit_stride = 1;
  problem.g_output_stride = layer.units;
  problem.g_unit_stride = 1;
  problem.group = 8;
  problem.layer = index;
  problem.info = layer.info.data();
  problem.damping_used = layer.damping_used.data();
  return problem;
}

// Largest |(corrected (A + damping I) - original)|, which is zero for the exact answer whatever the division is when
// there is one chunk.
double residual(const Layer& layer, double damping) {
  double worst = 0;
  const int64_t d = layer.units;
  std::vector<double> a(d * d);
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j < d; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < layer.rows; ++r) sum += double{layer.x[r * d + i]} * layer.x[r * d + j];
      a[i * d + j] = sum / layer.rows + (i == j ? damping : 0);
    }
  }
  for (int64_t o = 0; o < layer.outputs; ++o) {
    for (int64_t j = 0; j < d; ++j) {
      double sum = -layer.original[o * d + j];
      for (int64_t i = 0; i < d; ++i) sum += layer.g[o * d + i] * a[i * d + j];
      worst = std::fmax(worst, std::fabs(sum));
    }
  }
  return worst;
}

}  // namespace

int main() {
  Layer layers[] = {make_layer(300, 40, 7), make_layer(50, 61, 20), make_layer(50, 61, 9)};
  co::PreconditionLayer problems[] = {describe(layers[0], 0), describe(layers[1], 1), describe(layers[2], 1)};
  problems[2].same_input = true;  // make_layer gave it the same numbers
  problems[2].x = nullptr;
  co::PreconditionOptions options;
  options.damping = 0.1;
  options.chunk = 64;
  const co::ThreadPool pool{run, nullptr, 2};
  if (co::precondition_cpu(problems, 3, options, pool) != co::Status::kOk) return 1;
  for (const Layer& layer : layers) {
    const double worst = residual(layer, options.damping);
    std::printf("units %d: info %d, damping %g, residual %g\n", static_cast<int>(layer.units), layer.info[0],
                layer.damping_used[0], worst);
    if (layer.info[0] != 0 || layer.damping_used[0] != 0.1f || !(worst < 1e-4) || layer.g == layer.original) return 1;
  }
  const auto refused = [&](const co::PreconditionLayer* first, int64_t count) {
    return co::precondition_cpu(first, count, options, pool) == co::Status::kInvalidArgument;
  };
  if (!refused(problems + 2, 1)) return 1;  // the same input as what?
  problems[2].units = 60;
  if (!refused(problems, 3)) return 1;
  options.chunk = 257;
  return refused(problems, 2) ? 0 : 1;
}
