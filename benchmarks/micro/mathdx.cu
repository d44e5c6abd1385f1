// Tier C of bench_cuda.py: the correction as it is written with NVIDIA's device libraries, cuBLASDx and cuSolverDx.
//
// Three kernels for the chunks of all layers: X^T X of at most 512 rows of a chunk, the inverse of a chunk, and the
// product of 256 rows of G with it.  Matrix products and the Cholesky solve are MathDx's (mathdx.py has libmathdx
// generate them, the linker puts them in); they work on shared memory and want sizes that are constants, so chunks are
// padded to 64 or 128 units, and larger ones do not fit: the covariance and the identity that posv solves for are 128
// KiB at 128.  16-bit inputs take tensor cores as they are, float32 inputs float32 FMA; the inverse is split in two
// bfloat16 numbers, and so is a float32 G, which is what the fused kernel's accuracy costs with these libraries.
//
// The tests run it on the CPU with stand-ins for MathDx (tests/simt); it has never run on a GPU.
#include "cuda/convert.cuh"

using namespace consistency_ops;

template <int kSize>
struct MathDx;

// All threads; operands in shared memory.  c <- alpha a b + beta c; posv: b <- a^-1 b.
#define CO_MATHDX(SIZE)                                                                                       \
  extern "C" CO_MATHDX_FUNCTION void dx_gram_4_##SIZE(float* alpha, void* a, void* b, float* beta, float* c); \
  extern "C" CO_MATHDX_FUNCTION void dx_gram_2_##SIZE(float* alpha, void* a, void* b, float* beta, float* c); \
  extern "C" CO_MATHDX_FUNCTION void dx_apply_##SIZE(float* alpha, void* a, void* b, float* beta, float* c);  \
  extern "C" CO_MATHDX_FUNCTION void dx_posv_##SIZE(float* a, float* b, int* info);                           \
  template <>                                                                                                 \
  struct MathDx<SIZE> {                                                                                       \
    static CO_DEVICE void gram(void* x, float* sum, size_t element) {                                         \
      float one = 1.0f;                                                                                       \
      element == 4 ? dx_gram_4_##SIZE(&one, x, x, &one, sum) : dx_gram_2_##SIZE(&one, x, x, &one, sum);       \
    }                                                                                                         \
    static CO_DEVICE void apply(void* g, void* inverse, float* sum) {                                         \
      float one = 1.0f;                                                                                       \
      dx_apply_##SIZE(&one, g, inverse, &one, sum);                                                           \
    }                                                                                                         \
    static CO_DEVICE void posv(float* a, float* b, int* info) { dx_posv_##SIZE(a, b, info); }                 \
  };
#if defined(__CUDACC__)
#define CO_MATHDX_FUNCTION __device__
#else
#define CO_MATHDX_FUNCTION
#endif

namespace {

constexpr int kThreads = 256;
constexpr int kDepth = 64;       // rows of X in a product
constexpr int kSplitRows = 512;  // of X in a task
constexpr int kTileRows = 64;    // of G in a product
constexpr int kTaskRows = 256;   // of G in a task

struct Chunk {
  const void* x;         // (rows, x_pitch)
  void* g;               // (outputs, units, taps), corrected in place
  const int32_t* units;  // at every position of the chunk
  float* partials;       // (splits, padded, padded)
  uint16_t* inverse;     // (2, padded, padded): high and low part, bfloat16
  int32_t* info;
  int64_t x_pitch, g_pitch;  // elements from a row, from an output to the next
  int32_t rows, g_rows, taps, size;
  bool x_vectors, g_vectors;  // every 16 bytes of a row of the chunk are 16 aligned bytes in memory
};

struct Task {
  int32_t chunk, first;  // row
};

struct Params {
  const Chunk* chunks;
  const Task* tasks;
  float damping;
};

template <typename Raw>
struct alignas(16) Vector {
  static constexpr int kWidth = 16 / sizeof(Raw);
  Raw v[kWidth];
};

CO_DEVICE float value_of(uint32_t bits) { return __uint_as_float(bits); }
CO_DEVICE float value_of(uint16_t bits) { return bfloat16_to_float(bits); }
CO_DEVICE void set_value(uint32_t& bits, float value) { bits = __float_as_uint(value); }
CO_DEVICE void set_value(uint16_t& bits, float value) { bits = float_to_bfloat16(value); }

template <int kSize, typename Raw>
CO_DEVICE void gram(const Params& params) {
  using Row = Vector<Raw>;
  constexpr int kColumns = kSize / Row::kWidth, kLoads = kDepth * kColumns / kThreads;
  CO_DYNAMIC_SHARED(float, sum);
  Row* const tile = reinterpret_cast<Row*>(sum + kSize * kSize);
  const int thread = static_cast<int>(threadIdx.x);
  const Task task = params.tasks[blockIdx.x];
  const Chunk chunk = params.chunks[task.chunk];
  const Raw* const x = static_cast<const Raw*>(chunk.x);
  const int rows = min(kSplitRows, chunk.rows - task.first);

  Row next[kLoads];
  const auto fetch = [&](int first) {
    CO_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const int row = first + (thread + i * kThreads) / kColumns;
      const int position = (thread + i * kThreads) % kColumns * Row::kWidth;
      const Raw* const from = x + (task.first + row) * chunk.x_pitch;
      next[i] = Row{};
      if (row >= rows || position >= chunk.size) continue;
      if (chunk.x_vectors) {
        next[i] = *reinterpret_cast<const Row*>(from + chunk.units[position]);
      } else {
        CO_UNROLL
        for (int k = 0; k < Row::kWidth; ++k) {
          if (position + k < chunk.size) next[i].v[k] = from[chunk.units[position + k]];
        }
      }
    }
  };

  for (int e = thread; e < kSize * kSize; e += kThreads) sum[e] = 0.0f;
  fetch(0);
  for (int first = 0; first < rows; first += kDepth) {
    __syncthreads();  // the last product has read the tile
    CO_UNROLL
    for (int i = 0; i < kLoads; ++i) tile[thread + i * kThreads] = next[i];
    __syncthreads();
    if (first + kDepth < rows) fetch(first + kDepth);
    MathDx<kSize>::gram(tile, sum, sizeof(Raw));
  }
  __syncthreads();
  float* const out = chunk.partials + task.first / kSplitRows * kSize * kSize;
  for (int e = thread; e < kSize * kSize; e += kThreads) out[e] = sum[e];
}

template <int kSize>
CO_DEVICE void invert(const Params& params) {
  CO_DYNAMIC_SHARED(float, a);
  CO_SHARED(int32_t, info, [1]);
  float* const b = a + kSize * kSize;
  const int thread = static_cast<int>(threadIdx.x);
  const Chunk chunk = params.chunks[blockIdx.x];
  const int splits = (chunk.rows + kSplitRows - 1) / kSplitRows;
  for (int e = thread; e < kSize * kSize; e += kThreads) {
    const int row = e / kSize, column = e % kSize;
    const float one = row == column ? 1.0f : 0.0f;
    float sum = 0.0f;
    for (int s = 0; s < splits; ++s) sum += chunk.partials[s * kSize * kSize + e];
    const bool inside = row < chunk.size && column < chunk.size;
    a[e] = inside ? sum / static_cast<float>(chunk.rows) + one * params.damping : one;
    b[e] = one;
  }
  if (thread == 0) info[0] = 0;
  __syncthreads();
  MathDx<kSize>::posv(a, b, info);
  __syncthreads();
  for (int e = thread; e < kSize * kSize; e += kThreads) {
    const uint16_t high = float_to_bfloat16(b[e]);
    chunk.inverse[e] = high;
    chunk.inverse[kSize * kSize + e] = float_to_bfloat16(b[e] - bfloat16_to_float(high));
  }
  if (thread == 0) *chunk.info = info[0];
}

template <int kSize, typename Raw>
CO_DEVICE void apply(const Params& params) {
  using Row = Vector<Raw>;
  constexpr int kColumns = kSize / Row::kWidth;
  CO_DYNAMIC_SHARED(float, sum);  // (kTileRows, kSize)
  uint16_t* const inverse = reinterpret_cast<uint16_t*>(sum + kTileRows * kSize);
  uint16_t* const high = inverse + 2 * kSize * kSize;
  uint16_t* const low = high + kTileRows * kSize;  // of float32 gradients
  const int thread = static_cast<int>(threadIdx.x);
  const Task task = params.tasks[blockIdx.x];
  const Chunk chunk = params.chunks[task.chunk];
  Raw* const g = static_cast<Raw*>(chunk.g);
  if (*chunk.info != 0) return;  // not positive definite: the gradient stays as it is
  const uint4* const from = reinterpret_cast<const uint4*>(chunk.inverse);
  for (int e = thread; e < 2 * kSize * kSize / 8; e += kThreads) reinterpret_cast<uint4*>(inverse)[e] = from[e];

  const int end = min(chunk.g_rows, task.first + kTaskRows);
  for (int first = task.first; first < end; first += kTileRows) {
    // The row of G that holds vector i of the tile, or null; `position`: of its first element in the chunk.
    const auto row_of = [&](int i, int& position) -> Raw* {
      const int row = first + i / kColumns;
      position = i % kColumns * Row::kWidth;
      if (row >= end || position >= chunk.size) return nullptr;
      return g + row / chunk.taps * chunk.g_pitch + row % chunk.taps;
    };
    __syncthreads();  // the last tile has been written back
    for (int i = thread; i < kTileRows * kColumns; i += kThreads) {
      int position = 0;
      const Raw* const at = row_of(i, position);
      Row row{};
      if (at != nullptr && chunk.g_vectors) {
        row = *reinterpret_cast<const Row*>(at + chunk.units[position]);
      } else if (at != nullptr) {
        for (int k = 0; k < Row::kWidth && position + k < chunk.size; ++k) {
          row.v[k] = at[int64_t{chunk.units[position + k]} * chunk.taps];
        }
      }
      CO_UNROLL
      for (int k = 0; k < Row::kWidth; ++k) {
        const int e = i * Row::kWidth + k;
        const float value = value_of(row.v[k]);
        sum[e] = 0.0f;
        high[e] = float_to_bfloat16(value);
        if (sizeof(Raw) == 4) low[e] = float_to_bfloat16(value - bfloat16_to_float(high[e]));
      }
    }
    __syncthreads();
    if (sizeof(Raw) == 4) {
      MathDx<kSize>::apply(low, inverse, sum);
      __syncthreads();
    }
    MathDx<kSize>::apply(high, inverse + kSize * kSize, sum);
    __syncthreads();
    MathDx<kSize>::apply(high, inverse, sum);
    __syncthreads();
    for (int i = thread; i < kTileRows * kColumns; i += kThreads) {
      int position = 0;
      Raw* const at = row_of(i, position);
      Row row;
      CO_UNROLL
      for (int k = 0; k < Row::kWidth; ++k) set_value(row.v[k], sum[i * Row::kWidth + k]);
      if (at != nullptr && chunk.g_vectors) {
        *reinterpret_cast<Row*>(at + chunk.units[position]) = row;
      } else if (at != nullptr) {
        for (int k = 0; k < Row::kWidth && position + k < chunk.size; ++k) {
          at[int64_t{chunk.units[position + k]} * chunk.taps] = row.v[k];
        }
      }
    }
  }
}

}  // namespace

