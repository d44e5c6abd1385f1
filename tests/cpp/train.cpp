// A training loop in plain C++: a perceptron with two hidden layers learns a random function of inputs that are badly
// conditioned, by gradient descent, without and with the correction.  Every run gets the best of the same learning
// rates; the mean loss with the correction must be below three quarters of that without it.
//
// usage: train [SEEDS]
#include <consistency_ops/precondition.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "thread_pool.h"

namespace co = consistency_ops;

namespace {

constexpr int64_t kBatch = 512, kInputs = 32, kHidden = 56;
constexpr int kSteps = 60;

using Vector = std::vector<float>;

struct Linear {
  int64_t in, out;
  Vector weight, bias, weight_grad, bias_grad;  // weight: [out, in]
  Vector output, output_grad;                   // [kBatch, out]
  const float* input = nullptr;                 // [kBatch, in], set by forward

  Linear(int64_t inputs, int64_t outputs, std::mt19937& random)
      : in(inputs), out(outputs), weight(in * out), bias(out), weight_grad(in * out), bias_grad(out) {
    std::normal_distribution<float> normal(0, std::sqrt(2.0f / static_cast<float>(in)));
    for (float& w : weight) w = normal(random);
    output.resize(kBatch * out);
    output_grad.resize(kBatch * out);
  }

  void forward(const float* x) {
    input = x;
    for (int64_t r = 0; r < kBatch; ++r) {
      for (int64_t o = 0; o < out; ++o) {
        output[r * out + o] = std::inner_product(x + r * in, x + (r + 1) * in, &weight[o * in], bias[o]);
      }
    }
  }

  // From output_grad; input_grad may be null.
  void backward(float* input_grad) {
    std::fill(weight_grad.begin(), weight_grad.end(), 0.0f);
    std::fill(bias_grad.begin(), bias_grad.end(), 0.0f);
    if (input_grad != nullptr) std::fill(input_grad, input_grad + kBatch * in, 0.0f);
    for (int64_t r = 0; r < kBatch; ++r) {
      for (int64_t o = 0; o < out; ++o) {
        const float g = output_grad[r * out + o];
        bias_grad[o] += g;
        for (int64_t i = 0; i < in; ++i) weight_grad[o * in + i] += g * input[r * in + i];
        if (input_grad == nullptr) continue;
        for (int64_t i = 0; i < in; ++i) input_grad[r * in + i] += g * weight[o * in + i];
      }
    }
  }

  void descend(float rate) {
    for (size_t i = 0; i < weight.size(); ++i) weight[i] -= rate * weight_grad[i];
    for (size_t i = 0; i < bias.size(); ++i) bias[i] -= rate * bias_grad[i];
  }
};

// What the library must know of a layer.  It keeps no pointer after the call.
co::PreconditionLayer describe(Linear& layer, uint32_t index, int32_t* info) {
  co::PreconditionLayer problem{};  // zeroed: float32, no permutation, no stages of its own
  std::fill_n(problem.x_row_size, co::kMaxRowDims, 1);
  std::fill_n(problem.g_tap_size, co::kMaxTapDims, 1);
  problem.x = layer.input;
  problem.x_row_size[co::kMaxRowDims - 1] = kBatch;
  problem.x_row_stride[co::kMaxRowDims - 1] = layer.in;
  problem.x_unit_stride = 1;
  problem.units = layer.in;
  problem.g = layer.weight_grad.data();
  problem.outputs = layer.out;
  problem.g_output_stride = layer.in;
  problem.g_unit_stride = 1;
  problem.bias_grad = layer.bias_grad.data();
  problem.bias_stride = 1;
  problem.has_bias = true;
  problem.group = 8;  // one 32-byte sector of float gradients
  problem.layer = index;
  problem.info = info;
  return problem;
}

struct Data {
  Vector x = Vector(kBatch * kInputs), y = Vector(kBatch);

