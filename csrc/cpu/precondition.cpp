// The correction of all layers on the CPU: G[:, c] <- G[:, c] (X_c^T X_c / n + damping I)^-1.
//
// One parallel region a call.  The work is a list of tickets (plan.h) in three phases a layer:
//
//   covariance   a thread packs 32 to 128 rows of its chunks' units into panels, in one pass over X, and adds their
//                products to the chunks' upper blocks while both are in L2;
//   factor       one chunk: damp, factor, invert; the inverse replaces the covariance;
//   apply        64 rows of G: 4 to 16 rows of a chunk are gathered, multiplied by its inverse, and written back.  With
//                AVX-512, float32 and small chunks or 3 x 3 kernels the products read G where it lies, without a copy.
//
// X is read once and G is read and written once.  No sum depends on which thread computes it or how many there are, so
// results are bitwise reproducible.  The explicit inverse turns the solve into products at full speed and costs no
// accuracy: the error is that of the covariance (measured: that of substitution, in two digits, for conditions of 90 to
// 1e7).
#include "consistency_ops/precondition.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "consistency_ops/damping.h"
#include "consistency_ops/whitening.h"
#include "cpu/few_rows.h"
#include "cpu/one_unit.h"
#include "cpu/plan.h"
#include "cpu/strided.h"
#include "cpu/whitening.h"

namespace consistency_ops {

namespace cpu {
namespace {

constexpr int64_t kBlock = kPanel * kPanel;
constexpr uint32_t kPairOfOnes = 0x3F803F80;  // 1, 1 in bfloat16
// Below this many multiply-adds waking the other threads costs more than they bring.
constexpr int64_t kSerialWork = 2000000;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<char, Free>;

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

Bytes allocate(int64_t bytes) {
  return Bytes(static_cast<char*>(std::aligned_alloc(64, std::max<int64_t>(64, aligned(bytes)))));
}

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

template <typename T>
class Launch {
 public:
  // whitened: null for the correction.  unwhitens: G is a weight that an optimizer has moved.
  Launch(const PreconditionLayer* layers, const PreconditionOptions& options, const Plan& plan, char* workspace,
         int32_t threads, const WhitenedLayer* whitened, double decay, bool unwhitens, const char* finite)
      : layers_(layers),
        options_(options),
        plan_(plan),
        states_(plan.layers.size()),
        scratch_(threads),
        whitened_(whitened),
        decay_(decay),
        unwhitens_(unwhitens) {
    storage_ = reinterpret_cast<T*>(workspace);
    char* at = workspace + aligned(plan.storage_elements * sizeof(T));
    auto take = [&at](int64_t bytes) {
      char* taken = at;
      at += aligned(bytes);
      return taken;
    };
    for (Scratch<T>& s : scratch_) {
      s.row_offset = reinterpret_cast<int64_t*>(take(plan.most_rows * sizeof(int64_t)));
      s.packed = reinterpret_cast<T*>(take(plan.packed_elements * sizeof(T)));
      s.factor = reinterpret_cast<T*>(take(plan.largest_matrix * sizeof(T)));
      s.inverse_factor = reinterpret_cast<T*>(take(plan.largest_matrix * sizeof(T)));
      s.tile = reinterpret_cast<T*>(take(kMaxTileRows * kTilePitch * sizeof(T)));
      s.product = reinterpret_cast<T*>(take(kMaxTileRows * kTilePitch * sizeof(T)));
      s.projected = reinterpret_cast<T*>(take(kMaxTileRows * kTilePitch * sizeof(T)));
      s.inverse_diagonal = reinterpret_cast<T*>(take((kMaxChunk + plan.bias_elements) * sizeof(T)));
      s.bias = s.inverse_diagonal + kMaxChunk;
    }
    for (size_t l = 0; l < states_.size(); ++l) {
      states_[l].diagonals.resize(plan.layers[l].chunks.size());
      states_[l].info.assign(plan.layers[l].chunks.size(), 0);
      states_[l].few_rows.assign(plan.layers[l].chunks.size(), 0);
      if (whitened == nullptr) continue;
      states_[l].averaged.resize(plan.layers[l].chunks.size());
      if (finite != nullptr) states_[l].finite = finite[l] != 0;
      if (unwhitens) states_[l].squares.resize(layers[l].outputs / plan.layers[l].outputs_per_block + 1);
    }
  }

  // Of all outputs of a layer, in their order.
  Squares squares(int64_t layer) const {
    Squares sum;
    for (const Squares& block : states_[layer].squares) {
      sum.before += block.before;
      sum.after += block.after;
    }
    return sum;
  }

  // Whether this step's covariance has entered the average.
  bool entered(int64_t layer) const { return plan_.layers[layer].sample.count > 0 && states_[layer].finite; }

  // Takes tickets until none is left.
  void work(int64_t thread) {
    const int64_t tickets = static_cast<int64_t>(plan_.tasks.size());
    for (;;) {
      const int64_t ticket = next_.fetch_add(1, std::memory_order_relaxed);
      if (ticket >= tickets) return;
      const Task& task = plan_.tasks[ticket];
      LayerState& state = states_[plan_.layers[task.layer].head];
      const int phase = static_cast<int>(task.phase);
      wait_until([&] {
        return finished_.load(std::memory_order_acquire) >= task.wait_ticket &&
               (phase == 0 || state.done[phase - 1].load(std::memory_order_acquire) >= task.wait_in_phase);
      });
      switch (task.phase) {
        case Phase::kCovariance:
          covariance(task, scratch_[thread]);
          break;
        case Phase::kFactor:
          factor(task, scratch_[thread]);
          break;
        case Phase::kApply:
          apply(task, scratch_[thread]);
          break;
      }
      state.done[phase].fetch_add(1, std::memory_order_release);
      finished_.fetch_add(1, std::memory_order_release);
    }
  }

