// Row capture: a uniform sample of the input rows that a layer sees between two optimizer steps.
//
// The rows of all calls of a step form one stream, which is cut into blocks of `stride` rows.  Every block gives one
// row, drawn at random in it; a block may begin in one call and end in another.  The first call sets the stride.  Its
// last block gives a row even if it is shorter, so the rows of one call are those of sample_rows; when a second call
// completes the block, one of the new rows takes the place of that row as often as it should.  When the buffer would
// overflow, the stride doubles: of every two neighbouring blocks one, drawn at random, keeps its row.  So in every
// block every row is kept with the probability 1 / stride, whatever the calls; what rows at a fixed distance have in
// common (a column of an image, a position, a period) decides nothing.  As long as everything fits, stride is 1 and
// several calls leave what one large call leaves.
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
  int64_t stride;   // rows of a block; 0 before the first call
  int64_t next;     // the row that block number `used` gives; counted like seen + skipped
  int64_t mark;     // rows that were in the buffer at the last backward pass
  int64_t thinned;  // how often the stride has doubled
  int64_t forward;  // 1: a call outside of any backward pass has been seen
  int64_t step;     // third word of the random numbers
  int64_t paused;   // 1: captures nothing
  int64_t skipped;  // > 0: so much shorter was the last block of the only call so far; < 0: rows before block 0
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
  // [capacity, units], contiguous.  The dtype of x, or float32 or float64; bfloat16 if x is float32, which is rounded.
  DType rows_dtype;
  void* rows;
  int64_t capacity;
  CaptureState* state;
  uint64_t seed;
  uint32_t layer;
  bool in_backward;  // the call comes from a backward pass
  bool marks;        // before anything else, as capture_mark without a restart: a mark that needs no launch
};

// What one call does, in this order: row j of the buffer becomes row source_of(j) for all j below `kept`, `count` rows
// of x are appended, and the state becomes `after`.
struct CapturePlan {
  CaptureState after;
  int64_t move_first;           // the rows before it leave the buffer
  uint32_t levels, last_level;  // how often the stride doubles in this call, and all in all
  int64_t kept, count;
  int64_t first;   // the first appended row, in x; of block number `kept`
  int64_t origin;  // row 0 of x, in the stream
  RowDraws draws;  // of the other appended rows

  CO_HOST_DEVICE bool moves() const { return levels != 0 || move_first != 0; }
  // Rows move to lower places only.
  CO_HOST_DEVICE int64_t source_of(int64_t row) const;
  CO_HOST_DEVICE int64_t row_of_x(int64_t appended) const {
    return appended == 0 ? first : draws.row(kept + appended) - origin;
  }
};

CO_HOST_DEVICE inline uint32_t pair_word(const RowDraws& draws, uint32_t level, int64_t pair) {
  const Philox4 words = philox(draws.seed, draws.step, draws.layer, draw_purpose(kPairDraw, level, pair));
  return word_of(words, pair);
}

// Whether blocks 2 `pair` and 2 `pair` + 1 of the level below give their row to the second: 0 or 1.
CO_HOST_DEVICE inline int64_t second_of_pair(const RowDraws& draws, uint32_t level, int64_t pair) {
  return pair_word(draws, level, pair) >> 31;
}

CO_HOST_DEVICE inline int64_t CapturePlan::source_of(int64_t row) const {
  for (uint32_t level = last_level; level > last_level - levels; --level) {
    row = 2 * row + second_of_pair(draws, level, row);
  }
  return row + move_first;
}

// How many of the blocks used, used + 1, ... give a row below `end`.
CO_HOST_DEVICE inline int64_t rows_due(const CaptureState& s, const RowDraws& draws, int64_t end) {
  if (s.next >= end) return 0;
  const int64_t last = end / s.stride;  // the block that may still be incomplete
  return last <= s.used ? 1 : last - s.used + (draws.row(last) < end);
}

