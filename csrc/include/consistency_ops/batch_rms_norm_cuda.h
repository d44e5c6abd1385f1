// The CUDA launchers of batch_rms_norm.h.  They queue on `stream` (a cudaStream_t) and return at once: no
// synchronisation, no allocation.  Element types are float32, bfloat16 and float16; statistics and D are float32.
#pragma once

#include "consistency_ops/batch_rms_norm.h"

namespace consistency_ops {

// Two kernels, one where x is null or empty.  `workspace` is device memory of batch_rms_norm_workspace_cuda() bytes,
// aligned to 4; it need not be initialised.
Status batch_rms_norm_denominator_cuda(const BatchRmsNormParams& params, void* workspace, void* stream);
int64_t batch_rms_norm_workspace_cuda(const BatchRmsNormParams& params);

// One kernel.
Status channel_divide_cuda(const ChannelDivideParams& params, void* stream);

}  // namespace consistency_ops