 private:
  template <typename Condition>
  static void wait_until(Condition condition) {
    for (int spins = 0; !condition(); ++spins) {
      if (spins > 100) sched_yield();
    }
  }

  // covariance

  void covariance(const Task& task, const Scratch<T>& s) {
    const PreconditionLayer& layer = layers_[task.layer];
    const LayerPlan& plan = plan_.layers[task.layer];
    const bool computed = options_.stages & kStageCovariance;
    if (computed) {
      accumulate(task, s);
    } else if (options_.stages & kStageFactor) {
      for (int64_t c = task.begin; c < task.end; ++c) {
        from_dense(static_cast<const T*>(layer.covariance), c, plan.chunks[c], 1);
      }
    } else {
      for (int64_t c = task.begin; c < task.end; ++c) {
        const T* dense = static_cast<const T*>(layer.inverse);
        if (whitened_ != nullptr && !unwhitens_) {
          from_dense_transposed(dense, c, plan.chunks[c]);
        } else {
          from_dense(dense, c, plan.chunks[c], 1);
        }
      }
      return;
    }
    for (int64_t c = task.begin; c < task.end; ++c) {
      const ChunkPlan& chunk = plan.chunks[c];
      const T* matrix = storage_ + chunk.storage;
      DiagonalSum diagonal;
      for (int64_t k = 0; k < chunk.size && (!computed || plan.sample.count > 0); ++k) {
        const T moment = chunk.row_panels > 0 ? few_rows_moment(chunk, matrix, k) : matrix[diagonal_index(chunk, k)];
        if (moment - moment != 0) continue;  // NaN or Inf
        diagonal.sum += moment;
        ++diagonal.count;
      }
      states_[task.layer].diagonals[c] = diagonal;
      if (whitened_ != nullptr) look_at_average(task.layer, c, diagonal);
      if (computed && layer.covariance != nullptr) {
        to_dense(c, chunk, T(1) / static_cast<T>(plan.sample.count), static_cast<T*>(layer.covariance));
      }
    }
  }

  void accumulate(const Task& task, const Scratch<T>& s) {
    const PreconditionLayer& layer = layers_[task.layer];
    const LayerPlan& plan = plan_.layers[task.layer];
    const IsaKernels<T>& kernels = isa_kernels<T>();
    const GatherKernels<T>& gather = kernels.gather[static_cast<int>(layer.x_dtype)];
    const PairKernels* pairs = nullptr;
    // Where the chunks of a layer have 64 and 65 units, only some may have few rows.
    const bool few = plan.chunks.front().row_panels > 0 || plan.chunks.back().row_panels > 0;
    if (std::is_same_v<T, float> && layer.x_dtype == DType::kBFloat16 && !few) pairs = pair_kernels();
    const int32_t first_panel = plan.chunks[task.begin].first_panel;
    const ChunkPlan& last = plan.chunks[task.end - 1];
    const Run* runs = plan.runs.data() + plan.chunks[task.begin].first_run;
    const int64_t num_runs = last.first_run + last.num_runs - plan.chunks[task.begin].first_run;

    // The lanes that no run writes: the padding of every chunk, and the bias unit.
    for (int64_t c = task.begin; c < task.end; ++c) {
      const ChunkPlan& chunk = plan.chunks[c];
      const int64_t panel = chunk.first_panel - first_panel + chunk.panels - 1;
      T* tail = s.packed + panel * plan.packed_panel();
      for (int64_t lane = chunk.size - (chunk.panels - 1) * kPanel; lane < kPanel; ++lane) {
        for (int64_t k = 0; k < plan.row_block; ++k) tail[k * kPanel + lane] = 0;
      }
      if (c == plan.bias_chunk) {
        T* ones = s.packed + (chunk.first_panel - first_panel + plan.bias_column / kPanel) * plan.packed_panel() +
                  plan.bias_column % kPanel;
        for (int64_t k = 0; k < plan.row_block; ++k) ones[k * kPanel] = 1;
        if (pairs != nullptr) {
          uint32_t* words = reinterpret_cast<uint32_t*>(ones);
          for (int64_t k = 0; k < plan.row_block; ++k) words[k * kPanel] = kPairOfOnes;
        }
      }
    }

    for (int64_t row = 0; row < plan.sample.count; row += plan.row_block) {
      const int64_t rows = std::min(plan.row_block, plan.sample.count - row);
      sampled_offsets(layer, plan, row, rows, s.row_offset);
      T* block = s.packed - first_panel * plan.packed_panel();
      if constexpr (std::is_same_v<T, float>) {
        if (pairs != nullptr) {
          accumulate_pairs(*pairs, task, s, rows, row > 0, runs, num_runs);
          continue;
        }
      }
      gather.pack(layer.x, s.row_offset, rows, layer.x_unit_stride, layer.units, runs, num_runs, block);
      for (int64_t c = task.begin; c < task.end; ++c) {
        const ChunkPlan& chunk = plan.chunks[c];
        const T* packed = s.packed + (chunk.first_panel - first_panel) * plan.packed_panel();
        if (chunk.row_panels > 0) {
          store_few_rows(chunk, packed, plan.packed_panel(), rows, storage_ + chunk.storage);
        } else {
          kernels.chunk.gram(packed, rows, plan.row_block + 1, chunk.size, row > 0, storage_ + chunk.storage);
        }
      }
    }
  }

