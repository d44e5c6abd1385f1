// The body of PairKernels' gram and of TileKernels (chunk_kernels.h), out of five instructions on tiles.  Included by
// isa_amx.cpp, where they are the machine's, and by isa_amx_model.cpp, where they are functions of tile_model.h; inside
// a namespace of its own, same rules as chunk_kernels.inl.  A tile has 16 rows of 64 bytes.
//
//   CO_TILE_BEGIN(), CO_TILE_END()      before and after all others, on every thread
//   CO_TILE_ZERO(t)                     t: a number from 0 to 7
//   CO_TILE_LOAD(t, from, pitch)        rows are `pitch` bytes apart
//   CO_TILE_STORE(t, to, pitch)
//   CO_TILE_MULTIPLY(c, a, b)           c[m][n] += sum_k a[m][2k] b[k][2n] + a[m][2k + 1] b[k][2n + 1], 16 pairs of
//                                       bfloat16, c in float

#include "cpu/convert.inl"

constexpr int kWords = 16;                   // 32-bit words in a row of a tile
constexpr int kTileWords = kPanel * kWords;  // in a tile
constexpr int kTileBytes = 4 * kTileWords;
constexpr int kPairs = 16;  // rows of a right operand, each with two units or two rows of X
constexpr int kMostPanels = 256 / kPanel;
constexpr int kMostSteps = 128 / (2 * kPairs);  // of a packed block of X

typedef uint32_t Words __attribute__((vector_size(64), aligned(64), may_alias));

