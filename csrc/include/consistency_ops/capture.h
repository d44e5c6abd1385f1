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
  int64_t arrived;  // CUDA: thread blocks of the running launch that are done; 0 between launches
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

// What one call does, in this order: row j of the buffer becomes row move_first + j * move_stride for all j below
// `kept`, rows first, first + stride, ... of x are appended, and the state becomes `after`.
struct CapturePlan {
  CaptureState after;
  int64_t move_first, move_stride, kept;
  int64_t first, stride, count;
  CO_HOST_DEVICE bool moves() const { return move_stride != 1 || move_first != 0; }
};

constexpr uint32_t kThinningPurpose = 16;  // random.h uses 0 to 2

// How many of the stream's rows next, next + stride, ... lie below `end`.
CO_HOST_DEVICE inline int64_t rows_due(const CaptureState& s, int64_t end) {
  return s.next < end ? (end - s.next + s.stride - 1) / s.stride : 0;
}

CO_HOST_DEVICE inline CapturePlan plan_capture(const CaptureProblem& p, CaptureState s) {
  int64_t rows = 1;
  for (int i = 0; i < kMaxCaptureDims; ++i) rows *= p.row_size[i];
  CapturePlan plan{s, 0, 1, s.used, 0, 1, 0};
  if (s.paused != 0 || rows == 0 || p.units == 0) return plan;
  if (p.in_backward && s.forward != 0) return plan;
  if (!p.in_backward) s.forward = 1;
  if (s.stride == 0) {
    const RowSample sample = sample_rows(rows, p.capacity, p.seed, static_cast<uint64_t>(s.step), p.layer);
    s.stride = sample.stride;
    s.next = sample.offset;
  }
  const int64_t end = s.seen + rows;
  while (s.used + rows_due(s, end) > p.capacity) {  // every second row goes
    const uint32_t purpose = kThinningPurpose + static_cast<uint32_t>(s.thinned++);
    const int64_t parity = philox(p.seed, static_cast<uint64_t>(s.step), p.layer, purpose).v[0] & 1;
    if (s.used % 2 != parity) s.next += s.stride;
    s.mark = s.mark > parity ? (s.mark - parity + 1) / 2 : 0;
    s.used = s.used > parity ? (s.used - parity + 1) / 2 : 0;
    s.stride *= 2;
    plan.move_first += parity * plan.move_stride;
    plan.move_stride *= 2;
  }
  plan.kept = s.used;
  plan.first = s.next - s.seen;
  plan.stride = s.stride;
  plan.count = rows_due(s, end);
  s.used += plan.count;
  s.next += plan.count * s.stride;
  s.seen = end;
  plan.after = s;
  return plan;
}

// The same for capture_mark: a restart moves the rows after the mark to the front.  Where there are none, the same
// forward pass has been differentiated again, and its rows stay.
CO_HOST_DEVICE inline CapturePlan plan_mark(CaptureState s, bool restart) {
  CapturePlan plan{s, restart && s.mark < s.used ? s.mark : 0, 1, s.used, 0, 1, 0};
  plan.kept = s.used - plan.move_first;
  plan.after.used = plan.after.mark = plan.kept;
  return plan;
}

// CPU.  Invalid: capacity < 1, or a rows_dtype that x cannot be widened to.
Status capture_rows_cpu(const CaptureProblem& problem, const ThreadPool& pool);

// Notes that the rows captured so far have been through a backward pass.  `restart`: that pass began a new gradient, so
// rows that were marked before belong to a gradient that was thrown away (a skipped step) and are removed, if there are
// others.  Uses rows, rows_dtype, units and state of the problem.
Status capture_mark_cpu(const CaptureProblem& problem, bool restart);

}  // namespace consistency_ops
