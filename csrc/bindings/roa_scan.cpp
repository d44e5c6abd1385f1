// The additive recurrence: tensors to RoaScanParams.  CPU: elsewhere torch's own operations compute
// (ops/portable_scan.py).
#include "consistency_ops/roa_scan.h"

#include <optional>
#include <tuple>
#include <vector>

#include "bindings/checks.h"
#include "bindings/layout.h"
#include "bindings/registration.h"
#include "bindings/thread_pool.h"

#if !defined(CONSISTENCY_OPS_SIMT)  // whose library has no CPU kernels
namespace consistency_ops::bindings {
namespace {

using torch::headeronly::ScalarType;
using Optional = std::optional<Tensor>;

// Tensors as the kernels read them; they live as long as the call.
struct Maps {
  Tensor weight;
  Optional index, filter;
};

Tensor packed(const Tensor& x) { return x.is_contiguous() ? x : contiguous_copy(x); }

// (steps, rows, units) with neighbouring units; whatever the strides of steps and rows.
Tensor with_dense_units(const Tensor& x) { return x.size(2) <= 1 || x.stride(2) == 1 ? x : contiguous_copy(x); }

// The stride between the maps of two steps: 0 where one serves all.
int64_t step_of(const Tensor& x, int64_t dims, int64_t steps, int64_t units, const char* op, const char* name) {
  const bool own = x.dim() == dims + 1;
  bool fits = x.dim() == dims || (own && x.size(0) == steps);
  for (int64_t d = own; fits && d < x.dim(); ++d) fits = x.size(d) == units;
  STD_TORCH_CHECK(fits, op, ": ", name, " must have ", dims, " dimensions of ", units, " entries, or ", steps,
                  " times that");
  return own ? x.stride(0) : 0;
}

RoaScanMaps describe(Maps& maps, ScalarType dtype, int64_t steps, int64_t units, double alpha, double beta,
                     int64_t activation, const char* op) {
  RoaScanMaps params{};
  STD_TORCH_CHECK(maps.weight.scalar_type() == dtype && (!maps.filter || maps.filter->scalar_type() == dtype), op,
                  ": weight and filter must have the dtype of the states");
  STD_TORCH_CHECK(0 <= activation && activation < kActivations, op, ": activation must be in [0, ", kActivations,
                  "), got ", activation);
  STD_TORCH_CHECK(!maps.index || maps.index->scalar_type() == ScalarType::Long, op, ": index must be int64");
  maps.weight = packed(maps.weight);
  params.weight_step = step_of(maps.weight, 2, steps, units, op, "weight");
  params.weight = maps.weight.const_data_ptr();
  if (maps.index) {
    maps.index = packed(*maps.index);
    params.index_step = step_of(*maps.index, 1, steps, units, op, "index");
    params.index = maps.index->const_data_ptr<int64_t>();
  } else if (maps.filter) {
    maps.filter = packed(*maps.filter);
    params.filter_step = step_of(*maps.filter, 2, steps, units, op, "filter");
    params.filter = maps.filter->const_data_ptr();
  }
  params.alpha = alpha;
  params.beta = beta;
  params.activation = static_cast<Activation>(activation);
  return params;
}

std::tuple<Tensor, Tensor, Tensor> roa_scan(const Tensor& drive, const Tensor& initial, const Tensor& weight,
                                            const Optional& index, const Optional& filter, double alpha, double beta,
                                            int64_t activation, bool keep) {
  const char* op = "roa_scan";
  STD_TORCH_CHECK(drive.dim() == 3 && initial.dim() == 2 && initial.size(0) == drive.size(1) &&
                      initial.size(1) == drive.size(2) && initial.scalar_type() == drive.scalar_type(),
                  op, ": drive must be (steps, rows, units), and initial (rows, units) of the same dtype");
  RoaScanParams params{};
  params.dtype = dtype_of(drive, op, "drive");
  params.steps = drive.size(0);
  params.rows = drive.size(1);
  params.units = drive.size(2);
  Maps maps{weight, index, filter};
  params.maps = describe(maps, drive.scalar_type(), params.steps, params.units, alpha, beta, activation, op);
  const Tensor x = with_dense_units(drive), h = packed(initial);
  const std::vector<int64_t> shape{params.steps, params.rows, params.units}, none{0, params.rows, params.units};
  Tensor states = empty_contiguous(drive, shape, drive.scalar_type());
  Tensor last = empty_contiguous(drive, {params.rows, params.units}, drive.scalar_type());
  Tensor kept = empty_contiguous(drive, keep ? shape : none, drive.scalar_type());
  params.drive = x.const_data_ptr();
  params.drive_step = x.stride(0);
  params.drive_row = x.stride(1);
  params.initial = h.const_data_ptr();
  params.states = states.mutable_data_ptr();
  params.last = last.mutable_data_ptr();
  params.kept = keep ? kept.mutable_data_ptr() : nullptr;
  check_status(roa_scan_cpu(params, thread_pool()), op);
  return {states, last, kept};
}

std::tuple<Tensor, Tensor> roa_scan_backward(const Optional& grad_states, const Optional& grad_last,
                                             const Tensor& kept_states, const Tensor& weight, const Optional& index,
                                             const Optional& filter, double alpha, double beta, int64_t activation) {
  const char* op = "roa_scan_backward";
  STD_TORCH_CHECK(kept_states.dim() == 3, op, ": kept must be (steps, rows, units)");
  const Tensor kept = packed(kept_states);
  RoaScanBackwardParams params{};
  params.dtype = dtype_of(kept, op, "kept");
  params.steps = kept.size(0);
  params.rows = kept.size(1);
  params.units = kept.size(2);
  Maps maps{weight, index, filter};
  params.maps = describe(maps, kept.scalar_type(), params.steps, params.units, alpha, beta, activation, op);
  Optional states, last;
  if (grad_states) {
    STD_TORCH_CHECK(same_shape(*grad_states, kept) && grad_states->scalar_type() == kept.scalar_type(), op,
                    ": grad_states must have the shape and the dtype of kept");
    states = with_dense_units(*grad_states);
    params.grad_states = states->const_data_ptr();
    params.grad_step = states->stride(0);
    params.grad_row = states->stride(1);
  }
  if (grad_last) {
    STD_TORCH_CHECK(grad_last->dim() == 2 && grad_last->size(0) == params.rows && grad_last->size(1) == params.units &&
                        grad_last->scalar_type() == kept.scalar_type(),
                    op, ": grad_last must be (rows, units) with the dtype of kept");
    last = packed(*grad_last);
    params.grad_last = last->const_data_ptr();
  }
  Tensor delta = empty_contiguous(kept, {params.steps, params.rows, params.units}, kept.scalar_type());
  Tensor grad_initial = empty_contiguous(kept, {params.rows, params.units}, kept.scalar_type());
  params.kept = kept.const_data_ptr();
  params.delta = delta.mutable_data_ptr();
  params.grad_initial = grad_initial.mutable_data_ptr();
  check_status(roa_scan_backward_cpu(params, thread_pool()), op);
  return {delta, grad_initial};
}

}  // namespace

CO_LIBRARY_IMPL(CO_NAMESPACE, CPU, m) {
  m.impl("roa_scan", TORCH_BOX(&roa_scan));
  m.impl("roa_scan_backward", TORCH_BOX(&roa_scan_backward));
}

}  // namespace consistency_ops::bindings
#endif
