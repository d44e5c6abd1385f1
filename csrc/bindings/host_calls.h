// What csrc/torch_abi calls in the library that it was built beside: the kernels of the CPU, without torch's
// dispatcher.
#pragma once

#include "consistency_ops/capture.h"
#include "consistency_ops/precondition.h"

namespace consistency_ops::bindings {

// To be raised where a struct below changes and keeps its size.
constexpr int64_t kHostCallsVersion = 1;
// A number that changes with the structs below: a library and an accelerator with different ones do not fit.
constexpr int64_t kHostCallsLayout =
    ((static_cast<int64_t>(sizeof(CaptureProblem)) * 4096 + static_cast<int64_t>(sizeof(PreconditionLayer))) * 4096 +
     static_cast<int64_t>(sizeof(PreconditionOptions))) *
        4096 +
    kCaptureStateSize + 64 * kHostCallsVersion;

struct HostCalls {
  int64_t layout;
  // As the operators of these names: captures take turns, the correction runs on torch's threads.
  Status (*capture_rows)(const CaptureProblem& problem);
  Status (*capture_mark)(const CaptureProblem& problem, bool restart);
  Status (*precondition)(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options);
};

Status capture_rows_in_turn(const CaptureProblem& problem);
Status capture_mark_in_turn(const CaptureProblem& problem, bool restart);

}  // namespace consistency_ops::bindings
