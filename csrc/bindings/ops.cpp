// The one list of schemas.  Mutation is written down; sizes that follow tensor shapes are SymInt.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(consistency_ops, m) {
  // Lists that may lack entries (bias_grads, permutations, row_counts) are dense, with the layer of each entry beside them.
  m.def(
      "foreach_precondition_(Tensor(a!)[] grads, Tensor(b!)[] bias_grads, Tensor[] inputs, Tensor[] permutations, "
      "Tensor[] row_counts, int[] bias_layers, int[] permutation_layers, int[] row_count_layers, int[] layers, "
      "float damping, bool trace_scaling, int chunk, int group, int max_rows, int seed, int step) "
      "-> (Tensor info, Tensor damping_used)");
  m.def(
      "foreach_covariance(Tensor[] inputs, Tensor[] permutations, Tensor[] row_counts, int[] permutation_layers, "
      "int[] row_count_layers, int[] layers, int[] unit_dims, SymInt[] units, bool[] bias, int chunk, int group, "
      "int max_rows, int seed, int step) -> Tensor[]");
  m.def(
      "foreach_inverse(Tensor[] covariances, SymInt[] units, float damping, bool trace_scaling, int chunk) "
      "-> (Tensor[] inverses, Tensor info, Tensor damping_used)");
  m.def(
      "foreach_apply_(Tensor(a!)[] grads, Tensor(b!)[] bias_grads, Tensor[] inverses, Tensor info, Tensor[] permutations, "
      "int[] bias_layers, int[] permutation_layers, int[] layers, int chunk, int group, int seed, int step) -> ()");
}
