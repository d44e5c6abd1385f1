// Random problems in buffers of exactly the size that they need, for the sanitizers of tests/test_cpp.py: every
// instruction set, one and two threads, every dtype, strided and convolutional layouts, odd sizes.  Also without
// sanitizers: results are finite, the same for one and two threads, and gaps between strided elements stay untouched.
//
// usage: stress PROBLEMS
#include <consistency_ops/c_api.h>
#include <consistency_ops/modulus.h>
#include <consistency_ops/precondition.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

namespace co = consistency_ops;

namespace {

uint64_t state = 42;

uint64_t bits() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return state >> 33;
}

int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(bits() % (high - low + 1)); }

void run(void*, int64_t tasks, void (*task)(void*, int64_t), void* argument) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < tasks; ++i) threads.emplace_back(task, argument, i);
  for (std::thread& thread : threads) thread.join();
}

// Elements of one dtype with nothing around them that could be read by mistake.
struct Buffer {
  co::DType dtype;
  int64_t count;
  std::unique_ptr<unsigned char[]> bytes;

  Buffer(co::DType type, int64_t elements) : dtype(type), count(elements), bytes(new unsigned char[size()]) {
    for (int64_t i = 0; i < count; ++i) set(i);
  }
  Buffer(const Buffer& other)
      : dtype(other.dtype), count(other.count), bytes(new unsigned char[static_cast<size_t>(other.size())]) {
    std::memcpy(bytes.get(), other.bytes.get(), size());
  }
  int64_t size() const { return count * co::element_size(dtype); }
  bool operator==(const Buffer& other) const { return std::memcmp(bytes.get(), other.bytes.get(), size()) == 0; }

  // Random values with magnitudes in [0.5, 1) or, one in eight, zero: all of them finite in every dtype.
  void set(int64_t i) {
    const bool zero = bits() % 8 == 0;
    const uint64_t r = bits();
    if (dtype == co::DType::kFloat64) {
      const double value = zero ? 0 : std::ldexp(double(r % 1000) / 1000 + 1, -1) * (r & 1024 ? -1 : 1);
      std::memcpy(bytes.get() + i * 8, &value, 8);
    } else if (dtype == co::DType::kFloat32) {
      const float value = zero ? 0 : std::ldexp(float(r % 1000) / 1000 + 1, -1) * (r & 1024 ? -1 : 1);
      std::memcpy(bytes.get() + i * 4, &value, 4);
    } else {
      const uint16_t exponent = dtype == co::DType::kBFloat16 ? 0x3f00 : 0x3800;  // 0.5
      const uint16_t fraction = r % (dtype == co::DType::kBFloat16 ? 0x80 : 0x400);
      const uint16_t value = zero ? 0 : uint16_t(exponent | fraction | (r & 0x8000));
      std::memcpy(bytes.get() + i * 2, &value, 2);
    }
  }
  bool finite(int64_t i) const {
    if (dtype == co::DType::kFloat64) {
      double value;
      std::memcpy(&value, bytes.get() + i * 8, 8);
      return std::isfinite(value);
    }
    if (dtype == co::DType::kFloat32) {
      float value;
      std::memcpy(&value, bytes.get() + i * 4, 4);
      return std::isfinite(value);
    }
    uint16_t value;
    std::memcpy(&value, bytes.get() + i * 2, 2);
    const uint16_t exponent = dtype == co::DType::kBFloat16 ? 0x7f80 : 0x7c00;
    return (value & exponent) != exponent;
  }
};

[[noreturn]] void fail(const char* what, const char* isa, int problem) {
  std::fprintf(stderr, "problem %d on %s: %s\n", problem, isa, what);
  std::exit(1);
}

struct Layer {
  co::PreconditionLayer problem{};
  std::unique_ptr<Buffer> x, g, bias;
  std::vector<int64_t> permutation;
  int64_t row_count = 0;
  std::unique_ptr<int32_t[]> info;
  std::unique_ptr<float[]> damping;
};

