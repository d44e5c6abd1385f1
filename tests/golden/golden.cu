// Every wrapper of csrc/cuda/ptx.cuh on fixed operands, one line each: `name bits bits ...` in hexadecimal.
//
// nvcc compiles the instructions, another compiler the host bodies that tests/simt runs; both must print the same
// (test_golden.py; the matrix product to rounding).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "cuda/convert.cuh"

using namespace consistency_ops;

namespace {

enum Wrapper : int32_t {
  kFloat16ToFloat,
  kBFloat16ToFloat,
  kFloatToFloat16,
  kFloatToBFloat16,
  kToTf32,
  kPackBFloat16,
  kStoreWords,
  kFreshThread,
  kPrefetch,
  kAddRelease,
  kAddAcquireRelease,
  kMatrixProduct,
  kBFloat16Product,
  kFloat16Product,
  kAddNow,
  kInverseRoot,
  kBarrierSync,
  kWarpgroupProduct,
  kWarpgroupTransposed,
  kMatrices,
  kTransposed,
  kCluster,
};

struct Params {
  Wrapper wrapper;
  const uint32_t* in;
  uint32_t* out;
};

__global__ void golden_kernel(CO_KERNEL_PARAM(Params, p)) {
  CO_SHARED(Float4, shared, [1]);
  CO_SHARED(Float4, matrices, [32]);
  CO_SHARED(Float4, warpgroup, [160]);  // 2 KiB that begin on 512 bytes
  const unsigned thread = threadIdx.x, i = blockIdx.x * blockDim.x + thread;
  const uint32_t in = p.in[i];
  if (p.wrapper == kFloat16ToFloat) {
    p.out[i] = __float_as_uint(float16_to_float(static_cast<uint16_t>(in)));
  } else if (p.wrapper == kBFloat16ToFloat) {
    p.out[i] = __float_as_uint(bfloat16_to_float(static_cast<uint16_t>(in)));
  } else if (p.wrapper == kFloatToFloat16) {
    p.out[i] = float_to_float16(__uint_as_float(in));
  } else if (p.wrapper == kFloatToBFloat16) {
    p.out[i] = float_to_bfloat16(__uint_as_float(in));
  } else if (p.wrapper == kToTf32) {
    p.out[i] = __float_as_uint(to_tf32(__uint_as_float(in)));
  } else if (p.wrapper == kPackBFloat16) {
    p.out[i] = pack_bfloat16(__uint_as_float(in), __uint_as_float(in ^ 0x80010001u));
  } else if (p.wrapper == kStoreWords) {
    const uint32_t word[4] = {in, in + 1, in + 2, in + 3}, pair[2] = {in + 4, in + 5};
    store_words(p.out + i * 8, word);
    store_words(p.out + i * 8 + 4, pair);
  } else if (p.wrapper == kFreshThread) {
    p.out[i] = static_cast<uint32_t>(fresh_thread());
  } else if (p.wrapper == kPrefetch) {
    prefetch_l2(p.in + i);
    p.out[i] = in;
  } else if (p.wrapper == kAddRelease) {
    add_release(p.out, 1 + in % 2);
  } else if (p.wrapper == kAddAcquireRelease) {
    // Every thread gets another number; the last one sees that all have arrived.
    if (add_acquire_release(p.out, 1) == gridDim.x * blockDim.x - 1) p.out[1] = load_acquire(p.out);
  } else if (p.wrapper == kMatrixProduct) {
    float a[4], b[2], d[4];
    for (unsigned k = 0; k < 4; ++k) a[k] = to_tf32(__uint_as_float(p.in[thread * 4 + k]));
    for (unsigned k = 0; k < 2; ++k) b[k] = to_tf32(__uint_as_float(p.in[128 + thread * 2 + k]));
    for (unsigned k = 0; k < 4; ++k) d[k] = __uint_as_float(p.in[192 + thread * 4 + k]);
    mma_m16n8k8_tf32(d, a, b);
    for (unsigned k = 0; k < 4; ++k) p.out[thread * 4 + k] = __float_as_uint(d[k]);
  } else if (p.wrapper == kBFloat16Product || p.wrapper == kFloat16Product) {
    uint32_t a[4], b[2];
    float d[4];
    const auto half = [&](unsigned k) -> uint32_t {
      const float value = __uint_as_float(p.in[k % 512]);
      return p.wrapper == kBFloat16Product ? float_to_bfloat16(value) : float_to_float16(value);
    };
    for (unsigned k = 0; k < 4; ++k) a[k] = half(thread * 8 + 2 * k) | half(thread * 8 + 2 * k + 1) << 16;
    for (unsigned k = 0; k < 2; ++k) b[k] = half(256 + thread * 4 + 2 * k) | half(256 + thread * 4 + 2 * k + 1) << 16;
    for (unsigned k = 0; k < 4; ++k) d[k] = __uint_as_float(p.in[384 + thread * 4 + k]);
    if (p.wrapper == kBFloat16Product) {
      mma_m16n8k16<true>(d, a, b[0], b[1]);
    } else {
      mma_m16n8k16<false>(d, a, b[0], b[1]);
    }
    for (unsigned k = 0; k < 4; ++k) p.out[thread * 4 + k] = __float_as_uint(d[k]);
  } else if (p.wrapper == kAddNow) {
    float sum = __uint_as_float(in);
    add_now(sum, __uint_as_float(p.in[(i + 1) % 512]));
    p.out[i] = __float_as_uint(sum);
  } else if (p.wrapper == kInverseRoot) {
    p.out[i] = __float_as_uint(inverse_root_approximately(__uint_as_float(in)));
  } else if (p.wrapper == kBarrierSync) {
    // 128 threads: those of the first two warps write and go on, the others wait for them and read, twice.
    auto* words = reinterpret_cast<uint32_t*>(matrices);
    for (unsigned turn = 0; turn < 2; ++turn) {
      if (thread < 64) {
        words[turn * 64 + thread] = in + turn;
        barrier_arrive(3 + static_cast<int>(turn), 128);
      } else {
        barrier_sync(3 + static_cast<int>(turn), 128);
        p.out[turn * 64 + thread - 64] = words[turn * 64 + 127 - thread];
      }
    }
  } else if (p.wrapper == kWarpgroupProduct || p.wrapper == kWarpgroupTransposed) {
    // 128 threads: two products of 16, the first without a sum before it.
    const auto half = [&](unsigned k) -> uint32_t { return float_to_bfloat16(__uint_as_float(p.in[k % 512])); };
    auto* b = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(warpgroup) + 511) / 512 * 512);
    for (unsigned k = 0; k < 8; ++k) {
      const unsigned row = thread / 4, column = thread % 4 * 8 + k;
      b[row * 32 + ((column / 8) ^ row / 2 % 4) * 8 + column % 8] = static_cast<uint16_t>(half(thread * 8 + k + 77));
    }
    publish_to_warpgroups();
    __syncthreads();
    uint32_t a[4];
    float d[16];
    for (unsigned k = 0; k < 16; ++k) d[k] = __uint_as_float(in);
    for (unsigned product = 0; product < 2; ++product) {
      for (unsigned k = 0; k < 4; ++k) {
        const unsigned at = thread * 8 + 2 * k + product * 200;
        a[k] = half(at) | half(at + 1) << 16;
      }
      begin_warpgroup_products();
      if (p.wrapper == kWarpgroupProduct) {
        wgmma_m64n32k16<false>(d, a, b + product * 16, product > 0);
      } else {
        wgmma_m64n32k16<true>(d, a, b + product * 16 * 32, product > 0);
      }
      end_warpgroup_products();
    }
    for (unsigned k = 0; k < 16; ++k) global_memory(p.out)[thread * 16 + k] = __float_as_uint(d[k]);
  } else if (p.wrapper == kMatrices || p.wrapper == kTransposed) {
    auto* row = reinterpret_cast<uint16_t*>(matrices + thread);
    for (unsigned k = 0; k < 8; ++k) row[k] = static_cast<uint16_t>(thread << 8 | k);
    __syncwarp();
    uint32_t m[4];
    if (p.wrapper == kMatrices) {
      load_matrices(m, row);
    } else {
      load_matrices_transposed(m, row);
    }
    for (unsigned k = 0; k < 4; ++k) global_memory(p.out)[thread * 4 + k] = m[k];
  } else if (p.wrapper == kCluster) {
    // Four CTAs of one thread: each writes to its right neighbour and reads from its left one.
    const int rank = static_cast<int>(blockIdx.x);
    const float value = __uint_as_float(in);
    shared[0] = Float4{{0, 0, 0, 0}};
    cluster_barrier();
    store_cluster(shared, (rank + 1) % 4, Float4{{value, value + 1, value + 2, static_cast<float>(rank)}});
    cluster_barrier();
    const Float4 left = load_cluster(shared, (rank + 3) % 4);
    const int whole = load_cluster(reinterpret_cast<const int*>(shared), (rank + 3) % 4);
    for (int k = 0; k < 4; ++k) {
      p.out[rank * 9 + k] = __float_as_uint(shared[0].v[k]);
      p.out[rank * 9 + 4 + k] = __float_as_uint(left.v[k]);
    }
    p.out[rank * 9 + 8] = static_cast<uint32_t>(whole);
    cluster_barrier();
  }
}

