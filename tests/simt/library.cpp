// The shared library that the simt tests load: the CUDA kernels on the host runtime, behind C functions that report
// errors as text.  The structs of precondition.h and friends cross as they are; simt.py mirrors them and checks their
// sizes.
#include <cstring>
#include <memory>
#include <string>

#include "consistency_ops/batch_rms_norm_cuda.h"
#include "consistency_ops/capture_cuda.h"
#include "consistency_ops/damping.h"
#include "consistency_ops/linalg_cuda.h"
#include "consistency_ops/modulus_cuda.h"
#include "consistency_ops/precondition_cuda.h"
#include "consistency_ops/random.h"
#include "consistency_ops/whitening_cuda.h"
#include "cuda/precondition/counter_slots.h"
#include "cuda/precondition/heuristics.h"
#include "simt/runtime.h"

using namespace consistency_ops;

namespace {

thread_local std::string error;
std::unique_ptr<CounterSlots> slots;

// What test_simt_accesses.py cannot count, because one call stands for the reads of 32 lanes: ldmatrix reads 8 rows of
// 16 bytes at once, without bank conflicts if they lie in the 8 groups of 4 banks.
constexpr bool ldmatrix_is_free_of_conflicts() {
  for (int padded = kTile; padded <= kMaxChunk; padded += kTile) {
    unsigned groups = 0;
    for (int row = 0; row < 8; ++row) groups |= 1u << (row * x_pitch(padded) * 2 / 16 % 8);
    if (groups != 0xffu || x_pitch(padded) * 2 % 16 != 0) return false;
  }
  return true;
}
static_assert(ldmatrix_is_free_of_conflicts());

// Text of what went wrong, or null.
template <typename F>
const char* guarded(F&& run) {
  try {
    const Status status = run();
    if (status == Status::kOk) return nullptr;
    error = "status " + std::to_string(static_cast<int>(status));
  } catch (const simt::Error& e) {
    error = e.what();
  }
  return error.c_str();
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API void simt_configure(uint64_t seed, int32_t order, uint32_t resident, uint64_t shared_limit) {
  simt::Options& options = simt::options();
  options.seed = seed;
  options.order = static_cast<simt::Order>(order);
  options.resident = resident;
  options.shared_limit = shared_limit;
}

API void simt_let_clusters_fit(bool fit) { simt::options().clusters = fit; }

API simt::Stats simt_stats() { return simt::stats(); }

API int64_t simt_size_of(const char* name) {
  if (std::strcmp(name, "PreconditionLayer") == 0) return sizeof(PreconditionLayer);
  if (std::strcmp(name, "PreconditionOptions") == 0) return sizeof(PreconditionOptions);
  if (std::strcmp(name, "CudaDevice") == 0) return sizeof(CudaDevice);
  if (std::strcmp(name, "CudaTuning") == 0) return sizeof(CudaTuning);
  if (std::strcmp(name, "WhitenedLayer") == 0) return sizeof(WhitenedLayer);
  if (std::strcmp(name, "WhiteningOptions") == 0) return sizeof(WhiteningOptions);
  if (std::strcmp(name, "SpdParams") == 0) return sizeof(SpdParams);
  if (std::strcmp(name, "LayerWork") == 0) return sizeof(LayerWork);
  if (std::strcmp(name, "RowMatrix") == 0) return sizeof(RowMatrix);
  if (std::strcmp(name, "ModulusParams") == 0) return sizeof(ModulusParams);
  if (std::strcmp(name, "BatchRmsNormParams") == 0) return sizeof(BatchRmsNormParams);
  if (std::strcmp(name, "ChannelDivideParams") == 0) return sizeof(ChannelDivideParams);
  if (std::strcmp(name, "CaptureProblem") == 0) return sizeof(CaptureProblem);
  return -1;
}

API const char* simt_capture_rows(const CaptureProblem* problem, bool cpu) {
  return guarded([&] { return cpu ? capture_rows_cpu(*problem, {}) : capture_rows_cuda(*problem, nullptr); });
}

API const char* simt_capture_mark(const CaptureProblem* problem, bool restart, bool cpu) {
  return guarded(
      [&] { return cpu ? capture_mark_cpu(*problem, restart) : capture_mark_cuda(*problem, restart, nullptr); });
}

API int64_t simt_batch_rms_norm_workspace(const BatchRmsNormParams* params) {
  return batch_rms_norm_workspace_cuda(*params);
}

API const char* simt_batch_rms_norm_denominator(const BatchRmsNormParams* params, void* workspace) {
  return guarded([&] { return batch_rms_norm_denominator_cuda(*params, workspace, nullptr); });
}

API const char* simt_channel_divide(const ChannelDivideParams* params) {
  return guarded([&] { return channel_divide_cuda(*params, nullptr); });
}

API const char* simt_modulus(const ModulusParams* params) {
  return guarded([&] { return modulus_cuda(*params, nullptr); });
}

API const char* simt_modulus_backward(const ModulusBackwardParams* params) {
  return guarded([&] { return modulus_backward_cuda(*params, nullptr); });
}

API const char* simt_precondition(const PreconditionLayer* layers, int64_t count, const PreconditionOptions* options,
                                  const CudaDevice* device, void* workspace, const CudaTuning* tuning) {
  return guarded([&] { return precondition_cuda(layers, count, *options, *device, workspace, nullptr, *tuning); });
}

API int64_t simt_precondition_workspace(const PreconditionLayer* layers, int64_t count,
                                        const PreconditionOptions* options, const CudaTuning* tuning) {
  return precondition_workspace_cuda(layers, count, *options, *tuning);
}

// squares: null for the launch before the optimizer's step.
API const char* simt_whiten(const PreconditionLayer* layers, const WhitenedLayer* whitened, int64_t count,
                            const PreconditionOptions* options, const WhiteningOptions* whitening, float* squares,
                            const CudaDevice* device, void* workspace, const CudaTuning* tuning) {
  return guarded([&] {
    if (squares == nullptr) {
      return whiten_cuda(layers, whitened, count, *options, *whitening, *device, workspace, nullptr, *tuning);
    }
    return unwhiten_cuda(layers, whitened, count, *options, *whitening, squares, *device, workspace, nullptr, *tuning);
  });
}

// The inverse where there is no b.
API const char* simt_spd(const SpdParams* params, const CudaDevice* device) {
  return guarded([&] {
    return params->b == nullptr ? spd_inverse_cuda(*params, *device, nullptr)
                                : spd_solve_cuda(*params, *device, nullptr);
  });
}

API int64_t simt_whitening_workspace(const PreconditionLayer* layers, int64_t count, const PreconditionOptions* options,
                                     const WhiteningOptions* whitening, bool unwhitens, const CudaTuning* tuning) {
  return whitening_workspace_cuda(layers, count, *options, *whitening, unwhitens, *tuning);
}

API void simt_counter_slots() { slots = std::make_unique<CounterSlots>(); }

API int32_t simt_slot_of_stream(int32_t device, uint64_t stream) { return slots->of_stream(device, stream); }

API int32_t simt_slot_of_capture(int32_t device) { return slots->of_capture(device); }

API LaunchShape simt_choose_rung(int64_t chunks, int64_t longest_rows, int64_t permuted_bytes, int32_t clusters,
                                 const CudaTuning* tuning) {
  return choose_rung(chunks, longest_rows, permuted_bytes, clusters != 0, *tuning);
}

API bool simt_permutes(const RowMatrix* matrix, const CudaTuning* tuning) { return permutes(*matrix, *tuning); }

API LayerTasks simt_tasks_of_layer(const LayerWork* work, const LaunchShape* shape, const CudaTuning* tuning) {
  return tasks_of_layer(*work, *shape, *tuning);
}

API CtaShape simt_choose_cta(int32_t units, int32_t shared_bytes, int32_t slab_bytes) {
  return choose_cta(units, shared_bytes, slab_bytes);
}

API double simt_trace_scale(double sum, int64_t count, double multiplier) {
  return trace_scale(sum, count, multiplier);
}

API double simt_damping_of_try(double damping, int32_t failed) { return damping_of_try<double>(damping, failed); }

API void simt_division(int64_t units, int64_t chunk, int64_t group, uint64_t seed, uint64_t step, uint32_t layer,
                       int64_t* units_out) {
  const Division division = make_division(units, chunk, group, seed, step, layer);
  for (int64_t p = 0; p < units; ++p) units_out[p] = unit_at(division, p);
}

API int64_t simt_sample_rows(int64_t rows, int64_t max_rows, uint64_t seed, uint64_t step, uint32_t layer,
                             int64_t* out) {
  const RowSample sample = sample_rows(rows, max_rows);
  const RowDraws draws{seed, step, layer, 0, sample.stride, rows};
  if (out != nullptr) {
    for (int64_t i = 0; i < sample.count; ++i) out[i] = draws.row(i);  // one by one, as a kernel
  }
  return sample.count;
}
