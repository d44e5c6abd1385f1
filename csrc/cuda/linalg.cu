// Inverse and solve of batches of symmetric positive definite matrices: the inner step of the correction alone.
//
// One CTA a matrix, of a warp for every 32 rows and more, so that small matrices share an SM: 32 CTAs of a warp for up
// to 32 rows.  The lower triangle is read once into tiles of shared memory, and factored and inverted (sweep.cuh from
// 65 to 128 rows, else factor.cuh) or factored and substituted with (factor.cuh, substitute.cuh).  Where there are few
// matrices and many right-hand sides, several CTAs factor the same matrix and divide its right-hand sides: the factor
// takes as long as the others would wait for it.
#include "consistency_ops/linalg_cuda.h"
#include "cuda/precondition/substitute.cuh"
#include "cuda/precondition/sweep.cuh"

namespace consistency_ops {
namespace {

struct SpdLaunch {
  SpdParams problem;
  int64_t parts;  // CTAs of a matrix
};

CO_DEVICE float& symmetric(const Chunk& chunk, int row, int column) {
  const int i = max(row, column), j = min(row, column);
  return lower_tile(chunk.tiles, i / kTile, j / kTile)[i % kTile * kTilePitch + j % kTile];
}

// f(i, j) for all i, j < padded, the lanes of a warp along the dimension whose elements are neighbours.
template <int kWarps, typename F>
CO_DEVICE void for_elements(int padded, bool along_rows, F&& f) {
  const int thread = static_cast<int>(threadIdx.x);
  CO_NO_UNROLL
  for (int outer = thread / 32; outer < padded; outer += kWarps) {
    CO_NO_UNROLL
    for (int inner = thread % 32; inner < padded; inner += 32) {
      if (along_rows) {
        f(outer, inner);
      } else {
        f(inner, outer);
      }
    }
  }
}

// tiles <- the factor of matrix m, or if kInverts its inverse; info is written.  All threads; ends with a barrier.
template <int kWarps, bool kInverts>
CO_DEVICE bool factor_matrix(const SpdParams& p, int64_t m, bool writes_info, ChunkShared& shared, const Chunk& chunk) {
  if (threadIdx.x == 0) shared.task.size = static_cast<int32_t>(p.n);
  __syncthreads();
  const int n = static_cast<int>(p.n);
  const float* a = static_cast<const float*>(p.a) + m * p.a_batch;
  for_elements<kWarps>(chunk.padded(), p.a_column <= p.a_row, [&](int i, int j) {
    if (j > i) return;  // nothing that is made from the other half of a diagonal tile reaches a result
    symmetric(chunk, i, j) = i < n ? a[i * p.a_row + j * p.a_column] : i == j ? 1.0f : 0.0f;
  });
  if constexpr (kInverts && kWarps == 8) {
    factor_and_invert(chunk, chunk.tiles + chunk.tile_floats());
  } else {
    factor<kWarps>(chunk);
    __syncthreads();  // failed_minor, where there are no rows
  }
  const int info = shared.scratch.failed_minor;
  if (threadIdx.x == 0 && writes_info) p.info[m] = info;
  if constexpr (kInverts && kWarps != 8) {
    if (info == 0) invert<kWarps>(chunk);
  }
  return info == 0;
}

template <int kWarps>
__global__ void __launch_bounds__(kWarps * 32, kWarps == 8 ? 2 : 1)
    spd_inverse_kernel(CO_KERNEL_PARAM(SpdLaunch, launch)) {
  CO_DYNAMIC_SHARED(float, tiles);
  CO_SHARED(ChunkShared, shared, [1]);
  const Chunk chunk(shared[0], tiles);
  const SpdParams& p = launch.problem;
  const int64_t m = blockIdx.x;
  const int n = static_cast<int>(p.n);
  float* out = static_cast<float*>(p.result) + m * p.n * p.n;
  const bool ok = factor_matrix<kWarps, true>(p, m, true, shared[0], chunk);
  for_elements<kWarps>(chunk.padded(), true, [&](int i, int j) {
    if (i < n && j < n) out[i * n + j] = ok ? symmetric(chunk, i, j) : nanf("");
  });
}

template <int kWarps>
__global__ void __launch_bounds__(kWarps * 32) spd_solve_kernel(CO_KERNEL_PARAM(SpdLaunch, launch)) {
  CO_DYNAMIC_SHARED(float, tiles);
  CO_SHARED(ChunkShared, shared, [1]);
  const Chunk chunk(shared[0], tiles);
  const SpdParams& p = launch.problem;
  const int64_t m = blockIdx.x / launch.parts, part = blockIdx.x % launch.parts;
  const int n = static_cast<int>(p.n);
  const bool ok = factor_matrix<kWarps, false>(p, m, part == 0, shared[0], chunk);
  float* rows = tiles + chunk.tile_floats();
  const float* b = static_cast<const float*>(p.b) + m * p.b_batch;
  float* out = static_cast<float*>(p.result) + m * p.n * p.nrhs;
  CO_NO_UNROLL
  for (int64_t first = part * kTile; first < p.nrhs; first += launch.parts * kTile) {
    const int width = static_cast<int>(p.nrhs - first < kTile ? p.nrhs - first : kTile);
    // Element u of right-hand side r lies at row r of tile u / 32.
    const auto at = [&](int r, int u) { return rows + u / kTile * kTileFloats + r * kTilePitch + u % kTile; };
    const auto for_block = [&](bool along_units, auto&& f) {  // f(r, u); 32 x padded
      const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
      CO_NO_UNROLL
      for (int step = thread / 32; step < chunk.padded(); step += kWarps) {
        if (along_units) {
          f(step % kTile, step / kTile * kTile + lane);
        } else {
          f(lane, step);
        }
      }
      __syncthreads();
    };
    if (ok) {
      for_block(p.b_row < p.b_column, [&](int r, int u) {
        *at(r, u) = r < width && u < n ? b[u * p.b_row + (first + r) * p.b_column] : 0.0f;
      });
      substitute<kWarps>(chunk, rows);
    }
    for_block(false, [&](int r, int u) {
      if (r < width && u < n) out[u * p.nrhs + first + r] = ok ? *at(r, u) : nanf("");
    });
  }
}

constexpr int64_t kMaxGrid = 0x7fffffff;

// Where `tiles`, `floats` behind them and the fixed arrays of a CTA fit the device, launches the kernel for n rows.
template <typename F>
Status for_size(const SpdParams& p, int tiles, int floats, const CudaDevice& device, F&& run) {
  if (p.dtype != DType::kFloat32 || p.batch < 0 || p.n < 0 || p.n > kMaxChunk || p.nrhs < 0) {
    return Status::kInvalidArgument;
  }
  const int64_t bytes = (int64_t{tiles} * kTileFloats + floats) * static_cast<int64_t>(sizeof(float));
  if (bytes > device.shared_bytes - kStaticShared || p.batch > kMaxGrid) return Status::kInvalidArgument;
  if (p.batch == 0) return Status::kOk;
  return run(static_cast<size_t>(bytes));
}

int side_of(const SpdParams& p) { return padded_units(static_cast<int>(p.n)) / kTile; }

template <int kWarps>
Status launch_inverse(const SpdParams& p, size_t bytes, void* stream) {
  return launch(spd_inverse_kernel<kWarps>, dim3(static_cast<unsigned>(p.batch)), dim3(kWarps * 32), bytes, stream,
                SpdLaunch{p, 1});
}

template <int kWarps>
Status launch_solve(const SpdParams& p, size_t bytes, void* stream) {
  const int64_t blocks = (p.nrhs + kTile - 1) / kTile;
  int64_t parts = p.batch < kTargetCtas ? kTargetCtas / p.batch : 1;  // does not depend on the device
  parts = parts < blocks ? parts : blocks > 0 ? blocks : 1;
  return launch(spd_solve_kernel<kWarps>, dim3(static_cast<unsigned>(p.batch * parts)), dim3(kWarps * 32), bytes,
                stream, SpdLaunch{p, parts});
}

}  // namespace

Status spd_inverse_cuda(const SpdParams& params, const CudaDevice& device, void* stream) {
  const int side = side_of(params);
  const int floats = side == 3 || side == 4 ? kSweepFloats : 0;
  return for_size(params, lower_tiles(side), floats, device, [&](size_t bytes) {
    if (side <= 1) return launch_inverse<1>(params, bytes, stream);
    if (side <= 2) return launch_inverse<4>(params, bytes, stream);
    return side <= 4 ? launch_inverse<8>(params, bytes, stream) : launch_inverse<16>(params, bytes, stream);
  });
}

Status spd_solve_cuda(const SpdParams& params, const CudaDevice& device, void* stream) {
  const int side = side_of(params);
  return for_size(params, lower_tiles(side) + side, 0, device, [&](size_t bytes) {
    if (side <= 1) return launch_solve<1>(params, bytes, stream);
    if (side <= 2) return launch_solve<4>(params, bytes, stream);
    return side <= 4 ? launch_solve<8>(params, bytes, stream) : launch_solve<16>(params, bytes, stream);
  });
}

}  // namespace consistency_ops
