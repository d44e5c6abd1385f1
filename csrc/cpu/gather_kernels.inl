// The body of GatherKernels (chunk_kernels.h) for one instruction set; included by direct_kernels.inl, same rules.

#include "cpu/convert.inl"

constexpr int64_t kPrefetchBytes = 64 << 10;
constexpr int64_t kLongRowBytes = 4 << 10;
constexpr int64_t kPackRowBytes = 16 << 10;  // of short rows that are packed together: half of the smallest L1
constexpr int64_t kLeastPackRows = 8;

template <typename S, typename T>
struct Gather {
  // Through registers: source and target may have one type, and the compiler must not fear that they overlap.
  template <int kLength>
  static inline __attribute__((always_inline)) void copy_in(const S* from, T* to) {
    T values[kLength];
    for (int i = 0; i < kLength; ++i) values[i] = widen(from[i]);
    __builtin_memcpy(to, values, sizeof(values));
  }
  template <int kLength>
  static inline __attribute__((always_inline)) void copy_out(const T* from, S* to) {
    narrow_all<kLength>(from, to);
  }

  // Eight units are the common length (one sector of float); others are two copies that may overlap.
  static inline __attribute__((always_inline)) void copy_in(const S* from, T* to, int length) {
    if (length >= 8) {
      copy_in<8>(from, to);
      if (length > 8) copy_in<8>(from + length - 8, to + length - 8);
    } else if (length >= 4) {
      copy_in<4>(from, to);
      copy_in<4>(from + length - 4, to + length - 4);
    } else {
      for (int i = 0; i < length; i += 2) copy_in<1>(from + i, to + i);
      if (length > 1) copy_in<1>(from + 1, to + 1);
    }
  }
  static inline __attribute__((always_inline)) void copy_out(const T* from, S* to, int length) {
    if (length >= 8) {
      copy_out<8>(from, to);
      if (length > 8) copy_out<8>(from + length - 8, to + length - 8);
    } else if (length >= 4) {
      copy_out<4>(from, to);
      copy_out<4>(from + length - 4, to + length - 4);
    } else {
      for (int i = 0; i < length; i += 2) copy_out<1>(from + i, to + i);
      if (length > 1) copy_out<1>(from + 1, to + 1);
    }
  }

  using Quad = typename PackOf<T, 4>::type;
  using LooseQuad = typename PackOf<T, 4>::loose;

  static inline __attribute__((always_inline)) void load_quad(const S* from, Quad& quad) {
    if constexpr (sizeof(S) == sizeof(T)) {
      quad = *reinterpret_cast<const LooseQuad*>(from);
    } else {
      T values[4];
      for (int i = 0; i < 4; ++i) values[i] = widen(from[i]);
      __builtin_memcpy(&quad, values, sizeof(values));
    }
  }
  static inline __attribute__((always_inline)) void store_quad(const Quad& quad, S* to) {
    if constexpr (sizeof(S) == sizeof(T)) {
      *reinterpret_cast<LooseQuad*>(to) = quad;
    } else {
      narrow_all<4>(reinterpret_cast<const T*>(&quad), to);
    }
  }

  static inline __attribute__((always_inline)) void transpose(Quad* q) {
#if defined(__clang__)
#define CO_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
    using Index = typename PackOf<typename IntegerOf<sizeof(T)>::type, 4>::type;
#define CO_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif
    const Quad low01 = CO_SHUFFLE(q[0], q[1], 0, 4, 1, 5), high01 = CO_SHUFFLE(q[0], q[1], 2, 6, 3, 7);
    const Quad low23 = CO_SHUFFLE(q[2], q[3], 0, 4, 1, 5), high23 = CO_SHUFFLE(q[2], q[3], 2, 6, 3, 7);
    q[0] = CO_SHUFFLE(low01, low23, 0, 1, 4, 5);
    q[1] = CO_SHUFFLE(low01, low23, 2, 3, 6, 7);
    q[2] = CO_SHUFFLE(high01, high23, 0, 1, 4, 5);
    q[3] = CO_SHUFFLE(high01, high23, 2, 3, 6, 7);
#undef CO_SHUFFLE
  }

