// G[:, c] <- G[:, c] A_c^-1 for this CTA's part of the rows of G of one layer, in place.
//
// G never lies in shared memory.  A warp corrects 16 rows (output, tap): its lanes load four neighbouring units at a
// time, which are the operand of a matrix instruction as they come, because a product may sum over the units in any
// order that both operands agree on.  The sums of all columns stay in registers until the last unit has been read; then
// four neighbouring units are stored at a time.  So warps need no barrier, and the next units are on their way while
// the last ones are multiplied.  Where the units of a chunk are no neighbours in memory (taps of a convolution, the
// exact division, the ends of ragged chunks) the four are loaded and stored one by one.
//
// Up to 128 units A^-1 is split once a chunk, in three bfloat16 planes in the order in which ldmatrix wants them
// (make_planes).  G is split as it comes: float32 in three planes, whose six products have float32's accuracy; float16
// in two, which hold it exactly; bfloat16 is its own only plane, and two planes of A^-1 serve both 16-bit types.  With
// `tf32` float32 takes two planes and three products.  On sm_90a the four warps of a warpgroup multiply 64 rows
// together and take A^-1 from shared memory themselves (wgmma); elsewhere every warp loads it (ldmatrix, mma).  Where
// float32 accuracy is asked for, the products of 16 units go into sums of their own, because tensor cores cut what they
// add up toward zero and a long sum in them drifts.  Chunks above 128 units have no room for planes: 16 warps, of which
// two share their rows, multiply by TF32 tensor cores with both operands split as they are read.
//
// A row whose result has an element that is not finite in the gradient's own type is left as it was, in this chunk
// only.  Figures of the model: docs/developer/kernel-model.md.
#pragma once

#include <type_traits>

#include "cuda/precondition/scheduler.cuh"

namespace consistency_ops {

constexpr int kWarpRows = 16;  // of G
constexpr int kWarpColumns = 128;

// Storage of an element of G.
template <DType kType>
using RawOf = std::conditional_t<kType == DType::kFloat32, uint32_t, uint16_t>;

// Run by one thread, between barriers: what all threads must know of the G that they correct next.  It stays in shared
// memory, because registers that live through a product would be spilled.
CO_DEVICE void begin_member(const PreconditionLayer* members, const Chunk& chunk, int member) {
  GradientPart& part = chunk.scratch.part;
  part.member = member;
  const PreconditionLayer& layer = members[member];
  const OutputRange outputs = outputs_of(members, member, chunk.task);
  part.taps = static_cast<int>(layer.g_tap_size[0] * layer.g_tap_size[1] * layer.g_tap_size[2]);
  part.first = static_cast<int>(outputs.begin) * part.taps;
  part.end = static_cast<int>(outputs.end) * part.taps;
  uintptr_t bits = reinterpret_cast<uintptr_t>(layer.g) / static_cast<uintptr_t>(element_size(layer.g_dtype)) |
                   static_cast<uintptr_t>(layer.g_output_stride);
  CO_UNROLL
  for (int i = 0; i < kMaxTapDims; ++i) {
    if (layer.g_tap_size[i] > 1) bits |= static_cast<uintptr_t>(layer.g_tap_stride[i]);
  }
  part.aligned = layer.g_unit_stride == 1 && bits % 4 == 0 ? 1 : 0;
}

template <DType kType>
CO_DEVICE RawOf<kType>* row_of_g(const PreconditionLayer& layer, int taps, int index) {
  const uint32_t output = taps == 1 ? static_cast<uint32_t>(index) : static_cast<uint32_t>(index / taps);
  int64_t offset = output * layer.g_output_stride;
  if (taps > 1) {
    offset += strided_offset(static_cast<uint32_t>(index) - output * static_cast<uint32_t>(taps), layer.g_tap_size,
                             layer.g_tap_stride);
  }
  return global_memory(static_cast<RawOf<kType>*>(layer.g)) + offset;
}

// Which of the 128 rows of a round the first of a lane's two is.
template <int kWarps>
CO_DEVICE int place_of_lane() {
  return fresh_thread() / 32 / (kWarps / 8) * kWarpRows + fresh_thread() % 32 / 4;
}

// The two rows, 8 apart, of which a lane holds elements.
template <int kWarps, DType kType>
struct LaneRows {
  using Raw = RawOf<kType>;