void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "golden: %s: %s\n", what, launch_error());
  std::exit(1);
}

// Memory that both sides can reach: plain on the host, copied for a device.
std::vector<uint32_t> run(Wrapper wrapper, const std::vector<uint32_t>& in, size_t results, unsigned grid,
                          unsigned block, int cluster = 1) {
  std::vector<uint32_t> out(results, 0);
#if defined(__CUDACC__)
  const auto check = [](cudaError_t error) {
    launch_error() = cudaGetErrorString(error);
    require(error == cudaSuccess, "CUDA");
  };
  uint32_t *device_in, *device_out;
  check(cudaMalloc(&device_in, in.size() * 4));
  check(cudaMalloc(&device_out, results * 4));
  check(cudaMemcpy(device_in, in.data(), in.size() * 4, cudaMemcpyHostToDevice));
  check(cudaMemset(device_out, 0, results * 4));
  const Params params{wrapper, device_in, device_out};
#else
  const Params params{wrapper, in.data(), out.data()};
#endif
  require(launch(golden_kernel, dim3(grid), dim3(block), 0, nullptr, params, cluster) == Status::kOk, "launch");
#if defined(__CUDACC__)
  check(cudaDeviceSynchronize());
  check(cudaMemcpy(out.data(), device_out, results * 4, cudaMemcpyDeviceToHost));
  check(cudaFree(device_in));
  check(cudaFree(device_out));
#endif
  return out;
}

