// The body of GatherKernels (chunk_kernels.h) for one instruction set; included beside chunk_kernels.inl, same rules.

#include "cpu/convert.inl"

constexpr int64_t kPrefetchBytes = 8 << 10;

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
    S values[kLength];
    for (int i = 0; i < kLength; ++i) values[i] = narrow<S>(from[i]);
    __builtin_memcpy(to, values, sizeof(values));
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

  static void pack(const void* x, const int64_t* row_offset, int64_t rows, int64_t unit_stride, int64_t row_units,
                   const Run* runs, int64_t count, T* packed) {
    const S* source = static_cast<const S*>(x);
    if (unit_stride == 1) {
      // The runs of a row come in random order, which no hardware prefetcher follows; fetch the rows ahead as a whole.
      const int64_t row_bytes = row_units * sizeof(S);
      const int64_t ahead = 1 + kPrefetchBytes / (row_bytes + 1);
      for (int64_t k = 0; k < rows; ++k) {
        if (k + ahead < rows) {
          const char* next = reinterpret_cast<const char*>(source + row_offset[k + ahead]);
          for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(next + byte, 0, 3);
        }
        const S* row = source + row_offset[k];
        T* to = packed + k * kPanel;
        for (const Run* run = runs; run != runs + count; ++run) copy_in(row + run->unit, to + run->packed, run->length);
      }
      return;
    }
    // Units are far apart, rows often adjacent (channels-first maps): walk the rows of a run together.
    for (const Run* run = runs; run != runs + count; ++run) {
      T* to = packed + run->packed;
      const S* from = source + run->unit * unit_stride;
      for (int64_t k = 0; k < rows; ++k) {
        for (int i = 0; i < run->length; ++i) to[k * kPanel + i] = widen(from[row_offset[k] + i * unit_stride]);
      }
    }
  }

  static void load_tile(const void* g, const int64_t* row_offset, int rows, int64_t unit_stride, const Run* runs,
                        int64_t count, T* tile) {
    const S* source = static_cast<const S*>(g);
    if (unit_stride == 1) {
      for (int r = 0; r < rows; ++r) {
        const S* row = source + row_offset[r];
        T* to = tile + r * kTilePitch;
        for (const Run* run = runs; run != runs + count; ++run) copy_in(row + run->unit, to + run->column, run->length);
      }
      return;
    }
    for (const Run* run = runs; run != runs + count; ++run) {  // rows of one output are the adjacent taps of a kernel
      for (int i = 0; i < run->length; ++i) {
        const S* from = source + (run->unit + i) * unit_stride;
        T* to = tile + run->column + i;
        for (int r = 0; r < rows; ++r) to[r * kTilePitch] = widen(from[row_offset[r]]);
      }
    }
  }

  static void store_tile(const T* tile, uint32_t skip, void* g, const int64_t* row_offset, int rows,
                         int64_t unit_stride, const Run* runs, int64_t count) {
    S* target = static_cast<S*>(g);
    if (unit_stride == 1) {
      for (int r = 0; r < rows; ++r) {
        if (skip >> r & 1) continue;
        S* row = target + row_offset[r];
        const T* from = tile + r * kTilePitch;
        for (const Run* run = runs; run != runs + count; ++run)
          copy_out(from + run->column, row + run->unit, run->length);
      }
      return;
    }
    for (const Run* run = runs; run != runs + count; ++run) {
      for (int i = 0; i < run->length; ++i) {
        S* to = target + (run->unit + i) * unit_stride;
        const T* from = tile + run->column + i;
        for (int r = 0; r < rows; ++r) {
          if (!(skip >> r & 1)) to[row_offset[r]] = narrow<S>(from[r * kTilePitch]);
        }
      }
    }
  }

  static constexpr GatherKernels<T> table() { return {pack, load_tile, store_tile}; }
};

template <typename T>
constexpr IsaKernels<T> isa_table() {
  return {Kernels<T>::table(),
          {Gather<float, T>::table(), Gather<double, T>::table(), Gather<BFloat16, T>::table(),
           Gather<Float16, T>::table()}};
}