  // One block of rows, two rows a word.
  void accumulate_pairs(const PairKernels& pairs, const Task& task, const Scratch<float>& s, int64_t rows, bool add,
                        const Run* runs, int64_t num_runs) {
    const PreconditionLayer& layer = layers_[task.layer];
    const LayerPlan& plan = plan_.layers[task.layer];
    const int32_t first_panel = plan.chunks[task.begin].first_panel;
    uint32_t* packed = reinterpret_cast<uint32_t*>(s.packed);
    pairs.pack(layer.x, s.row_offset, rows, layer.x_unit_stride, layer.units, runs, num_runs,
               packed - first_panel * plan.packed_panel());
    for (int64_t c = task.begin; c < task.end; ++c) {
      const ChunkPlan& chunk = plan.chunks[c];
      const int64_t at = (chunk.first_panel - first_panel) * plan.packed_panel();
      if (c == plan.bias_chunk && rows % 2 != 0) {
        const int64_t bias = at + plan.bias_column / kPanel * plan.packed_panel() + plan.bias_column % kPanel;
        packed[bias + rows / 2 * kPanel] = kPairOfOnes & 0xFFFF;
      }
      pairs.gram(packed + at, (rows + 1) / 2, plan.row_block + 1, chunk.panels, add, storage_ + chunk.storage);
    }
  }

  void look_at_average(int64_t l, int64_t c, const DiagonalSum& diagonal) {
    LayerState& state = states_[l];
    const ChunkPlan& chunk = plan_.layers[l].chunks[c];
    if (diagonal.count != chunk.size) state.finite.store(false, std::memory_order_relaxed);
    if (whitened_[l].average == nullptr) return;
    const int64_t width = options_.chunk;
    const T* average = static_cast<const T*>(whitened_[l].average) + c * width * width;
    double sum = 0;
    for (int64_t k = 0; k < chunk.size; ++k) sum += average[k * width + k];
    state.averaged[c] = sum;
  }

  // Adds a chunk's covariance to the running sum and puts the average in its place.  Returns the mean of the layer's
  // average diagonal; 0 before anything has entered.  The weight is updated when all chunks are done.
  double average(int64_t l, int64_t c) {
    const LayerPlan& plan = plan_.layers[l];
    const ChunkPlan& chunk = plan.chunks[c];
    const WhitenedLayer& of = whitened_[l];
    const bool enters = entered(l);
    const double mean = enters ? (1 - decay_) / static_cast<double>(plan.sample.count) : 0;
    const double old_weight = *static_cast<const T*>(of.average_weight);
    const double weight = enters ? decay_ * old_weight + (1 - decay_) : old_weight;
    if (!(weight > 0)) return 0;
    const double kept = enters ? decay_ : 1;
    double sum = 0;
    for (size_t i = 0; i < plan.chunks.size(); ++i) {
      sum += kept * states_[l].averaged[i];
      if (enters) sum += mean * states_[l].diagonals[i].sum;
    }
    const int64_t width = options_.chunk, height = int64_t{chunk.panels} * kPanel;
    const T a = static_cast<T>(kept), b = static_cast<T>(mean), inverse_weight = static_cast<T>(1 / weight);
    T* stored = static_cast<T*>(of.average) + c * width * width;
    for (int64_t i = 0; i < chunk.size; ++i) {
      for (int64_t first = i / kPanel * kPanel; first < chunk.size; first += kPanel) {
        T* row = storage_ + chunk.storage + first * height + i * kPanel;
        const int64_t lanes = std::min<int64_t>(kPanel, chunk.size - first);
        for (int64_t j = 0; j < lanes; ++j) {
          T total = a * stored[i * width + first + j];
          if (enters) total += b * row[j];
          stored[i * width + first + j] = total;
          row[j] = total * inverse_weight;
        }
      }
    }
    for (int64_t i = 1; i < chunk.size; ++i) {
      for (int64_t j = 0; j < i; ++j) stored[i * width + j] = stored[j * width + i];
    }
    return sum / weight / static_cast<double>(plan.units);
  }

  // factor

  // What a chunk's stored matrix is multiplied by before the damping is added: 1 / n, and 1 / tau with trace scaling.
  double multiplier(const Task& task) const {
    const LayerPlan& plan = plan_.layers[task.layer];
    const double mean = options_.stages & kStageCovariance ? 1.0 / static_cast<double>(plan.sample.count) : 1.0;
    if (!options_.trace_scaling) return mean;
    DiagonalSum total;
    for (const DiagonalSum& diagonal : states_[task.layer].diagonals) {
      total.sum += diagonal.sum;
      total.count += diagonal.count;
    }
    return mean / trace_scale(total.sum, total.count, mean);
  }

  // Whether there have been rows to factor, in this step or in the average.
  bool seen(int64_t l) const {
    if (whitened_[l].average == nullptr) return plan_.layers[l].sample.count > 0;
    return entered(l) || *static_cast<const T*>(whitened_[l].average_weight) > 0;
  }

