// Chunks with fewer rows than units, as one-row forward passes and the last layers of a convnet at a small batch have.
//
// With s = 1 / (n tau) the inverse of s X^T X + damping I is (I - s X^T K^-1 X) / damping, K = s X X^T + damping I of
// the size of the rows: exactly the same correction, with 4 n operations an element of G in the place of 2 B, and
// without a factor of the size of the chunk.  The storage of the chunk's matrix then holds
//
//     X, later s K^-1 X / damping    a panel has the chunk's 16 units of 16 row_panels rows, the last of them zero
//     X^T                            a panel has 16 rows of the chunk's units
#pragma once

#include <algorithm>

#include "consistency_ops/precondition.h"
#include "cpu/plan.h"

namespace consistency_ops::cpu {

// Below this condition of the damped covariance both forms factor without a failure and lose the same digits.
template <typename T>
constexpr double kFewRowsCondition = sizeof(T) == 4 ? 1e6 : 1e14;

// Whether the 3 x 3 taps of a unit, and the units of an output, lie side by side: what DirectKernels moves fast.
inline bool has_dense_taps(const PreconditionLayer& layer) {
  int64_t taps = 1;
  for (int d = kMaxTapDims - 1; d >= 0; --d) {
    if (layer.g_tap_size[d] > 1 && layer.g_tap_stride[d] != taps) return false;
    taps *= layer.g_tap_size[d];
  }
  return taps == 9 && layer.g_unit_stride == taps && layer.g_dtype == DType::kFloat32;
}

// ChunkPlan::row_panels of a chunk: not 0 where the rows, padded to panels, are at most a quarter of its units.
inline int32_t few_row_panels(const PreconditionLayer& layer, const PreconditionOptions& options, const LayerPlan& plan,
                              int64_t chunk_panels) {
  const int64_t panels = (plan.sample.count + kPanel - 1) / kPanel;
  const bool fused = options.stages == kStageAll && layer.covariance == nullptr && layer.inverse == nullptr;
  // Elsewhere moving G takes longer than products.
  const bool pays = 4 * panels <= chunk_panels && (layer.g_unit_stride == 1 || has_dense_taps(layer));
  if (!fused || !pays || !(options.damping > 0) || plan.sample.count > plan.row_block) return 0;
  return static_cast<int32_t>(panels);
}

template <typename T>
T* few_rows_transposed(const ChunkPlan& chunk, T* storage) {
  return storage + int64_t{chunk.row_panels} * kPanel * chunk.panels * kPanel;
}

// X and X^T from the chunk's panels in a packed block, which are `pitch` elements apart.
template <typename T>
void store_few_rows(const ChunkPlan& chunk, const T* packed, int64_t pitch, int64_t rows, T* storage) {
  const int64_t padded = int64_t{chunk.row_panels} * kPanel, height = int64_t{chunk.panels} * kPanel;
  T* transposed = few_rows_transposed(chunk, storage);
  for (int64_t j = 0; j < chunk.panels; ++j) {
    T* panel = storage + j * padded * kPanel;
    std::copy_n(packed + j * pitch, rows * kPanel, panel);
    std::fill_n(panel + rows * kPanel, (padded - rows) * kPanel, T(0));
    for (int64_t k = 0; k < padded; ++k) {
      T* column = transposed + k / kPanel * height * kPanel + j * kPanel * kPanel + k % kPanel;
      for (int64_t i = 0; i < kPanel; ++i) column[i * kPanel] = panel[k * kPanel + i];
    }
  }
}

// The diagonal of X^T X at unit k of the chunk.
template <typename T>
T few_rows_moment(const ChunkPlan& chunk, const T* storage, int64_t k) {
  const int64_t padded = int64_t{chunk.row_panels} * kPanel;
  const T* column = storage + k / kPanel * padded * kPanel + k % kPanel;
  T moment = 0;
  for (int64_t row = 0; row < padded; ++row) moment += column[row * kPanel] * column[row * kPanel];
  return moment;
}

// Replaces X by s K^-1 X / damping, if K can be factored.  `factor`: scratch for K.
template <typename T>
bool factor_few_rows(const ChunkPlan& chunk, int64_t rows, T scale, T damping, const ChunkKernels<T>& kernels,
                     T* storage, T* factor, T* inverse_diagonal) {
  const int64_t padded = int64_t{chunk.row_panels} * kPanel, height = int64_t{chunk.panels} * kPanel;
  kernels.gram(few_rows_transposed(chunk, storage), chunk.size, height, rows, false, factor);
  for (int64_t j = 0; j < padded; ++j) {
    T* column = factor + j / kPanel * padded * kPanel + j % kPanel;
    for (int64_t i = 0; i < (j / kPanel + 1) * kPanel; ++i) column[i * kPanel] *= scale;
    T& pivot = column[j * kPanel];
    pivot = j < rows ? pivot + damping : T(1);
  }
  if (kernels.factor(factor, chunk.row_panels, inverse_diagonal) != 0) return false;
  for (int64_t j = 0; j < chunk.panels; ++j) {
    T* panel = storage + j * padded * kPanel;
    kernels.solve(factor, inverse_diagonal, chunk.row_panels, panel);
    for (int64_t e = 0; e < padded * kPanel; ++e) panel[e] *= scale / damping;
  }
  return true;
}

}  // namespace consistency_ops::cpu
