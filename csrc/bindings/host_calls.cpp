#include "bindings/host_calls.h"

#include <mutex>

#include "bindings/thread_pool.h"
#include "consistency_ops/c_api.h"

namespace {

// A call reads the state of a layer and writes it back: threads that share a model take turns.
std::mutex turn;

}  // namespace

namespace consistency_ops::bindings {

Status capture_rows_in_turn(const CaptureProblem& problem) {
  const std::lock_guard<std::mutex> lock(turn);
  return capture_rows_cpu(problem, thread_pool());
}

Status capture_mark_in_turn(const CaptureProblem& problem, bool restart) {
  const std::lock_guard<std::mutex> lock(turn);
  return capture_mark_cpu(problem, restart);
}

}  // namespace consistency_ops::bindings

// A HostCalls; consistency_ops/engine/host_path.py gives its address to csrc/torch_abi.
CO_API const void* co_host_calls(void);
const void* co_host_calls(void) {
  using namespace consistency_ops;
  static const bindings::HostCalls calls = {
      bindings::kHostCallsLayout, bindings::capture_rows_in_turn, bindings::capture_mark_in_turn,
      [](const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options) {
        return precondition_cpu(layers, count, options, bindings::thread_pool());
      }};
  return &calls;
}