  void factor(const Task& task, const Scratch<T>& s) {
    const PreconditionLayer& layer = layers_[task.layer];
    const LayerPlan& plan = plan_.layers[task.layer];
    const int64_t c = task.begin;
    const ChunkPlan& chunk = plan.chunks[c];
    LayerState& state = states_[task.layer];
    if (!(options_.stages & kStageFactor)) {
      state.info[c] = layer.info[c];
      return;
    }
    const ChunkKernels<T>& kernels = isa_kernels<T>().chunk;
    T* matrix = storage_ + chunk.storage;
    const int64_t height = int64_t{chunk.panels} * kPanel, elements = height * height;
    double multiplied = 1;
    double damping = options_.damping;
    int info = 0, tries = kMaxTries;
    if (whitened_ == nullptr || whitened_[task.layer].average == nullptr) {
      if (plan.sample.count > 0 || !(options_.stages & kStageCovariance)) multiplied = multiplier(task);
    } else {
      const double tau = average(task.layer, c);
      if (options_.trace_scaling) multiplied = 1 / trace_scale(tau, 1, 1.0);
    }
    if (whitened_ != nullptr && !seen(task.layer)) {  // given up, as a matrix of NaN
      info = 1;
      tries = 0;
      damping = damping_of_try<double>(options_.damping, kMaxTries - 1);
    }
    const T scale = static_cast<T>(multiplied);
    if (chunk.row_panels > 0) {
      state.few_rows[c] = factor_few(chunk, state.diagonals[c], plan.sample.count, scale, s);
      if (state.few_rows[c]) {
        report(layer, plan.members, c, info, damping);
        return;
      }
    }
    for (int failed = 0; failed < tries; ++failed) {
      damping = damping_of_try<double>(options_.damping, failed);
      for (int64_t j = 0; j < height; j += kPanel) {  // the upper blocks, a panel at a time
        const int64_t begin = j * height, end = begin + (j + kPanel) * kPanel;
        for (int64_t e = begin; e < end; ++e) s.factor[e] = matrix[e] * scale;
      }
      for (int64_t k = 0; k < int64_t{chunk.panels} * kPanel; ++k) {
        T& pivot = s.factor[diagonal_index(chunk, k)];
        pivot = k < chunk.size ? pivot + static_cast<T>(damping) : T(1);
      }
      info = kernels.factor(s.factor, chunk.panels, s.inverse_diagonal);
      if (info == 0) break;
    }
    state.info[c] = info;
    report(layer, plan.members, c, info, damping);
    if (info == 0 && options_.triangular) {
      kernels.invert_factor(s.factor, s.inverse_diagonal, chunk.panels, matrix);
    } else if (info == 0) {
      kernels.invert(s.factor, s.inverse_diagonal, chunk.panels, s.inverse_factor, matrix);
    }
    if (layer.inverse != nullptr) {
      if (info != 0) std::fill(matrix, matrix + elements, T(0));
      if (options_.triangular) {
        to_dense_lower(c, chunk, static_cast<T*>(layer.inverse));
      } else {
        to_dense(c, chunk, T(1), static_cast<T*>(layer.inverse));
      }
    }
    // What is applied is the transpose of what is kept.
    if (whitened_ != nullptr && info == 0) transpose(chunk);
  }

  // Of a lower triangular matrix.
  void transpose(const ChunkPlan& chunk) {
    const int64_t height = int64_t{chunk.panels} * kPanel;
    T* matrix = storage_ + chunk.storage;
    for (int64_t j = 0; j < chunk.panels; ++j) {
      for (int64_t i = 0; i <= j; ++i) {
        T* upper = matrix + (j * height + i * kPanel) * kPanel;
        T* lower = matrix + (i * height + j * kPanel) * kPanel;
        T block[kBlock];
        std::copy_n(lower, kBlock, block);
        std::fill(lower, lower + kBlock, T(0));
        own_type().transpose_block(block, kPanel, upper);
      }
    }
  }

  // As from_dense, the transpose of a lower triangular matrix.
  void from_dense_transposed(const T* dense, int64_t c, const ChunkPlan& chunk) {
    const int64_t width = options_.chunk, height = int64_t{chunk.panels} * kPanel;
    const T* in = dense + c * width * width;
    for (int64_t j = 0; j < chunk.panels; ++j) {
      T* panel = storage_ + chunk.storage + j * height * kPanel;
      const int64_t columns = std::min<int64_t>(kPanel, chunk.size - j * kPanel);
      for (int64_t i = 0; i <= j; ++i) {
        const T* from = in + j * kPanel * width + i * kPanel;
        T* to = panel + i * kBlock;
        if (columns == kPanel) {
          own_type().transpose_block(from, width, to);
          continue;
        }
        const int64_t rows = std::min<int64_t>(kPanel, chunk.size - i * kPanel);
        for (int64_t r = 0; r < kPanel; ++r) {
          for (int64_t k = 0; k < kPanel; ++k) {
            const bool inside = r < rows && k < columns;
            to[r * kPanel + k] = inside ? from[k * width + r] : T(r == k && i == j ? 1 : 0);
          }
        }
      }
      std::fill(panel + (j + 1) * kBlock, panel + chunk.panels * kBlock, T(0));
    }
  }

  static const GatherKernels<T>& own_type() {
    return isa_kernels<T>().gather[static_cast<int>(sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32)];
  }

