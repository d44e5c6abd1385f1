// torch's own threads as the ThreadPool of the torch-free launchers.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "consistency_ops/types.h"

namespace consistency_ops::bindings {

inline ThreadPool thread_pool() {
  ThreadPool pool;
  pool.threads = static_cast<int32_t>(torch::stable::get_num_threads());
  pool.run = [](void*, int64_t tasks, void (*task)(void*, int64_t), void* argument) {
    torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(argument, i);
    });
  };
  return pool;
}

}  // namespace consistency_ops::bindings