  // to[r * pitch + u] = from[u * stride + r] in blocks of 4 x 4, the last of which overlap.
  static void transpose_in(const S* from, int64_t stride, int64_t rows, int units, T* to, int64_t pitch) {
    if (rows < 4 || units < 4) {
      for (int u = 0; u < units; ++u) {
        for (int64_t r = 0; r < rows; ++r) to[r * pitch + u] = widen(from[u * stride + r]);
      }
      return;
    }
    for (int64_t r = 0; r < rows; r += 4) {
      const int64_t row = r + 4 <= rows ? r : rows - 4;
      for (int u = 0; u < units; u += 4) {
        const int unit = u + 4 <= units ? u : units - 4;
        Quad q[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) load_quad(from + (unit + i) * stride + row, q[i]);
        transpose(q);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) *reinterpret_cast<LooseQuad*>(to + (row + i) * pitch + unit) = q[i];
      }
    }
  }

  // to[u * stride + r] = from[r * pitch + u].
  static void transpose_out(const T* from, int64_t pitch, int64_t rows, int units, S* to, int64_t stride) {
    if (rows < 4 || units < 4) {
      for (int u = 0; u < units; ++u) {
        for (int64_t r = 0; r < rows; ++r) to[u * stride + r] = narrow<S>(from[r * pitch + u]);
      }
      return;
    }
    for (int u = 0; u < units; u += 4) {
      const int unit = u + 4 <= units ? u : units - 4;
      for (int64_t r = 0; r < rows; r += 4) {
        const int64_t row = r + 4 <= rows ? r : rows - 4;
        Quad q[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) q[i] = *reinterpret_cast<const LooseQuad*>(from + (row + i) * pitch + unit);
        transpose(q);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store_quad(q[i], to + (unit + i) * stride + row);
      }
    }
  }

  // Rows from `first` on that lie side by side.
  static int64_t adjacent(const int64_t* row_offset, int64_t first, int64_t rows) {
    int64_t end = first + 1;
    while (end < rows && row_offset[end] == row_offset[end - 1] + 1) ++end;
    return end - first;
  }

  template <int kLength>
  static inline __attribute__((always_inline)) void pack_run(const S* from, const int64_t* row_offset, int64_t rows,
                                                             T* to) {
    for (int64_t r = 0; r < rows; ++r) copy_in<kLength>(from + row_offset[r], to + r * kPanel);
  }

  static void pack_run(const S* from, const int64_t* row_offset, int64_t rows, int length, T* to) {
    if (length >= 8) {
      pack_run<8>(from, row_offset, rows, to);
      if (length > 8) pack_run<8>(from + length - 8, row_offset, rows, to + length - 8);
    } else if (length >= 4) {
      pack_run<4>(from, row_offset, rows, to);
      if (length > 4) pack_run<4>(from + length - 4, row_offset, rows, to + length - 4);
    } else {
      for (int u = 0; u < length; ++u) pack_run<1>(from + u, row_offset, rows, to + u);
    }
  }

  // Short rows: a few at a time, which stay in L1 while every run is taken from all of them, so that its length is
  // looked at once.  With the runs go the fetches of the rows that come next.
  static void pack_short(const S* source, const int64_t* row_offset, int64_t rows, int64_t row_bytes, const Run* runs,
                         int64_t count, T* packed) {
    int64_t some = kPackRowBytes / (row_bytes + 1);
    some = some < kLeastPackRows ? kLeastPackRows : some;
    for (int64_t k = 0; k < rows; k += some) {
      const int64_t here = rows - k < some ? rows - k : some;
      const int64_t next = rows - k - here < some ? rows - k - here : some;
      int64_t fetched = 0;
      for (int64_t i = 0; i < count; ++i) {
        for (; fetched < next * (i + 1) / count; ++fetched) {
          const char* row = reinterpret_cast<const char*>(source + row_offset[k + here + fetched]);
          for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(row + byte, 0, 3);
        }
        pack_run(source + runs[i].unit, row_offset + k, here, runs[i].length, packed + runs[i].packed + k * kPanel);
      }
    }
  }

  static void pack(const void* x, const int64_t* row_offset, int64_t rows, int64_t unit_stride, int64_t row_units,
                   const Run* runs, int64_t count, T* packed) {
    const S* source = static_cast<const S*>(x);
    const int64_t row_bytes = row_units * sizeof(S);
    if (unit_stride == 1 && row_bytes <= kLongRowBytes) {
      pack_short(source, row_offset, rows, row_bytes, runs, count, packed);
      return;
    }
    if (unit_stride == 1) {
      // The runs of a row come in random order, which no hardware prefetcher follows: with every run goes the fetch of
      // its share of a row ahead into L2, and of the next row into L1.
      const int64_t ahead = 1 + kPrefetchBytes / (row_bytes + 1);
      const int64_t share = 1 + row_bytes / (count + 1);
      for (int64_t k = 0; k < rows; ++k) {
        const char* next = reinterpret_cast<const char*>(source + row_offset[k + ahead < rows ? k + ahead : k]);
        const char* soon = reinterpret_cast<const char*>(source + row_offset[k + 1 < rows ? k + 1 : k]);
        const S* row = source + row_offset[k];
        T* to = packed + k * kPanel;
        for (const Run* run = runs; run != runs + count; ++run, next += share, soon += share) {
          __builtin_prefetch(next, 0, 2);
          __builtin_prefetch(soon, 0, 3);
          copy_in(row + run->unit, to + run->packed, run->length);
        }
      }
      return;
    }
    // Units are far apart, rows often adjacent (channels-first maps).
    for (int64_t k = 0, together; k < rows; k += together) {
      together = adjacent(row_offset, k, rows);
      for (const Run* run = runs; run != runs + count; ++run) {
        transpose_in(source + run->unit * unit_stride + row_offset[k], unit_stride, together, run->length,
                     packed + run->packed + k * kPanel, kPanel);
      }
    }
  }

  // The length of a run is looked at once, not once a row.
  template <int kLength>
  static inline __attribute__((always_inline)) void load_run(const S* from, const int64_t* row_offset, int rows,
                                                             int64_t ahead, T* to) {
    for (int r = 0; r < rows; ++r) {
      __builtin_prefetch(from + row_offset[r] + ahead, 1, 2);
      copy_in<kLength>(from + row_offset[r], to + r * kTilePitch);
    }
  }
  template <int kLength>
  static inline __attribute__((always_inline)) void store_run(const T* from, const int64_t* row_offset, int rows,
                                                              S* to) {
    for (int r = 0; r < rows; ++r) copy_out<kLength>(from + r * kTilePitch, to + row_offset[r]);
  }

  static void load_by_unit(const S* source, const int64_t* row_offset, int rows, int64_t unit_stride, const Run* runs,
                           int64_t count, int64_t ahead, T* tile) {
    const bool together = adjacent(row_offset, 0, rows) == rows;
    for (const Run* run = runs; run != runs + count; ++run) {
      const S* from = source + run->unit * unit_stride;
      T* to = tile + run->column * kMaxTileRows;
      for (int u = 0; u < run->length; ++u, from += unit_stride, to += kMaxTileRows) {
        __builtin_prefetch(from + row_offset[0] + ahead, 1, 2);
        if (together) {
          copy_in(from + row_offset[0], to, rows);
        } else {
          for (int r = 0; r < rows; ++r) to[r] = widen(from[row_offset[r]]);
        }
      }
    }
  }

  static void load_tile(const void* g, const int64_t* row_offset, int rows, int64_t unit_stride, const Run* runs,
                        int64_t count, int64_t ahead, bool by_unit, T* tile) {
    const S* source = static_cast<const S*>(g);
    if (by_unit) {
      load_by_unit(source, row_offset, rows, unit_stride, runs, count, ahead, tile);
      return;
    }
    if (rows > kTileRows) {  // of as many pages: one after the other, for the TLB
      for (int r = 0; r < rows; ++r) {
        const S* row = source + row_offset[r];
        for (const Run* run = runs; run != runs + count; ++run) {
          __builtin_prefetch(row + run->unit + ahead, 1, 2);
          copy_in(row + run->unit, tile + r * kTilePitch + run->column, run->length);
        }
      }
      return;
    }
    for (const Run* run = runs; run != runs + count; ++run) {
      const S* from = source + run->unit;
      T* to = tile + run->column;
      if (run->length == 8) {
        load_run<8>(from, row_offset, rows, ahead, to);
      } else if (run->length == 16) {
        load_run<16>(from, row_offset, rows, ahead, to);
      } else {
        for (int r = 0; r < rows; ++r) {
          __builtin_prefetch(from + row_offset[r] + ahead, 1, 2);
          copy_in(from + row_offset[r], to + r * kTilePitch, run->length);
        }
      }
    }
  }

  static void store_tile(const T* tile, uint32_t skip, void* g, const int64_t* row_offset, int rows,
                         int64_t unit_stride, const Run* runs, int64_t count) {
    S* target = static_cast<S*>(g);
    if (unit_stride == 1 && skip == 0 && rows > kTileRows) {
      for (int r = 0; r < rows; ++r) {
        S* row = target + row_offset[r];
        for (const Run* run = runs; run != runs + count; ++run) {
          copy_out(tile + r * kTilePitch + run->column, row + run->unit, run->length);
        }
      }
      return;
    }
    if (unit_stride == 1 && skip == 0) {
      for (const Run* run = runs; run != runs + count; ++run) {
        const T* from = tile + run->column;
        S* to = target + run->unit;
        if (run->length == 8) {
          store_run<8>(from, row_offset, rows, to);
        } else if (run->length == 16) {
          store_run<16>(from, row_offset, rows, to);
        } else {
          for (int r = 0; r < rows; ++r) copy_out(from + r * kTilePitch, to + row_offset[r], run->length);
        }
      }
      return;
    }
    for (int64_t r = 0, together; r < rows; r += together) {
      together = skip == 0 ? adjacent(row_offset, r, rows) : 1;
      if (skip >> r & 1) continue;
      for (const Run* run = runs; run != runs + count; ++run) {
        transpose_out(tile + r * kTilePitch + run->column, kTilePitch, together, run->length,
                      target + run->unit * unit_stride + row_offset[r], unit_stride);
      }
    }
  }

  // Sixteen sums side by side, in an order that nothing but `count` decides.
  template <typename Element>
  static inline __attribute__((always_inline)) double sum_up(int64_t count, Element element) {
    constexpr int kSums = 16;
    double sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums) {
      for (int j = 0; j < kSums; ++j) {
        const double x = element(i + j);
        sums[j] += x * x;
      }
    }
    for (; i < count; ++i) {
      const double x = element(i);
      sums[0] += x * x;
    }
    double total = 0;
    for (double sum : sums) total += sum;
    return total;
  }

  static double subtract(void* g, int64_t stride, const void* before, int64_t count) {
    S* to = static_cast<S*>(g);
    const S* from = static_cast<const S*>(before);
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) to[i] = narrow<S>(static_cast<T>(widen(to[i]) - widen(from[i])));
    } else {
      for (int64_t i = 0; i < count; ++i) {
        to[i * stride] = narrow<S>(static_cast<T>(widen(to[i * stride]) - widen(from[i * stride])));
      }
    }
    return sum_of_squares(g, stride, count);
  }

  static double sum_of_squares(const void* g, int64_t stride, int64_t count) {
    const S* from = static_cast<const S*>(g);
    if (stride == 1) return sum_up(count, [from](int64_t i) { return static_cast<double>(widen(from[i])); });
    return sum_up(count, [from, stride](int64_t i) { return static_cast<double>(widen(from[i * stride])); });
  }

  static void add_scaled(void* g, int64_t stride, const void* before, int64_t count, T scale) {
    S* to = static_cast<S*>(g);
    const S* from = static_cast<const S*>(before);
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) to[i] = narrow<S>(static_cast<T>(widen(from[i]) + scale * widen(to[i])));
    } else {
      for (int64_t i = 0; i < count; ++i) {
        S& at = to[i * stride];
        at = narrow<S>(static_cast<T>(widen(from[i * stride]) + scale * widen(at)));
      }
    }
  }

  static bool any_nonzero(const void* g, int64_t stride, int64_t count) {
    const S* from = static_cast<const S*>(g);
    for (int64_t i = 0; i < count; ++i) {
      if (!(widen(from[i * stride]) == 0)) return true;
    }
    return false;
  }

  static bool all_finite(const void* g, int64_t stride, int64_t count) {
    constexpr int kSums = 16;
    const S* from = static_cast<const S*>(g);
    T sums[kSums] = {};  // of zeros and NaN
    int64_t i = 0;
    for (; stride == 1 && i + kSums <= count; i += kSums) {
      for (int j = 0; j < kSums; ++j) {
        const T x = widen(from[i + j]);
        sums[j] += x - x;
      }
    }
    for (; i < count; ++i) {
      const T x = widen(from[i * stride]);
      sums[0] += x - x;
    }
    for (int j = 1; j < kSums; ++j) sums[0] += sums[j];
    return sums[0] == 0;
  }

  static void transpose_block(const void* from, int64_t stride, T* to) {
    transpose_in(static_cast<const S*>(from), stride, kPanel, kPanel, to, kPanel);
  }

  template <int kLanes>
  static inline __attribute__((always_inline)) void add_moments(const S* x, const int64_t* row_offset, int64_t rows,
                                                                double* squares, double* sums) {
    T square[kLanes] = {}, sum[kLanes] = {};
    for (int64_t k = 0; k < rows; ++k) {
      T values[kLanes];
      copy_in<kLanes>(x + row_offset[k], values);
      for (int i = 0; i < kLanes; ++i) {
        square[i] += values[i] * values[i];
        sum[i] += values[i];
      }
    }
    for (int i = 0; i < kLanes; ++i) {
      squares[i] += square[i];
      sums[i] += sum[i];
    }
  }

  static void moments(const void* x, const int64_t* row_offset, int64_t rows, int64_t lanes, double* squares,
                      double* sums) {
    const S* source = static_cast<const S*>(x);
    int64_t i = 0;
    for (; i + 16 <= lanes; i += 16) add_moments<16>(source + i, row_offset, rows, squares + i, sums + i);
    for (; i + 4 <= lanes; i += 4) add_moments<4>(source + i, row_offset, rows, squares + i, sums + i);
    for (; i < lanes; ++i) add_moments<1>(source + i, row_offset, rows, squares + i, sums + i);
  }

  static constexpr GatherKernels<T> table() {
    return {pack,       load_tile,   store_tile, subtract,        sum_of_squares,
            add_scaled, any_nonzero, all_finite, transpose_block, moments};
  }
};
