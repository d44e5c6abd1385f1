// The launch of csrc/cuda/port.cuh under the driver's rules for shared memory and clusters, on a fake runtime
// (fake_cuda/cuda_runtime.h): every size that a device has can be launched first, from any thread, on any device.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#define __CUDACC__
#include <cuda_runtime.h>
// after it, as nvcc does
#include "cuda/port.cuh"

using namespace consistency_ops;

namespace {

constexpr int kStatic = 4672, kOptIn = 227 << 10, kDefault = 48 << 10;

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
std::mutex turn;
std::map<std::pair<const void*, int>, int> allowed;  // dynamic bytes of a kernel in the context of a device
std::atomic<int> sets{0}, queries{0}, lowered{0};
std::atomic<bool> clusters_are_known{true};
std::atomic<int> clusters_that_fit{1};

cudaError_t failed(cudaError_t error) { return last_error = error; }

int& limit_of(const void* kernel) {
  return allowed.try_emplace({kernel, current_device}, kDefault - kStatic).first->second;
}

struct Params {
  int value;
};
void small_kernel(Params) {}
void large_kernel(Params) {}

void require(bool good, const char* what) {
  if (good) return;
  std::printf("%s\n", what);
  std::exit(1);
}

Status run(void (*kernel)(Params), size_t bytes, int cluster = 1) {
  return launch(kernel, dim3(8), dim3(256), bytes, nullptr, Params{1}, cluster);
}

}  // namespace

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = kOptIn;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = kStatic;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  const std::lock_guard<std::mutex> lock(turn);
  ++sets;
  if (value < 0 || value + kStatic > kOptIn) return failed(cudaErrorInvalidValue);
  lowered += value < limit_of(kernel);
  limit_of(kernel) = value;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  ++queries;
  if (!clusters_are_known) return failed(cudaErrorNotSupported);
  *clusters = clusters_that_fit;
  return cudaSuccess;
}
cudaError_t launch_on_the_fake(const void* kernel, const cudaLaunchConfig_t& config) {
  const std::lock_guard<std::mutex> lock(turn);
  return static_cast<int>(config.dynamicSmemBytes) > limit_of(kernel) ? failed(cudaErrorInvalidValue) : cudaSuccess;
}

int main() {
  // 45,072 and 47,120 bytes are what layers of 6144 and 7168 units take with an exact division.
  for (const size_t bytes : {size_t{45072}, size_t{47120}, size_t{49152}, size_t{76288}, size_t{kOptIn - kStatic}}) {
    allowed.clear();
    current_device = static_cast<int>(bytes);  // a device of its own: nothing was launched there
    require(run(small_kernel, bytes) == Status::kOk, "a first launch is refused");
  }
  const int before = sets;
  for (int i = 0; i < 100; ++i) require(run(small_kernel, 60000 + 16 * i) == Status::kOk, "a later launch is refused");
  require(sets == before, "the attribute is set at every launch");
  require(run(small_kernel, kOptIn) == Status::kLaunchFailed, "more than the device has is launched");
  require(cudaGetLastError() == cudaSuccess, "a refused launch leaves its error behind");

  current_device = 1;
  std::vector<std::thread> threads;
  std::atomic<int> refused{0};
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      current_device = t % 2;
      for (int i = 0; i < 2000; ++i) {
        const size_t bytes = 44000 + (static_cast<size_t>(i) * 7919 + static_cast<size_t>(t) * 104729) % 100000;
        refused += run(i % 3 ? small_kernel : large_kernel, bytes) != Status::kOk;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  require(refused == 0, "a launch beside others is refused");
  require(lowered == 0, "the attribute is lowered");

  current_device = 2;
  require(clusters_fit(small_kernel, dim3(512), 183 << 10, 8), "clusters that fit are refused");
  const int asked = queries;
  require(clusters_fit(small_kernel, dim3(512), 183 << 10, 8) && queries == asked, "the device is asked twice");
  clusters_that_fit = 0;
  require(!clusters_fit(small_kernel, dim3(512), 183 << 10, 4), "clusters that do not fit are taken");
  clusters_are_known = false;
  require(!clusters_fit(large_kernel, dim3(512), 183 << 10, 8), "clusters are taken where the query fails");
  require(cudaGetLastError() == cudaSuccess, "the query leaves its error behind");
  std::printf("ok\n");
}
