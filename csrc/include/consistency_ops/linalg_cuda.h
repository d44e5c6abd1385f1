// The CUDA launchers of linalg.h: float32 only.  They queue one kernel on `stream` (a cudaStream_t) and return at once.
#pragma once

#include "consistency_ops/linalg.h"
#include "consistency_ops/precondition_cuda.h"

namespace consistency_ops {

// Matrices above 192 rows need a device with 163 KiB of shared memory a block: kInvalidArgument elsewhere.
Status spd_inverse_cuda(const SpdParams& params, const CudaDevice& device, void* stream);
Status spd_solve_cuda(const SpdParams& params, const CudaDevice& device, void* stream);

}  // namespace consistency_ops
