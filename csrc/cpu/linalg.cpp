// Inverse and solve of batches of symmetric positive definite matrices, out of the chunk kernels.
//
// A thread takes the next matrix, factors it in panels (chunk_kernels.h) in its own cache and writes the result.  Where
// there are fewer matrices than threads and many right-hand sides, the factors are kept and the right-hand sides are
// divided too.  No number depends on which thread computes it.
#include "consistency_ops/linalg.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>

#include "cpu/chunk_kernels.h"
#include "cpu/parallel.h"

namespace consistency_ops {
namespace cpu {
namespace {

// Below this many multiply-adds waking the other threads costs more than they bring.
constexpr int64_t kSerialWork = 300000;
// Panels of right-hand sides that a task takes at once where they are divided.
constexpr int64_t kTaskPanels = 4;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Elements = std::unique_ptr<T, Free>;

template <typename T>
Elements<T> allocate(int64_t elements) {
  const int64_t bytes = (elements * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  return Elements<T>(static_cast<T*>(std::aligned_alloc(64, std::max<int64_t>(64, bytes))));
}

template <typename T>
class Batch {
 public:
  explicit Batch(const SpdParams& params)
      : p_(params),
        kernels_(isa_kernels<T>().chunk),
        panels_(static_cast<int>((params.n + kPanel - 1) / kPanel)),
        height_(int64_t{kPanel} * panels_),
        square_(height_ * height_) {}

  int64_t square() const { return square_; }
  int64_t height() const { return height_; }
  int64_t panels_of_rhs() const { return (p_.nrhs + kPanel - 1) / kPanel; }

  // u <- the factor of matrix m, padded with the identity; returns and writes its info.
  int factor(int64_t m, T* u, T* inverse_diagonal) const {
    load(static_cast<const T*>(p_.a) + m * p_.a_batch, u);
    const int info = kernels_.factor(u, panels_, inverse_diagonal);
    p_.info[m] = info;
    return info;
  }

  // w, inverse: scratch of square().
  void write_inverse(int64_t m, const T* u, const T* inverse_diagonal, T* w, T* inverse) const {
    kernels_.invert(u, inverse_diagonal, panels_, w, inverse);
    T* out = static_cast<T*>(p_.result) + m * p_.n * p_.n;
    for (int64_t i = 0; i < p_.n; ++i) {
      const T* row = inverse + i * kPanel;
      int64_t j = 0;
      for (; j + kPanel <= p_.n; j += kPanel) copy_line(row + j * height_, out + i * p_.n + j);
      for (int64_t e = j; e < p_.n; ++e) out[i * p_.n + e] = row[j * height_ + e - j];
    }
  }

  // right: scratch of height() * kPanel.
  void solve_panel(int64_t m, int64_t panel, const T* u, const T* inverse_diagonal, T* right) const {
    const int64_t first = panel * kPanel, width = std::min<int64_t>(kPanel, p_.nrhs - first);
    const T* b = static_cast<const T*>(p_.b) + m * p_.b_batch + first * p_.b_column;
    for (int64_t k = 0; k < p_.n; ++k) {
      T* to = right + k * kPanel;
      const T* from = b + k * p_.b_row;
      if (width == kPanel && p_.b_column == 1) {
        copy_line(from, to);
        continue;
      }
      for (int64_t c = 0; c < width; ++c) to[c] = from[c * p_.b_column];
      for (int64_t c = width; c < kPanel; ++c) to[c] = 0;
    }
    std::fill(right + p_.n * kPanel, right + height_ * kPanel, T(0));
    kernels_.solve(u, inverse_diagonal, panels_, right);
    T* out = static_cast<T*>(p_.result) + m * p_.n * p_.nrhs + first;
    for (int64_t k = 0; k < p_.n; ++k) {
      if (width == kPanel) {
        copy_line(right + k * kPanel, out + k * p_.nrhs);
      } else {
        for (int64_t c = 0; c < width; ++c) out[k * p_.nrhs + c] = right[k * kPanel + c];
      }
    }
  }

  // The result of matrix m, columns [first, last).
  void write_nan(int64_t m, int64_t width, int64_t first, int64_t last) const {
    T* out = static_cast<T*>(p_.result) + m * p_.n * width;
    for (int64_t k = 0; k < p_.n; ++k) {
      std::fill(out + k * width + first, out + k * width + last, std::numeric_limits<T>::quiet_NaN());
    }
  }

 private:
  static void copy_line(const T* from, T* to) { std::copy_n(from, kPanel, to); }

  // The upper blocks of u <- the transpose of the lower triangle of a.
  void load(const T* a, T* u) const {
    for (int64_t j = 0; j < height_; j += kPanel) {  // a panel: 16 rows of a
      T* panel = u + j * height_;
      const int64_t lanes = std::min<int64_t>(kPanel, p_.n - j);
      for (int64_t k = 0; k < j; k += kPanel) block(a + j * p_.a_row + k * p_.a_column, lanes, panel + k * kPanel);
      T* diagonal = panel + j * kPanel;  // both halves, because the factor reads whole rows
      const T* corner = a + j * (p_.a_row + p_.a_column);
      for (int64_t r = 0; r < kPanel; ++r) {
        for (int64_t c = 0; c <= r; ++c) {
          const T value = r < lanes ? corner[r * p_.a_row + c * p_.a_column] : T(r == c);
          diagonal[r * kPanel + c] = diagonal[c * kPanel + r] = value;
        }
      }
    }
  }

  // to[k][r] = from(r, k), 16 x 16, r < lanes.
  void block(const T* from, int64_t lanes, T* to) const {
    if (lanes < kPanel) std::fill(to, to + kPanel * kPanel, T(0));
    if (p_.a_row == 1 && lanes == kPanel) {
      for (int64_t k = 0; k < kPanel; ++k) copy_line(from + k * p_.a_column, to + k * kPanel);
    } else if (p_.a_column == 1) {
      for (int64_t r = 0; r < lanes; ++r) {
        for (int64_t k = 0; k < kPanel; ++k) to[k * kPanel + r] = from[r * p_.a_row + k];
      }
    } else {
      for (int64_t r = 0; r < lanes; ++r) {
        for (int64_t k = 0; k < kPanel; ++k) to[k * kPanel + r] = from[r * p_.a_row + k * p_.a_column];
      }
    }
  }

  const SpdParams& p_;
  const ChunkKernels<T>& kernels_;
  int panels_;
  int64_t height_, square_;
};

// body(task, scratch) for every task, with `elements` of scratch a thread.
template <typename T, typename Body>
Status for_each(int64_t tasks, int64_t work, int64_t elements, const ThreadPool& pool, const Body& body) {
  const bool serial = pool.run == nullptr || pool.threads <= 1 || work < kSerialWork;
  const int64_t threads = serial ? 1 : std::min<int64_t>(pool.threads, tasks);
  const Elements<T> scratch = allocate<T>(threads * elements);
  if (scratch == nullptr) return Status::kOutOfMemory;
  std::atomic<int64_t> next{0};
  run_tasks(pool, threads, [&](int64_t thread) {
    for (;;) {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      body(task, scratch.get() + thread * elements);
    }
  });
  return Status::kOk;
}

template <typename T>
Status inverse(const SpdParams& params, const ThreadPool& pool) {
  const Batch<T> batch(params);
  const int64_t square = batch.square(), work = params.batch * params.n * params.n * params.n / 2;
  return for_each<T>(params.batch, work, 3 * square + kMaxChunk, pool, [&](int64_t m, T* scratch) {
    T *u = scratch, *w = u + square, *dense = w + square, *inverse_diagonal = dense + square;
    if (batch.factor(m, u, inverse_diagonal) == 0) {
      batch.write_inverse(m, u, inverse_diagonal, w, dense);
    } else {
      batch.write_nan(m, params.n, 0, params.n);
    }
  });
}

template <typename T>
Status solve(const SpdParams& params, const ThreadPool& pool) {
  const Batch<T> batch(params);
  const int64_t square = batch.square(), right = batch.height() * kPanel, panels = batch.panels_of_rhs();
  const int64_t solves = panels * kPanel * params.n * params.n, factors = params.n * params.n * params.n / 6;
  if (params.batch >= pool.threads || panels < 2 * kTaskPanels) {
    const int64_t work = params.batch * (factors + solves);
    return for_each<T>(params.batch, work, square + right + kMaxChunk, pool, [&](int64_t m, T* scratch) {
      T *u = scratch, *inverse_diagonal = u + square, *b = inverse_diagonal + kMaxChunk;
      if (batch.factor(m, u, inverse_diagonal) != 0) return batch.write_nan(m, params.nrhs, 0, params.nrhs);
      for (int64_t panel = 0; panel < panels; ++panel) batch.solve_panel(m, panel, u, inverse_diagonal, b);
    });
  }
  const int64_t kept = square + kMaxChunk, parts = (panels + kTaskPanels - 1) / kTaskPanels;
  const Elements<T> factors_of = allocate<T>(params.batch * kept);
  if (factors_of == nullptr) return Status::kOutOfMemory;
  const Status status = for_each<T>(params.batch, params.batch * factors, 0, pool, [&](int64_t m, T*) {
    T* u = factors_of.get() + m * kept;
    batch.factor(m, u, u + square);
  });
  if (status != Status::kOk) return status;
  return for_each<T>(params.batch * parts, params.batch * solves, right, pool, [&](int64_t task, T* b) {
    const int64_t m = task / parts, first = task % parts * kTaskPanels, last = std::min(panels, first + kTaskPanels);
    if (params.info[m] != 0) {
      return batch.write_nan(m, params.nrhs, first * kPanel, std::min(params.nrhs, last * kPanel));
    }
    const T* u = factors_of.get() + m * kept;
    for (int64_t panel = first; panel < last; ++panel) batch.solve_panel(m, panel, u, u + square, b);
  });
}

bool valid(const SpdParams& p) {
  const bool known = p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64;
  return known && p.batch >= 0 && p.n >= 0 && p.n <= kMaxChunk && p.nrhs >= 0;
}

}  // namespace
}  // namespace cpu

Status spd_inverse_cpu(const SpdParams& params, const ThreadPool& pool) {
  if (!cpu::valid(params)) return Status::kInvalidArgument;
  std::fill_n(params.info, params.batch, 0);
  if (params.batch == 0 || params.n == 0) return Status::kOk;
  return params.dtype == DType::kFloat32 ? cpu::inverse<float>(params, pool) : cpu::inverse<double>(params, pool);
}

// The factor is computed also where there are no right-hand sides, because info tells of it.
Status spd_solve_cpu(const SpdParams& params, const ThreadPool& pool) {
  if (!cpu::valid(params)) return Status::kInvalidArgument;
  std::fill_n(params.info, params.batch, 0);
  if (params.batch == 0 || params.n == 0) return Status::kOk;
  return params.dtype == DType::kFloat32 ? cpu::solve<float>(params, pool) : cpu::solve<double>(params, pool);
}

}  // namespace consistency_ops
