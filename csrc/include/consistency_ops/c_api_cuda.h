/* The CUDA launchers of c_api.h, with C linkage; sm_80 and newer.  They are in the library where it was built with
 * nvcc.
 *
 * Streams.  A launcher works on the current device of the calling thread, queues kernels on `stream` (a cudaStream_t;
 *   NULL is the default stream) and returns: it allocates no device memory, copies nothing and does not synchronise, so
 *   it can be captured in a CUDA graph.  Data pointers are device pointers and must stay valid until the stream has
 *   passed the work; structs are read by the call itself.
 * Workspace.  Device memory of the caller, of as many bytes as the _workspace_ function says for the very parameters of
 *   the launch; NULL where that is 0.  Launches that may overlap need separate workspaces.
 * Types.  CO_FLOAT32, CO_BFLOAT16 and CO_FLOAT16; everything is computed in float32, statistics and D are CO_FLOAT32.
 *
 * All else as in c_api.h.  These kernels have run on a host simulator, never yet on a GPU. */
#ifndef CONSISTENCY_OPS_C_API_CUDA_H_
#define CONSISTENCY_OPS_C_API_CUDA_H_

#include "consistency_ops/c_api.h"

/* The CUDA runtime's text for the last CO_ERROR_LAUNCH_FAILED on this thread. */
CO_API const char* co_launch_error(void);

typedef struct co_cuda_device {
  int32_t shared_bytes;       /* cudaDevAttrMaxSharedMemoryPerBlockOptin */
  int32_t compute_capability; /* 10 * major + minor */
} co_cuda_device;

/* NULL stands for all zero. */
typedef struct co_cuda_tuning {
  int32_t rung;    /* how the CTAs of a chunk meet; 0: automatic, 1: one CTA, 2: a cluster, 3: through the workspace */
  int32_t ctas;    /* of a chunk: 1 .. 8 on rung 2, 1 .. 1024 on rung 3; 0: automatic */
  bool tf32;       /* one TF32 pass for every product instead of float32 accuracy */
  int32_t packing; /* rows are permuted first, so that the units of a chunk lie together; 0: automatic, 1: never,
                      2: wherever it is possible */
} co_cuda_tuning;

#define CO_CUDA_COUNTER_BYTES 2048

/* co_precondition_cpu on the GPU, one kernel for about a hundred layers.  Chunks above 192 units need 163 KiB of shared
 * memory a block; at most 112 layers in a row have the same input.  workspace: 16-byte aligned; its first
 * CO_CUDA_COUNTER_BYTES are zero before the first use, and every launch leaves them zero. */
CO_API int co_precondition_cuda(const co_precondition_layer* layers, int64_t count,
                                const co_precondition_options* options, const co_cuda_device* device, void* workspace,
                                void* stream, const co_cuda_tuning* tuning);

/* Bytes, enough for every device; a negative code for a bad argument. */
CO_API int64_t co_precondition_workspace_cuda(const co_precondition_layer* layers, int64_t count,
                                              const co_precondition_options* options, const co_cuda_tuning* tuning);

CO_API int co_modulus_cuda(int32_t dtype, int64_t numel, const void* x, void* y, uint8_t* signs, void* stream);
CO_API int co_modulus_backward_cuda(int32_t dtype, int64_t numel, const void* grad, const uint8_t* signs, void* grad_x,
                                    void* stream);

/* running_ms and denominator: CO_FLOAT32.  workspace: co_batch_rms_norm_workspace_cuda bytes, aligned to 4, need not be
 * initialised. */
CO_API int co_batch_rms_norm_denominator_cuda(int32_t dtype, const void* x, const co_channel_view* view,
                                              float* running_ms, int64_t* num_batches, float* denominator, double decay,
                                              double eps, void* workspace, void* stream);
CO_API int64_t co_batch_rms_norm_workspace_cuda(int32_t dtype, const void* x, const co_channel_view* view);
CO_API int co_channel_divide_cuda(int32_t dtype, const void* x, const co_channel_view* x_view, void* y,
                                  const co_channel_view* y_view, const float* denominator, void* stream);

#endif /* CONSISTENCY_OPS_C_API_CUDA_H_ */
