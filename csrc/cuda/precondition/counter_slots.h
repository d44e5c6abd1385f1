// Chooses the slot of the library's own counters that a launch uses (CudaTuning::counters).  Host only, without CUDA.
//
// A slot is zero before and after every launch, so no call has to fill it with zeros; but two launches that overlap
// must not share one.  Launches on one stream run one after the other and share the slot of their stream.  A captured
// launch may be replayed beside any other launch for as long as its graph lives, and nothing says when that ends: it
// gets a slot that is never given away again.  All slots together take 474 KiB of a device.  A launch for which no slot
// is left counts in the workspace, which is then filled with zeros by one more small kernel.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "consistency_ops/precondition_cuda.h"

namespace consistency_ops {

class CounterSlots {
 public:
  static constexpr int32_t kStreams = 64;  // of kCudaCounterSlots; the others are for captured launches

  // `stream` is an identity that no later stream gets (cudaStreamGetId): a handle may be used again while work of its
  // last owner still runs.  -1: no slot is left.
  int32_t of_stream(int device, uint64_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = of_stream_.find({device, stream});
    if (found != of_stream_.end()) return found->second;
    int32_t& used = streams_[device];
    if (used == kStreams) return -1;
    return of_stream_[{device, stream}] = used++;
  }

  // A new slot at every call; -1: no slot is left.
  int32_t of_capture(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int32_t& used = captures_[device];
    return kStreams + used == kCudaCounterSlots ? -1 : kStreams + used++;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<int, uint64_t>, int32_t> of_stream_;
  std::map<int, int32_t> streams_, captures_;  // slots given away on a device
};

}  // namespace consistency_ops
