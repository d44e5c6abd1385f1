// The dense kernels on one chunk, behind one table of function pointers for every instruction set.
//
// Storage.  A chunk of n units is padded to p = ceil(n / 16) panels.  A panel is 16 columns; panel J of a matrix with r rows
// keeps element (k, 16 J + j) at [J * r * 16 + k * 16 + j], so that one row of a panel is a cache line of float, and both
// operands of every product are walked with stride one.  Everything below is one outer-product tile,
//
//     C[16 x 16] (+|-)= sum_k a_k b_k^T,     a_k, b_k: rows of two panels,
//
// plus a triangular substitution on 16 vectors: A = U^T U with U in the upper blocks needs no transposed copy of anything.
#pragma once

#include <cstdint>

namespace consistency_ops::cpu {

constexpr int kPanel = 16;
// Row pitch of the 16-row tile of G that `apply` multiplies.  A compile-time constant lets the 16 broadcasts be addressed by
// displacement alone; 16 elements above the largest chunk keep the rows off the same cache set.
constexpr int kTilePitch = 256 + 16;

template <typename T>
struct ChunkKernels {
  // C (+)= P^T P on the upper blocks.  p: `panels` panels of `pitch` rows, the first `rows` of which count.
  void (*gram)(const T* p, int64_t rows, int64_t pitch, int panels, bool accumulate, T* c);
  // U^T U = A in place on the upper blocks; lanes under the diagonal of the diagonal blocks are scratch.  inverse_diagonal
  // gets 1 / U_kk.  Returns 0, or the order of the first leading minor that is not positive (or not finite).
  int (*factor)(T* a, int panels, T* inverse_diagonal);
  // inverse = (U^T U)^-1, all blocks; w: scratch of the same size.
  void (*invert)(const T* u, const T* inverse_diagonal, int panels, T* w, T* inverse);
  // out[16 x n] = g[16 x n] * inverse, rows kTilePitch apart.  Returns a mask of the rows whose result is not finite.
  uint32_t (*apply)(const T* g, const T* inverse, int panels, T* out);
  // b <- (U^T U)^-1 b, b: one panel of 16 right-hand sides.
  void (*solve)(const T* u, const T* inverse_diagonal, int panels, T* b);
};

// `length` consecutive units that lie side by side in a panel.  The division is a list of runs, sorted by position; it is
// resolved once a layer, so that moving data needs neither index arithmetic nor randomness.
struct Run {
  int32_t panel;  // counted from the layer's first chunk
  int32_t unit;
  int16_t lane, length;
};

// Moves between a strided matrix of one element type and the storage above; T is the compute type.
template <typename T>
struct GatherKernels {
  // packed(panel, k, lane) = x[row_offset[k] + unit * unit_stride] for k < rows; panels are `pitch` rows high.
  void (*pack)(const void* x, const int64_t* row_offset, int64_t rows, int64_t unit_stride, const Run* runs, int64_t count,
               int32_t first_panel, int64_t pitch, T* packed);
  // The same for at most 16 rows of G into a row-major tile, kTilePitch apart.
  void (*load_tile)(const void* g, const int64_t* row_offset, int rows, int64_t unit_stride, const Run* runs, int64_t count,
                    int32_t first_panel, T* tile);
  // Back into G, without the rows whose bit in `skip` is set.
  void (*store_tile)(const T* tile, uint32_t skip, void* g, const int64_t* row_offset, int rows, int64_t unit_stride,
                     const Run* runs, int64_t count, int32_t first_panel);
};

template <typename T>
struct IsaKernels {
  ChunkKernels<T> chunk;
  GatherKernels<T> gather[4];  // by DType
};

// The kernels of the instruction set in use: the best this machine has, unless use_isa chose another.
template <typename T>
const IsaKernels<T>& isa_kernels();
const char* isa_name();
bool use_isa(const char* name);  // false if this machine lacks it

}  // namespace consistency_ops::cpu
