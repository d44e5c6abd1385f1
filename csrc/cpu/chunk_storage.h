// The matrix of one chunk in panels (chunk_kernels.h), from and to the dense matrices that a caller keeps.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/plan.h"

namespace consistency_ops::cpu {

constexpr int64_t kBlock = kPanel * kPanel;

inline int64_t diagonal_index(const ChunkPlan& chunk, int64_t k) {
  return k / kPanel * chunk.panels * kBlock + k * kPanel + k % kPanel;
}

// `dense`: width x width, row-major, with zeros beyond the chunk.  Only the upper blocks of `matrix` are read.
template <typename T>
void to_dense(const ChunkPlan& chunk, const T* matrix, T scale, int64_t width, T* dense) {
  const int64_t height = int64_t{chunk.panels} * kPanel;
  std::fill(dense, dense + width * width, T(0));
  for (int64_t j = 0; j < chunk.size; ++j) {
    const T* column = matrix + j / kPanel * height * kPanel + j % kPanel;
    for (int64_t i = 0; i <= j; ++i) {
      dense[i * width + j] = dense[j * width + i] = column[i * kPanel] * scale;
    }
  }
}

// Of a lower triangular matrix.
template <typename T>
void to_dense_lower(const ChunkPlan& chunk, const T* matrix, int64_t width, T* dense) {
  const int64_t height = int64_t{chunk.panels} * kPanel;
  std::fill(dense, dense + width * width, T(0));
  for (int64_t j = 0; j < chunk.size; ++j) {
    const T* column = matrix + j / kPanel * height * kPanel + j % kPanel;
    for (int64_t i = j; i < chunk.size; ++i) dense[i * width + j] = column[i * kPanel];
  }
}

// `pad`: the diagonal beyond the chunk.
template <typename T>
void from_dense(const ChunkPlan& chunk, const T* dense, int64_t width, T pad, T* matrix) {
  const int64_t height = int64_t{chunk.panels} * kPanel;
  for (int64_t j = 0; j < height; j += kPanel) {
    T* panel = matrix + j * height;
    const int64_t lanes = std::min<int64_t>(kPanel, chunk.size - j);
    for (int64_t i = 0; i < height; ++i) {
      T row[kPanel] = {};
      if (i < chunk.size) {
        std::copy_n(dense + i * width + j, lanes, row);
      } else if (i - j < kPanel) {
        row[i - j] = pad;
      }
      std::copy_n(row, kPanel, panel + i * kPanel);
    }
  }
}

template <typename T>
const GatherKernels<T>& own_type() {
  return isa_kernels<T>().gather[static_cast<int>(sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32)];
}

// Of a lower triangular matrix.
template <typename T>
void transpose(const ChunkPlan& chunk, T* matrix) {
  const int64_t height = int64_t{chunk.panels} * kPanel;
  for (int64_t j = 0; j < chunk.panels; ++j) {
    for (int64_t i = 0; i <= j; ++i) {
      T* upper = matrix + (j * height + i * kPanel) * kPanel;
      T* lower = matrix + (i * height + j * kPanel) * kPanel;
      T block[kBlock];
      std::copy_n(lower, kBlock, block);
      std::fill(lower, lower + kBlock, T(0));
      own_type<T>().transpose_block(block, kPanel, upper);
    }
  }
}

// As from_dense, the transpose of a lower triangular matrix.
template <typename T>
void from_dense_transposed(const ChunkPlan& chunk, const T* dense, int64_t width, T* matrix) {
  const int64_t height = int64_t{chunk.panels} * kPanel;
  for (int64_t j = 0; j < chunk.panels; ++j) {
    T* panel = matrix + j * height * kPanel;
    const int64_t columns = std::min<int64_t>(kPanel, chunk.size - j * kPanel);
    for (int64_t i = 0; i <= j; ++i) {
      const T* from = dense + j * kPanel * width + i * kPanel;
      T* to = panel + i * kBlock;
      if (columns == kPanel) {
        own_type<T>().transpose_block(from, width, to);
        continue;
      }
      const int64_t rows = std::min<int64_t>(kPanel, chunk.size - i * kPanel);
      for (int64_t r = 0; r < kPanel; ++r) {
        for (int64_t k = 0; k < kPanel; ++k) {
          const bool inside = r < rows && k < columns;
          to[r * kPanel + k] = inside ? from[k * width + r] : T(r == k && i == j ? 1 : 0);
        }
      }
    }
    std::fill(panel + (j + 1) * kBlock, panel + chunk.panels * kBlock, T(0));
  }
}

}  // namespace consistency_ops::cpu
