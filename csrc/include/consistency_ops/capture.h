// Row capture: a uniform sample of the input rows that a layer sees between two optimizer steps.
//
// The rows of all calls of a step form one stream.  The first call takes every stride-th row after a random offset, as
// sample_rows does; later calls continue the pattern.  When the buffer would overflow, every second captured row is
// dropped (even or odd ones, at random) and the stride doubles, so every row of the stream is kept with the same
// probability 1 / stride.  As long as everything fits, stride is 1 and several calls leave what one large call leaves.
//
// A call inside a backward pass is the recomputation of a checkpointed block.  It counts only where the forward pass
// was not seen (reentrant checkpointing runs it without gradients).
#pragma once

#include "consistency_ops/random.h"
#include "consistency_ops/types.h"

namespace consistency_ops {

constexpr int kMaxCaptureDims = 4;

// One row of the int64 state tensor; lives where the rows live, so that nobody needs to read it on the host.
struct CaptureState {
  int64_t used;     // rows in the buffer
  int64_t seen;     // rows offered since the last reset
  int64_t stride;   // 0 before the first call
  int64_t next;     // index in the stream of the next row to take
  int64_t mark;     // rows that were in the buffer at the last backward pass
  int64_t thinned;  // how often every second row was dropped
  int64_t forward;  // 1: a call outside of any backward pass has been seen
  int64_t step;     // third word of the random offset
  int64_t paused;   // 1: captures nothing
};
constexpr int kCaptureStateSize = sizeof(CaptureState) / sizeof(int64_t);

struct CaptureProblem {
  // Element (r, u) of the input is x[sum_i r_i * row_stride[i] + u * unit_stride], where r_i are the digits of r in
  // base row_size, the last one fastest.  Unused dimensions have size 1.  Strides count elements.
  const void* x;
  int64_t row_size[kMaxCaptureDims];
  int64_t row_stride[kMaxCaptureDims];
  int64_t unit_stride;
  int64_t units;
  DType x_dtype;
  // [capacity, units], contiguous.  The dtype of x, or float32 or float64.
  DType rows_dtype;
  void* rows;
  int64_t capacity;
  CaptureState* state;
  uint64_t seed;
  uint32_t layer;
  bool in_backward;  // the call comes from a backward pass
};

// CPU.  Invalid: capacity < 1, or a rows_dtype that x cannot be widened to.
Status capture_rows_cpu(const CaptureProblem& problem, const ThreadPool& pool);

// Notes that the rows captured so far have been through a backward pass.  `restart`: that pass began a new gradient, so
// rows that were marked before belong to a gradient that was thrown away (a skipped step) and are removed. Uses rows,
// rows_dtype, units and state of the problem.
Status capture_mark_cpu(const CaptureProblem& problem, bool restart);

}  // namespace consistency_ops