Layer make_layer(co::DType x_type, co::DType g_type, const co::PreconditionOptions& options, uint32_t index) {
  Layer layer;
  co::PreconditionLayer& p = layer.problem;
  p.units = between(1, 300);
  p.outputs = between(1, 40);
  p.x_dtype = x_type;
  p.g_dtype = p.bias_dtype = g_type;
  p.layer = index;
  p.group = static_cast<int32_t>(between(1, options.chunk));
  for (int64_t& size : p.x_row_size) size = 1;
  for (int64_t& size : p.g_tap_size) size = 1;
  const int64_t gap = between(1, 3) == 3 ? 2 : 1;  // stride between neighbours
  int64_t elements;
  if (between(0, 1) == 0) {  // rows of a linear layer
    p.x_row_size[3] = between(1, 200);
    p.x_unit_stride = gap;
    p.x_row_stride[3] = p.units * gap + between(0, 3);
    elements = (p.x_row_size[3] - 1) * p.x_row_stride[3] + (p.units - 1) * gap + 1;
  } else {  // (N, units, height, width), contiguous
    p.x_row_size[1] = between(1, 4);
    p.x_row_size[2] = between(1, 7);
    p.x_row_size[3] = between(1, 7);
    p.x_row_stride[3] = 1;
    p.x_row_stride[2] = p.x_row_size[3];
    p.x_unit_stride = p.x_row_size[2] * p.x_row_size[3];
    p.x_row_stride[1] = p.x_unit_stride * p.units;
    elements = p.x_row_size[1] * p.x_row_stride[1];
    p.g_tap_size[1] = between(1, 3);
    p.g_tap_size[2] = between(1, 3);
  }
  layer.x = std::make_unique<Buffer>(x_type, elements);
  p.x = layer.x->bytes.get();
  p.g_tap_stride[2] = 1;
  p.g_tap_stride[1] = p.g_tap_size[2];
  p.g_unit_stride = p.g_tap_size[1] * p.g_tap_size[2] * gap;
  p.g_output_stride = p.g_unit_stride * p.units;
  layer.g = std::make_unique<Buffer>(
      g_type, p.outputs * p.g_output_stride - (p.g_unit_stride - p.g_tap_size[1] * p.g_tap_size[2]));
  p.g = layer.g->bytes.get();
  if (between(0, 1) == 0) {
    p.has_bias = true;
    p.bias_stride = gap;
    layer.bias = std::make_unique<Buffer>(g_type, (p.outputs - 1) * gap + 1);
    p.bias_grad = layer.bias->bytes.get();
  }
  if (between(0, 3) == 0) {  // some permutation
    layer.permutation.resize(p.units + p.has_bias);
    std::iota(layer.permutation.begin(), layer.permutation.end(), 0);
    for (size_t i = layer.permutation.size() - 1; i > 0; --i) {
      std::swap(layer.permutation[i], layer.permutation[bits() % (i + 1)]);
    }
    p.permutation = layer.permutation.data();
  }
  if (between(0, 3) == 0 && p.x_row_size[1] == 1 && p.x_row_size[2] == 1) layer.row_count = between(0, p.x_row_size[3]);
  const int64_t chunks = co::num_chunks(p, options);
  layer.info = std::make_unique<int32_t[]>(chunks);
  layer.damping = std::make_unique<float[]>(chunks);
  p.info = layer.info.get();
  p.damping_used = layer.damping.get();
  return layer;
}

