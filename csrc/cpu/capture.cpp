// Row capture on the CPU.  Bound by memory: contiguous rows are one memcpy, everything else is read once and written
// once.
#include "consistency_ops/capture.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/strided.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace consistency_ops {
namespace {

constexpr int64_t kTile = 64;               // rows of a tile: its offsets fit on the stack, its columns in L1
constexpr int64_t kTaskBytes = 512 * 1024;  // below this, waking a thread costs more than it saves
// The same of rows that are one block.  The threads that have just computed it are awake, and have parts of it in
// cache.
constexpr int64_t kBlockTaskBytes = 120 * 1024;

#include "cpu/convert.inl"

struct Copy {
  const CaptureProblem* problem;
  const CapturePlan* plan;
  int64_t task_rows;
};

template <typename From, typename To>
void convert_all(const From* from, int64_t count, To* to) {
  constexpr int kLength = 16;
  int64_t i = 0;
  if constexpr (std::is_same_v<To, BFloat16>) {  // compilers do not find the vector form of this rounding
    for (; i + kLength <= count; i += kLength) narrow_all<kLength>(from + i, to + i);
  }
  for (; i < count; ++i) to[i] = narrow<To>(widen(from[i]));
}

template <typename From, typename To>
void copy_tile(const CaptureProblem& p, const int64_t* offset, int64_t count, To* to) {
  const From* x = static_cast<const From*>(p.x);
  if (p.unit_stride == 1) {
    for (int64_t r = 0; r < count; ++r, to += p.units) {
      const From* from = x + offset[r];
      if constexpr (std::is_same_v<From, To>) {
        std::memcpy(to, from, sizeof(To) * static_cast<size_t>(p.units));
      } else {
        convert_all(from, p.units, to);
      }
    }
    return;
  }
  // Channels first: neighbours in memory are neighbouring rows.
  for (int64_t u = 0; u < p.units; ++u) {
    const From* from = x + u * p.unit_stride;
    for (int64_t r = 0; r < count; ++r) {
      if constexpr (std::is_same_v<From, To>) {
        to[r * p.units + u] = from[offset[r]];
      } else {
        to[r * p.units + u] = narrow<To>(widen(from[offset[r]]));
      }
    }
  }
}

template <typename From, typename To>
void run_task(void* argument, int64_t task) {
  const Copy& copy = *static_cast<const Copy*>(argument);
  const CaptureProblem& p = *copy.problem;
  const CapturePlan& plan = *copy.plan;
  const int64_t end = std::min(plan.count, (task + 1) * copy.task_rows);
  To* to = static_cast<To*>(p.rows) + plan.kept * p.units;
  int64_t offset[kTile];
  for (int64_t row = task * copy.task_rows; row < end; row += kTile) {
    const int64_t count = std::min(kTile, end - row);
    draw_rows(plan.draws, plan.kept + row, count, plan.origin, offset);
    if (row == 0) offset[0] = plan.first;
    for (int64_t r = 0; r < count; ++r) {
      offset[r] = cpu::offset_of(p.row_size, p.row_stride, kMaxCaptureDims, offset[r]);
    }
    copy_tile<From, To>(p, offset, count, to + row * p.units);
  }
}

using Task = void (*)(void*, int64_t);

template <typename To>
Task task_to(DType from) {
  switch (from) {
    case DType::kFloat32:
      return run_task<float, To>;
    case DType::kBFloat16:
      return run_task<BFloat16, To>;
    case DType::kFloat16:
      return run_task<Float16, To>;
    case DType::kFloat64:
      return std::is_same_v<To, double> ? run_task<double, double> : nullptr;
  }
  return nullptr;
}

Task task_of(DType from, DType to) {
  if (to == DType::kFloat32) return task_to<float>(from);
  if (to == DType::kFloat64) return task_to<double>(from);
  if (from == DType::kFloat32 && to == DType::kBFloat16) return run_task<float, BFloat16>;
  if (from != to) return nullptr;
  return run_task<BFloat16, BFloat16>;  // both half types are copied as they are
}

int64_t row_bytes(const CaptureProblem& p) { return p.units * element_size(p.rows_dtype); }

// The rows are read again only at the optimizer's step.  Stores past the cache neither fetch the lines that they
// overwrite nor push out what the forward pass is about to use: a third of the cost of memcpy on small layers.
void copy_past_cache(void* to, const void* from, size_t bytes) {
#if defined(__SSE2__)
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  const size_t head = std::min(bytes, (16 - reinterpret_cast<uintptr_t>(target) % 16) % 16);
  const size_t body = (bytes - head) / 64 * 64;
  std::memcpy(target, source, head);
  target += head;
  source += head;
  for (size_t i = 0; i < body; i += 64) {
    __m128i line[4];
    for (size_t k = 0; k < 4; ++k) line[k] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i + 16 * k));
    for (size_t k = 0; k < 4; ++k) _mm_stream_si128(reinterpret_cast<__m128i*>(target + i + 16 * k), line[k]);
  }
  _mm_sfence();
  std::memcpy(target + body, source + body, bytes - head - body);
