// The kernels of batch_rms_norm.cpp for one instruction set; included inside a namespace of its own
// and under its target pragma.  Calls no function of another header (see chunk_kernels.inl).
#include "cpu/convert.inl"

// S: element type; T: the type that is summed and divided in.  Chains of additions in T have at most 64 terms; the
// sums of the chains are added in double.
template <typename S, typename T>
struct Normalise {
  static constexpr int kLanes = 32, kChain = 64, kVectors = kLanes * sizeof(T) / CO_VECTOR_BYTES;
  typedef T V __attribute__((vector_size(CO_VECTOR_BYTES)));

  static double sum_of_squares(const void* x, int64_t n) {
    const S* from = static_cast<const S*>(x);
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += kLanes * kChain) {
      const int64_t end = n - begin < kLanes * kChain ? n : begin + kLanes * kChain;
      alignas(CO_VECTOR_BYTES) T value[kLanes], lane[kLanes];
      V sum[kVectors] = {};
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes) {
#pragma GCC unroll 32
        for (int j = 0; j < kLanes; ++j) value[j] = widen(from[i + j]);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          V block;
          __builtin_memcpy(&block, value + v * (kLanes / kVectors), sizeof(V));
          sum[v] += block * block;
        }
      }
      __builtin_memcpy(lane, sum, sizeof(lane));
      for (int j = 0; i + j < end; ++j) {
        const T rest = widen(from[i + j]);
        lane[j] += rest * rest;
      }
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
      }
      total += static_cast<double>(lane[0]);
    }
    return total;
  }

  // sums[c] += squares of column c of a row-major block.  Narrow dense rows are read as fewer, wider ones.
  static void add_squares(const void* x, int64_t rows, int64_t stride, int64_t channels, double* sums) {
    const S* from = static_cast<const S*>(x);
    const int64_t fold = stride == channels && 2 * channels <= kWide ? kWide / channels : 1;
    const int64_t wide = rows / fold * fold;
    if (fold > 1 && wide > 0) {
      double folded[kWide] = {};
      add_square_columns(from, wide / fold, fold * stride, fold * channels, folded);
      for (int64_t j = 0; j < fold * channels; ++j) sums[j % channels] += folded[j];
      add_square_columns(from + wide * stride, rows - wide, stride, channels, sums);
    } else {
      add_square_columns(from, rows, stride, channels, sums);
    }
  }

  static void divide_run(const void* x, void* y, int64_t n, const void* denominator) {
    const S* from = static_cast<const S*>(x);
    S* to = static_cast<S*>(y);
    const T d = *static_cast<const T*>(denominator);
    for (int64_t i = 0; i < n; ++i) to[i] = narrow<S>(widen(from[i]) / d);
  }

  static void divide_rows(const void* x, void* y, int64_t rows, int64_t x_stride, int64_t y_stride, int64_t channels,
                          const void* denominator) {
    const S* from = static_cast<const S*>(x);
    S* to = static_cast<S*>(y);
    const T* d = static_cast<const T*>(denominator);
    const bool is_dense = x_stride == channels && y_stride == channels;
    const int64_t fold = is_dense && 2 * channels <= kWide ? kWide / channels : 1;
    const int64_t wide = rows / fold * fold;
    if (fold > 1 && wide > 0) {
      T repeated[kWide];
      for (int64_t j = 0; j < fold * channels; ++j) repeated[j] = d[j % channels];
      divide_columns(from, to, wide / fold, fold * x_stride, fold * y_stride, fold * channels, repeated);
      divide_columns(from + wide * x_stride, to + wide * y_stride, rows - wide, x_stride, y_stride, channels, d);
    } else {
      divide_columns(from, to, rows, x_stride, y_stride, channels, d);
    }
  }

 private:
  static constexpr int64_t kWide = 256;  // columns whose sums are kept at once

  static void add_square_columns(const S* from, int64_t rows, int64_t stride, int64_t channels, double* sums) {
    for (int64_t c0 = 0; c0 < channels; c0 += kWide) {
      const int64_t width = channels - c0 < kWide ? channels - c0 : kWide;
      for (int64_t r0 = 0; r0 < rows; r0 += kChain) {
        const int64_t last = rows - r0 < kChain ? rows : r0 + kChain;
        T sum[kWide] = {};
        for (int64_t r = r0; r < last; ++r) {
          const S* row = from + r * stride + c0;
          for (int64_t c = 0; c < width; ++c) {
            const T value = widen(row[c]);
            sum[c] += value * value;
          }
        }
        for (int64_t c = 0; c < width; ++c) sums[c0 + c] += static_cast<double>(sum[c]);
      }
    }
  }

  static void divide_columns(const S* from, S* to, int64_t rows, int64_t x_stride, int64_t y_stride, int64_t channels,
                             const T* d) {
    for (int64_t r = 0; r < rows; ++r) {
      const S* x = from + r * x_stride;
      S* y = to + r * y_stride;
      for (int64_t c = 0; c < channels; ++c) y[c] = narrow<S>(widen(x[c]) / d[c]);
    }
  }
};

template <typename S, typename T>
constexpr Kernels table() {
  using N = Normalise<S, T>;
  return {N::sum_of_squares, N::add_squares, N::divide_run, N::divide_rows};
}

const Kernels kTable[4] = {table<float, float>(), table<double, double>(), table<BFloat16, float>(),
                           table<Float16, float>()};
