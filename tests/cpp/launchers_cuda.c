/* The CUDA launchers of the C interface, in C: the correction of a gradient on the GPU against the CPU, which draws the
 * same division, and the modulus with its bits.  Exit status 77: no CUDA device. */
#include <consistency_ops/c_api_cuda.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kRows = 256, kUnits = 150, kOutputs = 40, kChunks = 2, kBits = (kOutputs * kUnits + 7) / 8 };

static void check(int ok, const char* what) {
  if (ok) return;
  fprintf(stderr, "%s: %s; %s\n", what, cudaGetErrorString(cudaGetLastError()), co_launch_error());
  exit(1);
}

static void* on_device(const void* values, size_t bytes) {
  void* copy = NULL;
  check(cudaMalloc(&copy, bytes) == cudaSuccess, "cudaMalloc");
  check(cudaMemcpy(copy, values, bytes, cudaMemcpyHostToDevice) == cudaSuccess, "copy to the GPU");
  return copy;
}

static co_precondition_layer describe(const float* x, float* g, int32_t* info) {
  co_precondition_layer layer = {0};
  for (int d = 0; d < 4; ++d) layer.x_row_size[d] = 1;
  for (int d = 0; d < 3; ++d) layer.g_tap_size[d] = 1;
  layer.x = x;
  layer.x_row_size[3] = kRows;
  layer.x_row_stride[3] = kUnits;
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

int main(void) {
  static float x[kRows * kUnits], g[kOutputs * kUnits], corrected[kOutputs * kUnits], magnitude[kOutputs * kUnits];
  static uint8_t signs[kBits];
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    puts("no CUDA device");
    return 77;
  }
  int shared = 0, major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) == cudaSuccess, "attribute");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess, "attribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0) == cudaSuccess, "attribute");
  const co_cuda_device device = {shared, 10 * major + minor};

  srand(1);
  for (int i = 0; i < kRows * kUnits; ++i) x[i] = 2.0f * (float)rand() / (float)RAND_MAX - 1.0f;
  for (int i = 0; i < kOutputs * kUnits; ++i) g[i] = 2.0f * (float)rand() / (float)RAND_MAX - 1.0f;
  int32_t info[kChunks] = {-1, -1}, cpu_info[kChunks] = {-1, -1};
  float* const device_x = on_device(x, sizeof x);
  float* const device_g = on_device(g, sizeof g);
  int32_t* const device_info = on_device(info, sizeof info);
  uint8_t* const device_signs = on_device(signs, sizeof signs);
  cudaStream_t stream = NULL;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess, "cudaStreamCreate");

  co_precondition_options options = {0};
  options.damping = 0.1;
  options.trace_scaling = true;
  options.chunk = 128;
  options.max_rows = kRows;
  options.stages = CO_STAGE_ALL;
  const co_precondition_layer layer = describe(device_x, device_g, device_info);
  const int64_t bytes = co_precondition_workspace_cuda(&layer, 1, &options, NULL);
  void* workspace = NULL;
  check(bytes >= 0, "co_precondition_workspace_cuda");
  if (bytes > 0) {
    check(cudaMalloc(&workspace, (size_t)bytes) == cudaSuccess, "cudaMalloc");
    check(cudaMemsetAsync(workspace, 0, CO_CUDA_COUNTER_BYTES, stream) == cudaSuccess, "cudaMemset");
  }
  check(co_precondition_cuda(&layer, 1, &options, &device, workspace, stream, NULL) == 0, "co_precondition_cuda");
  check(cudaStreamSynchronize(stream) == cudaSuccess, "cudaStreamSynchronize");
  check(cudaMemcpy(corrected, device_g, sizeof g, cudaMemcpyDeviceToHost) == cudaSuccess, "copy of G");
  check(cudaMemcpy(info, device_info, sizeof info, cudaMemcpyDeviceToHost) == cudaSuccess, "copy of info");
  check(co_modulus_cuda(CO_FLOAT32, kOutputs * kUnits, device_g, device_g, device_signs, stream) == 0, "modulus");
  check(cudaStreamSynchronize(stream) == cudaSuccess, "cudaStreamSynchronize");
  check(cudaMemcpy(magnitude, device_g, sizeof g, cudaMemcpyDeviceToHost) == cudaSuccess, "copy of |G|");
  check(cudaMemcpy(signs, device_signs, sizeof signs, cudaMemcpyDeviceToHost) == cudaSuccess, "copy of the bits");

  const co_precondition_layer on_cpu = describe(x, g, cpu_info);
  if (co_precondition_cpu(&on_cpu, 1, &options, NULL) != 0) return 1;
  float largest = 0, difference = 0;
  for (int i = 0; i < kOutputs * kUnits; ++i) {
    largest = fmaxf(largest, fabsf(g[i]));
    difference = fmaxf(difference, fabsf(g[i] - corrected[i]));
    if (magnitude[i] != fabsf(corrected[i]) || (signs[i / 8] >> i % 8 & 1) != (corrected[i] < 0)) return 1;
  }
  printf("largest difference from the CPU %g of %g\n", (double)difference, (double)largest);
  return memcmp(info, cpu_info, sizeof info) == 0 && info[0] == 0 && difference < 1e-4f * largest ? 0 : 1;
}