  const PreconditionLayer& layer;
  const Chunk& chunk;
  int inside;   // how many of the two there are
  Raw* row[2];  // the first of the part where there is none

  CO_DEVICE LaneRows(const PreconditionLayer& layer_, const Chunk& chunk_, int first) : layer(layer_), chunk(chunk_) {
    const GradientPart& part = chunk.scratch.part;
    const int index = first + place_of_lane<kWarps>();
    inside = index + 8 < part.end ? 2 : index < part.end ? 1 : 0;
    CO_UNROLL
    for (int r = 0; r < 2; ++r) row[r] = row_of_g<kType>(layer, part.taps, r < inside ? index + 8 * r : part.first);
  }
  // Positions `position` to `position` + 3 of the chunk; zeros where there is no unit.
  CO_DEVICE void load(int position, FourUnits<Raw> (&to)[2]) const {
    const int32_t unit = chunk.scratch.run[position >> 2];
    to[0] = to[1] = FourUnits<Raw>{};
    if (unit == kNoUnit) return;
    if (chunk.scratch.part.aligned != 0 && unit >= 0) {
      CO_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (r < inside) to[r] = *reinterpret_cast<const FourUnits<Raw>*>(row[r] + unit);
      }
      return;
    }
    CO_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int32_t single = chunk.scratch.unit[position + i];
      if (single == kNoUnit) continue;
      CO_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (single == kBiasUnit) {
          to[r].set(i, from_float<Raw>(kType, chunk.scratch.bias_copies()[place_of_lane<kWarps>() + 8 * r]));
        } else if (r < inside) {
          to[r].set(i, row[r][single * layer.g_unit_stride]);
        }
      }
    }
  }
  // The results of `kCount` positions.
  template <int kCount>
  CO_DEVICE void store(int r, int position, const float (&value)[kCount]) const {
    const int32_t unit = chunk.scratch.run[position >> 2];
    if (kCount == 4 && chunk.scratch.part.aligned != 0 && unit >= 0) {
      FourUnits<Raw> four{};
      CO_UNROLL
      for (int i = 0; i < 4; i += 2) four.set(kType, i, value[i], value[i + 1]);
      store_words(row[r] + unit, four.word);
    } else if (unit != kNoUnit) {
      CO_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const int32_t single = chunk.scratch.unit[position + i];
        if (single >= 0) row[r][single * layer.g_unit_stride] = from_float<Raw>(kType, value[i]);
        if (single == kBiasUnit) chunk.scratch.bias_copies()[place_of_lane<kWarps>() + 8 * r] = value[i];
      }
    }
  }
};

constexpr int kPrefetchRows = 256;  // 128 KiB of float32 a CTA, 34 MB in all: what L2 holds beside the rest

// Asks L2 for the first rows of these outputs, a sector at a time, a row a warp.
template <int kWarps>
CO_DEVICE void prefetch_g(const PreconditionLayer& layer, const Chunk& chunk, const OutputRange& outputs) {
  constexpr uintptr_t kSector = 32;
  const int warp = fresh_thread() / 32, lane = fresh_thread() % 32;
  const uint32_t taps = static_cast<uint32_t>(layer.g_tap_size[0] * layer.g_tap_size[1] * layer.g_tap_size[2]);
  const int rows = static_cast<int>(min(int64_t{kPrefetchRows}, (outputs.end - outputs.begin) * taps));
  const int64_t bytes = element_size(layer.g_dtype);
  CO_NO_UNROLL
  for (int r = warp; r < rows; r += kWarps) {
    const uint32_t output = static_cast<uint32_t>(r) / taps;
    const int64_t offset =
        (outputs.begin + output) * layer.g_output_stride +
        strided_offset(static_cast<uint32_t>(r) - output * taps, layer.g_tap_size, layer.g_tap_stride);
    const uintptr_t row = reinterpret_cast<uintptr_t>(layer.g) + static_cast<uintptr_t>(offset * bytes);
    const auto sector = [&](int32_t unit) {
      return (row + static_cast<uintptr_t>(unit * layer.g_unit_stride * bytes)) / kSector;
    };
    CO_NO_UNROLL
    for (int p = lane; p < chunk.size(); p += 32) {
      const int32_t unit = chunk.scratch.unit[p], before = p > 0 ? chunk.scratch.unit[p - 1] : kNoUnit;
      if (unit >= 0 && (before < 0 || sector(unit) != sector(before))) {
        prefetch_l2(static_cast<const char*>(layer.g) + offset * bytes + unit * layer.g_unit_stride * bytes);
      }
    }
  }
}

