// The chunk kernels for the compiler's baseline: correct on any processor.
#include "cpu/chunk_kernels.h"

#define CO_VECTOR_BYTES 16

namespace consistency_ops::cpu {
namespace portable {
#include "cpu/chunk_kernels.inl"
#include "cpu/direct_kernels.inl"
}  // namespace portable

extern const IsaKernels<float> portable_f32;
extern const IsaKernels<double> portable_f64;
const IsaKernels<float> portable_f32 = portable::isa_table<float>();
const IsaKernels<double> portable_f64 = portable::isa_table<double>();

}  // namespace consistency_ops::cpu
