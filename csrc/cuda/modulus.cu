// |x| and its backward, with one bit an element between them.
//
// Both are bound by memory: forward moves 2 + 1 / (8 size) times the tensor, backward the same.  So a lane takes 16
// bytes at a time and has four such loads in flight (64 KiB an SM; 4.3 TB/s at 800 ns of latency need 26), and the bits
// of a warp leave as whole bytes side by side: 8 / V neighbouring lanes of V elements each fill a byte with shuffles.
// Numbers are treated as integers, as on the CPU: |x| clears the top bit; x is negative, and neither -0 nor NaN,
// exactly when its bits, read as a signed integer, lie in (lowest, bits of -Inf].
//
// Rows that do not start on 16 bytes, and the end of a row, are read element by element in the same layout of lanes.
#include <algorithm>
#include <type_traits>

#include "consistency_ops/modulus_cuda.h"
#include "cuda/port.cuh"

namespace consistency_ops {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // a thread
constexpr int kCtas = 4;     // resident on an SM, by registers
constexpr int kMaxGridRows = 65535;

// Numbers of type I, kElements in 16 bytes, and the bits of -Inf.
template <typename I_, uint64_t kMinusInf_>
struct ModulusTraits {
  using I = I_;
  static constexpr int kBits = 8 * sizeof(I);
  static constexpr int kElements = 16 / sizeof(I);
  static constexpr int kLanes = 8 / kElements;  // that share a byte of signs
  static constexpr I kTop = static_cast<I>(uint64_t{1} << (kBits - 1));
  static constexpr I kMinusInf = static_cast<I>(kMinusInf_);
  static_assert(kLanes >= 1, "a lane fills at most one byte");
};
using Float64 = ModulusTraits<uint64_t, 0xFFF0000000000000u>;
using Float32 = ModulusTraits<uint32_t, 0xFF800000u>;
using BFloat16 = ModulusTraits<uint16_t, 0xFF80u>;
using Float16 = ModulusTraits<uint16_t, 0xFC00u>;

// kElements numbers.  Words, not an array of I: 16-bit elements would take a register each.
template <typename Traits>
struct alignas(16) Vector {
  using I = typename Traits::I;
  static constexpr int kWords = sizeof(I) == 8 ? 2 : 4, kPerWord = Traits::kElements / kWords;
  using Word = std::conditional_t<sizeof(I) == 8, uint64_t, uint32_t>;
  Word word[kWords];