// Where a matrix instruction of 16 bits wants unit `p` of a tile: lane t = lane % 4 brings the units 4 t to 4 t + 3 of
// every 16, and the instruction takes the first two of each lane before the last two.  Pairs stay pairs.
CO_DEVICE int plane_place(int p) { return (p & ~15) | (p & 2) << 2 | (p & 12) >> 1 | (p & 1); }

// Element (row, column) of a plane of a tile: rows of 64 bytes, whose four vectors are turned so that eight rows of a
// column of vectors lie in 32 banks.
CO_DEVICE int plane_offset(int row, int column) { return row * kTile + ((column / 8 ^ row / 2 % 4) * 8 | column % 8); }

// All threads of a CTA of 256; begins and ends with a barrier.  The lower tiles of A^-1, float32, become three
// bfloat16 planes each, in place: value = high + middle + low to 2^-26.  Planes are larger than tiles, so the second
// half of the tiles goes first, to where no tile of the first half lies.
CO_DEVICE void make_planes(const Chunk& chunk) {
  constexpr int kMost = (kMaxPlaneTiles + 1) / 2;
  const int count = lower_tiles(chunk.side()), row = fresh_thread() / 16, column = fresh_thread() % 16 * 2;
  uint16_t* const planes = reinterpret_cast<uint16_t*>(chunk.tiles);
  CO_NO_UNROLL
  for (int half = 1; half >= 0; --half) {
    const int first = half == 1 ? count / 2 : 0, tiles = half == 1 ? count - count / 2 : count / 2;
    float value[kMost][2][2];
    CO_UNROLL
    for (int i = 0; i < kMost; ++i) {
      if (i >= tiles) continue;
      CO_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float* from = chunk.tiles + (first + i) * kTileFloats + (r * 16 + row) * kTilePitch + column;
        value[i][r][0] = from[0];
        value[i][r][1] = from[1];
      }
    }
    __syncthreads();  // the tiles have been read, also by those who copied them
    CO_UNROLL
    for (int i = 0; i < kMost; ++i) {
      if (i >= tiles) continue;
      CO_UNROLL
      for (int r = 0; r < 2; ++r) {
        uint16_t* to = planes + (first + i) * kPlaneTile + plane_offset(r * 16 + plane_place(row), plane_place(column));
        float rest[2] = {value[i][r][0], value[i][r][1]};
        CO_UNROLL
        for (int p = 0; p < kPlanes; ++p, to += kTile * kTile) {
          const uint32_t pair = pack_bfloat16(rest[0], rest[1]);
          *reinterpret_cast<uint32_t*>(to) = pair;
          rest[0] -= __uint_as_float(pair << 16);
          rest[1] -= __uint_as_float(pair & 0xffff0000u);
        }
      }
    }
  }
  publish_to_warpgroups();
  __syncthreads();
}

// left[p] <- plane p of the units of both rows, as the left operand of a product of 16 units.
template <DType kType, int kLeft>
CO_DEVICE void split_rows(const FourUnits<RawOf<kType>> (&raw)[2], const Chunk& chunk, uint32_t (&left)[kLeft][4]) {
  CO_UNROLL
  for (int r = 0; r < 2; ++r) {
    if constexpr (kLeft == 1) {
      // A zero that the compiler does not know: it would put the words in order anew before every product.
      left[0][r] = raw[r].word[0] ^ static_cast<uint32_t>(chunk.scratch.failed_minor);
      left[0][r + 2] = raw[r].word[1] ^ static_cast<uint32_t>(chunk.scratch.failed_minor);
    } else {
      float rest[4];
      CO_UNROLL
      for (int i = 0; i < 4; ++i) rest[i] = raw[r].get(kType, i);
      CO_UNROLL
      for (int p = 0; p < kLeft; ++p) {
        CO_UNROLL
        for (int pair = 0; pair < 2; ++pair) {
          const uint32_t bits = left[p][r + 2 * pair] = pack_bfloat16(rest[2 * pair], rest[2 * pair + 1]);
          rest[2 * pair] -= __uint_as_float(bits << 16);
          rest[2 * pair + 1] -= __uint_as_float(bits & 0xffff0000u);
        }
      }
    }
  }
}

