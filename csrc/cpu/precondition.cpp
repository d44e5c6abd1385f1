// The correction of all layers on the CPU: G[:, c] <- G[:, c] (X_c^T X_c / n + damping I)^-1.
//
// One parallel region a call (launch.h).  The work is a list of tickets (plan.h) in three phases a layer:
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

#include <algorithm>
#include <new>

#include "cpu/launch.h"
#include "cpu/one_unit.h"

namespace consistency_ops {

namespace cpu {

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

}  // namespace cpu

Status precondition_cpu(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                        const ThreadPool& pool) {
  if (!cpu::valid(layers, count, options)) return Status::kInvalidArgument;
  try {
    const cpu::Plan plan = cpu::make_plan(layers, count, options, std::max(1, pool.threads),
                                          cpu::pair_kernels() != nullptr, false, cpu::tile_kernels());
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
  const cpu::Plan plan = cpu::make_plan(layers, count, options, std::max(1, threads), cpu::pair_kernels() != nullptr,
                                        false, cpu::tile_kernels());
  const int64_t element = options.float64 ? sizeof(double) : sizeof(float);
  return cpu::workspace_bytes(plan, element, threads) + plan.table_bytes;
}

}  // namespace consistency_ops