// to[r][c] = from[c][r] of 16 x 16 words: bit by bit of the index, the halves of pairs of rows change places.
static void transpose_words(const uint32_t* from, uint32_t* to) {
  Words rows[kPanel];
#pragma GCC unroll 16
  for (int r = 0; r < kPanel; ++r) rows[r] = *reinterpret_cast<const Words*>(from + r * kWords);
#if defined(__clang__)
#define CO_PERMUTE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CO_PERMUTE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif
#define CO_EXCHANGE(bit, upper, lower)                        \
  _Pragma("GCC unroll 16") for (int r = 0; r < kPanel; ++r) { \
    if (r & bit) continue;                                    \
    const Words a = rows[r], b = rows[r | bit];               \
    rows[r] = CO_PERMUTE(a, b, upper);                        \
    rows[r | bit] = CO_PERMUTE(a, b, lower);                  \
  }
#define CO_LIST(...) __VA_ARGS__
  CO_EXCHANGE(1, CO_LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
              CO_LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
  CO_EXCHANGE(2, CO_LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
              CO_LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
  CO_EXCHANGE(4, CO_LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
              CO_LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
  CO_EXCHANGE(8, CO_LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
              CO_LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#undef CO_LIST
#undef CO_EXCHANGE
#undef CO_PERMUTE
#pragma GCC unroll 16
  for (int r = 0; r < kPanel; ++r) *reinterpret_cast<Words*>(to + r * kWords) = rows[r];
}

static void begin() { CO_TILE_BEGIN(); }
static void end() { CO_TILE_END(); }

// c (+)= sum over the steps of two panels with two panels, or fewer: tiles 0 to 3 of C, 4 and 5 of the left operand, 6
// and 7 of the right one.  kCorner: without the second row and first column, which lie under the diagonal.
template <int kRows, int kColumns, bool kCorner>
static void add_products(const uint32_t* left, const uint32_t* right, int64_t pitch, int64_t steps, bool accumulate,
                         float* c, int64_t next_column) {
  if (accumulate) {
    CO_TILE_LOAD(0, c, 4 * kPanel);
    if constexpr (kColumns == 2) CO_TILE_LOAD(1, c + next_column, 4 * kPanel);
    if constexpr (kRows == 2 && !kCorner) CO_TILE_LOAD(2, c + kTileWords, 4 * kPanel);
    if constexpr (kRows == 2 && kColumns == 2) CO_TILE_LOAD(3, c + next_column + kTileWords, 4 * kPanel);
  } else {
    CO_TILE_ZERO(0);
    if constexpr (kColumns == 2) CO_TILE_ZERO(1);
    if constexpr (kRows == 2 && !kCorner) CO_TILE_ZERO(2);
    if constexpr (kRows == 2 && kColumns == 2) CO_TILE_ZERO(3);
  }
  for (int64_t s = 0; s < steps; ++s) {
    CO_TILE_LOAD(4, left + s * kTileWords, 4 * kWords);
    CO_TILE_LOAD(6, right + s * kTileWords, 4 * kWords);
    CO_TILE_MULTIPLY(0, 4, 6);
    if constexpr (kColumns == 2) {
      CO_TILE_LOAD(7, right + pitch * kWords + s * kTileWords, 4 * kWords);
      CO_TILE_MULTIPLY(1, 4, 7);
    }
    if constexpr (kRows == 2) {
      CO_TILE_LOAD(5, left + (steps + s) * kTileWords, 4 * kWords);
      if constexpr (!kCorner) CO_TILE_MULTIPLY(2, 5, 6);
      if constexpr (kColumns == 2) CO_TILE_MULTIPLY(3, 5, 7);
    }
  }
  CO_TILE_STORE(0, c, 4 * kPanel);
  if constexpr (kColumns == 2) CO_TILE_STORE(1, c + next_column, 4 * kPanel);
  if constexpr (kRows == 2 && !kCorner) CO_TILE_STORE(2, c + kTileWords, 4 * kPanel);
  if constexpr (kRows == 2 && kColumns == 2) CO_TILE_STORE(3, c + next_column + kTileWords, 4 * kPanel);
}

// A packed panel is a right operand as it is; the left one is its transpose.
static void gram(uint32_t* p, int64_t pairs, int64_t pitch, int panels, bool accumulate, float* c) {
  const int64_t steps = (pairs + kPairs - 1) / kPairs, column = int64_t{kPanel} * panels * kPanel;
  alignas(64) uint32_t transposed[kMostPanels * kMostSteps * kTileWords];
  for (int j = 0; j < panels; ++j) {
    uint32_t* panel = p + j * pitch * kWords;
    for (int64_t e = pairs * kWords; e < steps * kTileWords; ++e) panel[e] = 0;
    for (int64_t s = 0; s < steps; ++s) {
      transpose_words(panel + s * kTileWords, transposed + (j * steps + s) * kTileWords);
    }
  }
  for (int i = 0; i < panels; i += 2) {
    const uint32_t* right = p + i * pitch * kWords;
    const bool pair = i + 1 < panels;
    for (int j = 0; j < i; j += 2) {
      const uint32_t* left = transposed + j * steps * kTileWords;
      float* to = c + i * column + j * kTileWords;
      if (pair) {
        add_products<2, 2, false>(left, right, pitch, steps, accumulate, to, column);
      } else {
        add_products<2, 1, false>(left, right, pitch, steps, accumulate, to, column);
      }
    }
    const uint32_t* left = transposed + i * steps * kTileWords;
    float* to = c + i * column + i * kTileWords;
    if (pair) {
      add_products<2, 2, true>(left, right, pitch, steps, accumulate, to, column);
    } else {
      add_products<1, 1, false>(left, right, pitch, steps, accumulate, to, column);
    }
  }
}

// The inverse as right operands: for every panel of 16 columns and every 32 rows a tile of the upper terms and one of
// the lower terms.  x = upper + lower to 16 bits; where all elements are beyond 2^+-60, times a power of two, so that
// no lower term of a large element is subnormal and no upper one infinite.
static float split(const float* inverse, int panels, uint16_t* tiles) {
  const int64_t height = int64_t{kPanel} * panels, blocks = (panels + 1) / 2;
  int32_t largest = 0;
  for (int64_t e = 0; e < height * height; ++e) {
    const int32_t magnitude = static_cast<int32_t>(to_bits(inverse[e]) & 0x7FFFFFFFu);
    largest = magnitude > largest ? magnitude : largest;
  }
  const int exponent = (largest >> 23) - 127;  // 2^exponent <= the largest < 2^(exponent + 1), if it is normal
  const int shift = exponent > 60 ? -exponent : exponent < -60 && exponent > -127 ? -exponent : 0;
  const float scale = from_bits(static_cast<uint32_t>(127 + shift) << 23);
  for (int64_t j = 0; j < panels; ++j) {
    for (int64_t k = 0; k < blocks * 2 * kPairs; k += 2) {
      const float* rows = inverse + j * height * kPanel + k * kPanel;
      uint32_t words[2][kWords] = {};  // an even number of panels: beyond the last one are zeros
      for (int n = 0; k < height && n < kWords; ++n) {
        for (int odd = 0; odd < 2; ++odd) {
          const float x = rows[odd * kPanel + n] * scale;
          const BFloat16 upper = narrow<BFloat16>(x);
          words[0][n] |= uint32_t{upper.bits} << 16 * odd;
          words[1][n] |= uint32_t{narrow<BFloat16>(x - widen(upper)).bits} << 16 * odd;
        }
      }
      uint16_t* to = tiles + (j * blocks + k / (2 * kPairs)) * kTileBytes + k % (2 * kPairs) / 2 * 2 * kWords;
      __builtin_memcpy(to, words[0], sizeof(words[0]));
      __builtin_memcpy(to + kTileBytes / 2, words[1], sizeof(words[1]));
    }
  }
  return from_bits(static_cast<uint32_t>(127 - shift) << 23);
}

constexpr int kMostRows = 2 * kPanel;        // of G at once
constexpr int kRowPitch = 256 + 2 * kPanel;  // elements; an odd number of cache lines, for as many sets

template <int kBytes>
static inline __attribute__((always_inline)) void copy(const uint16_t* from, uint16_t* to) {
  unsigned char bytes[kBytes];
  __builtin_memcpy(bytes, from, kBytes);
  __builtin_memcpy(to, bytes, kBytes);
}

static inline __attribute__((always_inline)) void copy_run(const uint16_t* from, uint16_t* to, int length) {
  if (length == kPanel) {
    copy<2 * kPanel>(from, to);
  } else if (length >= 8) {  // two copies that may overlap
    copy<16>(from, to);
    copy<16>(from + length - 8, to + length - 8);
  } else if (length >= 4) {
    copy<8>(from, to);
    copy<8>(from + length - 4, to + length - 4);
  } else {
    for (int i = 0; i < length; ++i) to[i] = from[i];
  }
}

// product = g * two panels of the inverse, or one, in 16 rows or 32.
template <int kRows, int kColumns>
static void multiply(const uint16_t* g, const uint16_t* tiles, int64_t blocks, float* product) {
  CO_TILE_ZERO(0);
  if constexpr (kColumns == 2) CO_TILE_ZERO(1);
  if constexpr (kRows == 2) CO_TILE_ZERO(2);
  if constexpr (kRows == 2 && kColumns == 2) CO_TILE_ZERO(3);
  for (int64_t k = 0; k < blocks; ++k) {
    CO_TILE_LOAD(4, g + k * 2 * kPairs, 2 * kRowPitch);
    if constexpr (kRows == 2) CO_TILE_LOAD(5, g + kPanel * kRowPitch + k * 2 * kPairs, 2 * kRowPitch);
    for (int term = 0; term < 2; ++term) {
      const uint16_t* right = tiles + k * kTileBytes + term * (kTileBytes / 2);
      CO_TILE_LOAD(6, right, 4 * kWords);
      CO_TILE_MULTIPLY(0, 4, 6);
      if constexpr (kRows == 2) CO_TILE_MULTIPLY(2, 5, 6);
      if constexpr (kColumns == 2) {
        CO_TILE_LOAD(7, right + blocks * kTileBytes, 4 * kWords);
        CO_TILE_MULTIPLY(1, 4, 7);
        if constexpr (kRows == 2) CO_TILE_MULTIPLY(3, 5, 7);
      }
    }
  }
  CO_TILE_STORE(0, product, 4 * kTilePitch);
  if constexpr (kColumns == 2) CO_TILE_STORE(1, product + kPanel, 4 * kTilePitch);
  if constexpr (kRows == 2) CO_TILE_STORE(2, product + kPanel * kTilePitch, 4 * kTilePitch);
  if constexpr (kRows == 2 && kColumns == 2) {
    CO_TILE_STORE(3, product + kPanel * kTilePitch + kPanel, 4 * kTilePitch);
  }
}

// One row of a product in bfloat16; false if a result is NaN or beyond the limit.
static bool round_row(const float* product, int64_t width, float scale, float limit, uint16_t* to) {
  int32_t largest = 0;
  for (int64_t n = 0; n < width; n += kPanel) {
    float scaled[kPanel];
    for (int i = 0; i < kPanel; ++i) scaled[i] = product[n + i] * scale;
    for (int i = 0; i < kPanel; ++i) {
      const int32_t magnitude = static_cast<int32_t>(to_bits(scaled[i]) & 0x7FFFFFFFu);
      largest = magnitude > largest ? magnitude : largest;
    }
    narrow_all<kPanel>(scaled, reinterpret_cast<BFloat16*>(to + n));
  }
  return largest <= static_cast<int32_t>(to_bits(limit));
}

static void correct(void* gradient, const int64_t* row_offset, int64_t rows, const Run* runs, int64_t count,
                    int64_t ahead, const uint16_t* tiles, int64_t size, float scale, float limit) {
  uint16_t* g = static_cast<uint16_t*>(gradient);
  const int panels = static_cast<int>((size + kPanel - 1) / kPanel);
  const int64_t blocks = (panels + 1) / 2, width = int64_t{kPanel} * panels;
  alignas(64) uint16_t tile[kMostRows * kRowPitch];
  for (int64_t r = 0; r < kMostRows; ++r) {  // what no run writes; rows beyond the last one count, too, but not the NaN
    for (int64_t n = r < rows ? size : 0; n < blocks * 2 * kPairs; ++n) tile[r * kRowPitch + n] = 0;
  }
  alignas(64) float product[kMostRows * kTilePitch];
  alignas(64) uint16_t rounded[kRowPitch];
  for (int64_t first = 0; first < rows; first += kMostRows) {
    const int here = static_cast<int>(rows - first < kMostRows ? rows - first : kMostRows);
    for (int r = 0; r < here; ++r) {  // one after the other: each is in a page of its own
      const uint16_t* row = g + row_offset[first + r];
      for (const Run* run = runs; run != runs + count; ++run) {
        __builtin_prefetch(row + run->unit + ahead, 1, 2);
        copy_run(row + run->unit, tile + r * kRowPitch + run->column, run->length);
      }
    }
    for (int j = 0; j < panels; j += 2) {
      const uint16_t* right = tiles + j * blocks * kTileBytes;
      float* to = product + j * kPanel;
      if (here > kPanel && j + 1 < panels) {
        multiply<2, 2>(tile, right, blocks, to);
      } else if (here > kPanel) {
        multiply<2, 1>(tile, right, blocks, to);
      } else if (j + 1 < panels) {
        multiply<1, 2>(tile, right, blocks, to);
      } else {
        multiply<1, 1>(tile, right, blocks, to);
      }
    }
    for (int r = 0; r < here; ++r) {
      if (!round_row(product + r * kTilePitch, width, scale, limit, rounded)) continue;
      uint16_t* row = g + row_offset[first + r];
      for (const Run* run = runs; run != runs + count; ++run) {
        copy_run(rounded + run->column, row + run->unit, run->length);
      }
    }
  }
}