  // The form of few_rows.h, if the chunk is well enough conditioned; or else its covariance, in the same place.
  bool factor_few(const ChunkPlan& chunk, const DiagonalSum& diagonal, int64_t rows, T scale, const Scratch<T>& s) {
    const ChunkKernels<T>& kernels = isa_kernels<T>().chunk;
    T* storage = storage_ + chunk.storage;
    const bool fits = diagonal.count == chunk.size && scale * diagonal.sum <= kFewRowsCondition<T> * options_.damping;
    if (fits && factor_few_rows(chunk, rows, scale, static_cast<T>(options_.damping), kernels, storage, s.factor,
                                s.inverse_diagonal)) {
      return true;
    }
    const int64_t height = int64_t{chunk.panels} * kPanel;
    kernels.gram(storage, rows, int64_t{chunk.row_panels} * kPanel, chunk.size, false, s.inverse_factor);
    std::copy_n(s.inverse_factor, height * height, storage);
    return false;
  }

  static void report(const PreconditionLayer& layer, int64_t members, int64_t c, int info, double damping) {
    for (const PreconditionLayer* member = &layer; member != &layer + members; ++member) {
      if (member->damping_used != nullptr) member->damping_used[c] = static_cast<float>(damping);
      if (member->info != nullptr) member->info[c] = info;
    }
  }

  // apply

  void apply(const Task& task, const Scratch<T>& s) {
    const int64_t outputs = plan_.layers[task.layer].outputs_per_block;
    if (unwhitens_ && !whitened_[task.layer].moves) return;
    for (int64_t first = task.begin; first < task.end; first += outputs) {
      const int64_t here = std::min<int64_t>(outputs, task.end - first);
      Squares* squares = unwhitens_ ? &states_[task.layer].squares[first / outputs] : nullptr;
      if (unwhitens_) squares->before = subtract<T>(layers_[task.layer], whitened_[task.layer], first, here);
      apply_block(task.layer, first, here, first + outputs < task.end, s);
      if (unwhitens_) squares->after = sum_of_squares<T>(layers_[task.layer], first, here);
    }
  }

  MatrixKind kind() const {
    if (!options_.triangular) return MatrixKind::kSymmetric;
    return whitened_ == nullptr ? MatrixKind::kGeneral : unwhitens_ ? MatrixKind::kLower : MatrixKind::kUpper;
  }

  // Corrects some outputs; `more`: as many come next.
  void apply_block(int32_t index, int64_t first_output, int64_t outputs, bool more, const Scratch<T>& s) {
    const PreconditionLayer& layer = layers_[index];
    const int64_t taps = plan_.layers[index].taps, head = plan_.layers[index].head;
    const LayerPlan& plan = plan_.layers[head];
    const IsaKernels<T>& kernels = isa_kernels<T>();
    const GatherKernels<T>& g_gather = kernels.gather[static_cast<int>(layer.g_dtype)];
    const GatherKernels<T>& bias_gather = kernels.gather[static_cast<int>(layer.bias_dtype)];
    const T largest =
        std::min(largest_of<T>(layer.g_dtype), largest_of<T>(layer.has_bias ? layer.bias_dtype : layer.g_dtype));
    const int64_t rows = outputs * taps;
    // Where the units lie apart, rows (the taps of an output) mostly lie side by side and are moved as pieces.
    const bool by_unit = layer.g_unit_stride != 1;
    const int64_t tile_rows = by_unit || plan.chunks[0].panels > kFewPanels ? kMaxTileRows : kTileRows;
    const int64_t adjacent_rows = taps > 1 ? taps : rows;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t o = taps == 1 ? r : r / taps;
      s.row_offset[r] = (first_output + o) * layer.g_output_stride +
                        offset_of(layer.g_tap_size, layer.g_tap_stride, kMaxTapDims, r - o * taps);
    }
    const int64_t ahead = more ? outputs * layer.g_output_stride : 0;

    for (size_t c = 0; c < plan.chunks.size(); ++c) {
      if (states_[head].info[c] != 0) continue;
      const ChunkPlan& chunk = plan.chunks[c];
      const Run* runs = plan.runs.data() + chunk.first_run;
      const bool with_bias = static_cast<int32_t>(c) == plan.bias_chunk;
      const Run bias_run{0, 0, plan.bias_column, 1};
      const bool few = states_[head].few_rows[c];
      const T* matrix = storage_ + chunk.storage;
      int64_t corrected = 0;
      if (!with_bias && !few) {
        corrected = kernels.direct[static_cast<int>(layer.g_dtype)].correct(
            layer.g, s.row_offset, rows, layer.g_unit_stride, runs, chunk.num_runs, taps, ahead, matrix, chunk.size,
            largest, s.product);
        if (corrected == rows) continue;
      }
      for (int r = 0; !by_unit && r < tile_rows; ++r) {
        std::fill(s.tile + r * kTilePitch + chunk.size, s.tile + r * kTilePitch + chunk.panels * kPanel, T(0));
      }
      for (int64_t side = 0; side < rows; side += adjacent_rows) {
        for (int64_t at = std::max(side, corrected); at < side + adjacent_rows; at += tile_rows) {
          const int here = static_cast<int>(std::min(tile_rows, side + adjacent_rows - at));
          const int64_t* row_offset = s.row_offset + at;
          g_gather.load_tile(layer.g, row_offset, here, layer.g_unit_stride, runs, chunk.num_runs, ahead, by_unit,
                             s.tile);
          int64_t bias_offset[kMaxTileRows];
          if (with_bias) {
            for (int r = 0; r < here; ++r) bias_offset[r] = (first_output + (at + r) / taps) * layer.bias_stride;
            bias_gather.load_tile(layer.bias_grad, bias_offset, here, 1, &bias_run, 1, 0, by_unit, s.tile);
          }
          const uint32_t bad =
              few ? kernels.chunk.apply_few(s.tile, by_unit, here, few_rows_transposed(chunk, matrix), matrix,
                                            chunk.row_panels, chunk.size, T(1) / static_cast<T>(options_.damping),
                                            largest, s.projected, s.product)
                  : kernels.chunk.apply(s.tile, by_unit, here, matrix, kind(), chunk.size, largest, s.product);
          g_gather.store_tile(s.product, bad, layer.g, row_offset, here, layer.g_unit_stride, runs, chunk.num_runs);
          if (with_bias) {
            for (int r = 0; r < here; ++r) {
              const T* column = s.product + r * kTilePitch + plan.bias_column;
              if (bad >> r & 1) column = s.tile + tile_index(by_unit, r, plan.bias_column);
              s.bias[at + r] = *column;
            }
          }
        }
      }
      if (with_bias) average_bias(layer, taps, first_output, outputs, s);
    }
  }

