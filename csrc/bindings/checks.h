// What every binding checks, and how it says so: `op: what must hold, got value`.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "bindings/describe.h"
#include "consistency_ops/types.h"

namespace consistency_ops::bindings {

using torch::stable::Tensor;

inline void check_status(Status status, const char* op) {
  STD_TORCH_CHECK(status != Status::kOutOfMemory, op, ": out of memory for the workspace; no gradient was changed");
  STD_TORCH_CHECK(status != Status::kLaunchFailed, op, ": its CUDA kernel could not be launched: ", launch_error());
  STD_TORCH_CHECK(status == Status::kOk, op, ": the arguments break a bound that consistency_ops.ops checks");
}

}  // namespace consistency_ops::bindings