#else
  std::memcpy(to, from, bytes);
#endif
}

void copy_block(char* to, const char* from, int64_t bytes, const ThreadPool& pool) {
  const int64_t tasks = std::clamp<int64_t>(bytes / kBlockTaskBytes, 1, std::max<int64_t>(1, pool.threads));
  const int64_t share = (bytes / tasks + 63) / 64 * 64;
  cpu::run_tasks(pool, tasks, [&](int64_t task) {
    const int64_t begin = std::min(bytes, task * share);
    const int64_t end = task + 1 == tasks ? bytes : std::min(bytes, begin + share);
    copy_past_cache(to + begin, from + begin, static_cast<size_t>(end - begin));
  });
}

bool one_block(const CaptureProblem& p, const CapturePlan& plan) {
  int64_t dense = p.units;
  for (int i = kMaxCaptureDims - 1; i >= 0; --i) {
    if (p.row_size[i] != 1 && p.row_stride[i] != dense) return false;
    dense *= p.row_size[i];
  }
  return p.x_dtype == p.rows_dtype && p.unit_stride == 1 && plan.draws.stride == 1;
}

// Rows move to lower places only, so the order of the copies matters and no copy is needed in between.
void move_rows(const CaptureProblem& p, const CapturePlan& plan) {
  char* rows = static_cast<char*>(p.rows);
  const int64_t bytes = row_bytes(p);
  if (plan.levels == 0) {
    std::memmove(rows, rows + plan.move_first * bytes, static_cast<size_t>(plan.kept * bytes));
    return;
  }
  for (int64_t row = 0; row < plan.kept; ++row) {
    const int64_t from = plan.source_of(row);
    if (from != row) std::memcpy(rows + row * bytes, rows + from * bytes, static_cast<size_t>(bytes));
  }
}

}  // namespace

Status capture_rows_cpu(const CaptureProblem& p, const ThreadPool& pool) {
  Task task = task_of(p.x_dtype, p.rows_dtype);
  if (p.capacity < 1 || task == nullptr) return Status::kInvalidArgument;
  const CapturePlan plan = plan_capture(p, *p.state);
  if (plan.moves()) move_rows(p, plan);
  Copy copy{&p, &plan, 0};
  if (plan.count > 0 && one_block(p, plan)) {
    copy_block(static_cast<char*>(p.rows) + plan.kept * row_bytes(p),
               static_cast<const char*>(p.x) + plan.first * row_bytes(p), plan.count * row_bytes(p), pool);
  } else if (plan.count > 0) {
    const int64_t wanted = (plan.count * row_bytes(p) + kTaskBytes - 1) / kTaskBytes;
    const int64_t tiles = (plan.count + kTile - 1) / kTile;
    const int64_t tasks =
        pool.run == nullptr ? 1 : std::max<int64_t>(1, std::min({wanted, tiles, int64_t{pool.threads}}));
    copy.task_rows = (tiles + tasks - 1) / tasks * kTile;
    if (tasks == 1) {
      task(&copy, 0);
    } else {
      pool.run(pool.context, (plan.count + copy.task_rows - 1) / copy.task_rows, task, &copy);
    }
  }
  *p.state = plan.after;
  return Status::kOk;
}

Status capture_mark_cpu(const CaptureProblem& p, bool restart) {
  const CapturePlan plan = plan_mark(*p.state, restart);
  if (plan.moves()) move_rows(p, plan);
  *p.state = plan.after;
  return Status::kOk;
}

}  // namespace consistency_ops
