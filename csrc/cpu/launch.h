// One call of the correction: its tasks and what they share.  A file a phase: covariance.cpp, factor.cpp, apply.cpp;
// what only whitening adds is in whitening.cpp.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "consistency_ops/precondition.h"
#include "consistency_ops/whitening.h"
#include "cpu/plan.h"

namespace consistency_ops::cpu {

// The sum and the number of the finite elements of a chunk's diagonal.
struct DiagonalSum {
  double sum = 0;
  int64_t count = 0;
};

// Of a displacement, as the optimizer made it and as it was mapped.
struct Squares {
  double before = 0, after = 0;
};

struct LayerState {
  std::atomic<int32_t> done[3] = {};   // tasks finished, by phase
  std::vector<DiagonalSum> diagonals;  // by chunk
  std::vector<int32_t> info;
  std::vector<uint8_t> few_rows;  // whether the chunk's storage has the form of few_rows.h
  std::vector<float> tile_scale;  // by chunk, what TileKernels::split has returned
  // Of whitening.
  std::atomic<bool> finite{true};  // whether the gradient and the covariance are
  std::vector<double> averaged;    // by chunk, the diagonal's sum in the average so far
  std::vector<Squares> squares;    // by block of outputs
};

template <typename T>
struct Scratch {
  int64_t* row_offset;
  T *packed, *factor, *inverse_factor, *tile, *product, *projected, *inverse_diagonal, *bias;
};

// Between these two a thread may use the kernels on tiles.  Null: nothing.
class TileScope {
 public:
  explicit TileScope(const TileKernels* tiles) : tiles_(tiles) {
    if (tiles_ != nullptr) tiles_->begin();
  }
  ~TileScope() {
    if (tiles_ != nullptr) tiles_->end();
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  const TileKernels* tiles_;
};

// What a call does beside a correction.
struct Whitening {
  const WhitenedLayer* layers = nullptr;  // null for the correction
  double decay = 0;
  bool unwhitens = false;        // G is a weight that an optimizer has moved
  const char* finite = nullptr;  // by layer, whether the gradient is; null: all are
};

template <typename T>
class Launch {
 public:
  Launch(const PreconditionLayer* layers, const PreconditionOptions& options, const Plan& plan, char* workspace,
         int32_t threads, const Whitening& whitening);

  // Takes tickets until none is left.
  void work(int64_t thread);

  // Of all outputs of a layer, in their order.
  Squares squares(int64_t layer) const;
  // Whether this step's covariance has entered the average.
  bool entered(int64_t layer) const { return plan_.layers[layer].sample.count > 0 && states_[layer].finite; }

 private:
  void covariance(const Task& task, const Scratch<T>& s);
  void accumulate(const Task& task, const Scratch<T>& s);
  // One block of rows, two rows a word.
  void accumulate_pairs(const PairKernels& pairs, const Task& task, const Scratch<float>& s, int64_t rows, bool add,
                        const Run* runs, int64_t num_runs);

  void factor(const Task& task, const Scratch<T>& s);
  // What a chunk's stored matrix is multiplied by before the damping is added: 1 / n, and 1 / tau with trace scaling.
  double multiplier(const Task& task) const;
  // The form of few_rows.h, if the chunk is well enough conditioned; or else its covariance, in the same place.
  bool factor_few(const ChunkPlan& chunk, const DiagonalSum& diagonal, int64_t rows, T scale, const Scratch<T>& s);

  // The inverse in tile order, where it is to be applied so.
  void to_tiles(int64_t layer, int64_t c, const Scratch<T>& s);

  void apply(const Task& task, const Scratch<T>& s);
  // Corrects some outputs; `more`: as many come next.
  void apply_block(int32_t index, int64_t first_output, int64_t outputs, bool more, const Scratch<T>& s);
  // What is corrected after the outputs before this one: of the layer, or the first ones of another.
  const char* next_outputs(int32_t index, int64_t output) const;
  MatrixKind kind() const;

  // Notes the diagonal of the average so far.
  void look_at_average(int64_t layer, int64_t c, const DiagonalSum& diagonal);
  // Adds a chunk's covariance to the running sum and puts the average in its place.  Returns the mean of the layer's
  // average diagonal; 0 before anything has entered.  The weight is updated when all chunks are done.
  double average(int64_t layer, int64_t c);
  // Whether there have been rows to factor, in this step or in the average.
  bool seen(int64_t layer) const;

  T* matrix(const ChunkPlan& chunk) const { return storage_ + chunk.storage; }
  // The c-th of [chunks, chunk, chunk], the caller's.
  T* dense(void* matrices, int64_t c) const {
    return static_cast<T*>(matrices) + c * int64_t{options_.chunk} * options_.chunk;
  }

  const PreconditionLayer* layers_;
  const PreconditionOptions& options_;
  const Plan& plan_;
  std::vector<LayerState> states_;
  std::vector<int32_t> after_;  // by layer, the one that this thread corrects after it; or -1
  std::vector<Scratch<T>> scratch_;
  T* storage_;
  const WhitenedLayer* whitened_;
  double decay_;
  bool unwhitens_;
  std::atomic<int64_t> next_{0}, finished_{0};
};

// Plans nothing and checks nothing: does all tasks, then calls `after`.
template <typename T>
Status run(const PreconditionLayer* layers, const PreconditionOptions& options, const Plan& plan,
           const ThreadPool& pool, const Whitening& whitening = {},
           const std::function<void(const Launch<T>&)>& after = nullptr);

// Whether so little is to be done that waking other threads costs more than they bring.
bool is_serial(const Plan& plan, const PreconditionLayer* layers, const ThreadPool& pool);

// Bytes of the workspace of one call.
int64_t workspace_bytes(const Plan& plan, int64_t element, int32_t threads);

// What the entry points share (precondition.cpp).
bool valid(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options);
// info and damping_used of a layer without chunks to process.
void write_defaults(const PreconditionLayer& layer, const PreconditionOptions& options);

}  // namespace consistency_ops::cpu