  CO_DEVICE I get(int e) const { return static_cast<I>(word[e / kPerWord] >> (e % kPerWord * Traits::kBits)); }
  CO_DEVICE void set(int e, I value) {
    word[e / kPerWord] |= static_cast<Word>(value) << (e % kPerWord * Traits::kBits);
  }
  CO_DEVICE void flip(int e) {
    word[e / kPerWord] ^= static_cast<Word>(Traits::kTop) << (e % kPerWord * Traits::kBits);
  }
  CO_DEVICE void clear_tops() {
    constexpr Word kTops = kPerWord == 2 ? Word{0x80008000u} : static_cast<Word>(Traits::kTop);
    CO_UNROLL
    for (int w = 0; w < kWords; ++w) word[w] &= static_cast<Word>(~kTops);
  }
};

// Elements [first, first + kElements) of a row of `length`; those past the end are 0.
template <typename Traits>
CO_DEVICE Vector<Traits> load(const typename Traits::I* row, int64_t first, int64_t length, bool aligned) {
  Vector<Traits> v{};
  if (aligned && first + Traits::kElements <= length) {
    v = *reinterpret_cast<const Vector<Traits>*>(row + first);
  } else {
    CO_UNROLL
    for (int e = 0; e < Traits::kElements; ++e) {
      if (first + e < length) v.set(e, row[first + e]);
    }
  }
  return v;
}

template <typename Traits>
CO_DEVICE void store(typename Traits::I* row, int64_t first, int64_t length, bool aligned, const Vector<Traits>& v) {
  if (aligned && first + Traits::kElements <= length) {
    *reinterpret_cast<Vector<Traits>*>(row + first) = v;
  } else {
    CO_UNROLL
    for (int e = 0; e < Traits::kElements; ++e) {
      if (first + e < length) row[first + e] = v.get(e);
    }
  }
}

CO_DEVICE bool on_16_bytes(const void* a, const void* b) {
  return ((reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) & 15) == 0;
}

template <typename Traits>
__global__ void __launch_bounds__(kThreads, kCtas) modulus_kernel(CO_KERNEL_PARAM(ModulusParams, params)) {
  using I = typename Traits::I;
  const int64_t length = params.row_length;
  for (int64_t r = blockIdx.y; r < params.rows; r += gridDim.y) {
    const I* x = static_cast<const I*>(params.x) + r * length;
    I* y = static_cast<I*>(params.y) + r * length;
    const bool aligned = on_16_bytes(x, y);
    const int64_t first = (int64_t{blockIdx.x} * kThreads * kVectors + threadIdx.x) * Traits::kElements;
    Vector<Traits> v[kVectors];
    CO_UNROLL
    for (int u = 0; u < kVectors; ++u)
      v[u] = load<Traits>(x, first + u * kThreads * Traits::kElements, length, aligned);
    CO_UNROLL
    for (int u = 0; u < kVectors; ++u) {
      const int64_t at = first + u * kThreads * Traits::kElements;
      uint32_t signs = 0;
      CO_UNROLL
      for (int e = 0; e < Traits::kElements; ++e) {
        const I value = v[u].get(e);
        if (value > Traits::kTop && value <= Traits::kMinusInf) signs |= 1u << e;
      }
      v[u].clear_tops();
      store<Traits>(y, at, length, aligned, v[u]);
      if (params.signs == nullptr) continue;  // the same for all lanes
      CO_UNROLL
      for (int lanes = 1; lanes < Traits::kLanes; lanes *= 2) {
        signs |= __shfl_xor_sync(0xffffffffu, signs, lanes) << (lanes * Traits::kElements);
      }
      if (threadIdx.x % Traits::kLanes == 0 && at < length) {
        params.signs[r * ((length + 7) / 8) + at / 8] = static_cast<uint8_t>(signs);
      }
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kThreads, kCtas)
    modulus_backward_kernel(CO_KERNEL_PARAM(ModulusBackwardParams, params)) {
  using I = typename Traits::I;
  const int64_t length = params.row_length;
  for (int64_t r = blockIdx.y; r < params.rows; r += gridDim.y) {
    const I* grad = static_cast<const I*>(params.grad) + r * length;
    I* grad_x = static_cast<I*>(params.grad_x) + r * length;
    const uint8_t* row_signs = params.signs + r * ((length + 7) / 8);
    const bool aligned = on_16_bytes(grad, grad_x);
    const int64_t first = (int64_t{blockIdx.x} * kThreads * kVectors + threadIdx.x) * Traits::kElements;
    Vector<Traits> v[kVectors];
    uint32_t signs[kVectors];
    CO_UNROLL
    for (int u = 0; u < kVectors; ++u) {
      const int64_t at = first + u * kThreads * Traits::kElements;
      v[u] = load<Traits>(grad, at, length, aligned);
      signs[u] = at < length ? uint32_t{row_signs[at / 8]} >> (at % 8) : 0;
    }
    CO_UNROLL
    for (int u = 0; u < kVectors; ++u) {
      CO_UNROLL
      for (int e = 0; e < Traits::kElements; ++e) {
        if (signs[u] >> e & 1) v[u].flip(e);
      }
      store<Traits>(grad_x, first + u * kThreads * Traits::kElements, length, aligned, v[u]);
    }
  }
}

// Blocks for rows of `length` elements of `size` bytes; z is 1.
dim3 grid_of(int64_t rows, int64_t length, int64_t size) {
  const int64_t block_elements = kThreads * kVectors * (16 / size);
  return dim3(static_cast<unsigned>((length + block_elements - 1) / block_elements),
              static_cast<unsigned>(std::min<int64_t>(rows, kMaxGridRows)));
}

template <typename Params>
bool valid(const Params& params) {
  const int64_t largest = (int64_t{1} << 31) * kThreads;  // blocks of a grid, times more than one element each
  return params.rows >= 0 && params.row_length >= 0 && params.row_length < largest && params.dtype >= DType::kFloat32 &&
         params.dtype <= DType::kFloat16;
}

}  // namespace

Status modulus_cuda(const ModulusParams& params, void* stream) {
  if (!valid(params)) return Status::kInvalidArgument;
  if (params.rows == 0 || params.row_length == 0) return Status::kOk;
  auto* kernel = params.dtype == DType::kFloat32    ? modulus_kernel<Float32>
                 : params.dtype == DType::kFloat64  ? modulus_kernel<Float64>
                 : params.dtype == DType::kBFloat16 ? modulus_kernel<BFloat16>
                                                    : modulus_kernel<Float16>;
  return launch(kernel, grid_of(params.rows, params.row_length, element_size(params.dtype)), dim3(kThreads), 0, stream,
                params);
}

Status modulus_backward_cuda(const ModulusBackwardParams& params, void* stream) {
  if (!valid(params)) return Status::kInvalidArgument;
  if (params.rows == 0 || params.row_length == 0) return Status::kOk;
  auto* kernel = params.dtype == DType::kFloat32   ? modulus_backward_kernel<Float32>
                 : params.dtype == DType::kFloat64 ? modulus_backward_kernel<Float64>
                                                   : modulus_backward_kernel<Float16>;
  return launch(kernel, grid_of(params.rows, params.row_length, element_size(params.dtype)), dim3(kThreads), 0, stream,
                params);
}

}  // namespace consistency_ops