void correct(const char* isa, int problem, co::DType x_type, co::DType g_type) {
  co::PreconditionOptions options;
  options.chunk = static_cast<int32_t>(between(1, between(0, 1) == 0 ? 32 : co::kMaxChunk));
  options.damping = 0.1;
  options.trace_scaling = between(0, 1) == 0;
  options.float64 = g_type == co::DType::kFloat64;
  options.max_rows = between(1, 300);
  options.seed = bits();
  std::vector<Layer> layers;
  const int64_t count = between(1, 4);
  for (int64_t i = 0; i < count; ++i) layers.push_back(make_layer(x_type, g_type, options, static_cast<uint32_t>(i)));
  std::vector<co::PreconditionLayer> problems;
  for (Layer& layer : layers) {
    if (layer.row_count > 0) layer.problem.row_count = &layer.row_count;
    problems.push_back(layer.problem);
  }
  std::vector<Buffer> original, once;
  for (const Layer& layer : layers) original.push_back(*layer.g);
  std::vector<Buffer> bias;
  for (const Layer& layer : layers) bias.push_back(layer.bias ? *layer.bias : Buffer(g_type, 1));
  for (const co::ThreadPool& pool : {co::ThreadPool{}, co::ThreadPool{run, nullptr, 2}}) {
    for (size_t i = 0; i < layers.size(); ++i) {
      std::memcpy(layers[i].g->bytes.get(), original[i].bytes.get(), original[i].size());
      if (layers[i].bias) std::memcpy(layers[i].bias->bytes.get(), bias[i].bytes.get(), bias[i].size());
    }
    if (co::precondition_cpu(problems.data(), count, options, pool) != co::Status::kOk) fail("status", isa, problem);
    for (size_t i = 0; i < layers.size(); ++i) {
      for (int64_t e = 0; e < layers[i].g->count; ++e) {
        if (!layers[i].g->finite(e)) fail("a value that is not finite", isa, problem);
      }
    }
    if (once.empty()) {
      for (const Layer& layer : layers) once.push_back(*layer.g);
    } else {
      for (size_t i = 0; i < layers.size(); ++i) {
        if (!(once[i] == *layers[i].g)) fail("another result on two threads", isa, problem);
      }
    }
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    const co::PreconditionLayer& p = layers[i].problem;
    const int64_t taps = p.g_tap_size[1] * p.g_tap_size[2];
    const int64_t bytes = co::element_size(g_type);
    for (int64_t e = 0; e < layers[i].g->count; ++e) {
      const bool gap = e % p.g_unit_stride >= taps;
      if (gap && std::memcmp(layers[i].g->bytes.get() + e * bytes, original[i].bytes.get() + e * bytes, bytes) != 0) {
        fail("a write between strided elements", isa, problem);
      }
    }
  }
}

void modulus(const char* isa, int problem, co::DType type) {
  const int64_t rows = between(1, 5), length = between(1, 700);
  const Buffer x(type, rows * length);
  Buffer y(type, rows * length), back(type, rows * length);
  const std::unique_ptr<uint8_t[]> signs(new uint8_t[rows * ((length + 7) / 8)]);
  const co::ThreadPool pool{run, nullptr, 2};
  const co::ModulusParams forward{x.bytes.get(), y.bytes.get(), signs.get(), rows, length, type};
  const co::ModulusBackwardParams backward{y.bytes.get(), signs.get(), back.bytes.get(), rows, length, type};
  if (co::modulus_cpu(forward, pool) != co::Status::kOk) fail("modulus", isa, problem);
  if (co::modulus_backward_cpu(backward, pool) != co::Status::kOk) fail("modulus backward", isa, problem);
  if (!(back == x)) fail("|x| times the sign of x is not x", isa, problem);
}

}  // namespace

int main(int argc, char** argv) {
  const int problems = argc > 1 ? std::atoi(argv[1]) : 20;
  const co::DType types[] = {co::DType::kFloat32, co::DType::kFloat64, co::DType::kBFloat16, co::DType::kFloat16};
  int sets = 0;
  for (const char* isa : {"portable", "avx2", "avx512", "avx512bf16", "amx", "amx_model"}) {
    if (co_set_cpu_isa(isa) != 0) continue;
    ++sets;
    for (int problem = 0; problem < problems; ++problem) {
      const co::DType type = types[problem % 4];
      const bool mixed = type == co::DType::kBFloat16 && between(0, 1) == 0;  // float gradients of bfloat16 inputs
      correct(isa, problem, type, mixed ? co::DType::kFloat32 : type);
      modulus(isa, problem, type);
    }
    std::printf("%s: %d problems\n", isa, problems);
  }
  return sets == 0;
}
