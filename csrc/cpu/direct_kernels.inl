// The body of DirectKernels (chunk_kernels.h) for one instruction set, and the table of all its kernels; included
// beside chunk_kernels.inl, same rules.
//
// Products G A^-1 that read G where it lies, without the copy into a tile, for the shapes whose sums fit the registers.

#include "cpu/gather_kernels.inl"

template <typename S, typename T>
struct Direct {
  using K = Kernels<T>;
  using V = typename K::V;
  using Largest = typename K::VectorOfBits;
  static constexpr int kLine = 64;  // bytes of a cache line, which a piece of 8 units of two rows of float fills
  // Rows that share an inverse in the L1 cache.
  static constexpr int kManyRows = kMaxTileRows;

  // acc[r][p] = the products of kOfRows rows with kPanels panels of a matrix.
  template <int kPanels, int kOfRows, bool kPrefetch>
  static inline __attribute__((always_inline)) void multiply(const DirectRows<T>& at, int64_t first, const T* matrix,
                                                             int64_t height, V (&acc)[kOfRows][kPanels]) {
    const S* g[kOfRows];
#pragma GCC unroll 16
    for (int r = 0; r < kOfRows; ++r) g[r] = static_cast<const S*>(at.g) + at.row_offset[first + r];
    const Run* end = at.runs + at.count;
    const char* next = at.next + first * at.size * static_cast<int64_t>(sizeof(S));
    for (const Run* run = at.runs; run != end; ++run) {
      const int64_t unit = run->unit;
      const T* factors = matrix + run->column * kPanel;
      if constexpr (kPrefetch) {
#pragma GCC unroll 16
        for (int r = 0; r < kOfRows / 2; ++r) __builtin_prefetch(next + r * kLine, 1, 2);
        next += run->length * kOfRows * static_cast<int64_t>(sizeof(S));
      }
      auto add = [&](int u) __attribute__((always_inline)) {
        V row[kPanels];
#pragma GCC unroll 16
        for (int p = 0; p < kPanels; ++p) row[p] = K::vector(factors + (p * height + u) * kPanel, 0);
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
    }
    if (at.bias == nullptr) return;
#pragma GCC unroll 16
    for (int p = 0; p < kPanels; ++p) {
      const V row = K::vector(matrix + (p * height + at.bias_column) * kPanel, 0);
#pragma GCC unroll 16
      for (int r = 0; r < kOfRows; ++r) acc[r][p] += at.bias[first + r] * row;
    }
  }

  // The products of `rows` rows, a multiple of 4, with kPanels panels, to `out`.
  template <int kPanels, bool kPrefetch>
  static void multiply_part(const DirectRows<T>& at, int64_t first, int rows, const T* matrix, int64_t height, T* out,
                            Largest& largest) {
    Largest kept = largest;
    int r = 0;
    auto block = [&](auto count) __attribute__((always_inline)) {
      constexpr int kOfRows = count.value;
      V acc[kOfRows][kPanels] = {};
      multiply<kPanels, kOfRows, kPrefetch>(at, first + r, matrix, height, acc);
#pragma GCC unroll 16
      for (int i = 0; i < kOfRows; ++i) {
#pragma GCC unroll 16
        for (int p = 0; p < kPanels; ++p) {
          K::vector(out + (r + i) * kTilePitch + p * kPanel, 0) = acc[i][p];
          K::keep_largest(acc[i][p], kept);
        }
      }
      r += kOfRows;
    };
    if constexpr (kPanels <= 2) {  // fewer sums would wait for one another
      while (rows - r >= 8) block(Count<8>{});
    }
    while (r < rows) block(Count<4>{});
    largest = kept;
  }

  // The same with all panels: so many at a time that they stay in the L1 cache for all rows.
  static void multiply_all(const DirectRows<T>& at, int64_t first, int rows, const T* matrix, int panels,
                           int64_t height, T* out, Largest& largest) {
    int j = 0;
    auto part = [&](auto count) __attribute__((always_inline)) {
      const T* from = matrix + j * height * kPanel;
      if (j == 0) {
        multiply_part<count.value, true>(at, first, rows, from, height, out, largest);
      } else {
        multiply_part<count.value, false>(at, first, rows, from, height, out + j * kPanel, largest);
      }
      j += count.value;
    };
    while (panels - j >= 7 || panels - j == 4) part(Count<4>{});
    while (panels - j >= 5 || panels - j == 3) part(Count<3>{});
    if (panels - j == 2) part(Count<2>{});
    if (panels - j == 1) part(Count<1>{});
  }

  // One column of the product with a symmetric matrix, from its row.
  static void multiply_column(const DirectRows<T>& at, int64_t first, int rows, const T* matrix, int64_t height,
                              int64_t column, T* out) {
    typedef typename VectorOf<T, kPanel / 2 * sizeof(T)>::type Loose
        __attribute__((aligned(alignof(T)), may_alias));  // in a row of G
    const T* row = matrix + column * kPanel;
    auto factors_of = [&](int64_t k) { return row + k / kPanel * height * kPanel + k % kPanel; };
    for (int r = 0; r < rows; ++r) {
      const S* g = static_cast<const S*>(at.g) + at.row_offset[first + r];
      typename K::Half sums{};
      T total = at.bias == nullptr ? T(0) : at.bias[first + r] * *factors_of(at.bias_column);
      for (const Run* run = at.runs; run != at.runs + at.count; ++run) {
        const T* factors = factors_of(run->column);
        int u = 0;
        for (; u + kPanel / 2 <= run->length; u += kPanel / 2) {
          sums += *reinterpret_cast<const Loose*>(g + run->unit + u) * *reinterpret_cast<const Loose*>(factors + u);
        }
        for (; u < run->length; ++u) total += g[run->unit + u] * factors[u];
      }
      for (int i = 0; i < kPanel / 2; ++i) total += sums[i];
      out[r * kTilePitch + column] = total;
    }
  }

  static void store(const DirectRows<T>& at, int64_t first, int rows) {
    Gather<S, T>::store_tile(at.product, 0, at.g, at.row_offset + first, rows, 1, at.runs, at.count);
    if (at.bias == nullptr) return;
    for (int r = 0; r < rows; ++r) at.bias[first + r] = at.product[r * kTilePitch + at.bias_column];
  }

  // Corrects rows until a result is beyond the limit, whose rows are left to others.
  static int64_t correct_many_rows(const DirectRows<T>& at, const T* matrix, int panels, int tail) {
    const int64_t height = int64_t{kPanel} * panels;
    int64_t r = 0;
    while (at.rows - r >= 4) {
      const int here = static_cast<int>(at.rows - r >= kManyRows ? kManyRows : (at.rows - r) / 4 * 4);
      Largest largest{};
      multiply_all(at, r, here, matrix, panels - (tail > 0), height, at.product, largest);
      if (tail > 0) {
        T* last = at.product + height - kPanel;
        for (int i = 0; i < here; ++i) K::vector(last + i * kTilePitch, 0) = V{};
        for (int64_t column = height - kPanel; column < at.size; ++column) {
          multiply_column(at, r, here, matrix, height, column, at.product);
        }
        for (int i = 0; i < here; ++i) K::keep_largest(K::vector(last + i * kTilePitch, 0), largest);
      }
      if (K::any_beyond(largest, at.limit)) break;
      store(at, r, here);
      r += here;
    }
    return r;
  }

  // Corrects kOfRows rows in a chunk of few panels, `whole` ones of two runs each.  If a result is beyond the limit,
  // returns false and leaves G as it is.
  template <int kPanels, int kOfRows>
  static bool correct_few_panels(const DirectRows<T>& at, int64_t first, bool whole, const T* matrix) {
    V acc[kOfRows][kPanels] = {};
    multiply<kPanels, kOfRows, true>(at, first, matrix, int64_t{kPanels} * kPanel, acc);
    Largest largest{};
#pragma GCC unroll 16
    for (int r = 0; r < kOfRows; ++r) {
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) K::keep_largest(acc[r][p], largest);
    }
    if (K::any_beyond(largest, at.limit)) return false;
    if (whole) {
      S* g[kOfRows];
#pragma GCC unroll 16
      for (int r = 0; r < kOfRows; ++r) g[r] = static_cast<S*>(at.g) + at.row_offset[first + r];
#pragma GCC unroll 16
      for (int p = 0; p < 2 * kPanels; ++p) {
#pragma GCC unroll 16
        for (int r = 0; r < kOfRows; ++r) {
          __builtin_memcpy(g[r] + at.runs[p].unit, reinterpret_cast<const T*>(&acc[r][p / 2]) + p % 2 * (kPanel / 2),
                           kPanel / 2 * sizeof(T));
        }
      }
      return true;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kOfRows; ++r) {
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) K::vector(at.product + r * kTilePitch + p * kPanel, 0) = acc[r][p];
    }
    store(at, first, kOfRows);
    return true;
  }

  template <int kPanels>
  static int64_t correct_all_rows(const DirectRows<T>& at, const T* matrix) {
    bool whole = at.count == 2 * kPanels;
    for (int64_t i = 0; i < at.count; ++i) whole = whole && at.runs[i].length == kPanel / 2;
    constexpr int kOfRows = 4;
    int64_t r = 0;
    while (r + kOfRows <= at.rows && correct_few_panels<kPanels, kOfRows>(at, r, whole, matrix)) r += kOfRows;
    return r;
  }

  // Multiplies the taps of one output, which lie side by side from `first` on.
  template <int kPanels, int kTaps>
  static void multiply_taps(const S* first, int64_t unit_stride, const Run* runs, int64_t count, const char* next,
                            const T* inverse, int64_t height, T* product, Largest& largest) {
    V acc[kTaps][kPanels] = {};
    const T* factors = inverse;
    for (const Run* run = runs; run != runs + count; ++run) {
      const S* g = first + run->unit * unit_stride;
      for (int u = 0; u < run->length; ++u, factors += kPanel, g += unit_stride) {
        __builtin_prefetch(next, 1, 2);
        next += kTaps * sizeof(S);
        V row[kPanels];
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

  // All panels of the product of the taps of one output.
  template <int kTaps>
  static void multiply_all_taps(const DirectRows<T>& at, int64_t first, const T* matrix, int panels, int64_t height,
                                T* out, Largest& largest) {
    const S* from = static_cast<const S*>(at.g) + at.row_offset[first];
    const char* next = at.next + first * at.size * static_cast<int64_t>(sizeof(S));
    int j = 0;
    for (; j + 2 <= panels; j += 2) {
      multiply_taps<2, kTaps>(from, at.unit_stride, at.runs, at.count, next, matrix + j * height * kPanel, height,
                              out + j * kPanel, largest);
    }
    if (j < panels) {
      multiply_taps<1, kTaps>(from, at.unit_stride, at.runs, at.count, next, matrix + j * height * kPanel, height,
                              out + j * kPanel, largest);
    }
  }

  template <int kTaps>
  static int64_t correct_all_taps(const DirectRows<T>& at, const T* matrix, int panels) {
    int64_t r = 0;
    for (; r + kTaps <= at.rows; r += kTaps) {
      if (Gather<S, T>::adjacent(at.row_offset, r, r + kTaps) != kTaps) break;
      Largest largest{};
      multiply_all_taps<kTaps>(at, r, matrix, panels, int64_t{panels} * kPanel, at.product, largest);
      if (K::any_beyond(largest, at.limit)) break;
      Gather<S, T>::store_tile(at.product, 0, at.g, at.row_offset + r, kTaps, at.unit_stride, at.runs, at.count);
    }
    return r;
  }

  static int64_t correct(const DirectRows<T>& at, const T* matrix, MatrixKind kind) {
    // 4 rows x 4 panels, or 9 taps x 2, of sums need 32 registers of a panel's row.
    if constexpr (sizeof(S) == sizeof(T) && K::kVectors == 1) {
      constexpr int kMostPanels = 8;
      const int panels = static_cast<int>((at.size + kPanel - 1) / kPanel);
      if (at.taps == 9 && at.unit_stride != 1) {
        return at.bias == nullptr ? correct_all_taps<9>(at, matrix, panels) : 0;
      }
      const int units = static_cast<int>(at.size - int64_t{kPanel} * (panels - 1));
      const int tail = kind == MatrixKind::kSymmetric && units <= K::kFewLanes ? units : 0;
      const bool is_triangular = kind == MatrixKind::kLower || kind == MatrixKind::kUpper;
      if (at.unit_stride != 1 || panels < 2 + (tail > 0) || panels > kMostPanels) return 0;
      if (tail > 0 || panels > 4) return is_triangular ? 0 : correct_many_rows(at, matrix, panels, tail);
      switch (panels) {
        case 2:
          return correct_all_rows<2>(at, matrix);
        case 3:
          return correct_all_rows<3>(at, matrix);
        case 4:
          return correct_all_rows<4>(at, matrix);
      }
    }
    return 0;
  }

  // at.product <- projected * w.
  template <int kOfRows>
  static void expand(const DirectRows<T>& at, int first, const T* w, int row_panels, int panels) {
    const int64_t height = int64_t{kPanel} * row_panels;
    const T* from = at.projected + first * kTilePitch;
    T* to = at.product + first * kTilePitch;
    Largest unused{};
    int j = 0;
    for (; j + 2 <= panels; j += 2) {
      K::template multiply<kOfRows, 2, kTilePitch, 1>(from, w + j * height * kPanel, height, height, to + j * kPanel,
                                                      unused);
    }
    if (j < panels) {
      K::template multiply<kOfRows, 1, kTilePitch, 1>(from, w + j * height * kPanel, height, height, to + j * kPanel,
                                                      unused);
    }
  }

  // out <- inverse_damping * g - out, element by element.
  static inline __attribute__((always_inline)) void subtract_from(const S* g, int64_t length, T inverse_damping, T* out,
                                                                  Largest& largest) {
    typedef V Loose __attribute__((aligned(alignof(T)), may_alias));
    int64_t i = 0;
    for (; i + kPanel <= length; i += kPanel) {
      Loose& to = *reinterpret_cast<Loose*>(out + i);
      const V result = *reinterpret_cast<const Loose*>(g + i) * inverse_damping - to;
      to = result;
      K::keep_largest(result, largest);
    }
    if (i == length) return;
    V rest{};
    for (int j = 0; i + j < length; ++j) out[i + j] = rest[j] = g[i + j] * inverse_damping - out[i + j];
    K::keep_largest(rest, largest);
  }

  static int64_t correct_few_rows(const DirectRows<T>& at, const T* x_transposed, const T* w, int row_panels,
                                  int panels, T inverse_damping) {
    const int64_t height = int64_t{kPanel} * panels;
    typedef typename VectorOf<T, kPanel / 2 * sizeof(T)>::type Loose __attribute__((aligned(alignof(T)), may_alias));
    int64_t r = 0;
    while (at.rows - r >= 4) {
      const int here = static_cast<int>(at.rows - r >= kManyRows ? kManyRows : (at.rows - r) / 4 * 4);
      Largest unused{}, largest{};
      multiply_all(at, r, here, x_transposed, row_panels, height, at.projected, unused);
      int i = 0;
      for (; i + 8 <= here; i += 8) expand<8>(at, i, w, row_panels, panels);
      if (i < here) expand<4>(at, i, w, row_panels, panels);
      for (i = 0; i < here; ++i) {
        const S* g = static_cast<const S*>(at.g) + at.row_offset[r + i];
        T* row = at.product + i * kTilePitch;
        for (const Run* run = at.runs; run != at.runs + at.count; ++run) {
          int u = 0;
          for (; u + kPanel / 2 <= run->length; u += kPanel / 2) {
            Loose& to = *reinterpret_cast<Loose*>(row + run->column + u);
            to = *reinterpret_cast<const Loose*>(g + run->unit + u) * inverse_damping - to;
          }
          for (; u < run->length; ++u) row[run->column + u] = g[run->unit + u] * inverse_damping - row[run->column + u];
        }
        for (int p = 0; p < panels; ++p) K::keep_largest(K::vector(row + p * kPanel, 0), largest);
      }
      if (K::any_beyond(largest, at.limit)) break;
      store(at, r, here);
      r += here;
    }
    return r;
  }

  // The taps of a unit, and the units of an output, side by side.
  template <int kTaps>
  static int64_t correct_few_taps(const DirectRows<T>& at, const T* x_transposed, const T* w, int row_panels,
                                  int panels, T inverse_damping) {
    const int64_t height = int64_t{kPanel} * panels;
    int64_t r = 0;
    for (; r + kTaps <= at.rows; r += kTaps) {
      if (Gather<S, T>::adjacent(at.row_offset, r, r + kTaps) != kTaps) break;
      Largest unused{}, largest{};
      multiply_all_taps<kTaps>(at, r, x_transposed, row_panels, height, at.projected, unused);
      expand<kTaps>(at, 0, w, row_panels, panels);
      S* g = static_cast<S*>(at.g) + at.row_offset[r];
      for (const Run* run = at.runs; run != at.runs + at.count; ++run) {
        T* out = at.tile + run->column * kTaps;
        Gather<T, T>::transpose_out(at.product + run->column, kTilePitch, kTaps, run->length, out, kTaps);
        subtract_from(g + run->unit * kTaps, run->length * kTaps, inverse_damping, out, largest);
      }
      if (K::any_beyond(largest, at.limit)) break;
      for (const Run* run = at.runs; run != at.runs + at.count; ++run) {
        __builtin_memcpy(g + run->unit * kTaps, at.tile + run->column * kTaps, run->length * kTaps * sizeof(T));
      }
    }
    return r;
  }

  static int64_t correct_few(const DirectRows<T>& at, const T* x_transposed, const T* w, int row_panels,
                             T inverse_damping) {
    if constexpr (sizeof(S) == sizeof(T) && K::kVectors == 1) {
      const int panels = static_cast<int>((at.size + kPanel - 1) / kPanel);
      if (at.bias != nullptr) return 0;
      if (at.taps == 9 && at.unit_stride == 9) {
        return correct_few_taps<9>(at, x_transposed, w, row_panels, panels, inverse_damping);
      }
      if (at.unit_stride == 1) return correct_few_rows(at, x_transposed, w, row_panels, panels, inverse_damping);
    }
    return 0;
  }

  static constexpr DirectKernels<T> table() { return {correct, correct_few}; }
};

template <typename T>
constexpr IsaKernels<T> isa_table() {
  return {Kernels<T>::table(),
          {Gather<float, T>::table(), Gather<double, T>::table(), Gather<BFloat16, T>::table(),
           Gather<Float16, T>::table()},
          {Direct<float, T>::table(), Direct<double, T>::table(), Direct<BFloat16, T>::table(),
           Direct<Float16, T>::table()}};
}