void print(const char* name, const std::vector<uint32_t>& values) {
  std::printf("%s", name);
  for (const uint32_t value : values) std::printf(" %08x", value);
  std::printf("\n");
}

uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

}  // namespace

int main() {
  constexpr unsigned kAll = 1 << 16, kBlock = 256;
  std::vector<uint32_t> halves(kAll), floats(kAll), small(512);
  uint32_t state = 12345;
  for (unsigned i = 0; i < kAll; ++i) {
    halves[i] = i;
    // The upper half is every pattern of exponents; the lower half, ties and their neighbours.
    state = state * 1664525u + 1013904223u;
    const uint32_t low[4] = {0x8000u, 0x1000u, state >> 16, 0x7fffu + (state >> 31)};
    floats[i] = i << 16 | (low[i % 4] & 0xffffu);
  }
  for (unsigned i = 0; i < small.size(); ++i) {
    state = state * 1664525u + 1013904223u;
    small[i] = as_bits(static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f);
  }
  const unsigned grid = kAll / kBlock;
  print("float16_to_float", run(kFloat16ToFloat, halves, kAll, grid, kBlock));
  print("bfloat16_to_float", run(kBFloat16ToFloat, halves, kAll, grid, kBlock));
  print("float_to_float16", run(kFloatToFloat16, floats, kAll, grid, kBlock));
  print("float_to_bfloat16", run(kFloatToBFloat16, floats, kAll, grid, kBlock));
  print("to_tf32", run(kToTf32, floats, kAll, grid, kBlock));
  print("pack_bfloat16", run(kPackBFloat16, floats, kAll, grid, kBlock));
  print("store_words", run(kStoreWords, small, 64 * 8, 1, 64));
  print("fresh_thread", run(kFreshThread, small, 64, 1, 64));
  print("prefetch_l2", run(kPrefetch, small, 64, 1, 64));
  print("add_release", run(kAddRelease, small, 1, 4, 64));
  print("add_acquire_release", run(kAddAcquireRelease, small, 2, 4, 64));
  print("mma_m16n8k8_tf32", run(kMatrixProduct, small, 128, 1, 32));
  print("mma_m16n8k16<bfloat16>", run(kBFloat16Product, small, 128, 1, 32));
  print("mma_m16n8k16<float16>", run(kFloat16Product, small, 128, 1, 32));
  // What a sum does at the end of the range: rows of A with the largest number, infinity and NaN, and a sum that
  // overflows only with its last terms.  Only whether a result is finite, infinite or NaN is compared.
  const float ends[] = {3.0e38f, -3.0e38f, std::numeric_limits<float>::infinity(),
                        -std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()};
  std::vector<uint32_t> large(512, as_bits(1.0f));
  const unsigned places[] = {5, 36, 75, 106, 127};  // five rows of A
  for (unsigned i = 0; i < 5; ++i) large[places[i]] = as_bits(ends[i]);
  print("mma_m16n8k8_tf32<ends>", run(kMatrixProduct, large, 128, 1, 32));
  print("mma_m16n8k16<bfloat16,ends>", run(kBFloat16Product, large, 128, 1, 32));
  print("mma_m16n8k16<float16,ends>", run(kFloat16Product, large, 128, 1, 32));
  std::vector<uint32_t> sums(512, as_bits(0x1p60f));  // 2^120 a product; D begins just below the largest float
  for (unsigned i = 384; i < 512; ++i) sums[i] = as_bits(i % 2 ? 0x1.fffffep127f : -0x1.fffffep127f);
  for (unsigned i = 192; i < 320; ++i) sums[i] = as_bits(i % 2 ? 0x1.fffffep127f : -0x1.fffffep127f);
  print("mma_m16n8k8_tf32<overflow>", run(kMatrixProduct, sums, 128, 1, 32));
  print("mma_m16n8k16<bfloat16,overflow>", run(kBFloat16Product, sums, 128, 1, 32));
  print("add_now", run(kAddNow, small, 512, 2, 256));
  std::vector<uint32_t> positive(512);
  for (unsigned i = 0; i < 512; ++i) positive[i] = 0x00800000u + i * 0x003f8000u + (small[i] & 0x7fffu);
  print("inverse_root_approximately", run(kInverseRoot, positive, 512, 2, 256));
  print("barrier_sync", run(kBarrierSync, small, 128, 1, 128));
  print("wgmma_m64n32k16<rows>", run(kWarpgroupProduct, small, 2048, 1, 128));  // zeros where there are none
  print("wgmma_m64n32k16<columns>", run(kWarpgroupTransposed, small, 2048, 1, 128));
  print("load_matrices", run(kMatrices, small, 128, 1, 32));
  print("load_matrices_transposed", run(kTransposed, small, 128, 1, 32));
  print("cluster", run(kCluster, small, 36, 4, 1, 4));
}
