// The one source of randomness: which rows are sampled, and which chunk every unit falls in.
//
// Both are pure functions of (seed, step, layer): Philox4x32-10 makes the keys, an alternating Feistel network with
// cycle walking makes the bijection.  No state, no index tensors, no sort; any thread can ask for any position.  The
// CPU kernels, the CUDA kernels and reference.py compile or mirror this file, so they draw the same division bit for
// bit.
#pragma once

#include "consistency_ops/types.h"

namespace consistency_ops {

struct Philox4 {
  uint32_t v[4];
};

// Philox4x32-10 (Salmon et al., SC 2011) of the counter (step, layer, purpose) under the key `seed`.
CO_HOST_DEVICE inline Philox4 philox(uint64_t seed, uint64_t step, uint32_t layer, uint32_t purpose) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(step), c1 = static_cast<uint32_t>(step >> 32), c2 = layer, c3 = purpose;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A number in [0, n) from 32 random bits; n <= 2^32.
CO_HOST_DEVICE inline int64_t below(uint32_t bits, int64_t n) {
  return static_cast<int64_t>((static_cast<uint64_t>(bits) * static_cast<uint64_t>(n)) >> 32);
}

// Numbers of blocks: block i of a level gets one word of its own.  Four neighbouring blocks share a counter.  `kind` is
// one of the two constants; numbers repeat after 2^26 blocks, and levels after 64.
constexpr uint32_t kRowDraw = 1u << 31;   // which row of a block is taken
constexpr uint32_t kPairDraw = 1u << 30;  // which one of two neighbouring blocks keeps its row (capture.h)

CO_HOST_DEVICE inline uint32_t draw_purpose(uint32_t kind, uint32_t level, int64_t block) {
  return kind | (level & 63) << 24 | (static_cast<uint32_t>(block >> 2) & 0xFFFFFF);
}

CO_HOST_DEVICE inline uint32_t word_of(const Philox4& words, int64_t block) {
  // No index into the array, and no choice between two of its elements: it would leave the registers.
  const uint32_t odd = 0u - (static_cast<uint32_t>(block) & 1), upper = 0u - (static_cast<uint32_t>(block) >> 1 & 1);
  const uint32_t low = (words.v[0] & ~odd) | (words.v[1] & odd), high = (words.v[2] & ~odd) | (words.v[3] & odd);
  return (low & ~upper) | (high & upper);
}

// One row of every block of `stride` rows; a row behind `end` is never taken, so the last block may be shorter.  One
// row in `stride` at a fixed distance would meet the same column of an image, or the same position of a sequence, again
// and again.
struct RowDraws {
  uint64_t seed, step;
  uint32_t layer, level;
  int64_t stride, end;

  // The row of this block, from the four words of its counter.
  CO_HOST_DEVICE int64_t row(int64_t block, const Philox4& words) const {
    const int64_t begin = block * stride, size = end - begin < stride ? end - begin : stride;
    return begin + below(word_of(words, block), size);
  }
  CO_HOST_DEVICE int64_t row(int64_t block) const {
    if (stride == 1) return block;
    return row(block, philox(seed, step, layer, draw_purpose(kRowDraw, level, block)));
  }
};

// The rows of blocks first .. first + count - 1, less `origin`, with one call of the generator for four.
inline void draw_rows(const RowDraws& draws, int64_t first, int64_t count, int64_t origin, int64_t* rows) {
  Philox4 words{};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = first + i;
    if (draws.stride > 1 && (i == 0 || block % 4 == 0)) {
      words = philox(draws.seed, draws.step, draws.layer, draw_purpose(kRowDraw, draws.level, block));
    }
    rows[i] = (draws.stride > 1 ? draws.row(block, words) : block) - origin;
  }
}

// At most max_rows of `rows`, at least one: `count` blocks, each of which gives one.
struct RowSample {
  int64_t stride, count;
};

CO_HOST_DEVICE inline RowSample sample_rows(int64_t rows, int64_t max_rows) {
  if (rows <= max_rows) return {1, rows > 0 ? rows : 0};  // no division, which a GPU has none for
  const int64_t stride = rows / max_rows + (rows % max_rows != 0);
  return {stride, rows / stride + (rows % stride != 0)};
}