CO_HOST_DEVICE inline CapturePlan plan_capture(const CaptureProblem& p, CaptureState s) {
  if (p.marks) s.mark = s.used;
  int64_t rows = 1;
  for (int i = 0; i < kMaxCaptureDims; ++i) rows *= p.row_size[i];
  const auto level = static_cast<uint32_t>(s.thinned);
  CapturePlan plan{s, 0, 0, level, s.used, 0, 0, 0, {p.seed, static_cast<uint64_t>(s.step), p.layer, level, 1, 0}};
  if (s.paused != 0 || rows == 0 || p.units == 0) return plan;
  if (p.in_backward && s.forward != 0) return plan;
  if (!p.in_backward) s.forward = 1;
  RowDraws& draws = plan.draws;
  draws.end = INT64_MAX;
  if (s.stride == 0) {
    const RowSample sample = sample_rows(rows, p.capacity);
    draws.stride = s.stride = sample.stride;
    draws.end = rows;
    s.next = draws.row(0);
    s.skipped = sample.count * sample.stride - rows;
    plan.count = sample.count;
  } else {
    draws.stride = s.stride;
    if (s.skipped > 0) {  // the last block of the first call goes on
      const int64_t block = s.used - 1, place = below(pair_word(draws, 0, block), s.stride);
      if (place >= s.stride - s.skipped) {  // its row comes from this call, or a later one
        s.used = block;
        s.mark = s.mark < block ? s.mark : block;
        s.next = block * s.stride + place;
      }
      s.skipped = 0;
    }
    plan.origin = s.seen + s.skipped;
    const int64_t end = plan.origin + rows;
    while (s.used + (plan.count = rows_due(s, draws, end)) > p.capacity) {
      const uint32_t next_level = draws.level + 1;
      const int64_t pair = s.used / 2;
      // The block whose row is due next is the first or the second of its pair, and only in the second case has the
      // pair a row in the buffer.
      const bool second = second_of_pair(draws, next_level, pair) != 0, has_row = s.used % 2 != 0;
      if (second && !has_row) s.next = draws.row(s.used + 1);
      const int64_t marked_pair = s.mark / 2;
      s.mark = marked_pair + (s.mark % 2 != 0 && second_of_pair(draws, next_level, marked_pair) == 0);
      s.used = pair + (has_row && !second);
      s.stride *= 2;
      s.thinned += 1;
      draws.stride = s.stride;
      draws.level = next_level;
      if (has_row && !second) s.next = draws.row(s.used);
      plan.levels += 1;
      plan.last_level = next_level;
    }
  }
  plan.kept = s.used;
  plan.first = s.next - plan.origin;
  s.used += plan.count;
  s.seen += rows;
  if (plan.count > 0) {
    RowDraws following = draws;
    following.end = INT64_MAX;
    s.next = following.row(s.used);
  }
  plan.after = s;
  return plan;
}

// The same for capture_mark: a restart moves the rows after the mark to the front.  Where there are none, the same
// forward pass has been differentiated again, and its rows stay.
CO_HOST_DEVICE inline CapturePlan plan_mark(CaptureState s, bool restart) {
  CapturePlan plan{s, restart && s.mark < s.used ? s.mark : 0, 0, 0, s.used, 0, 0, 0, {0, 0, 0, 0, 1, 0}};
  plan.kept = s.used - plan.move_first;
  plan.after.used = plan.after.mark = plan.kept;
  plan.after.next -= plan.move_first * s.stride;  // block number 0 is again that of row 0
  plan.after.skipped -= plan.move_first * s.stride;
  return plan;
}

// CPU.  Invalid: capacity < 1, or a rows_dtype that rows_dtype above does not allow.
Status capture_rows_cpu(const CaptureProblem& problem, const ThreadPool& pool);

// Notes that the rows captured so far have been through a backward pass.  `restart`: that pass began a new gradient, so
// rows that were marked before belong to a gradient that was thrown away (a skipped step) and are removed, if there are
// others.  Uses rows, rows_dtype, units and state of the problem.
Status capture_mark_cpu(const CaptureProblem& problem, bool restart);

}  // namespace consistency_ops