// Calls f(tile, half, planes) for every 16 units of a warp's 16 rows of G, which are loaded kAhead such steps before.
template <int kLeft, int kAhead, int kWarps, DType kType, typename F>
CO_DEVICE void walk_rows(const LaneRows<kWarps, kType>& rows, const Chunk& chunk, int side, F&& f) {
  const int t = fresh_thread() % 4;
  FourUnits<RawOf<kType>> raw[kAhead > 0 ? kAhead : 1][2];
  CO_UNROLL
  for (int i = 0; i < kAhead; ++i) rows.load(16 * i + 4 * t, raw[i]);
  CO_NO_UNROLL
  for (int k = 0; k < side; ++k) {
    CO_UNROLL
    for (int s = 0; s < 2; ++s) {
      constexpr int kPlaces = kAhead > 0 ? kAhead : 1;
      const int next = k * kTile + (s + kAhead) * 16;
      if (kAhead == 0) rows.load(next + 4 * t, raw[0]);
      uint32_t left[kLeft][4];
      split_rows<kType>(raw[s % kPlaces], chunk, left);
      if (kAhead > 0 && next < side * kTile) rows.load(next + 4 * t, raw[s % kPlaces]);
      f(k, s, left);
    }
  }
}

// sum[first], sum[first + 1] += 16 rows x 16 units times 16 columns of A^-1, whose planes begin at `tile`.  is_below:
// the tile lies on or below the diagonal, and its rows are the columns of the product; else it is read transposed.
template <int kLevels, int kLeft>
CO_DEVICE void multiply_planes_16(float (&sum)[2][4], const uint32_t (&left)[kLeft][4], const uint16_t* tile,
                                  bool is_below) {
  constexpr bool kApart = kLevels == 3;  // float32-accurate; what has fewer planes is not by far
  float term[2][4] = {};
  CO_UNROLL
  for (int q = kLevels - 1; q >= 0; --q) {  // the plane of A^-1; small products first
    uint32_t right[4];
    if (is_below) {
      load_matrices(right, tile + q * kTile * kTile);
    } else {
      load_matrices_transposed(right, tile + q * kTile * kTile);
    }
    CO_UNROLL
    for (int p = kLeft - 1; p >= 0; --p) {
      if (p + q >= kLevels) continue;
      CO_UNROLL
      for (int n = 0; n < 2; ++n) {
        mma_m16n8k16<true>(kApart ? term[n] : sum[n], left[p], right[2 * n], right[2 * n + 1]);
      }
    }
  }
  CO_UNROLL
  for (int n = 0; kApart && n < 2; ++n) add(sum[n], term[n]);
}

// sum <- 16 rows of G times A^-1, by its planes.  kLeft planes of G; products of planes whose numbers add up to less
// than kLevels.  sum[m][n][i] belongs to row i / 2 of the lane's two and to position 16 m + 4 t + 2 n + i % 2.
template <int kLeft, int kLevels, int kWarps, DType kType>
CO_DEVICE void multiply_planes(float (&sum)[8][2][4], const LaneRows<kWarps, kType>& rows, const Chunk& chunk) {
  constexpr int kAhead = kLevels == 3 ? 0 : kType == DType::kFloat32 ? 1 : 2;  // three planes leave no registers
  walk_rows<kLeft, kAhead>(rows, chunk, chunk.side(), [&](int k, int s, const uint32_t (&left)[kLeft][4]) {
    const int lane = fresh_thread() % 32, side = chunk.side();
    const uint16_t* const planes = reinterpret_cast<const uint16_t*>(chunk.tiles);
    // Matrices 0 to 3 of ldmatrix: columns 0 and units 0, columns 0 and units 8, columns 8 and units 0, and both 8.
    const uint16_t* const below = planes + plane_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8);
    const uint16_t* const above = planes + plane_offset(lane / 8 % 2 * 8 + lane % 8, lane / 16 * 8);
    // The second 16 units of a tile, or columns: in a row the vectors that lie two further, or back.
    const int below_16 = (lane / 2 % 4 ^ lane / 8 % 2) < 2 ? 16 : -16,
              above_16 = (lane / 2 % 4 ^ lane / 16) < 2 ? 16 : -16;
    CO_UNROLL
    for (int n = 0; n < kWarpColumns / kTile; ++n) {
      if (n >= side) continue;
      const int tile = (n >= k ? lower_tiles(n) + k : lower_tiles(k) + n) * kPlaneTile;
      CO_UNROLL
      for (int b = 0; b < 2; ++b) {
        multiply_planes_16<kLevels>(sum[2 * n + b], left,
                                    n >= k ? below + (s == 0 ? 0 : below_16) + tile + b * 16 * kTile
                                           : above + (b == 0 ? 0 : above_16) + tile + s * 16 * kTile,
                                    n >= k);
      }
    }
  });
}