  // Inputs around 1 with standard deviations from 1 to 0.03: hard for gradient descent.
  explicit Data(uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    Vector direction(kInputs);
    for (float& d : direction) d = normal(random) / std::sqrt(static_cast<float>(kInputs));
    for (int64_t r = 0; r < kBatch; ++r) {
      float projection = 0;
      for (int64_t i = 0; i < kInputs; ++i) {
        const float z = normal(random);
        x[r * kInputs + i] = 1 + z * std::pow(0.03f, static_cast<float>(i) / (kInputs - 1));
        projection += direction[i] * z;
      }
      y[r] = std::sin(2 * projection);
    }
  }
};

struct Correction {
  co::ThreadPool pool;
  bool on;
};

// The mean squared error after kSteps steps.  Infinite: diverged.  Negative: the library reported an error.
double train(const Data& data, uint32_t seed, float rate, const Correction& correction) {
  std::mt19937 random(seed + 100);
  Linear first(kInputs, kHidden, random), second(kHidden, kHidden, random), third(kHidden, 1, random);
  Linear* const layers[] = {&first, &second, &third};
  Vector hidden[2];
  double loss = 0;
  for (int step = 0; step <= kSteps; ++step) {
    const float* x = data.x.data();
    for (int l = 0; l < 3; ++l) {
      layers[l]->forward(x);
      if (l == 2) break;
      hidden[l] = layers[l]->output;
      for (float& h : hidden[l]) h = std::max(h, 0.0f);
      x = hidden[l].data();
    }
    loss = 0;
    for (int64_t r = 0; r < kBatch; ++r) {
      const float error = third.output[r] - data.y[r];
      loss += double{error} * error / kBatch;
      third.output_grad[r] = 2 * error / kBatch;
    }
    if (step == kSteps) break;
    for (int l = 2; l >= 0; --l) {
      layers[l]->backward(l > 0 ? layers[l - 1]->output_grad.data() : nullptr);
      for (size_t i = 0; l > 0 && i < hidden[l - 1].size(); ++i) {
        if (hidden[l - 1][i] <= 0) layers[l - 1]->output_grad[i] = 0;
      }
    }
    if (correction.on) {
      co::PreconditionOptions options;
      options.damping = 0.1;
      options.trace_scaling = true;
      options.chunk = 64;
      options.step = static_cast<uint64_t>(step);  // a new random division every step
      int32_t info[3] = {};
      co::PreconditionLayer problems[3];
      for (uint32_t l = 0; l < 3; ++l) {
        problems[l] = describe(*layers[l], l, &info[l]);
        if (co::num_chunks(problems[l], options) != 1) return -1;  // the length of its info
      }
      if (step == 0 && co::precondition_workspace_cpu(problems, 3, options, correction.pool.threads) > 4 << 20)
        return -1;
      if (co::precondition_cpu(problems, 3, options, correction.pool) != co::Status::kOk) return -1;
      for (const int32_t failed : info) {
        if (failed != 0) return INFINITY;  // its gradient was left as it is
      }
    }
    for (Linear* layer : layers) layer->descend(rate);
  }
  return loss;
}

}  // namespace

int main(int argc, char** argv) {
  const uint32_t seeds = argc > 1 ? static_cast<uint32_t>(std::atoi(argv[1])) : 3;
  WorkerPool workers(2);
  double sum[2] = {0, 0};
  for (uint32_t seed = 0; seed < seeds; ++seed) {
    const Data data(seed);
    for (const bool on : {false, true}) {
      double best = INFINITY;
      for (const float rate : {0.003f, 0.01f, 0.03f, 0.1f, 0.3f}) {
        const double loss = train(data, seed, rate, {workers.view(), on});
        if (loss < 0) return 1;
        if (loss < best) best = loss;
      }
      std::printf("seed %u, %s: %.3f\n", seed, on ? "corrected" : "plain", best);
      sum[on] += best;
    }
  }
  if (workers.calls() == 0) return 1;
  // The same bits without a pool and with more threads than cores.
  WorkerPool many(7);
  const double alone = train(Data(0), 0, 0.03f, {co::ThreadPool{}, true});
  if (!(alone >= 0) || alone != train(Data(0), 0, 0.03f, {many.view(), true})) return 1;
  std::printf("loss after %d steps, mean: plain %.3f, corrected %.3f\n", kSteps, sum[0] / seeds, sum[1] / seeds);
  return sum[1] < 0.75 * sum[0] ? 0 : 1;
}