  static int64_t tile_index(bool by_unit, int64_t row, int64_t unit) {
    return by_unit ? unit * kMaxTileRows + row : row * kTilePitch + unit;
  }

  // Every tap of an output has corrected a copy of its bias; the bias becomes their mean.
  void average_bias(const PreconditionLayer& layer, int64_t taps, int64_t first_output, int64_t outputs,
                    const Scratch<T>& s) {
    const Run run{0, 0, 0, 1};
    for (int64_t o = first_output; o < first_output + outputs; ++o) {
      const T* copies = s.bias + (o - first_output) * taps;
      T mean = copies[0];
      for (int64_t t = 1; t < taps; ++t) {
        const T difference = copies[t] - mean;  // NaN between infinities: all copies are the infinity that came in
        if (difference == difference) mean += difference / static_cast<T>(t + 1);
      }
      const int64_t offset = o * layer.bias_stride;
      isa_kernels<T>().gather[static_cast<int>(layer.bias_dtype)].store_tile(&mean, 0, layer.bias_grad, &offset, 1, 1,
                                                                             &run, 1);
    }
  }

  // storage

  static int64_t diagonal_index(const ChunkPlan& chunk, int64_t k) {
    return k / kPanel * chunk.panels * kBlock + k * kPanel + k % kPanel;
  }

  // The c-th of [chunks, chunk, chunk] row-major, only the upper blocks of which are valid before the inverse.
  void to_dense(int64_t c, const ChunkPlan& chunk, T scale, T* dense) const {
    const int64_t width = options_.chunk, height = int64_t{chunk.panels} * kPanel;
    const T* matrix = storage_ + chunk.storage;
    T* out = dense + c * width * width;
    std::fill(out, out + width * width, T(0));
    for (int64_t j = 0; j < chunk.size; ++j) {
      const T* column = matrix + j / kPanel * height * kPanel + j % kPanel;
      for (int64_t i = 0; i <= j; ++i) {
        out[i * width + j] = out[j * width + i] = column[i * kPanel] * scale;
      }
    }
  }

  // Of a lower triangular matrix.
  void to_dense_lower(int64_t c, const ChunkPlan& chunk, T* dense) const {
    const int64_t width = options_.chunk, height = int64_t{chunk.panels} * kPanel;
    T* out = dense + c * width * width;
    std::fill(out, out + width * width, T(0));
    for (int64_t j = 0; j < chunk.size; ++j) {
      const T* column = storage_ + chunk.storage + j / kPanel * height * kPanel + j % kPanel;
      for (int64_t i = j; i < chunk.size; ++i) out[i * width + j] = column[i * kPanel];
    }
  }

  void from_dense(const T* dense, int64_t c, const ChunkPlan& chunk, T pad) {
    const int64_t width = options_.chunk, height = int64_t{chunk.panels} * kPanel;
    const T* in = dense + c * width * width;
    for (int64_t j = 0; j < height; j += kPanel) {
      T* panel = storage_ + chunk.storage + j * height;
      const int64_t lanes = std::min<int64_t>(kPanel, chunk.size - j);
      for (int64_t i = 0; i < height; ++i) {
        T row[kPanel] = {};
        if (i < chunk.size) {
          std::copy_n(in + i * width + j, lanes, row);
        } else if (i - j < kPanel) {
          row[i - j] = pad;
        }
        std::copy_n(row, kPanel, panel + i * kPanel);
      }
    }
  }