// d = or += 64 rows x 16 units times 32 columns of A^-1, whose planes begin at `tile`.  Begin and end stand with the
// products between two branches, or the compiler waits after every single one.
template <bool kTransposed, int kLevels, int kLeft>
CO_DEVICE void multiply_planes_32(float (&d)[16], const uint32_t (&left)[kLeft][4], const uint16_t* tile, bool adds) {
  begin_warpgroup_products();
  CO_UNROLL
  for (int q = kLevels - 1; q >= 0; --q) {  // the plane of A^-1; small products first
    CO_UNROLL
    for (int p = kLeft - 1; p >= 0; --p) {
      if (p + q >= kLevels) continue;
      wgmma_m64n32k16<kTransposed>(d, left[p], tile + q * kTile * kTile, adds || q + 1 < kLevels);
    }
  }
  end_warpgroup_products();
}

// The same as multiply_planes by the four warps of a warpgroup, which take A^-1 from shared memory themselves.
template <int kLeft, int kLevels, int kWarps, DType kType>
CO_DEVICE void multiply_planes_together(float (&sum)[8][2][4], const LaneRows<kWarps, kType>& rows,
                                        const Chunk& chunk) {
  constexpr bool kApart = kLevels == 3;  // as in multiply_planes_16
  constexpr int kAhead = kType == DType::kFloat32 ? 1 : 2;
  // The compiler must know that no warp goes a way of its own here, or it puts the products one after the other.
  const int side = __shfl_sync(0xffffffffu, chunk.side(), 0);
  const uint16_t* const planes = reinterpret_cast<const uint16_t*>(chunk.tiles);
  walk_rows<kLeft, kAhead>(rows, chunk, side, [&](int k, int s, const uint32_t (&left)[kLeft][4]) {
    CO_UNROLL
    for (int n = 0; n < kWarpColumns / kTile; ++n) {
      if (n >= side) continue;
      float term[16];
      float (&total)[16] = reinterpret_cast<float (&)[16]>(sum[2 * n]);
      float (&target)[16] = kApart ? term : total;
      if (n >= k) {
        multiply_planes_32<false, kLevels>(target, left, planes + (lower_tiles(n) + k) * kPlaneTile + s * 16, !kApart);
      } else {
        multiply_planes_32<true, kLevels>(target, left, planes + (lower_tiles(k) + n) * kPlaneTile + s * 16 * kTile,
                                          !kApart);
      }
      CO_UNROLL
      for (int i = 0; kApart && i < 16; ++i) add_now(total[i], term[i]);
    }
  });
}

// The same for chunks above 128 units, by 128 columns of the float32 tiles.  kProducts: 3 for float32; 2 where G has 16
// bits, which TF32 holds; 1 rounds both.  sum[m][n][i]: position 128 half + 16 m + 8 n + 2 t + i % 2.
template <int kProducts, int kWarps, DType kType>
CO_DEVICE void multiply_tiles(float (&sum)[8][2][4], const LaneRows<kWarps, kType>& rows, const Chunk& chunk,
                              int half) {
  const int lane = fresh_thread() % 32, g = lane / 4, t = lane % 4;
  const auto split = [](float value, float& high, float& low) {
    const SplitFloat parts(value);
    high = kProducts == 1 ? to_tf32(value) : parts.high;
    low = parts.low;
  };
  CO_NO_UNROLL
  for (int k = 0; k < 2 * chunk.side(); ++k) {  // 16 units
    FourUnits<RawOf<kType>> now[2];             // not ahead: its registers are taken, and 16 warps wait in turn
    rows.load(k * 16 + 4 * t, now);
    CO_UNROLL
    for (int s = 0; s < 2; ++s) {  // two of every lane's four
      float left[4], left_low[4];
      CO_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float value = now[i % 2].get(kType, s * 2 + i / 2);
        split(value, left[i], left_low[i]);
        if (kProducts == 2) left[i] = value;
      }
      CO_UNROLL
      for (int n = 0; n < kWarpColumns / kTile; ++n) {
        const int column = half * (kWarpColumns / kTile) + n;
        if (column >= chunk.side()) continue;
        const int unit = k % 2 * 16 + 4 * t + s * 2;
        const bool below = column >= k / 2;  // on or below the diagonal: rows of the tile are columns of the product
        const float* tile = lower_tile(chunk.tiles, below ? column : k / 2, below ? k / 2 : column);
        const int by_unit = below ? 1 : kTilePitch, by_column = below ? kTilePitch : 1;
        tile += unit * by_unit + g * by_column;
        CO_UNROLL
        for (int b = 0; b < 4; ++b) {
          float right[2], right_low[2];
          split(tile[b * 8 * by_column], right[0], right_low[0]);
          split(tile[b * 8 * by_column + by_unit], right[1], right_low[1]);
          float term[4] = {};
          if (kProducts > 2) mma_m16n8k8_tf32(term, left_low, right);
          if (kProducts > 1) mma_m16n8k8_tf32(term, left, right_low);
          mma_m16n8k8_tf32(term, left, right);
          add(sum[2 * n + b / 2][b % 2], term);
        }
      }
    }
  }
}

