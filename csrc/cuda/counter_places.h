// Which place of the library's own counters a launch takes (CudaTuning::counters).  Host only, free of CUDA.
//
// A place is zero before and after every launch, so nothing has to be filled with zeros first; but two launches that
// overlap must not share one.  Launches on one stream run one after the other and share the place of their stream.  A
// captured launch may be replayed beside any other, from now on and for as long as its graph lives, of which nobody
// tells us the end: it gets a place that is never given away again.  The places are 474 KiB of a device; who finds none
// left counts in the workspace and fills that with zeros, one small kernel more.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "consistency_ops/precondition_cuda.h"

namespace consistency_ops {

class CounterPlaces {
 public:
  static constexpr int32_t kStreams = 64;  // of kCudaCounterPlaces; the others are for captured launches

  // `stream` is an identity that no later stream gets (cudaStreamGetId): a handle may be used again while work of its
  // last owner still runs.  -1: there is no place left.
  int32_t of_stream(int device, uint64_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = of_stream_.find({device, stream});
    if (found != of_stream_.end()) return found->second;
    int32_t& used = streams_[device];
    if (used == kStreams) return -1;
    return of_stream_[{device, stream}] = used++;
  }

  // Another one at every call; -1: there is no place left.
  int32_t of_capture(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int32_t& used = captures_[device];
    return kStreams + used == kCudaCounterPlaces ? -1 : kStreams + used++;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<int, uint64_t>, int32_t> of_stream_;
  std::map<int, int32_t> streams_, captures_;  // places given away on a device
};

}  // namespace consistency_ops
