// The body of DirectKernels (chunk_kernels.h) for one instruction set, and the table of all its kernels; included
// beside chunk_kernels.inl, same rules.
//
// Products G A^-1 that read G where it lies, without the copy into a tile, for the shapes whose sums fit the registers.

#include "cpu/gather_kernels.inl"

template <typename S, typename T>
struct Direct {
  // Corrects kOfRows rows in a chunk of kPanels panels.  If a result is beyond `limit`, returns false and leaves G as
  // it is.
  template <int kPanels, int kOfRows>
  static bool correct_rows(S* source, const int64_t* row_offset, const Run* runs, int64_t count, bool whole,
                           int64_t ahead, const T* inverse, T limit, T* product) {
    using K = Kernels<T>;
    typename K::V acc[kOfRows][kPanels] = {};
    constexpr int64_t kHeight = kPanels * kPanel;
    S* g[kOfRows];
#pragma GCC unroll 16
    for (int r = 0; r < kOfRows; ++r) g[r] = source + row_offset[r];
    const T* factors = inverse;
    for (const Run* run = runs; run != runs + count; ++run) {
      const int64_t unit = run->unit;
#pragma GCC unroll 16
      for (int r = 0; r < kOfRows; ++r) __builtin_prefetch(g[r] + unit + ahead, 1, 2);
      auto add = [&](int u) __attribute__((always_inline)) {
        typename K::V row[kPanels];
#pragma GCC unroll 16
        for (int p = 0; p < kPanels; ++p) row[p] = K::vector(factors + (p * kHeight + u) * kPanel, 0);
#pragma GCC unroll 16
        for (int r = 0; r < kOfRows; ++r) {
          const T scalar = g[r][unit + u];
#pragma GCC unroll 16
          for (int p = 0; p < kPanels; ++p) acc[r][p] += scalar * row[p];
        }
      };
      if (run->length == 8) {
#pragma GCC unroll 8
        for (int u = 0; u < 8; ++u) add(u);
      } else {
        for (int u = 0; u < run->length; ++u) add(u);
      }
      factors += run->length * kPanel;
    }
    typename K::VectorOfBits largest{};
#pragma GCC unroll 16
    for (int r = 0; r < kOfRows; ++r) {
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) K::keep_largest(acc[r][p], largest);
    }
    if (K::any_beyond(largest, limit)) return false;
    if (whole) {
#pragma GCC unroll 16
      for (int p = 0; p < 2 * kPanels; ++p) {
#pragma GCC unroll 16
        for (int r = 0; r < kOfRows; ++r) {
          __builtin_memcpy(g[r] + runs[p].unit, reinterpret_cast<const T*>(&acc[r][p / 2]) + p % 2 * (kPanel / 2),
                           kPanel / 2 * sizeof(T));
        }
      }
      return true;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kOfRows; ++r) {
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) K::vector(product + r * kTilePitch + p * kPanel, 0) = acc[r][p];
    }
    Gather<S, T>::store_tile(product, 0, source, row_offset, kOfRows, 1, runs, count);
    return true;
  }

  template <int kPanels>
  static int64_t correct_all_rows(S* source, const int64_t* row_offset, int64_t rows, const Run* runs, int64_t count,
                                  int64_t ahead, const T* inverse, T limit, T* product) {
    bool whole = count == 2 * kPanels;
    for (int64_t i = 0; i < count; ++i) whole = whole && runs[i].length == kPanel / 2;
    constexpr int kOfRows = 4;
    int64_t r = 0;
    while (r + kOfRows <= rows &&
           correct_rows<kPanels, kOfRows>(source, row_offset + r, runs, count, whole, ahead, inverse, limit, product)) {
      r += kOfRows;
    }
    return r;
  }

  // Multiplies the taps of one output, which lie side by side from `first` on.
  template <int kPanels, int kTaps>
  static void multiply_taps(const S* first, int64_t unit_stride, const Run* runs, int64_t count, int64_t ahead,
                            const T* inverse, int64_t height, T* product, typename Kernels<T>::VectorOfBits& largest) {
    using K = Kernels<T>;
    typename K::V acc[kTaps][kPanels] = {};
    const T* factors = inverse;
    for (const Run* run = runs; run != runs + count; ++run) {
      const S* g = first + run->unit * unit_stride;
      for (int u = 0; u < run->length; ++u, factors += kPanel, g += unit_stride) {
        __builtin_prefetch(g + ahead, 1, 2);
        typename K::V row[kPanels];
#pragma GCC unroll 16
        for (int p = 0; p < kPanels; ++p) row[p] = K::vector(factors + p * height * kPanel, 0);
#pragma GCC unroll 16
        for (int r = 0; r < kTaps; ++r) {
          const T scalar = g[r];
#pragma GCC unroll 16
          for (int p = 0; p < kPanels; ++p) acc[r][p] += scalar * row[p];
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTaps; ++r) {
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
        K::vector(product + r * kTilePitch + p * kPanel, 0) = acc[r][p];
        K::keep_largest(acc[r][p], largest);
      }
    }
  }

  template <int kTaps>
  static int64_t correct_all_taps(S* source, const int64_t* row_offset, int64_t rows, int64_t unit_stride,
                                  const Run* runs, int64_t count, int64_t ahead, const T* inverse, int panels, T limit,
                                  T* product) {
    const int64_t height = int64_t{panels} * kPanel;
    int64_t r = 0;
    for (; r + kTaps <= rows; r += kTaps) {
      if (Gather<S, T>::adjacent(row_offset, r, r + kTaps) != kTaps) break;
      typename Kernels<T>::VectorOfBits largest{};
      int j = 0;
      for (; j + 2 <= panels; j += 2) {
        multiply_taps<2, kTaps>(source + row_offset[r], unit_stride, runs, count, ahead, inverse + j * height * kPanel,
                                height, product + j * kPanel, largest);
      }
      if (j < panels) {
        multiply_taps<1, kTaps>(source + row_offset[r], unit_stride, runs, count, ahead, inverse + j * height * kPanel,
                                height, product + j * kPanel, largest);
      }
      if (Kernels<T>::any_beyond(largest, limit)) break;
      Gather<S, T>::store_tile(product, 0, source, row_offset + r, kTaps, unit_stride, runs, count);
    }
    return r;
  }

  static int64_t correct(void* g, const int64_t* row_offset, int64_t rows, int64_t unit_stride, const Run* runs,
                         int64_t count, int64_t taps, int64_t ahead, const T* inverse, int64_t size, T limit,
                         T* product) {
    // 4 rows x 4 panels, or 9 taps x 2, of sums need 32 registers of a panel's row.
    if constexpr (sizeof(S) == sizeof(T) && Kernels<T>::kVectors == 1) {
      S* source = static_cast<S*>(g);
      const int panels = static_cast<int>((size + kPanel - 1) / kPanel);
      if (taps == 9 && unit_stride != 1) {
        return correct_all_taps<9>(source, row_offset, rows, unit_stride, runs, count, ahead, inverse, panels, limit,
                                   product);
      }
      if (unit_stride != 1) return 0;
      switch (panels) {
        case 2:
          return correct_all_rows<2>(source, row_offset, rows, runs, count, ahead, inverse, limit, product);
        case 3:
          return correct_all_rows<3>(source, row_offset, rows, runs, count, ahead, inverse, limit, product);
        case 4:
          return correct_all_rows<4>(source, row_offset, rows, runs, count, ahead, inverse, limit, product);
      }
    }
    return 0;
  }

  static constexpr DirectKernels<T> table() { return {correct}; }
};

template <typename T>
constexpr IsaKernels<T> isa_table() {
  return {Kernels<T>::table(),
          {Gather<float, T>::table(), Gather<double, T>::table(), Gather<BFloat16, T>::table(),
           Gather<Float16, T>::table()},
          {Direct<float, T>::table(), Direct<double, T>::table(), Direct<BFloat16, T>::table(),
           Direct<Float16, T>::table()}};
}
