// Small kernels, right and wrong ones, that show what the host runtime notices; and the host bodies of ptx.cuh's
// wrappers.
#include <cstring>
#include <string>

#include "cuda/convert.cuh"

using namespace consistency_ops;

namespace {

// A block reverses an array through shared memory.
void reverse(const float* x, float* y, bool with_barrier) {
  CO_SHARED(float, tile, [64]);
  tile[threadIdx.x] = x[threadIdx.x];
  if (with_barrier) __syncthreads();
  y[threadIdx.x] = tile[63 - threadIdx.x];
}

void divergent_barrier() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

// One half of a block writes, the other half waits for it at a named barrier and reads.
void hand_over(const float* x, float* y, bool with_barrier) {
  CO_SHARED(float, tile, [32]);
  if (threadIdx.x < 32) {
    tile[threadIdx.x] = x[threadIdx.x];
    if (with_barrier) barrier_arrive(1, 64);
  } else {
    if (with_barrier) barrier_sync(1, 64);
    y[threadIdx.x - 32] = tile[63 - threadIdx.x];
  }
}

void half_a_barrier() {
  if (threadIdx.x < 32) barrier_sync(2, 64);
}

void two_sizes() { barrier_sync(2, threadIdx.x < 32 ? 32 : 64); }

void early_exit() {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

void wrong_mask(float* y) {
  if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_xor_sync(0xffffu, y[threadIdx.x], 16);
}

void lane_outside_mask() { (void)__ballot_sync(0xffu, 1); }

// The lanes of a warp do not run in lock step, and a shuffle, in which they meet, does not order what they have stored.
void exchange(float* y, bool with_syncwarp, bool with_shuffle) {
  CO_SHARED(float, tile, [32]);
  tile[threadIdx.x] = y[threadIdx.x];
  if (with_syncwarp) __syncwarp();
  if (with_shuffle) (void)__shfl_sync(0xffffffffu, 1.0f, 0);
  y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

void too_much_shared() {
  CO_SHARED(float, tile, [12 << 10]);
  tile[threadIdx.x] = 0;
}

// A CTA adds the values of its cluster, in the order of the ranks, through distributed shared memory.
void cluster_sum(float* y, bool with_first_barrier, bool with_last_barrier) {
  CO_SHARED(float, value, [64]);
  const simt::Site site{__FILE__, __LINE__};
  value[threadIdx.x] = static_cast<float>(blockIdx.x + 1);
  if (with_first_barrier) simt::cluster_barrier(site);
  float sum = 0;
  for (unsigned rank = 0; rank < simt::cluster_size(); ++rank) {
    sum += static_cast<float*>(simt::map_shared_rank(value, rank))[63 - threadIdx.x];
  }
  if (with_last_barrier) simt::cluster_barrier({__FILE__, __LINE__});
  y[blockIdx.x * 64 + threadIdx.x] = sum;
}

// D[16][8] += A[16][8] B[8][8] with the fragments as the PTX ISA lays them out.
void multiply(const float* a, const float* b, float* d) {
  const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
  const float left[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
  const float right[2] = {b[t * 8 + g], b[(t + 4) * 8 + g]};
  float* const element[4] = {d + g * 8 + 2 * t, d + g * 8 + 2 * t + 1, d + (g + 8) * 8 + 2 * t,
                             d + (g + 8) * 8 + 2 * t + 1};
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = *element[i];
  mma_m16n8k8_tf32(sum, left, right);
  for (int i = 0; i < 4; ++i) *element[i] = sum[i];
}

// D[16][8] += A[16][16] B[16][8] of 16-bit numbers, both stored with their columns k in the rows of shared memory.
template <bool kBFloat16>
void multiply_16(const float* a, const float* b, float* d, bool with_syncwarp) {
  CO_SHARED(uint16_t, left, [16][24]);   // [k][row]
  CO_SHARED(uint16_t, right, [16][24]);  // [k][column]
  const auto narrow = [](float x) { return kBFloat16 ? float_to_bfloat16(x) : float_to_float16(x); };
  const unsigned lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (unsigned i = lane; i < 256; i += 32) left[i % 16][i / 16] = narrow(a[i]);
  for (unsigned i = lane; i < 256; i += 32) right[i / 16][i % 16] = i % 16 < 8 ? narrow(b[i / 16 * 8 + i % 16]) : 0;
  if (with_syncwarp) __syncwarp();
  uint32_t x[4], y[4];
  load_matrices_transposed(x, &left[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
  load_matrices_transposed(y, &right[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
  float sum[4];
  for (unsigned i = 0; i < 4; ++i) sum[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_m16n8k16<kBFloat16>(sum, x, y[0], y[2]);
  for (unsigned i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// The last CTA to arrive adds the partial values.
void last_block(const float* x, float* partial, uint32_t* counter, float* y, bool with_fence) {
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = x[blockIdx.x];
  if (with_fence) __threadfence();
  if (atomicAdd(counter, 1u) != gridDim.x - 1) return;
  if (with_fence) __threadfence();
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
  *y = sum;
}

thread_local std::string error;

template <typename F>
const char* run(unsigned grid, unsigned block, unsigned cluster, F&& kernel) {
  try {
    simt::launch(dim3(grid), dim3(block), dim3(cluster), size_t{0}, [&] { kernel(); });
    return nullptr;
  } catch (const simt::Error& e) {
    error = e.what();
    return error.c_str();
  }
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API const char* selftest(const char* name, int variant, const float* x, float* y, float* z, uint32_t* counter) {
  const auto is = [name](const char* wanted) { return std::strcmp(name, wanted) == 0; };
  if (is("reverse")) return run(1, 64, 1, [&] { reverse(x, y, variant); });
  if (is("divergent barrier")) return run(1, 64, 1, divergent_barrier);
  if (is("hand over")) return run(1, 64, 1, [&] { hand_over(x, y, variant != 0); });
  if (is("half a barrier")) return run(1, 64, 1, half_a_barrier);
  if (is("two sizes")) return run(1, 64, 1, two_sizes);
  if (is("early exit")) return run(1, 64, 1, early_exit);
  if (is("wrong mask")) return run(1, 32, 1, [&] { wrong_mask(y); });
  if (is("lane outside mask")) return run(1, 32, 1, lane_outside_mask);
  if (is("exchange")) return run(1, 32, 1, [&] { exchange(y, variant & 1, variant & 2); });
  if (is("too much shared")) return run(1, 32, 1, too_much_shared);
  if (is("cluster sum")) return run(8, 64, 4, [&] { cluster_sum(y, variant & 1, variant & 2); });
  if (is("multiply")) return run(1, 32, 1, [&] { multiply(x, y, z); });
  if (is("multiply bfloat16")) return run(1, 32, 1, [&] { multiply_16<true>(x, y, z, variant); });
  if (is("multiply float16")) return run(1, 32, 1, [&] { multiply_16<false>(x, y, z, variant); });
  if (is("last block")) return run(6, 32, 1, [&] { last_block(x, z, counter, y, variant); });
  return "no such kernel";
}

API float selftest_float16_to_float(uint16_t bits) { return float16_to_float(bits); }
API float selftest_bfloat16_to_float(uint16_t bits) { return bfloat16_to_float(bits); }
API uint16_t selftest_float_to_float16(float value) { return float_to_float16(value); }
API uint16_t selftest_float_to_bfloat16(float value) { return float_to_bfloat16(value); }
API float selftest_to_tf32(float value) { return to_tf32(value); }
