// The dense kernels on one chunk, behind one table of function pointers for every instruction set.
//
// Storage.  A chunk of n units is padded to p = ceil(n / 16) panels.  A panel is 16 columns; panel J of a matrix with r
// rows keeps element (k, 16 J + j) at [J * r * 16 + k * 16 + j], so that one row of a panel is a cache line of float,
// and both operands of every product are walked with stride one.  Everything below is one outer-product tile,
//
//     C[16 x 16] (+|-)= sum_k a_k b_k^T,     a_k, b_k: rows of two panels,
//
// plus a triangular substitution on 16 vectors: A = U^T U with U in the upper blocks needs no transposed copy of
// anything.
#pragma once

#include <cstdint>

namespace consistency_ops::cpu {

constexpr int kPanel = 16;
// Row pitch of the tile of G that `apply` multiplies.  A compile-time constant lets the broadcasts be addressed by
// displacement alone; 16 elements above the largest chunk keep the rows off the same cache set.
constexpr int kTilePitch = 256 + 16;
// Rows of a tile.  Few for chunks of few panels, because rows of G are often a multiple of 4096 bytes apart: the lines
// of one piece of each fall into one set of the L1 cache, which must keep them from the load to the store.  More for
// larger chunks, whose inverse is read from L2 once a tile.
constexpr int kTileRows = 4;
constexpr int kFewPanels = 4;
constexpr int kMaxTileRows = 16;
// Most units whose moments are summed in one pass.
constexpr int kMomentLanes = 64;

enum class MatrixKind : int8_t { kSymmetric, kGeneral, kLower, kUpper };

template <typename T>
struct ChunkKernels {
  // C (+)= P^T P on the upper blocks, of a chunk of `size` units.  p: panels of `pitch` rows, the first `rows` of which
  // count; the lanes beyond `size` are zero.
  void (*gram)(const T* p, int64_t rows, int64_t pitch, int64_t size, bool accumulate, T* c);
  // U^T U = A in place on the upper blocks; lanes under the diagonal of the diagonal blocks are scratch.
  // inverse_diagonal gets 1 / U_kk.  Returns 0, or the order of the first leading minor that is not positive (or not
  // finite).
  int (*factor)(T* a, int panels, T* inverse_diagonal);
  // w = U^-T, lower triangular, all blocks; the blocks above the diagonal are zero.
  void (*invert_factor)(const T* u, const T* inverse_diagonal, int panels, T* w);
  // inverse = (U^T U)^-1, all blocks; w: scratch of the same size.
  void (*invert)(const T* u, const T* inverse_diagonal, int panels, T* w, T* inverse);
  // out[rows x size] = g[rows x size] * matrix, padded with zeros; rows <= kMaxTileRows.  Rows of `out` are kTilePitch
  // apart, those of `g` likewise, or, `by_unit`, g[unit * kMaxTileRows + row].  A symmetric matrix may be read by its
  // rows, which is faster where the last panel has few units; of a triangular one only the blocks that are not zero.
  // Returns a mask of the rows with a result that is NaN or of larger magnitude than `limit`.
  uint32_t (*apply)(const T* g, bool by_unit, int rows, const T* matrix, MatrixKind kind, int64_t size, T limit,
                    T* out);
  // As `apply`, of (I - X^T W') / damping in place of a matrix, which few rows X make cheaper.  x_transposed: X^T, 16
  // rows of X a panel; w = W' / damping, panels of 16 row_panels rows; projected: scratch, as `out`.
  uint32_t (*apply_few)(const T* g, bool by_unit, int rows, const T* x_transposed, const T* w, int row_panels,
                        int64_t size, T inverse_damping, T limit, T* projected, T* out);
  // b <- (U^T U)^-1 b, b: one panel of 16 right-hand sides.
  void (*solve)(const T* u, const T* inverse_diagonal, int panels, T* b);
};

// `length` consecutive units that lie side by side in a panel.  The division is a list of runs, sorted by position; it
// is resolved once a layer, so that moving data needs neither index arithmetic nor randomness.
struct Run {
  int64_t packed;  // offset of its first unit in row 0 of the layer's packed block
  int32_t unit;
  int16_t column;  // in the chunk
  int16_t length;
};

// Moves between a strided matrix of one element type and the storage above; T is the compute type.
template <typename T>
struct GatherKernels {
  // packed[run.packed + 16 k + i] = x[row_offset[k] + (run.unit + i) * unit_stride] for k < rows; `row_units`: of the
  // layer.
  void (*pack)(const void* x, const int64_t* row_offset, int64_t rows, int64_t unit_stride, int64_t row_units,
               const Run* runs, int64_t count, T* packed);
  // tile[r * kTilePitch + run.column + i], or, `by_unit`, tile[(run.column + i) * kMaxTileRows + r], for some rows of
  // G; only by unit may the units lie apart.  Prefetches what lies `ahead` elements further.
  void (*load_tile)(const void* g, const int64_t* row_offset, int rows, int64_t unit_stride, const Run* runs,
                    int64_t count, int64_t ahead, bool by_unit, T* tile);
  // Back into G, without the rows whose bit in `skip` is set.
  void (*store_tile)(const T* tile, uint32_t skip, void* g, const int64_t* row_offset, int rows, int64_t unit_stride,
                     const Run* runs, int64_t count);
  // The five below take `count` elements, `stride` apart, of G and of another tensor of its type and strides.
  // g <- g - before; returns the sum of the squares of what g is then.
  double (*subtract)(void* g, int64_t stride, const void* before, int64_t count);
  double (*sum_of_squares)(const void* g, int64_t stride, int64_t count);
  // g <- before + scale * g.
  void (*add_scaled)(void* g, int64_t stride, const void* before, int64_t count, T scale);
  bool (*any_nonzero)(const void* g, int64_t stride, int64_t count);  // NaN is not zero
  bool (*all_finite)(const void* g, int64_t stride, int64_t count);
  // to[16 r + u] = from[u * stride + r] for r, u < 16.
  void (*transpose_block)(const void* from, int64_t stride, T* to);
  // squares[i] += sum_k x_ki^2, sums[i] += sum_k x_ki, x_ki = x[row_offset[k] + i], for i < lanes <= kMomentLanes.  The
  // sums over these rows are in T.
  void (*moments)(const void* x, const int64_t* row_offset, int64_t rows, int64_t lanes, double* squares, double* sums);
};

// Rows of G in one chunk, and what their products may use.
template <typename T>
struct DirectRows {
  void* g;
  const int64_t* row_offset;
  int64_t rows, unit_stride;
  const Run* runs;
  int64_t count;
  int64_t taps;  // so many rows after one another may lie side by side
  int64_t size;  // units of the chunk
  // What is prefetched while the rows are corrected: as many bytes as they have in this chunk.
  const char* next;
  T limit;
  T* bias;  // one a row, corrected with it; or null
  int64_t bias_column;
  T *tile, *product, *projected;  // scratch
};

// load_tile, apply and store_tile in one, for as many rows from the first on as they return: G is read where it lies,
// without a copy.
template <typename T>
struct DirectKernels {
  // For chunks of 2 to 8 panels, or any with 9 taps side by side.
  int64_t (*correct)(const DirectRows<T>& at, const T* matrix, MatrixKind kind);
  // As apply_few.  For units side by side, or 9 taps of every unit.
  int64_t (*correct_few)(const DirectRows<T>& at, const T* x_transposed, const T* w, int row_panels, T inverse_damping);
};

// Products of G in bfloat16 with the inverse as two terms of bfloat16, x = upper + lower to 16 bits: no more is lost
// than the rounding of the result to bfloat16.
struct TileKernels {
  // Before and after any of the others (and PairKernels' gram), once a task, on the thread that calls them.
  void (*begin)();
  void (*end)();
  // `tiles`: the inverse in tile order, room for 2 * panels * round_up(panels, 2) * 16 * 16 elements.  Returns a power
  // of two by which the products with it are multiplied.
  float (*split)(const float* inverse, int panels, uint16_t* tiles);
  // load_tile, apply and store_tile in one, for rows whose units lie side by side.
  void (*correct)(void* g, const int64_t* row_offset, int64_t rows, const Run* runs, int64_t count, int64_t ahead,
                  const uint16_t* tiles, int64_t size, float scale, float limit);
};

// X in bfloat16 where the machine multiplies pairs of it: the products are exact and summed in float.  A packed block
// holds two rows in every 32-bit word, the even row in the lower half: rows / 2 rows of words.
struct PairKernels {
  // As GatherKernels::pack; a last odd row is paired with zeros.
  void (*pack)(const void* x, const int64_t* row_offset, int64_t rows, int64_t unit_stride, int64_t row_units,
               const Run* runs, int64_t count, uint32_t* packed);
  // As ChunkKernels::gram, `pairs` and `pitch` in words.  May write zeros up to the next multiple of 16 pairs.
  void (*gram)(uint32_t* p, int64_t pairs, int64_t pitch, int panels, bool accumulate, float* c);
  const TileKernels* tiles;  // null: gram needs no begin and end
};

template <typename T>
struct IsaKernels {
  ChunkKernels<T> chunk;
  GatherKernels<T> gather[4];  // by DType
  DirectKernels<T> direct[4];  // by DType
};

// In rising order: a machine with one level has all levels below it.
enum class IsaLevel { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The instruction set in use: the best this machine has, unless use_isa chose another.
IsaLevel isa_level();
const char* isa_name();
bool use_isa(const char* name);  // false if this machine lacks it

template <typename T>
const IsaKernels<T>& isa_kernels();
const PairKernels* pair_kernels();  // null if the instruction set in use has none
const TileKernels* tile_kernels();  // likewise

}  // namespace consistency_ops::cpu