// A result is written where it is smaller than this: it is finite in the gradient's own type, and no sum of tensor
// cores, which round toward zero, that stopped at the largest float32.
CO_DEVICE float written_below(DType dtype) {
  if (dtype == DType::kFloat32) return 0x1.fffff8p127f;
  return dtype == DType::kBFloat16 ? 0x1.ffp127f : 65520.0f;  // half-way to what rounds to infinity
}

// The bias gradient of a chunk that has its unit: every row of G has a copy of its output's, corrected like the row,
// and their mean goes back.  One thread adds the copies of an output with several taps, in the order of the rows.
struct BiasCopies {
  CO_DEVICE static void load(const PreconditionLayer& layer, const Chunk& chunk, int first) {
    const GradientPart& part = chunk.scratch.part;
    if (const int place = fresh_thread(); place < kRoundRows && first + place < part.end) {
      chunk.scratch.bias_copies()[place] =
          load_element(layer.bias_dtype, layer.bias_grad, (first + place) / part.taps * layer.bias_stride);
    }
  }
  CO_DEVICE static void store(const PreconditionLayer& layer, const Chunk& chunk, int first) {
    const int thread = fresh_thread(), taps = chunk.scratch.part.taps;
    const int count = min(kRoundRows, chunk.scratch.part.end - first);
    if (taps == 1) {
      if (thread >= count) return;
      store_element(layer.bias_dtype, layer.bias_grad, (first + thread) * layer.bias_stride,
                    chunk.scratch.bias_copies()[thread]);
    } else if (thread == 0) {
      float sum = chunk.scratch.bias_sum;  // of an output that began in the last round
      int tap = first % taps;
      for (int place = 0; place < count; ++place) {
        sum = (tap == 0 ? 0.0f : sum) + chunk.scratch.bias_copies()[place];
        if (++tap < taps) continue;
        store_element(layer.bias_dtype, layer.bias_grad, (first + place) / taps * layer.bias_stride,
                      sum / static_cast<float>(taps));
        tap = 0;
      }
      chunk.scratch.bias_sum = sum;
    }
  }
};

// written <- whether the whole rows may be written, from what each lane found in its own elements of them.
CO_DEVICE void join_written(bool (&written)[2]) {
  const int quad = fresh_thread() % 32 / 4;
  CO_UNROLL
  for (int r = 0; r < 2; ++r) written[r] = (__ballot_sync(0xffffffffu, written[r]) >> 4 * quad & 15u) == 15u;
}

template <int kLeft, int kLevels, int kWarps, DType kType>
CO_DEVICE void multiply_by_planes(float (&sum)[8][2][4], const LaneRows<kWarps, kType>& rows, const Chunk& chunk) {
  if (by_warpgroups(chunk.task.warpgroups)) {
    multiply_planes_together<kLeft, kLevels>(sum, rows, chunk);
  } else {
    multiply_planes<kLeft, kLevels>(sum, rows, chunk);
  }
}

