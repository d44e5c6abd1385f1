// Addresses in strided problems.
#pragma once

#include <cstdint>
#include <limits>

#include "consistency_ops/types.h"

namespace consistency_ops::cpu {

// Offset of the index-th row, whose digits in base `size` (the last one fastest) are multiplied by `stride`.  Most
// problems have one row dimension, and divisions cost more than moving a short row.
inline int64_t offset_of(const int64_t* size, const int64_t* stride, int dims, int64_t index) {
  int64_t offset = 0;
  for (int i = dims - 1; i > 0; --i) {
    if (index < size[i]) return offset + index * stride[i];
    const int64_t outer = index / size[i];
    offset += (index - outer * size[i]) * stride[i];
    index = outer;
  }
  return offset + index * stride[0];
}

// The largest magnitude that does not become infinite in `dtype`.
template <typename T>
T largest_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return static_cast<T>(3.3961774292304457e38);  // just below the midpoint of its largest value and 2^128
    case DType::kFloat16:
      return static_cast<T>(65519.99609375);
    case DType::kFloat32:
      return static_cast<T>(std::numeric_limits<float>::max());
    default:
      return std::numeric_limits<T>::max();
  }
}

}  // namespace consistency_ops::cpu