// How the units 0 .. units-1 (the bias, if any, is the last) are dealt to chunks.
//
// Position p of the division holds unit unit_at(p); chunk c is the positions [chunk_begin(c), chunk_begin(c + 1)), so
// chunks are equal within one unit.  Runs of `group` consecutive units move together, after a random cyclic offset; the
// units % group left over stay at the end.  group = 1 is the exact division of the paper.  One chunk holds the units in
// their natural order.
//
// The offset is what moves the borders of the groups from step to step.  Where groups are whole multiples of 8 units it
// is a multiple of half a group, so a kernel can read the units 16 bytes at a time (4 of float32, 8 of 16 bits), and
// the units behind the last multiple, the bias for one, stay where they are.
struct Division {
  int64_t units;
  int64_t chunks;
  int64_t groups;   // full groups, the ones that are permuted
  int64_t offset;   // cyclic offset, in units
  int64_t rotated;  // the first so many units take part in it
  int32_t group;
  int32_t right_bits, left_bits;  // lengths of the Feistel halves; 2^(right + left) >= groups
  uint32_t key[8];
};

CO_HOST_DEVICE constexpr int64_t offset_step(int64_t group) { return group % 8 == 0 ? group / 2 : 1; }

CO_HOST_DEVICE inline Division make_division(int64_t units, int64_t chunk, int64_t group, uint64_t seed, uint64_t step,
                                             uint32_t layer) {
  Division d{};
  d.units = units;
  d.chunks = (units + chunk - 1) / chunk;
  d.group = static_cast<int32_t>(group);
  d.groups = units / group;
  const int64_t turn = offset_step(group);
  d.rotated = units / turn * turn;
  d.offset = below(philox(seed, step, layer, 0).v[1], units / turn) * turn;
  const Philox4 low = philox(seed, step, layer, 1), high = philox(seed, step, layer, 2);
  for (int i = 0; i < 4; ++i) {
    d.key[i] = low.v[i];
    d.key[4 + i] = high.v[i];
  }
  int32_t bits = 2;
  while ((int64_t{1} << bits) < d.groups) ++bits;
  d.left_bits = bits / 2;
  d.right_bits = bits - d.left_bits;
  return d;
}

CO_HOST_DEVICE inline uint32_t mix(uint32_t value, uint32_t key) {
  uint32_t h = value + key;
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  return h ^ (h >> 16);
}

CO_HOST_DEVICE inline int64_t permuted_group(const Division& d, int64_t index) {
  const uint32_t left_mask = (1u << d.left_bits) - 1, right_mask = (1u << d.right_bits) - 1;
  uint32_t x = static_cast<uint32_t>(index);
  do {  // at most 4 * groups values are walked, so the expected number of turns is below 4
    uint32_t left = x >> d.right_bits, right = x & right_mask;
    for (int round = 0; round < 8; round += 2) {
      left ^= mix(right, d.key[round]) & left_mask;
      right ^= mix(left, d.key[round + 1]) & right_mask;
    }
    x = (left << d.right_bits) | right;
  } while (x >= static_cast<uint64_t>(d.groups));
  return x;
}

// The unit at a place that has been permuted already.
CO_HOST_DEVICE inline int64_t rotate(const Division& d, int64_t place) {
  if (place >= d.rotated) return place;
  return place + d.offset >= d.rotated ? place + d.offset - d.rotated : place + d.offset;
}

CO_HOST_DEVICE inline int64_t unit_at(const Division& d, int64_t position) {
  if (d.chunks <= 1) return position;
  if (position >= d.groups * d.group) return rotate(d, position);
  return rotate(d, permuted_group(d, position / d.group) * d.group + position % d.group);
}

// First position of chunk c of `chunks`: sizes differ by at most one unit, the larger ones come first.
CO_HOST_DEVICE inline int64_t chunk_begin(int64_t units, int64_t chunks, int64_t c) {
  const int64_t base = units / chunks, larger = units % chunks;
  return c * base + (c < larger ? c : larger);
}

}  // namespace consistency_ops
