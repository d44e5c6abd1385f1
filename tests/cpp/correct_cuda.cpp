// The CUDA launcher without torch: device memory, workspace and stream are the caller's.  Corrects one layer of several
// chunks on the GPU and compares with the CPU launcher, which draws the same division.  Exit status 77: no CUDA device.
#include <consistency_ops/precondition_cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace co = consistency_ops;

namespace {

constexpr int64_t kRows = 512, kUnits = 300, kOutputs = 64, kChunks = 3;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
T* to_device(const std::vector<T>& values, cudaStream_t stream) {
  void* copy = nullptr;
  check(cudaMalloc(&copy, values.size() * sizeof(T)), "cudaMalloc");
  check(cudaMemcpyAsync(copy, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice, stream), "copy to GPU");
  return static_cast<T*>(copy);
}

co::PreconditionLayer describe(const float* x, float* g, int32_t* info) {
  co::PreconditionLayer layer{};
  std::fill_n(layer.x_row_size, co::kMaxRowDims, 1);
  std::fill_n(layer.g_tap_size, co::kMaxTapDims, 1);
  layer.x = x;
  layer.x_row_size[co::kMaxRowDims - 1] = kRows;
  layer.x_row_stride[co::kMaxRowDims - 1] = kUnits;
  layer.x_unit_stride = 1;
  layer.units = kUnits;
  layer.g = g;
  layer.outputs = kOutputs;
  layer.g_output_stride = kUnits;
  layer.g_unit_stride = 1;
  layer.group = 8;
  layer.info = info;
  return layer;
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("no CUDA device");
    return 77;
  }
  co::CudaDevice device{};
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "attribute");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "attribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "attribute");
  device.compute_capability = 10 * major + minor;
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");

  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::vector<float> x(kRows * kUnits), g(kOutputs * kUnits);
  for (float& value : x) value = normal(random);
  for (float& value : g) value = normal(random);
  std::vector<int32_t> info(kChunks, -1);
  float* const device_x = to_device(x, stream);
  float* const device_g = to_device(g, stream);
  int32_t* const device_info = to_device(info, stream);

  co::PreconditionOptions options;
  options.damping = 0.1;
  options.trace_scaling = true;
  const co::PreconditionLayer problem = describe(device_x, device_g, device_info);
  if (co::num_chunks(problem, options) != kChunks) return 1;
  const int64_t bytes = co::precondition_workspace_cuda(&problem, 1, options);
  void* workspace = nullptr;
  if (bytes > 0) {
    check(cudaMalloc(&workspace, static_cast<size_t>(bytes)), "cudaMalloc");
    check(cudaMemsetAsync(workspace, 0, co::kCudaCounterBytes, stream), "cudaMemset");
  }
  const co::Status status = co::precondition_cuda(&problem, 1, options, device, workspace, stream);
  if (status != co::Status::kOk) {
    std::fprintf(stderr, "precondition_cuda: status %d, %s\n", static_cast<int>(status), co::launch_error());
    return 1;
  }
  std::vector<float> corrected(g.size());
  check(cudaMemcpyAsync(corrected.data(), device_g, g.size() * sizeof(float), cudaMemcpyDeviceToHost, stream), "copy");
  check(cudaMemcpyAsync(info.data(), device_info, sizeof(int32_t) * kChunks, cudaMemcpyDeviceToHost, stream), "copy");
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  for (void* memory : {static_cast<void*>(device_x), static_cast<void*>(device_g), static_cast<void*>(device_info)}) {
    check(cudaFree(memory), "cudaFree");
  }
  check(cudaFree(workspace), "cudaFree");
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");

  std::vector<int32_t> cpu_info(kChunks, -1);
  const co::PreconditionLayer on_cpu = describe(x.data(), g.data(), cpu_info.data());
  if (co::precondition_cpu(&on_cpu, 1, options, co::ThreadPool{}) != co::Status::kOk) return 1;
  float largest = 0, difference = 0;
  for (size_t i = 0; i < g.size(); ++i) {
    largest = std::max(largest, std::fabs(g[i]));
    difference = std::max(difference, std::fabs(g[i] - corrected[i]));
  }
  std::printf("largest difference from the CPU %g of %g\n", double{difference}, double{largest});
  return info == cpu_info && info == std::vector<int32_t>(kChunks, 0) && difference < 1e-4f * largest ? 0 : 1;
}
