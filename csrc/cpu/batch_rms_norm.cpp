// Mean squares of channels, the denominators made from them, and the division.
//
// Both passes over x walk it in memory order, in blocks cut by the shape alone: at most kBlock elements, whole
// channels-first maps or whole channels-last pixels where they fit.  A block leaves one partial sum a channel; the
// partial sums are added in the order of the blocks, so the result does not depend on the threads.
#include "consistency_ops/batch_rms_norm.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>

#include "cpu/chunk_kernels.h"
#include "cpu/parallel.h"

namespace consistency_ops {
namespace {

struct Kernels {
  double (*sum_of_squares)(const void* x, int64_t n);
  void (*add_squares)(const void* x, int64_t rows, int64_t stride, int64_t channels, double* sums);
  void (*divide_run)(const void* x, void* y, int64_t n, const void* denominator);
  void (*divide_rows)(const void* x, void* y, int64_t rows, int64_t x_stride, int64_t y_stride, int64_t channels,
                      const void* denominator);
};

#define CO_KERNELS "cpu/batch_rms_norm.inl"
#include "cpu/each_isa.inl"

const Kernels& kernels(DType dtype) { return CO_BEST(kTable[static_cast<int>(dtype)]); }

constexpr int64_t kBlock = 1 << 15;  // elements

struct Range {
  int64_t begin, end;
};

// One axis cut into pieces of `block`.
struct Axis {
  int64_t size, block;
  int64_t pieces() const { return (size + block - 1) / block; }
  Range piece(int64_t i) const { return {i * block, (i + 1) * block < size ? (i + 1) * block : size}; }
};

struct Grid {
  Axis outer, channel, inner;
  bool channels_last;
  int64_t tasks() const { return outer.pieces() * channel.pieces() * inner.pieces(); }
  int64_t partials() const { return outer.pieces() * inner.pieces(); }
};

Axis cut(int64_t size, int64_t room) { return {size, std::max<int64_t>(1, std::min(size, room))}; }

bool valid(const ChannelView& view) {
  return view.outer >= 0 && view.channels >= 0 && view.inner >= 0 &&
         (view.inner_stride == 1 || view.channel_stride == 1 || view.inner <= 1 || view.channels <= 1);
}

bool is_channels_last(const ChannelView& view) { return view.channel_stride == 1 && (view.inner_stride != 1); }

Grid make_grid(const ChannelView& view) {
  Grid grid{};
  grid.channels_last = is_channels_last(view);
  if (grid.channels_last) {
    grid.channel = cut(view.channels, kBlock);
    grid.inner = cut(view.inner, kBlock / grid.channel.block);
  } else {
    grid.inner = cut(view.inner, kBlock);
    grid.channel = cut(view.channels, kBlock / grid.inner.block);
  }
  grid.outer = cut(view.outer, kBlock / (grid.channel.block * grid.inner.block));
  return grid;
}

// body(outer range, channel range, inner range, index of the partial sum)
template <typename Body>
void run_grid(const Grid& grid, const ThreadPool& pool, const Body& body) {
  cpu::run_tasks(pool, grid.tasks(), [&](int64_t task) {
    const int64_t i = task % grid.inner.pieces(), rest = task / grid.inner.pieces();
    const int64_t c = rest % grid.channel.pieces(), o = rest / grid.channel.pieces();
    body(grid.outer.piece(o), grid.channel.piece(c), grid.inner.piece(i), o * grid.inner.pieces() + i);
  });
}

double get(const void* p, DType dtype, int64_t i) {
  return dtype == DType::kFloat64 ? static_cast<const double*>(p)[i] : static_cast<const float*>(p)[i];
}
void set(void* p, DType dtype, int64_t i, double value) {
  if (dtype == DType::kFloat64) {
    static_cast<double*>(p)[i] = value;
  } else {
    static_cast<float*>(p)[i] = static_cast<float>(value);
  }
}

// sums[c] = sum of x^2 over channel c; false without memory.
bool channel_squares(const BatchRmsNormParams& p, const ThreadPool& pool, double* sums) {
  const ChannelView& view = p.view;
  const Grid grid = make_grid(view);
  const Kernels& kernel = kernels(p.dtype);
  const int64_t size = element_size(p.dtype), channels = view.channels;
  const std::unique_ptr<double, void (*)(void*)> partial(
      static_cast<double*>(std::calloc(grid.partials() * channels, sizeof(double))), std::free);
  if (partial == nullptr) return false;
  run_grid(grid, pool, [&](Range outer, Range channel, Range inner, int64_t index) {
    double* out = partial.get() + index * channels;
    for (int64_t o = outer.begin; o < outer.end; ++o) {
      const char* image =
          static_cast<const char*>(p.x) + (o * view.outer_stride + inner.begin * view.inner_stride) * size;
      if (grid.channels_last) {
        kernel.add_squares(image + channel.begin * size, inner.end - inner.begin, view.inner_stride,
                           channel.end - channel.begin, out + channel.begin);
      } else {
        for (int64_t c = channel.begin; c < channel.end; ++c) {
          out[c] += kernel.sum_of_squares(image + c * view.channel_stride * size, inner.end - inner.begin);
        }
      }
    }
  });
  for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
  for (int64_t b = 0; b < grid.partials(); ++b) {
    for (int64_t c = 0; c < channels; ++c) sums[c] += partial.get()[b * channels + c];
  }
  return true;
}

}  // namespace

Status batch_rms_norm_denominator_cpu(const BatchRmsNormParams& p, const ThreadPool& pool) {
  const int64_t channels = p.view.channels, count = p.view.outer * p.view.inner;
  if ((p.x != nullptr && !valid(p.view)) || !(p.decay >= 0 && p.decay < 1) || !(p.eps > 0))
    return Status::kInvalidArgument;
  if (channels == 0) return Status::kOk;
  if (p.x != nullptr && count > 0) {
    const std::unique_ptr<double, void (*)(void*)> sums(static_cast<double*>(std::malloc(channels * sizeof(double))),
                                                        std::free);
    if (sums == nullptr || !channel_squares(p, pool, sums.get())) return Status::kOutOfMemory;
    for (int64_t c = 0; c < channels; ++c) {
      const double v = get(p.running_ms, p.running_dtype, c);
      const double mean = sums.get()[c] / static_cast<double>(count);
      set(p.running_ms, p.running_dtype, c, p.decay * v + (1 - p.decay) * mean);
    }
    if (p.num_batches != nullptr) ++*p.num_batches;
  }
  // D is made from the stored v, rounded as it is, so that evaluation repeats the last training call.
  const bool corrected = p.num_batches != nullptr && *p.num_batches > 0;
  const double correction = corrected ? 1 - std::pow(p.decay, static_cast<double>(*p.num_batches)) : 1;
  double largest = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const double v = get(p.running_ms, p.running_dtype, c);
    if (!(v <= largest)) largest = v;  // NaN stays: from here on every comparison with it is false
    if (std::isnan(v)) break;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const double v = get(p.running_ms, p.running_dtype, c);
    set(p.denominator, p.denominator_dtype, c, std::sqrt(v / correction + p.eps * (largest + 1e-6)));
  }
  return Status::kOk;
}