// The sums of a warp with 16 rows.
template <int kWarps, DType kType>
CO_DEVICE void multiply_rows(float (&sum)[8][2][4], const LaneRows<kWarps, kType>& rows, const Chunk& chunk, int half) {
  if constexpr (kWarps > 8) {
    if (chunk.task.tf32) {
      multiply_tiles<1>(sum, rows, chunk, half);
    } else {
      multiply_tiles<kType == DType::kFloat32 ? 3 : 2>(sum, rows, chunk, half);
    }
  } else if constexpr (kType == DType::kFloat16) {
    multiply_by_planes<2, 2>(sum, rows, chunk);
  } else if constexpr (kType == DType::kBFloat16) {
    multiply_by_planes<1, 2>(sum, rows, chunk);
  } else if (chunk.task.tf32) {
    multiply_by_planes<2, 2>(sum, rows, chunk);
  } else {
    multiply_by_planes<3, 3>(sum, rows, chunk);
  }
}

// Whether this warp, or its warpgroup, has rows in the round that begins at row `first`.
template <int kWarps>
CO_DEVICE bool is_busy(const Chunk& chunk, int first) {
  const int together = kWarps == 8 && by_warpgroups(chunk.task.warpgroups) ? 4 : kWarps / 8;  // warps
  return first + fresh_thread() / 32 / together * (kWarps == 8 ? together : 1) * kWarpRows < chunk.scratch.part.end;
}

// All threads, between barriers; after begin_member, and up to 128 units after make_planes.
template <int kWarps, DType kType>
CO_DEVICE void apply(const PreconditionLayer& layer, const Chunk& chunk) {
  constexpr bool kByPlanes = kWarps == 8;
  constexpr int kHalves = kWarps / 8;  // warps that share their rows
  CO_NO_UNROLL
  for (int first = chunk.scratch.part.first; first < chunk.scratch.part.end; first += kRoundRows) {
    if (kHalves > 1 || chunk.scratch.has_bias != 0) {
      __syncthreads();  // the flags and copies of the last rows have been read
      if (const int thread = fresh_thread(); thread < kRoundRows) chunk.scratch.not_finite[thread] = 0;
      if (chunk.scratch.has_bias != 0) BiasCopies::load(layer, chunk, first);
      __syncthreads();
    }
    const LaneRows<kWarps, kType> rows(layer, chunk, first);
    float sum[8][2][4] = {};
    if (is_busy<kWarps>(chunk, first)) multiply_rows(sum, rows, chunk, fresh_thread() / 32 % kHalves);
    const float limit = written_below(kType);
    bool written[2] = {true, true};
    CO_UNROLL
    for (int m = 0; m < 8; ++m) {
      CO_UNROLL
      for (int i = 0; i < 8; ++i) written[i % 4 / 2] = written[i % 4 / 2] && fabs(sum[m][i / 4][i % 4]) < limit;
    }
    join_written(written);
    if (kHalves > 1) {
      CO_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (is_busy<kWarps>(chunk, first) && !written[r])
          atomicOr(&chunk.scratch.not_finite[place_of_lane<kWarps>() + 8 * r], 1);
      }
      __syncthreads();  // all rows have been read, and the flags are complete
      CO_UNROLL
      for (int r = 0; r < 2; ++r) written[r] = chunk.scratch.not_finite[place_of_lane<kWarps>() + 8 * r] == 0;
    }
    CO_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (r >= rows.inside || !written[r]) continue;
      const int t = fresh_thread() % 4;
      CO_UNROLL
      for (int m = 0; m < 8; ++m) {
        if constexpr (kByPlanes) {
          if (m * 16 >= chunk.padded()) continue;
          const float value[4] = {sum[m][0][2 * r], sum[m][0][2 * r + 1], sum[m][1][2 * r], sum[m][1][2 * r + 1]};
          rows.store(r, m * 16 + 4 * t, value);
        } else {
          CO_UNROLL
          for (int n = 0; n < 2; ++n) {
            const int position = fresh_thread() / 32 % kHalves * kWarpColumns + m * 16 + n * 8 + 2 * t;
            if (position >= chunk.padded()) continue;
            const float value[2] = {sum[m][n][2 * r], sum[m][n][2 * r + 1]};
            rows.store(r, position, value);
          }
        }
      }
    }
    if (chunk.scratch.has_bias != 0) {
      __syncthreads();  // the copies are complete
      BiasCopies::store(layer, chunk, first);
    }
  }
}

}  // namespace consistency_ops
