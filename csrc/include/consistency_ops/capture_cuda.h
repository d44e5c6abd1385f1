// The CUDA launchers of capture.h.  They queue one kernel on `stream` (a cudaStream_t) and return at once: no
// synchronisation, no allocation, and no value of the state is read by the host, so they can be captured in a graph.
#pragma once

#include "consistency_ops/capture.h"

namespace consistency_ops {

Status capture_rows_cuda(const CaptureProblem& problem, void* stream);
Status capture_mark_cuda(const CaptureProblem& problem, bool restart, void* stream);

}  // namespace consistency_ops