Status channel_divide_cpu(const ChannelDivideParams& p, const ThreadPool& pool) {
  const ChannelView &x = p.x_view, &y = p.y_view;
  const Grid grid = make_grid(x);
  if (!valid(x) || !valid(y) || x.outer != y.outer || x.channels != y.channels || x.inner != y.inner ||
      grid.channels_last != is_channels_last(y)) {
    return Status::kInvalidArgument;
  }
  const Kernels& kernel = kernels(p.dtype);
  const int64_t size = element_size(p.dtype), d_size = p.dtype == DType::kFloat64 ? 8 : 4;
  run_grid(grid, pool, [&](Range outer, Range channel, Range inner, int64_t) {
    for (int64_t o = outer.begin; o < outer.end; ++o) {
      const char* from = static_cast<const char*>(p.x) + (o * x.outer_stride + inner.begin * x.inner_stride) * size;
      char* to = static_cast<char*>(p.y) + (o * y.outer_stride + inner.begin * y.inner_stride) * size;
      const char* d = static_cast<const char*>(p.denominator);
      if (grid.channels_last) {
        kernel.divide_rows(from + channel.begin * size, to + channel.begin * size, inner.end - inner.begin,
                           x.inner_stride, y.inner_stride, channel.end - channel.begin, d + channel.begin * d_size);
      } else {
        for (int64_t c = channel.begin; c < channel.end; ++c) {
          kernel.divide_run(from + c * x.channel_stride * size, to + c * y.channel_stride * size,
                            inner.end - inner.begin, d + c * d_size);
        }
      }
    }
  });
  return Status::kOk;
}

}  // namespace consistency_ops