  const PreconditionLayer* layers_;
  const PreconditionOptions& options_;
  const Plan& plan_;
  std::vector<LayerState> states_;
  std::vector<Scratch<T>> scratch_;
  T* storage_;
  const WhitenedLayer* whitened_;
  double decay_;
  bool unwhitens_;
  std::atomic<int64_t> next_{0}, finished_{0};
};

bool valid(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options) {
  if (count < 0 || (count > 0 && layers == nullptr)) return false;
  if (options.chunk < 1 || options.chunk > kMaxChunk) return false;
  if (options.max_rows < 1 || !(options.damping >= 0) || options.stages < 1 || options.stages > kStageAll) return false;
  if (options.stages == (kStageCovariance | kStageApply)) return false;
  if (options.triangular && options.stages != kStageFactor && options.stages != kStageApply) return false;
  for (int64_t l = 0; l < count; ++l) {
    const PreconditionLayer& layer = layers[l];
    if (layer.units < 0 || layer.units >= INT32_MAX || layer.outputs < 0 || layer.outputs >= INT32_MAX) return false;
    for (int64_t size : layer.g_tap_size) {
      if (size < 0) return false;
    }
    if (options.stages & kStageApply && layer.outputs > 0 && layer.units > 0 && layer.has_bias &&
        layer.bias_grad == nullptr) {
      return false;
    }
    if (layer.same_input) {
      if (l == 0 || layer.units != layers[l - 1].units || layer.has_bias != layers[l - 1].has_bias) return false;
      continue;
    }
    if (layer.group < 1 || layer.group > options.chunk) return false;
    for (int64_t size : layer.x_row_size) {
      if (size < 0) return false;
    }
    if (layer.units == 0) continue;
    if (options.stages == kStageCovariance && layer.covariance == nullptr) return false;
    if (options.stages == kStageFactor && (layer.covariance == nullptr || layer.inverse == nullptr)) return false;
    if (options.stages == kStageApply && (layer.inverse == nullptr || layer.info == nullptr)) return false;
  }
  return true;
}

void write_defaults(const PreconditionLayer& layer, const PreconditionOptions& options) {
  const int64_t chunks = num_chunks(layer, options);
  if (!(options.stages & kStageFactor)) return;
  for (int64_t c = 0; c < chunks; ++c) {
    if (layer.info != nullptr) layer.info[c] = 0;
    if (layer.damping_used != nullptr) layer.damping_used[c] = static_cast<float>(options.damping);
  }
}

int64_t work_of(const Plan& plan, const PreconditionLayer* layers) {
  int64_t work = 0;
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    const LayerPlan& layer = plan.layers[l];
    for (const ChunkPlan& chunk : layer.chunks) work += chunk.size * chunk.size * (layer.sample.count / 2 + chunk.size);
    for (const ChunkPlan& chunk : plan.layers[layer.head].chunks) {
      work += chunk.size * chunk.size * layers[l].outputs * layer.taps;
    }
  }
  return work;
}

bool is_serial(const Plan& plan, const PreconditionLayer* layers, const ThreadPool& pool) {
  return pool.run == nullptr || pool.threads <= 1 || work_of(plan, layers) < kSerialWork;
}

// `after` is called with the launch when all of its tasks are done.
template <typename T, typename After>
Status run(const PreconditionLayer* layers, const PreconditionOptions& options, const Plan& plan,
           const ThreadPool& pool, After after, const WhitenedLayer* whitened = nullptr, double decay = 0,
           bool unwhitens = false, const char* finite = nullptr) {
  const bool serial = is_serial(plan, layers, pool);
  const int32_t threads = serial ? 1 : pool.threads;
  const int64_t bytes = aligned(plan.storage_elements * sizeof(T)) + threads * thread_bytes(plan, sizeof(T));
  const Bytes workspace = allocate(bytes);
  if (workspace == nullptr) return Status::kOutOfMemory;
  Launch<T> launch(layers, options, plan, workspace.get(), threads, whitened, decay, unwhitens, finite);
  if (serial) {
    launch.work(0);
  } else {
    pool.run(
        pool.context, threads, [](void* argument, int64_t thread) { static_cast<Launch<T>*>(argument)->work(thread); },
        &launch);
  }
  after(launch);
  return Status::kOk;
}

template <typename T>
Status run(const PreconditionLayer* layers, const PreconditionOptions& options, const Plan& plan,
           const ThreadPool& pool) {
  return run<T>(layers, options, plan, pool, [](const Launch<T>&) {});
}

// whitening

template <typename T>
Status whiten(const PreconditionLayer* layers, const WhitenedLayer* whitened, const std::vector<char>& finite,
              const PreconditionOptions& options, double decay, const Plan& plan, const ThreadPool& pool) {
  auto after = [&](const Launch<T>& launch) {
    if (options.stages == kStageApply) return;
    for (size_t l = 0; l < plan.layers.size(); ++l) {
      if (whitened[l].average == nullptr || !plan.layers[l].active || !launch.entered(l)) continue;
      T* weight = static_cast<T*>(whitened[l].average_weight);
      *weight = static_cast<T>(decay * *weight + (1 - decay));
    }
  };
  return run<T>(layers, options, plan, pool, after, whitened, decay, false, finite.data());
}

template <typename T>
Status unwhiten(const PreconditionLayer* layers, const WhitenedLayer* whitened, const PreconditionOptions& options,
                const WhiteningOptions& whitening, const Plan& plan, double* squares, const ThreadPool& pool) {
  const auto count = static_cast<int64_t>(plan.layers.size());
  std::vector<T> scale(count, T(1));
  auto after = [&](const Launch<T>& launch) {
    int64_t end;
    for (int64_t l = 0; l < count; l = end) {
      Squares sum;
      for (end = l; end < count && (end == l || !whitened[end].first); ++end) {
        const Squares of_group = launch.squares(end);
        sum.before += of_group.before;
        sum.after += of_group.after;
      }
      squares[2 * l] = sum.before;
      squares[2 * l + 1] = sum.after;
      const double ratio = std::sqrt(sum.before / sum.after);
      if (!whitening.keep_norm || !(sum.after > 0) || !(ratio - ratio == 0)) continue;
      std::fill(scale.begin() + l, scale.begin() + end, static_cast<T>(ratio));
    }
  };
  const Status status = run<T>(layers, options, plan, pool, after, whitened, 0, true);
  if (status != Status::kOk || !whitening.finish) return status;
  std::atomic<int64_t> next{0};
  auto finish = [&](int64_t) {
    for (int64_t at = next.fetch_add(1); at < static_cast<int64_t>(plan.tasks.size()); at = next.fetch_add(1)) {
      const Task& task = plan.tasks[at];
      if (task.phase != Phase::kApply || !whitened[task.layer].moves) continue;
      add_scaled<T>(layers[task.layer], whitened[task.layer], task.begin, task.end - task.begin, scale[task.layer]);
    }
  };
  if (is_serial(plan, layers, pool)) {
    finish(0);
  } else {
    pool.run(
        pool.context, pool.threads,
        [](void* argument, int64_t thread) { (*static_cast<decltype(finish)*>(argument))(thread); }, &finish);
  }
  return Status::kOk;
}

bool valid_whitening(const PreconditionLayer* layers, const WhitenedLayer* whitened, int64_t count,
                     const PreconditionOptions& options, bool unwhitens) {
  if (!options.triangular || (options.stages != kStageApply && (unwhitens || options.stages != kStageAll))) {
    return false;
  }
  PreconditionOptions plain = options;
  plain.triangular = false;
  if (!valid(layers, count, plain)) return false;
  for (int64_t l = 0; l < count; ++l) {
    const PreconditionLayer& layer = layers[l];
    const WhitenedLayer& of = whitened[l];
    const bool empty = layer.units == 0 || layer.outputs == 0;
    if (layer.same_input || (layer.inverse == nullptr && !empty)) return false;
    if ((of.average == nullptr) != (of.average_weight == nullptr)) return false;
    if (unwhitens && !empty && (of.before == nullptr || (layer.has_bias && of.bias_before == nullptr))) return false;
  }
  return true;
}

}  // namespace
}  // namespace cpu

