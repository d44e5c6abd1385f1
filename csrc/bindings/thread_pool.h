// torch's own threads as the ThreadPool of the torch-free launchers.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "consistency_ops/types.h"

namespace consistency_ops::bindings {

// Whether this process was forked from one that had several threads: then everything runs on the calling thread.
bool lost_its_threads();

// The calling thread starts OpenMP's threads, if there are not any yet.
void note_use_of_threads();

inline ThreadPool thread_pool() {
  ThreadPool pool;
  if (lost_its_threads()) {
    pool.threads = 1;
    return pool;
  }
  pool.threads = static_cast<int32_t>(torch::stable::get_num_threads());
  pool.run = [](void*, int64_t tasks, void (*task)(void*, int64_t), void* argument) {
    if (torch::stable::get_num_threads() > 1) note_use_of_threads();
    torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(argument, i);
    });
  };
  return pool;
}

}  // namespace consistency_ops::bindings
