#include "cpu/one_unit.h"

#include <algorithm>
#include <cmath>

#include "consistency_ops/damping.h"
#include "cpu/strided.h"

namespace consistency_ops::cpu {

namespace {

#include "cpu/convert.inl"

// Below this many elements waking the other threads costs more than they bring.
constexpr int64_t kSerialElements = 100000;

// Channels that are summed together.
struct Block {
  int64_t first, lanes;
  int64_t rows;  // that are sampled
};

// The inverse of the damped covariance; w01 and w11 only with a bias.
template <typename T>
struct Inverse {
  T w00, w01, w11;
  int info;
  double damping;
};

bool positive(double pivot) { return pivot > 0 && pivot - pivot == 0; }

// `squares`, `sum`: of the inputs of all `rows`, which are the second moments with themselves and with the bias.
template <typename T>
Inverse<T> invert(double squares, double sum, int64_t rows, bool has_bias, const PreconditionOptions& options) {
  const T stored = static_cast<T>(squares);
  double scale = 1.0 / static_cast<double>(rows);
  if (options.trace_scaling) {
    const bool finite = stored - stored == 0;
    const double diagonal = (finite ? stored : 0) + (has_bias ? static_cast<double>(rows) : 0);
    scale /= trace_scale(diagonal, int{finite} + int{has_bias}, scale);
  }
  const T m00 = stored * static_cast<T>(scale), m01 = static_cast<T>(sum) * static_cast<T>(scale);
  const T m11 = static_cast<T>(rows) * static_cast<T>(scale);
  Inverse<T> inverse{};
  for (int failed = 0; failed < kMaxTries; ++failed) {
    inverse.damping = damping_of_try<double>(options.damping, failed);
    const T damping = static_cast<T>(inverse.damping), first = m00 + damping;
    inverse.info = positive(first) ? 0 : 1;
    if (inverse.info != 0) continue;
    inverse.w00 = 1 / first;
    if (!has_bias) break;
    const T ratio = m01 / first, second = m11 + damping - ratio * m01;
    inverse.info = positive(second) ? 0 : 2;
    if (inverse.info != 0) continue;
    inverse.w11 = 1 / second;
    inverse.w01 = -ratio * inverse.w11;
    inverse.w00 -= ratio * inverse.w01;
    break;
  }
  return inverse;
}

template <typename T>
T load(const void* from, int64_t at, DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return widen(static_cast<const BFloat16*>(from)[at]);
    case DType::kFloat16:
      return widen(static_cast<const Float16*>(from)[at]);
    case DType::kFloat64:
      return static_cast<T>(static_cast<const double*>(from)[at]);
    default:
      return static_cast<const float*>(from)[at];
  }
}

template <typename T>
void store(T value, void* to, int64_t at, DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      static_cast<BFloat16*>(to)[at] = narrow<BFloat16>(value);
      return;
    case DType::kFloat16:
      static_cast<Float16*>(to)[at] = narrow<Float16>(value);
      return;
    case DType::kFloat64:
      static_cast<double*>(to)[at] = value;
      return;
    default:
      static_cast<float*>(to)[at] = static_cast<float>(value);
  }
}

// G of one channel without a bias.  An element whose result is not finite stays as it is.
template <typename T, typename S>
void scale(const PreconditionLayer& layer, T factor) {
  const T limit = largest_of<T>(layer.g_dtype);
  const int64_t* size = layer.g_tap_size;
  const int64_t* stride = layer.g_tap_stride;
  for (int64_t o = 0; o < layer.outputs; ++o) {
    for (int64_t outer = 0; outer < size[0] * size[1]; ++outer) {
      S* g = static_cast<S*>(layer.g) + o * layer.g_output_stride + outer / size[1] * stride[0] +
             outer % size[1] * stride[1];
      for (int64_t t = 0; t < size[2]; ++t, g += stride[2]) {
        const T value = widen(*g) * factor;
        if (std::abs(value) <= limit) *g = narrow<S>(value);
      }
    }
  }
}

template <typename T>
void scale(const PreconditionLayer& layer, T factor) {
  switch (layer.g_dtype) {
    case DType::kBFloat16:
      return scale<T, BFloat16>(layer, factor);
    case DType::kFloat16:
      return scale<T, Float16>(layer, factor);
    case DType::kFloat64:
      return scale<T, double>(layer, factor);
    default:
      return scale<T, float>(layer, factor);
  }
}

