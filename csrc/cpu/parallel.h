// Tasks on the caller's ThreadPool, for any callable.
#pragma once

#include "consistency_ops/types.h"

namespace consistency_ops::cpu {

// body(task) for every task in [0, tasks); a single task stays on the calling thread.
template <typename Body>
void run_tasks(const ThreadPool& pool, int64_t tasks, const Body& body) {
  if (pool.run == nullptr || tasks == 1) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  pool.run(
      pool.context, tasks, [](void* argument, int64_t index) { (*static_cast<const Body*>(argument))(index); },
      const_cast<Body*>(&body));
}

}  // namespace consistency_ops::cpu
