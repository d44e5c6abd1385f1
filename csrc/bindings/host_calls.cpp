#include "bindings/host_calls.h"

#include "bindings/thread_pool.h"
#include "consistency_ops/c_api.h"

// A HostCalls; consistency_ops/host.py gives its address to csrc/torch_abi.
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
