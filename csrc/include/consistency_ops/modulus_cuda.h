// The CUDA launchers of modulus.h.  They queue one kernel on `stream` (a cudaStream_t) and return at once.
#pragma once

#include "consistency_ops/modulus.h"

namespace consistency_ops {

Status modulus_cuda(const ModulusParams& params, void* stream);
Status modulus_backward_cuda(const ModulusBackwardParams& params, void* stream);

}  // namespace consistency_ops
