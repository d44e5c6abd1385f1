// The body of chunk_kernels.h for one instruction set.  Included by isa_*.cpp, inside a namespace of its own and under
// that file's target pragma; CO_VECTOR_BYTES is the width of one vector register.  It must not call inline functions of
// other headers: their code would be generated for this instruction set and shared with callers that may not run it.

template <typename T, int kBytes = CO_VECTOR_BYTES>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <int kBytes>
struct IntegerOf;
template <>
struct IntegerOf<4> {
  using type = int32_t;
};
template <>
struct IntegerOf<8> {
  using type = int64_t;
};

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

template <typename T>
struct Kernels {
  using V = typename VectorOf<T>::type;
  using Half = typename VectorOf<T, kPanel / 2 * sizeof(T)>::type;  // half a row of a panel
  using Bits = typename IntegerOf<sizeof(T)>::type;
  using VectorOfBits = typename VectorOf<Bits>::type;
  static constexpr int kLanes = CO_VECTOR_BYTES / sizeof(T);
  static constexpr int kVectors = kPanel / kLanes;  // registers a row of a panel
  // Rows of C held in registers at once: as many as leave room for a row of b and a broadcast.
  static constexpr int kRegisters = CO_VECTOR_BYTES == 64 ? 16 : 8;
  static constexpr int kRows = kRegisters / kVectors;
  // A last panel with at most so many units is cheaper lane by lane than as a tile that is mostly padding: 129 units
  // are chunks of 65 and 64.
  static constexpr int kFewLanes = 4;
  static_assert(kVectors >= 1 && kRows >= 1 && kPanel % kRows == 0, "a tile is a whole number of register blocks");

  static V& vector(T* p, int v) { return *reinterpret_cast<V*>(p + v * kLanes); }
  static const V& vector(const T* p, int v) { return *reinterpret_cast<const V*>(p + v * kLanes); }

  // kZero: c = sum.  kLoad: the sum goes on from c.  kAdd: the sum starts at zero and is added to c at the end, which
  // keeps the chains of rounding errors as short as the block of rows.
  enum Start { kZero, kLoad, kAdd };

