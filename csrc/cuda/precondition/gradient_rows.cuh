// The rows of G that a CTA corrects: where they lie, and how lanes load and store four neighbouring units of them.
//
// Where the units of a chunk are no neighbours in memory (taps of a convolution, the exact division, the ends of ragged
// chunks) the four are loaded and stored one by one.  A row is an output and a tap.
#pragma once

#include <type_traits>

#include "cuda/precondition/scheduler.cuh"

namespace consistency_ops {

constexpr int kWarpRows = 16;  // of G

// Storage of an element of G.
template <DType kType>
using RawOf = std::conditional_t<kType == DType::kFloat32, uint32_t, uint16_t>;

// Run by one thread, between barriers: what all threads must know of the G that they correct next.  It stays in shared
// memory, because registers that live through a product would be spilled.
template <bool kWhitens>
CO_DEVICE void begin_member(const PreconditionLayer* members, const Chunk& chunk, int member, const void* bias_before) {
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
  if (kWhitens && chunk.task.mode == Mode::kUnwhitens) {
    part.to_before = static_cast<const char*>(layer.x) - static_cast<const char*>(layer.g);
    part.bias_before = bias_before;
    bits |= reinterpret_cast<uintptr_t>(layer.x) / static_cast<uintptr_t>(element_size(layer.g_dtype));
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

// The matrix M that rows of G are multiplied by, of which the lower tiles lie in shared memory.
enum class Triangle : int {
  kSymmetric = 0,  // the whole matrix
  kLower = 1,      // M is lower triangular: D L^-1
  kUpper = 2,      // M is the transpose of what lies there: G L^-T
};
template <bool kWhitens>
CO_DEVICE Triangle triangle_of(Mode mode) {
  if (!kWhitens) return Triangle::kSymmetric;
  return mode == Mode::kWhitens || mode == Mode::kWhitensBy ? Triangle::kUpper : Triangle::kLower;
}
// Whether block (k, n) of M is zero, of units k and columns n.
CO_DEVICE bool is_zero(Triangle triangle, int k, int n) {
  return triangle == Triangle::kLower ? n > k : triangle == Triangle::kUpper && n < k;
}
// Whether tile (k, n) of M is read from tile (n, k), whose rows are then the columns of the product.
CO_DEVICE bool reads_below(Triangle triangle, int k, int n) {
  return triangle == Triangle::kSymmetric ? n >= k : triangle == Triangle::kUpper;
}

CO_DEVICE void add_square(float& sum, float value) {
  const float scaled = value * kSquareScale;
  sum = fma(scaled, scaled, sum);
}

// The two rows, 8 apart, of which a lane holds elements.
//
// Where displacements are mapped back (Mode::kUnwhitens) what is loaded is now - before, rounded to the type.
template <int kWarps, DType kType, bool kWhitens>
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
        if (r >= inside) continue;
        to[r] = *reinterpret_cast<const FourUnits<Raw>*>(row[r] + unit);
        if (!unwhitens()) continue;
        const FourUnits<Raw> now = to[r], old = *reinterpret_cast<const FourUnits<Raw>*>(before(row[r] + unit));
        to[r] = FourUnits<Raw>{};
        CO_UNROLL
        for (int i = 0; i < 4; i += 2) {
          to[r].set(kType, i, now.get(kType, i) - old.get(kType, i), now.get(kType, i + 1) - old.get(kType, i + 1));
        }
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
          const Raw* const now = row[r] + single * layer.g_unit_stride;
          to[r].set(i, unwhitens() ? from_float<Raw>(kType, value_of(*now) - value_of(*before(now))) : *now);
        }
      }
    }
  }
  CO_DEVICE bool unwhitens() const { return kWhitens && chunk.task.mode == Mode::kUnwhitens; }
  CO_DEVICE static float value_of(Raw element) { return to_float<Raw>(kType, element); }
  CO_DEVICE const Raw* before(const Raw* now) const {
    return reinterpret_cast<const Raw*>(reinterpret_cast<const char*>(now) + chunk.scratch.part.to_before);
  }
  // What becomes of an element whose displacement was mapped to `value`; if it was not, the displacement stays.
  CO_DEVICE float moved(float now, float old, float value, bool written, float (&squares)[2]) const {
    const float from = value_of(from_float<Raw>(kType, now - old));
    const float to = written ? value_of(from_float<Raw>(kType, value)) : from;
    add_square(squares[0], from);
    add_square(squares[1], to);
    return chunk.task.adds ? old + to : to;
  }
  // The mapped displacements of `kCount` positions.
  template <int kCount>
  CO_DEVICE void move(int r, int position, const float (&value)[kCount], bool written, float (&squares)[2]) const {
    const int32_t unit = chunk.scratch.run[position >> 2];
    if (kCount == 4 && chunk.scratch.part.aligned != 0 && unit >= 0) {
      const FourUnits<Raw> now = *reinterpret_cast<const FourUnits<Raw>*>(row[r] + unit),
                           old = *reinterpret_cast<const FourUnits<Raw>*>(before(row[r] + unit));
      FourUnits<Raw> four{};
      CO_UNROLL
      for (int i = 0; i < 4; i += 2) {
        const float first = moved(now.get(kType, i), old.get(kType, i), value[i], written, squares);
        const float second = moved(now.get(kType, i + 1), old.get(kType, i + 1), value[i + 1], written, squares);
        four.set(kType, i, first, second);
      }
      store_words(row[r] + unit, four.word);
    } else if (unit != kNoUnit) {
      CO_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const int32_t single = chunk.scratch.unit[position + i];
        if (single >= 0) {
          Raw* const now = row[r] + single * layer.g_unit_stride;
          const float result = moved(value_of(*now), value_of(*before(now)), value[i], written, squares);
          *now = from_float<Raw>(kType, result);
        }
        if (single == kBiasUnit && written) {
          chunk.scratch.bias_copies()[place_of_lane<kWarps>() + 8 * r] = value[i];
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

}  // namespace consistency_ops