#define CO_KERNEL(NAME, BODY) \
  extern "C" __global__ void __launch_bounds__(kThreads) NAME(CO_KERNEL_PARAM(Params, params)) { BODY(params); }
#define CO_KERNELS(SIZE)                             \
  CO_MATHDX(SIZE)                                    \
  CO_KERNEL(gram_4_##SIZE, (gram<SIZE, uint32_t>))   \
  CO_KERNEL(gram_2_##SIZE, (gram<SIZE, uint16_t>))   \
  CO_KERNEL(invert_##SIZE, (invert<SIZE>))           \
  CO_KERNEL(apply_4_##SIZE, (apply<SIZE, uint32_t>)) \
  CO_KERNEL(apply_2_##SIZE, (apply<SIZE, uint16_t>))
CO_KERNELS(64)
CO_KERNELS(128)

#if !defined(__CUDACC__)
#include <cstring>

#define API extern "C" __attribute__((visibility("default")))

// For the tests: the kernel of this name on the CPU.
API int mathdx_launch(const char* name, int64_t grid, int64_t shared, const Params* params) {
  const struct {
    const char* name;
    void (*kernel)(const Params&);
  } kernels[] = {{"gram_4_64", gram_4_64},    {"gram_2_64", gram_2_64},   {"invert_64", invert_64},
                 {"apply_4_64", apply_4_64},  {"apply_2_64", apply_2_64}, {"gram_4_128", gram_4_128},
                 {"gram_2_128", gram_2_128},  {"invert_128", invert_128}, {"apply_4_128", apply_4_128},
                 {"apply_2_128", apply_2_128}};
  for (const auto& entry : kernels) {
    if (std::strcmp(entry.name, name) != 0) continue;
    return static_cast<int>(launch(entry.kernel, dim3(static_cast<unsigned>(grid)), dim3(kThreads),
                                   static_cast<size_t>(shared), nullptr, *params));
  }
  return -1;
}

API int64_t mathdx_chunk_bytes() { return sizeof(Chunk); }
#endif
