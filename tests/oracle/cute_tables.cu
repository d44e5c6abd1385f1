// Prints, from the traits of NVIDIA's CuTe, evaluated by the compiler, which element every (lane, register value) of an
// instruction is.  The test writes instructions.inc: M(operation of CuTe, name to print) and L(copy operation, name).
#include <cstdio>
#include <cute/tensor.hpp>
// after it
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

using namespace cute;

template <typename Layout>
void print_table(const char* name, const char* part, Layout layout) {
  const int lanes = int(size<0>(layout)), values = int(size<1>(layout));
  std::printf("%s %s %d", name, part, values);
  for (int lane = 0; lane < lanes; ++lane) {
    for (int v = 0; v < values; ++v) std::printf(" %d", int(layout(lane, v)));
  }
  std::printf("\n");
}

template <typename Operation>
void print_product(const char* name) {
  using Traits = MMA_Traits<Operation>;
  const auto shape = typename Traits::Shape_MNK{};
  std::printf("%s shape 3 %d %d %d\n", name, int(get<0>(shape)), int(get<1>(shape)), int(get<2>(shape)));
  print_table(name, "A", typename Traits::ALayout{});
  print_table(name, "B", typename Traits::BLayout{});
  print_table(name, "C", typename Traits::CLayout{});
}

template <typename Operation>
void print_load(const char* name) {
  using Traits = Copy_Traits<Operation>;
  print_table(name, "source", typename Traits::SrcLayout{});
  print_table(name, "destination", typename Traits::DstLayout{});
}

// Products of a warpgroup, whose right operand lies in shared memory: where CuTe's layout of 64-byte swizzle puts
// element (row, column) of a 32 x 32 matrix of bfloat16, and the stride that a descriptor of it would have, in bytes.
template <typename Operation>
void print_warpgroup(const char* name) {
  using Traits = MMA_Traits<Operation>;
  const auto shape = typename Traits::Shape_MNK{};
  std::printf("%s shape 3 %d %d %d\n", name, int(get<0>(shape)), int(get<1>(shape)), int(get<2>(shape)));
  print_table(name, "A", typename Traits::ALayout{});
  print_table(name, "C", typename Traits::CLayout{});
}

// `columns_first`: (row, column) is (k, n) of an MN-major operand, else (n, k) of a K-major one.
template <typename Atom>
void print_swizzle(const char* part, bool columns_first) {
  const auto layout = as_position_independent_swizzle_layout(tile_to_shape(Atom{}, Shape<_32, _32>{}));
  std::printf("swizzle %s 32", part);
  for (int row = 0; row < 32; ++row) {
    for (int column = 0; column < 32; ++column) {
      std::printf(" %d", int(columns_first ? layout(column, row) : layout(row, column)));
    }
  }
  std::printf("\n");
}

#define W(operation, name)                                                      \
  print_warpgroup<SM90::GMMA::operation<GMMA::Major::K, GMMA::Major::K>>(name); \
  print_swizzle<GMMA::Layout_K_SW64_Atom<bfloat16_t>>("K", false);              \
  print_swizzle<GMMA::Layout_MN_SW64_Atom<bfloat16_t>>("MN", true);
#define M(operation, name) print_product<operation>(name);
#define L(operation, name) print_load<operation>(name);

int main() {
#include "instructions.inc"
}
