// Addresses in strided problems.
#pragma once

#include <cstdint>

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

}  // namespace consistency_ops::cpu
