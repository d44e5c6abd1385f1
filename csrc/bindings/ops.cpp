// The one list of schemas.  Mutation is written down; sizes that follow tensor shapes are SymInt.
#include "bindings/registration.h"

CO_LIBRARY(CO_NAMESPACE, m) {
  // Lists that may lack entries (bias_grads, permutations, row_counts) are dense, with the layer of each entry beside
  // them.
  // tf32, rung (PreconditionRung) and ctas are the CUDA kernel's CudaTuning; the CPU has no use for them.
  m.def(
      "foreach_precondition_(Tensor(a!)[] grads, Tensor(b!)[] bias_grads, Tensor[] inputs, Tensor[] permutations, "
      "Tensor[] row_counts, int[] bias_layers, int[] permutation_layers, int[] row_count_layers, int[] layers, "
      "int[] groups, float damping, bool trace_scaling, int chunk, int max_rows, int seed, int step, "
      "bool tf32=False, int rung=0, int ctas=0) -> (Tensor info, Tensor damping_used)");
  m.def(
      "foreach_covariance(Tensor[] inputs, Tensor[] permutations, Tensor[] row_counts, int[] permutation_layers, "
      "int[] row_count_layers, int[] layers, int[] groups, int[] unit_dims, SymInt[] units, bool[] bias, "
      "int chunk, int max_rows, int seed, int step) -> Tensor[]");
  m.def(
      "foreach_inverse(Tensor[] covariances, SymInt[] units, float damping, bool trace_scaling, int chunk, "
      "bool triangular=False) "
      "-> (Tensor[] inverses, Tensor info, Tensor damping_used)");
  m.def(
      "foreach_apply_(Tensor(a!)[] grads, Tensor(b!)[] bias_grads, Tensor[] inverses, Tensor info, Tensor[] "
      "permutations, "
      "int[] bias_layers, int[] permutation_layers, int[] layers, int[] groups, int chunk, int seed, int step, "
      "bool triangular=False) -> ()");
  // foreach_inverse and foreach_apply_ in one launch.
  m.def(
      "foreach_correct_(Tensor(a!)[] grads, Tensor(b!)[] bias_grads, Tensor[] covariances, Tensor[] permutations, "
      "int[] bias_layers, int[] permutation_layers, int[] layers, int[] groups, float damping, bool trace_scaling, "
      "int chunk, int seed, int step) -> (Tensor info, Tensor damping_used)");

  // signs: one bit an element, in the memory order of the result; strides: those of the result, if grad has others.
  m.def("modulus(Tensor x) -> Tensor");
  m.def("modulus_forward(Tensor x, int batch_dims=0) -> (Tensor y, Tensor signs)");
  m.def("modulus_backward(Tensor grad, Tensor signs, SymInt[]? strides=None) -> Tensor");
  m.def("modulus_complex_backward(Tensor grad, Tensor x) -> Tensor");

  m.def(
      "batch_rms_norm_denominator_(Tensor x, Tensor(a!) running_ms, Tensor(b!)? num_batches, float decay, float "
      "eps) "
      "-> Tensor");
  m.def(
      "batch_rms_norm_denominator(Tensor running_ms, Tensor? num_batches, ScalarType dtype, float decay, float eps) "
      "-> Tensor");
  m.def("batch_rms_norm_divide(Tensor x, Tensor denominator) -> Tensor");

  // state: int64 [layers, 10], one CaptureState (capture.h) a layer.
  m.def(
      "capture_rows_(Tensor(a!) rows, Tensor(b!) state, Tensor x, SymInt index, SymInt unit_dim, SymInt seed, "
      "bool in_backward=False) -> ()");
  m.def("capture_mark_(Tensor(a!) rows, Tensor(b!) state, SymInt index, bool restart) -> ()");
}
