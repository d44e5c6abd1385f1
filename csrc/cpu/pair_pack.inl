// The body of PairKernels' pack (chunk_kernels.h); included like chunk_kernels.inl, same rules.

template <int kLength>
static inline __attribute__((always_inline)) void interleave(const uint16_t* even, const uint16_t* odd, uint32_t* to) {
  uint32_t words[kLength];
  for (int i = 0; i < kLength; ++i) words[i] = even[i] | uint32_t{odd[i]} << 16;
  __builtin_memcpy(to, words, sizeof(words));
}

static void pack(const void* x, const int64_t* row_offset, int64_t rows, int64_t unit_stride, int64_t row_units,
                 const Run* runs, int64_t count, uint32_t* packed) {
  const uint16_t* source = static_cast<const uint16_t*>(x);
  // With every run goes the prefetch of its share of two later rows (see pack in gather_kernels.inl).
  const int64_t row_bytes = unit_stride == 1 ? row_units * 2 : 0;
  const int64_t ahead = 2 + (64 << 10) / (row_bytes + 1) / 2 * 2;
  const int64_t share = row_bytes == 0 ? 0 : 1 + row_bytes / (count + 1);
  for (int64_t k = 0; k + 1 < rows; k += 2) {
    const int64_t later = k + ahead + 1 < rows ? k + ahead : k;
    const char* next[2] = {reinterpret_cast<const char*>(source + row_offset[later]),
                           reinterpret_cast<const char*>(source + row_offset[later + 1])};
    const uint16_t* even = source + row_offset[k];
    const uint16_t* odd = source + row_offset[k + 1];
    uint32_t* to = packed + k / 2 * kPanel;
    for (const Run* run = runs; run != runs + count; ++run) {
      for (const char*& line : next) {
        __builtin_prefetch(line, 0, 2);
        line += share;
      }
      if (unit_stride == 1 && run->length >= 8) {  // others than 8 are two copies that overlap
        const int back = run->length - 8;
        interleave<8>(even + run->unit, odd + run->unit, to + run->packed);
        if (back > 0) interleave<8>(even + run->unit + back, odd + run->unit + back, to + run->packed + back);
      } else if (unit_stride == 1 && run->length >= 4) {
        const int back = run->length - 4;
        interleave<4>(even + run->unit, odd + run->unit, to + run->packed);
        interleave<4>(even + run->unit + back, odd + run->unit + back, to + run->packed + back);
      } else {
        for (int i = 0; i < run->length; ++i) {
          const int64_t at = (run->unit + i) * unit_stride;
          to[run->packed + i] = even[at] | uint32_t{odd[at]} << 16;
        }
      }
    }
  }
  if (rows % 2 == 0) return;
  const uint16_t* last = source + row_offset[rows - 1];
  for (const Run* run = runs; run != runs + count; ++run) {
    for (int i = 0; i < run->length; ++i) {
      packed[rows / 2 * kPanel + run->packed + i] = last[(run->unit + i) * unit_stride];
    }
  }
}