  // c[16 x 16] (start) +/- sum_k a_k b_k^T with a_k[r] = a[r * kRowStride + k * kStepStride].
  template <int kRowStride, int kStepStride, bool kSubtract>
  static inline __attribute__((always_inline)) void tile(const T* a, const T* b, int64_t steps, Start start, T* c) {
    for (int r0 = 0; r0 < kPanel; r0 += kRows) {
      V acc[kRows][kVectors];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          acc[r][v] = start == kLoad ? vector(c + (r0 + r) * kPanel, v) : V{};
        }
      }
      const T* ar = a + r0 * kRowStride;
      const T* br = b;
      for (int64_t k = 0; k < steps; ++k, ar += kStepStride, br += kPanel) {
        V row[kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) row[v] = vector(br, v);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const T scalar = ar[r * kRowStride];
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) {
            if constexpr (kSubtract) {
              acc[r][v] -= scalar * row[v];
            } else {
              acc[r][v] += scalar * row[v];
            }
          }
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          V& to = vector(c + (r0 + r) * kPanel, v);
          to = start == kAdd ? to + acc[r][v] : acc[r][v];
        }
      }
    }
  }

  // Both operands are panels.
  template <bool kSubtract>
  static void panel_tile(const T* a, const T* b, int64_t steps, Start start, T* c) {
    tile<1, kPanel, kSubtract>(a, b, steps, start, c);
  }

  // panel_tile of a panel with itself, without the 8 x 8 block below the diagonal.
  static void diagonal_tile(const T* p, int64_t steps, bool accumulate, T* c) {
    constexpr int kHalf = kPanel / 2;
    static_assert(kHalf % kRows == 0 || kRows % kHalf == 0);
    constexpr int kBlock = kRows < kHalf ? kRows : kHalf;
    for (int r0 = 0; r0 < kHalf; r0 += kBlock) {
      V upper[kBlock][kVectors] = {};
      Half lower[kBlock] = {};
      const T* row = p;
      for (int64_t k = 0; k < steps; ++k, row += kPanel) {
        V right[kVectors];
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) right[v] = vector(row, v);
        const Half half = *reinterpret_cast<const Half*>(row + kHalf);
#pragma GCC unroll 16
        for (int r = 0; r < kBlock; ++r) {
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) upper[r][v] += row[r0 + r] * right[v];
          lower[r] += row[kHalf + r0 + r] * half;
        }
      }
      for (int r = 0; r < kBlock; ++r) {
        for (int v = 0; v < kVectors; ++v) {
          V& to = vector(c + (r0 + r) * kPanel, v);
          to = accumulate ? to + upper[r][v] : upper[r][v];
        }
        Half& to = *reinterpret_cast<Half*>(c + (kHalf + r0 + r) * kPanel + kHalf);
        to = accumulate ? to + lower[r] : lower[r];
        if (!accumulate) *reinterpret_cast<Half*>(c + (kHalf + r0 + r) * kPanel) = Half{};
      }
    }
  }

  // Products of one lane of panel `last` with kPanels panels at once, itself perhaps among them: column `lane` of their
  // blocks.
  template <int kPanels>
  static void gram_lane(const T* p, int64_t rows, int64_t pitch, int last, int lane, int first, bool accumulate, T* c) {
    V acc[kPanels][kVectors] = {};
    const T* scalars = p + last * pitch * kPanel + lane;
    for (int64_t k = 0; k < rows; ++k) {
      const T scalar = scalars[k * kPanel];
#pragma GCC unroll 16
      for (int j = 0; j < kPanels; ++j) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) acc[j][v] += scalar * vector(p + ((first + j) * pitch + k) * kPanel, v);
      }
    }
    T* column = c + (int64_t{kPanel} * (last + 1) * last + first * kPanel) * kPanel + lane;
    for (int j = 0; j < kPanels; ++j) {
      for (int e = 0; e < kPanel; ++e) {
        T& to = column[(j * kPanel + e) * kPanel];
        const T sum = acc[j][e / kLanes][e % kLanes];
        to = accumulate ? to + sum : sum;
      }
    }
  }

  static void gram(const T* p, int64_t rows, int64_t pitch, int64_t size, bool accumulate, T* c) {
    const int panels = static_cast<int>((size + kPanel - 1) / kPanel);
    const int tail = static_cast<int>(size - int64_t{kPanel} * (panels - 1));
    const int64_t height = int64_t{kPanel} * panels;
    const int last = panels - 1;
    const bool by_lane = tail <= kFewLanes && last > 0;
    if (by_lane) {
      if (!accumulate) __builtin_memset(c + last * height * kPanel, 0, panels * kPanel * kPanel * sizeof(T));
      for (int lane = 0; lane < tail; ++lane) {
        int first = 0;
        for (; first + 4 <= panels; first += 4) gram_lane<4>(p, rows, pitch, last, lane, first, accumulate, c);
        for (; first < panels; ++first) gram_lane<1>(p, rows, pitch, last, lane, first, accumulate, c);
      }
    }
    for (int i = 0; i < panels - by_lane; ++i) {
      const T* right = p + i * pitch * kPanel;
      for (int j = 0; j < i; ++j) {
        panel_tile<false>(p + j * pitch * kPanel, right, rows, accumulate ? kAdd : kZero,
                          c + (i * height + j * kPanel) * kPanel);
      }
      diagonal_tile(right, rows, accumulate, c + (i * height + i * kPanel) * kPanel);
    }
  }

  // The 16 rows of b <- L^-1 b, L = the transpose of the upper triangular block u.
  static inline void substitute_forward(const T* u, const T* inverse_diagonal, T* b) {
    for (int v = 0; v < kVectors; ++v) {
      V x[kPanel];
#pragma GCC unroll 16
      for (int k = 0; k < kPanel; ++k) x[k] = vector(b + k * kPanel, v);
#pragma GCC unroll 16
      for (int k = 0; k < kPanel; ++k) {
        x[k] *= inverse_diagonal[k];
        vector(b + k * kPanel, v) = x[k];
#pragma GCC unroll 16
        for (int m = k + 1; m < kPanel; ++m) x[m] -= u[k * kPanel + m] * x[k];
      }
    }
  }

  // The 16 rows of b <- U^-1 b.
  static inline void substitute_backward(const T* u, const T* inverse_diagonal, T* b) {
    for (int v = 0; v < kVectors; ++v) {
      V x[kPanel];
#pragma GCC unroll 16
      for (int k = 0; k < kPanel; ++k) x[k] = vector(b + k * kPanel, v);
#pragma GCC unroll 16
      for (int k = kPanel - 1; k >= 0; --k) {
        x[k] *= inverse_diagonal[k];
        vector(b + k * kPanel, v) = x[k];
#pragma GCC unroll 16
        for (int m = 0; m < k; ++m) x[m] -= u[m * kPanel + k] * x[k];
      }
    }
  }

  static T square_root(T x) {
    if constexpr (sizeof(T) == 4) {
      return __builtin_sqrtf(x);
    } else {
      return __builtin_sqrt(x);
    }
  }

  // U^T U = A of one 16 x 16 block; returns 0 or the order of the failing minor.
  static int factor_block(T* a, T* inverse_diagonal) {
    constexpr T kLargest = sizeof(T) == 4 ? T(3.4028234663852886e38) : T(1.7976931348623157e308);
    for (int k = 0; k < kPanel; ++k) {
      T* row = a + k * kPanel;
      const T pivot = row[k];
      if (!(pivot > 0 && pivot <= kLargest)) return k + 1;
      const T root = square_root(pivot);
      const T inverse = 1 / root;
      inverse_diagonal[k] = inverse;
      for (int v = 0; v < kVectors; ++v) vector(row, v) *= inverse;
      row[k] = root;
      for (int m = k + 1; m < kPanel; ++m) {
        const T scalar = row[m];
        for (int v = 0; v < kVectors; ++v) vector(a + m * kPanel, v) -= scalar * vector(row, v);
      }
    }
    return 0;
  }

  static int factor(T* a, int panels, T* inverse_diagonal) {
    const int64_t height = int64_t{kPanel} * panels;
    for (int j = 0; j < panels; ++j) {
      const T* left = a + j * height * kPanel;
      const T* diagonal = left + j * kPanel * kPanel;
      for (int i = j; i < panels; ++i) {
        T* right = a + i * height * kPanel;
        T* block = right + j * kPanel * kPanel;
        if (j > 0) panel_tile<true>(left, right, int64_t{kPanel} * j, kLoad, block);
        if (i == j) {
          const int info = factor_block(block, inverse_diagonal + j * kPanel);
          if (info != 0) return j * kPanel + info;
        } else {
          substitute_forward(diagonal, inverse_diagonal + j * kPanel, block);
        }
      }
    }
    return 0;
  }

  // By forward substitution on the identity.
  static void invert_lower_blocks(const T* u, const T* inverse_diagonal, int panels, T* w) {
    const int64_t height = int64_t{kPanel} * panels;
    for (int j = 0; j < panels; ++j) {
      T* column = w + j * height * kPanel;
      for (int k = j; k < panels; ++k) {
        T* block = column + k * kPanel * kPanel;
        const T* factor_panel = u + k * height * kPanel;
        if (k == j) {
          for (int e = 0; e < kPanel * kPanel; ++e) block[e] = e % (kPanel + 1) == 0;
        } else {
          panel_tile<true>(factor_panel + j * kPanel * kPanel, column + j * kPanel * kPanel, int64_t{kPanel} * (k - j),
                           kZero, block);
        }
        substitute_forward(factor_panel + k * kPanel * kPanel, inverse_diagonal + k * kPanel, block);
      }
    }
  }

  static void invert_factor(const T* u, const T* inverse_diagonal, int panels, T* w) {
    invert_lower_blocks(u, inverse_diagonal, panels, w);
    for (int j = 1; j < panels; ++j) {
      T* column = w + int64_t{j} * panels * kPanel * kPanel;
      for (int64_t e = 0; e < int64_t{j} * kPanel * kPanel; ++e) column[e] = 0;
    }
  }

  static void invert(const T* u, const T* inverse_diagonal, int panels, T* w, T* inverse) {
    const int64_t height = int64_t{kPanel} * panels;
    invert_lower_blocks(u, inverse_diagonal, panels, w);
    for (int j = 0; j < panels; ++j) {  // W^T W
      for (int i = 0; i <= j; ++i) {
        T* block = inverse + (j * height + i * kPanel) * kPanel;
        const int64_t first = int64_t{kPanel} * j;
        panel_tile<false>(w + (i * height + first) * kPanel, w + (j * height + first) * kPanel, height - first, kZero,
                          block);
        if (i != j) {
          T* mirror = inverse + (i * height + j * kPanel) * kPanel;
          for (int r = 0; r < kPanel; ++r) {
            for (int c = 0; c < kPanel; ++c) mirror[r * kPanel + c] = block[c * kPanel + r];
          }
        }
      }
    }
  }

  // Columns of the product that a panel with few units leaves: rows of g with rows of the symmetric inverse.
  static void apply_column(const T* g, int rows, const T* inverse, int panels, int64_t column, T* out) {
    const int64_t height = int64_t{kPanel} * panels;
    for (int r = 0; r < rows; ++r) {
      V sum{};
      for (int j = 0; j < panels; ++j) {
        for (int v = 0; v < kVectors; ++v) {
          sum += vector(g + r * kTilePitch + j * kPanel, v) * vector(inverse + (j * height + column) * kPanel, v);
        }
      }
      T total = 0;
      for (int v = 0; v < kLanes; ++v) total += sum[v];
      out[r * kTilePitch + column] = total;
    }
  }

  // The same of g by unit: all rows at once.
  static void apply_column_by_unit(const T* g, int rows, const T* inverse, int64_t height, int64_t size, int64_t column,
                                   T* out) {
    static_assert(kMaxTileRows == kPanel);
    const T* factors = inverse + column / kPanel * height * kPanel + column % kPanel;
    V sum[kVectors] = {};
    for (int64_t k = 0; k < size; ++k) {
      for (int v = 0; v < kVectors; ++v) sum[v] += factors[k * kPanel] * vector(g + k * kMaxTileRows, v);
    }
    for (int r = 0; r < rows; ++r) out[r * kTilePitch + column] = sum[r / kLanes][r % kLanes];
  }

  // Magnitudes compare as their bits do, NaN above infinity above all others.
  static inline __attribute__((always_inline)) void keep_largest(V x, VectorOfBits& largest) {
    constexpr Bits kMagnitude = sizeof(T) == 4 ? 0x7FFFFFFF : static_cast<Bits>(0x7FFFFFFFFFFFFFFF);
    const VectorOfBits bits = __builtin_bit_cast(VectorOfBits, x) & kMagnitude;
    largest = bits > largest ? bits : largest;
  }

  static inline __attribute__((always_inline)) bool any_beyond(VectorOfBits largest, T limit) {
    const VectorOfBits beyond = largest > __builtin_bit_cast(Bits, limit);
    uint64_t words[sizeof(beyond) / 8], any = 0;
    __builtin_memcpy(words, &beyond, sizeof(beyond));
    for (uint64_t word : words) any |= word;
    return any != 0;
  }

  // out = g * kPanels neighbouring panels of the inverse.
  template <int kOfRows, int kPanels, int kRowStride, int kStepStride>
  static inline __attribute__((always_inline)) void multiply(const T* g, const T* inverse, int64_t height,
                                                             int64_t steps, T* out, VectorOfBits& largest) {
    V acc[kOfRows][kPanels][kVectors] = {};
#pragma GCC unroll 2
    for (int64_t k = 0; k < steps; ++k) {
      V row[kPanels][kVectors];
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) row[p][v] = vector(inverse + (p * height + k) * kPanel, v);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kOfRows; ++r) {
        const T scalar = g[r * kRowStride + k * kStepStride];
#pragma GCC unroll 16
        for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) acc[r][p][v] += scalar * row[p][v];
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kOfRows; ++r) {
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          vector(out + r * kTilePitch + p * kPanel, v) = acc[r][p][v];
          keep_largest(acc[r][p][v], largest);
        }
      }
    }
  }

  // All rows, a few at a time.
  template <int kPanels, int kRowStride, int kStepStride>
  static void multiply_rows(const T* g, int rows, const T* inverse, int64_t height, int64_t steps, T* out,
                            VectorOfBits& largest) {
    VectorOfBits kept = largest;
    int r = 0;
    auto block = [&](auto count) __attribute__((always_inline)) {
      multiply<count.value, kPanels, kRowStride, kStepStride>(g + r * kRowStride, inverse, height, steps,
                                                              out + r * kTilePitch, kept);
      r += count.value;
    };
    if constexpr (kRegisters / kVectors / kPanels >= 8) {
      while (rows - r >= 8 && rows - r != 9) block(Count<8>{});
    }
    if constexpr (kRows >= 4) {
      // 9 rows, the taps of most kernels, are 3 + 3 + 3: a single row would wait for its own sums.
      while (rows - r >= 4 && rows - r != 9 && rows - r != 6) block(Count<4>{});
      while (rows - r >= 3) block(Count<3>{});
    }
    if constexpr (kRows >= 2) {
      while (rows - r >= 2) block(Count<2>{});
    }
    while (rows - r >= 1) block(Count<1>{});
    largest = kept;
  }

  // Panels of a triangular matrix begin, or end, with blocks of zeros, which are left out.
  template <int kRowStride, int kStepStride>
  static void multiply_panels(const T* g, int rows, const T* inverse, MatrixKind kind, int panels, int64_t height,
                              int64_t steps, T* out, VectorOfBits& largest) {
    constexpr int kPair = 2 * 4 * kVectors <= kRegisters ? 2 : 1;
    auto multiply_some = [&](auto count, int j) __attribute__((always_inline)) {
      const int64_t first = kind == MatrixKind::kLower ? int64_t{kPanel} * j : 0;
      const int64_t end = int64_t{kPanel} * (j + count.value);
      const int64_t last = kind == MatrixKind::kUpper && end < steps ? end : steps;
      multiply_rows<count.value, kRowStride, kStepStride>(g + first * kStepStride, rows,
                                                          inverse + (j * height + first) * kPanel, height, last - first,
                                                          out + j * kPanel, largest);
    };
    int j = 0;
    for (; j + kPair <= panels; j += kPair) multiply_some(Count<kPair>{}, j);
    if (kPair > 1 && j < panels) multiply_some(Count<1>{}, j);
  }

  static uint32_t apply(const T* g, bool by_unit, int rows, const T* matrix, MatrixKind kind, int64_t size, T limit,
                        T* out) {
    const int panels = static_cast<int>((size + kPanel - 1) / kPanel);
    const int tail = static_cast<int>(size - int64_t{kPanel} * (panels - 1));
    const int64_t height = int64_t{kPanel} * panels;
    const bool by_column = (kind == MatrixKind::kSymmetric || by_unit) && tail <= kFewLanes && panels > 1;
    VectorOfBits largest{};
    if (by_unit) {
      multiply_panels<1, kMaxTileRows>(g, rows, matrix, kind, panels - by_column, height, size, out, largest);
    } else {
      multiply_panels<kTilePitch, 1>(g, rows, matrix, kind, panels - by_column, height, size, out, largest);
    }
    if (by_column) {
      T* last = out + height - kPanel;
      for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < kVectors; ++v) vector(last + r * kTilePitch, v) = V{};
      }
      for (int64_t column = height - kPanel; column < size; ++column) {
        if (by_unit) {
          apply_column_by_unit(g, rows, matrix, height, size, column, out);
        } else {
          apply_column(g, rows, matrix, panels, column, out);
        }
      }
      for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < kVectors; ++v) keep_largest(vector(last + r * kTilePitch, v), largest);
      }
    }
    return any_beyond(largest, limit) ? rows_beyond(out, rows, height, limit) : 0;
  }

  static uint32_t apply_few(const T* g, bool by_unit, int rows, const T* x_transposed, const T* w, int row_panels,
                            int64_t size, T inverse_damping, T limit, T* projected, T* out) {
    const int panels = static_cast<int>((size + kPanel - 1) / kPanel);
    const int64_t width = int64_t{kPanel} * panels, height = int64_t{kPanel} * row_panels;
    VectorOfBits unused{}, largest{};
    if (by_unit) {
      multiply_panels<1, kMaxTileRows>(g, rows, x_transposed, MatrixKind::kGeneral, row_panels, width, size, projected,
                                       unused);
    } else {
      multiply_panels<kTilePitch, 1>(g, rows, x_transposed, MatrixKind::kGeneral, row_panels, width, size, projected,
                                     unused);
    }
    multiply_panels<kTilePitch, 1>(projected, rows, w, MatrixKind::kGeneral, panels, height, height, out, unused);
    for (int r = 0; r < rows; ++r) {
      T* row = out + r * kTilePitch;
      if (by_unit) {
        for (int64_t k = 0; k < size; ++k) row[k] = g[k * kMaxTileRows + r] * inverse_damping - row[k];
      } else {
        for (int v = 0; v < panels * kVectors; ++v) {
          vector(row, v) = vector(g + r * kTilePitch, v) * inverse_damping - vector(row, v);
        }
      }
      for (int v = 0; v < panels * kVectors; ++v) keep_largest(vector(row, v), largest);
    }
    return any_beyond(largest, limit) ? rows_beyond(out, rows, width, limit) : 0;
  }

  static uint32_t rows_beyond(const T* out, int rows, int64_t width, T limit) {
    uint32_t bad = 0;
    for (int r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < width; ++k) {
        const T x = out[r * kTilePitch + k];
        if (!(x <= limit && x >= -limit)) bad |= 1u << r;
      }
    }
    return bad;
  }

  static void solve(const T* u, const T* inverse_diagonal, int panels, T* b) {
    const int64_t height = int64_t{kPanel} * panels;
    constexpr int kBlock = kPanel * kPanel;
    for (int k = 0; k < panels; ++k) {
      const T* panel = u + k * height * kPanel;
      if (k > 0) panel_tile<true>(panel, b, int64_t{kPanel} * k, kLoad, b + k * kBlock);
      substitute_forward(panel + k * kBlock, inverse_diagonal + k * kPanel, b + k * kBlock);
    }
    for (int k = panels - 1; k >= 0; --k) {
      for (int m = k + 1; m < panels; ++m) {  // rows of block k of U: lane by lane, so the strides of a are exchanged
        tile<kPanel, 1, true>(u + (m * height + k * kPanel) * kPanel, b + m * kBlock, kPanel, kLoad, b + k * kBlock);
      }
      substitute_backward(u + (k * height + k * kPanel) * kPanel, inverse_diagonal + k * kPanel, b + k * kBlock);
    }
  }

  static constexpr ChunkKernels<T> table() { return {gram, factor, invert_factor, invert, apply, apply_few, solve}; }
};