// G and the bias of one channel.  A row (an output's tap) with a result that is not finite stays as it is.
template <typename T>
void correct_with_bias(const PreconditionLayer& layer, const Inverse<T>& inverse) {
  const T limit = std::min(largest_of<T>(layer.g_dtype), largest_of<T>(layer.bias_dtype));
  int64_t taps = 1;
  for (int64_t size : layer.g_tap_size) taps *= size;
  for (int64_t o = 0; o < layer.outputs; ++o) {
    const T bias = load<T>(layer.bias_grad, o * layer.bias_stride, layer.bias_dtype);
    T mean = 0;
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t at = o * layer.g_output_stride + offset_of(layer.g_tap_size, layer.g_tap_stride, kMaxTapDims, t);
      const T old = load<T>(layer.g, at, layer.g_dtype);
      const T value = old * inverse.w00 + bias * inverse.w01;
      T copy = old * inverse.w01 + bias * inverse.w11;
      if (std::abs(value) <= limit && std::abs(copy) <= limit) {
        store(value, layer.g, at, layer.g_dtype);
      } else {
        copy = bias;
      }
      const T difference = copy - mean;  // NaN between infinities: all copies are the infinity that came in
      if (t == 0) {
        mean = copy;
      } else if (difference == difference) {
        mean += difference / static_cast<T>(t + 1);
      }
    }
    store(mean, layer.bias_grad, o * layer.bias_stride, layer.bias_dtype);
  }
}

template <typename T>
void correct(const PreconditionLayer* layers, const PreconditionOptions& options, const LayerPlan& plan,
             const Block& block) {
  const PreconditionLayer& head = layers[block.first];
  double squares[kMomentLanes] = {}, sums[kMomentLanes] = {};
  int64_t row_offset[kRowBlock];
  for (int64_t row = 0; row < block.rows; row += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, block.rows - row);
    sampled_offsets(head, plan, row, rows, row_offset);
    isa_kernels<T>().gather[static_cast<int>(head.x_dtype)].moments(head.x, row_offset, rows, block.lanes, squares,
                                                                    sums);
  }
  for (int64_t i = 0; i < block.lanes; ++i) {
    const PreconditionLayer& layer = layers[block.first + i];
    const Inverse<T> inverse = invert<T>(squares[i], sums[i], block.rows, layer.has_bias, options);
    if (layer.info != nullptr) *layer.info = inverse.info;
    if (layer.damping_used != nullptr) *layer.damping_used = static_cast<float>(inverse.damping);
    if (inverse.info != 0) continue;
    if (layer.has_bias) {
      correct_with_bias(layer, inverse);
    } else {
      scale(layer, inverse.w00);
    }
  }
}

// Whether `next` is the channel after `layer`: the same rows, one element further.
bool follows(const PreconditionLayer& next, const PreconditionLayer& layer) {
  return static_cast<const char*>(next.x) == static_cast<const char*>(layer.x) + element_size(layer.x_dtype) &&
         next.x_dtype == layer.x_dtype && next.layer == layer.layer && next.row_count == layer.row_count &&
         std::equal(next.x_row_size, next.x_row_size + kMaxRowDims, layer.x_row_size) &&
         std::equal(next.x_row_stride, next.x_row_stride + kMaxRowDims, layer.x_row_stride);
}

struct Work {
  const PreconditionLayer* layers;
  const PreconditionOptions* options;
  const Plan* plan;
  std::vector<Block> blocks;
};

void run_block(void* argument, int64_t index) {
  const Work& work = *static_cast<const Work*>(argument);
  const Block& block = work.blocks[index];
  const LayerPlan& plan = work.plan->layers[block.first];
  if (work.options->float64) {
    correct<double>(work.layers, *work.options, plan, block);
  } else {
    correct<float>(work.layers, *work.options, plan, block);
  }
}

}  // namespace

void correct_one_unit(const PreconditionLayer* layers, const PreconditionOptions& options, const Plan& plan,
                      const ThreadPool& pool) {
  Work work{layers, &options, &plan, {}};
  int64_t elements = 0;
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    const LayerPlan& at = plan.layers[l];
    if (!at.one_unit) continue;
    const auto index = static_cast<int64_t>(l);
    Block* last = work.blocks.empty() ? nullptr : &work.blocks.back();
    if (last != nullptr && last->first + last->lanes == index && last->lanes < kMomentLanes &&
        follows(layers[l], layers[l - 1])) {
      ++last->lanes;
    } else {
      work.blocks.push_back({index, 1, at.sample.count});
    }
    elements += at.sample.count + layers[l].outputs * at.taps;
  }
  const auto blocks = static_cast<int64_t>(work.blocks.size());
  if (pool.run != nullptr && pool.threads > 1 && blocks > 1 && elements > kSerialElements) {
    pool.run(pool.context, blocks, run_block, &work);
  } else {
    for (int64_t b = 0; b < blocks; ++b) run_block(&work, b);
  }
}

}  // namespace consistency_ops::cpu
