// Elements in memory <-> float.
#pragma once

#include "cuda/ptx.cuh"

namespace consistency_ops {

CO_DEVICE float bfloat16_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

// The float that an element of storage `Raw` holds, and back: uint32_t is a float32, uint16_t what `dtype` says.
template <typename Raw>
CO_DEVICE float to_float(DType dtype, uint32_t bits) {
  if (sizeof(Raw) == 4) return __uint_as_float(bits);
  return dtype == DType::kBFloat16 ? bfloat16_to_float(static_cast<uint16_t>(bits))
                                   : float16_to_float(static_cast<uint16_t>(bits));
}

template <typename Raw>
CO_DEVICE Raw from_float(DType dtype, float value) {
  if (sizeof(Raw) == 4) return static_cast<Raw>(__float_as_uint(value));
  return dtype == DType::kBFloat16 ? float_to_bfloat16(value) : float_to_float16(value);
}

// 1, the input of the bias.
template <typename Raw>
CO_DEVICE Raw one_bits(DType dtype) {
  if (sizeof(Raw) == 4) return static_cast<Raw>(0x3f800000u);
  return dtype == DType::kBFloat16 ? 0x3f80 : 0x3c00;
}

CO_DEVICE float load_element(DType dtype, const void* base, int64_t offset) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(base)[offset];
  return to_float<uint16_t>(dtype, static_cast<const uint16_t*>(base)[offset]);
}

CO_DEVICE void store_element(DType dtype, void* base, int64_t offset, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(base)[offset] = value;
  } else {
    static_cast<uint16_t*>(base)[offset] = from_float<uint16_t>(dtype, value);
  }
}

CO_DEVICE float round_to(DType dtype, float value) {
  return dtype == DType::kFloat32 ? value : to_float<uint16_t>(dtype, from_float<uint16_t>(dtype, value));
}

CO_DEVICE bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }

}  // namespace consistency_ops