Status whiten_cpu(const PreconditionLayer* layers, const WhitenedLayer* whitened, int64_t count,
                  const PreconditionOptions& options, const WhiteningOptions& whitening, const ThreadPool& pool) {
  if (!cpu::valid_whitening(layers, whitened, count, options, false)) return Status::kInvalidArgument;
  if (!(whitening.decay >= 0 && whitening.decay < 1)) return Status::kInvalidArgument;
  try {
    const cpu::Plan plan = cpu::make_plan(layers, count, options, std::max(1, pool.threads), true);
    std::vector<char> finite(count);
    for (int64_t l = 0; l < count; ++l) {
      if (!plan.layers[l].active) cpu::write_defaults(layers[l], options);
      if (whitened[l].has_gradient != nullptr && cpu::has_gradient(layers[l])) *whitened[l].has_gradient = 1;
      finite[l] = whitened[l].average == nullptr || cpu::is_finite(layers[l]);
    }
    return options.float64 ? cpu::whiten<double>(layers, whitened, finite, options, whitening.decay, plan, pool)
                           : cpu::whiten<float>(layers, whitened, finite, options, whitening.decay, plan, pool);
  } catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
  }
}

Status unwhiten_cpu(const PreconditionLayer* layers, const WhitenedLayer* whitened, int64_t count,
                    const PreconditionOptions& options, const WhiteningOptions& whitening, double* squares,
                    const ThreadPool& pool) {
  if (!cpu::valid_whitening(layers, whitened, count, options, true)) return Status::kInvalidArgument;
  try {
    std::fill(squares, squares + 2 * count, 0.0);
    const cpu::Plan plan = cpu::make_plan(layers, count, options, std::max(1, pool.threads));
    return options.float64 ? cpu::unwhiten<double>(layers, whitened, options, whitening, plan, squares, pool)
                           : cpu::unwhiten<float>(layers, whitened, options, whitening, plan, squares, pool);
  } catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
  }
}

Status precondition_cpu(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                        const ThreadPool& pool) {
  if (!cpu::valid(layers, count, options)) return Status::kInvalidArgument;
  try {
    const cpu::Plan plan = cpu::make_plan(layers, count, options, std::max(1, pool.threads));
    for (int64_t l = 0; l < count; ++l) {
      const cpu::LayerPlan& head = plan.layers[plan.layers[l].head];
      if (!head.active && !head.one_unit) cpu::write_defaults(layers[l], options);
    }
    cpu::correct_one_unit(layers, options, plan, pool);
    if (plan.tasks.empty()) return Status::kOk;
    return options.float64 ? cpu::run<double>(layers, options, plan, pool)
                           : cpu::run<float>(layers, options, plan, pool);
  } catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
  }
}

int64_t precondition_workspace_cpu(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                                   int32_t threads) {
  if (!cpu::valid(layers, count, options)) return 0;
  const cpu::Plan plan = cpu::make_plan(layers, count, options, std::max(1, threads));
  const int64_t element = options.float64 ? sizeof(double) : sizeof(float);
  return cpu::aligned(plan.storage_elements * element) + threads * cpu::thread_bytes(plan, element) + plan.table_bytes;
}

}  // namespace consistency_ops
