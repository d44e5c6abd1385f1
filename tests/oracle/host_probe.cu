// One-hot probes of the host bodies of csrc/cuda/ptx.cuh.  For a matrix product, one element of A and one of B are 1:
// the element of D that becomes 1 tells that their k agree, and where row and column went.  All pairs, one line each
// that has a product: `name lane_of_a value_of_a lane_of_b value_of_b lane_of_d value_of_d`.  For a load, every element
// of the 32 rows in shared memory has a number of its own: `name lane register low high`.  For a product of a
// warpgroup, of which one warp runs, one element of A is 1 and every element of the 32 x 32 numbers in shared memory
// has a number: `name transposed half lane_of_a value_of_a lane_of_d value_of_d number` tells which one came to D.
#include <cstdio>
#include <vector>

#include "cuda/port.cuh"
#include "cuda/ptx.cuh"

using namespace consistency_ops;

namespace {

enum Instruction { kTf32, kBFloat16, kFloat16, kLoad, kTransposedLoad, kWarpgroup, kTransposedWarpgroup };

struct Params {
  Instruction instruction;
  int a_lane, a_value, b_lane, b_value;
  float* d;     // [32, 4]
  uint32_t* m;  // [32, 4]
  int half, digit;
};

// B has 1 + digit 0 or 1, base 32, of the number of each element.  `half`: the first or the second 16 of k.
__global__ void probe_warpgroup(CO_KERNEL_PARAM(Params, p)) {
  CO_DYNAMIC_SHARED(uint16_t, matrix);
  const int lane = static_cast<int>(threadIdx.x);
  for (int e = lane; e < 1024; e += 32) {
    matrix[e] = float_to_bfloat16(static_cast<float>(1 + (p.digit == 0 ? e % 32 : e / 32)));
  }
  __syncwarp();
  uint32_t a[4] = {};
  if (lane == p.a_lane) a[p.a_value / 2] = 0x3f80u << 16 * (p.a_value % 2);
  float d[16];
  if (p.instruction == kWarpgroup) {
    wgmma_m64n32k16<false>(d, a, matrix + p.half * 16, false);
  } else {
    wgmma_m64n32k16<true>(d, a, matrix + p.half * 16 * 32, false);
  }
  for (int i = 0; i < 16; ++i) p.d[lane * 16 + i] = d[i];
}

__global__ void probe(CO_KERNEL_PARAM(Params, p)) {
  CO_SHARED(Float4, rows, [32]);
  const int lane = static_cast<int>(threadIdx.x);
  const auto one = [&](int of_lane, int of_value, int value) { return lane == of_lane && value == of_value; };
  if (p.instruction == kLoad || p.instruction == kTransposedLoad) {
    auto* row = reinterpret_cast<uint16_t*>(rows + lane);
    for (int k = 0; k < 8; ++k) row[k] = static_cast<uint16_t>(lane * 8 + k);
    __syncwarp();
    uint32_t m[4];
    if (p.instruction == kLoad) {
      load_matrices(m, row);
    } else {
      load_matrices_transposed(m, row);
    }
    for (int i = 0; i < 4; ++i) p.m[lane * 4 + i] = m[i];
    return;
  }
  float d[4] = {};
  if (p.instruction == kTf32) {
    float a[4], b[2];
    for (int i = 0; i < 4; ++i) a[i] = one(p.a_lane, p.a_value, i) ? 1.0f : 0.0f;
    for (int i = 0; i < 2; ++i) b[i] = one(p.b_lane, p.b_value, i) ? 1.0f : 0.0f;
    mma_m16n8k8_tf32(d, a, b);
  } else {
    const uint32_t unit = p.instruction == kBFloat16 ? 0x3f80 : 0x3c00;
    const auto pair = [&](int of_lane, int of_value, int first) {
      return (one(of_lane, of_value, first) ? unit : 0) | (one(of_lane, of_value, first + 1) ? unit << 16 : 0);
    };
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; ++i) a[i] = pair(p.a_lane, p.a_value, 2 * i);
    for (int i = 0; i < 2; ++i) b[i] = pair(p.b_lane, p.b_value, 2 * i);
    if (p.instruction == kBFloat16) {
      mma_m16n8k16<true>(d, a, b[0], b[1]);
    } else {
      mma_m16n8k16<false>(d, a, b[0], b[1]);
    }
  }
  for (int i = 0; i < 4; ++i) p.d[lane * 4 + i] = d[i];
}

void run(const Params& params) {
  if (launch(probe, dim3(1), dim3(32), 0, nullptr, params) != Status::kOk) std::printf("a launch failed\n");
}

void probe_pairs(const char* name, Instruction instruction, int a_values, int b_values) {
  std::vector<float> d(128);
  Params p{instruction, 0, 0, 0, 0, d.data(), nullptr, 0, 0};
  for (int pair = 0; pair < 32 * a_values * 32 * b_values; ++pair) {
    p.b_value = pair % b_values;
    p.b_lane = pair / b_values % 32;
    p.a_value = pair / b_values / 32 % a_values;
    p.a_lane = pair / b_values / 32 / a_values;
    run(p);
    for (int i = 0; i < 128; ++i) {
      if (d[i] == 0.0f) continue;
      std::printf("%s %d %d %d %d %d %d\n", name, p.a_lane, p.a_value, p.b_lane, p.b_value, i / 4, i % 4);
    }
  }
}

void probe_warpgroups(const char* name) {
  std::vector<float> digits[2] = {std::vector<float>(512), std::vector<float>(512)};
  for (int pair = 0; pair < 4 * 256; ++pair) {
    const bool transposed = pair / 512 == 1;
    const int half = pair / 256 % 2, lane = pair / 8 % 32, value = pair % 8;
    for (int digit = 0; digit < 2; ++digit) {
      const Params p{transposed ? kTransposedWarpgroup : kWarpgroup,
                     lane,
                     value,
                     0,
                     0,
                     digits[digit].data(),
                     nullptr,
                     half,
                     digit};
      if (launch(probe_warpgroup, dim3(1), dim3(32), 2048, nullptr, p) != Status::kOk) std::printf("a launch failed\n");
    }
    for (int i = 0; i < 512; ++i) {
      if (digits[0][i] == 0.0f) continue;
      const int number = static_cast<int>(digits[1][i] - 1) * 32 + static_cast<int>(digits[0][i] - 1);
      std::printf("%s %d %d %d %d %d %d %d\n", name, transposed, half, lane, value, i / 16, i % 16, number);
    }
  }
}

}  // namespace

int main() {
  probe_warpgroups("wgmma.m64n32k16.mma_async.f32.bf16.bf16");
  probe_pairs("mma.m16n8k8.f32.tf32.tf32.f32", kTf32, 4, 2);
  probe_pairs("mma.m16n8k16.f32.bf16.bf16.f32", kBFloat16, 8, 4);
  probe_pairs("mma.m16n8k16.f32.f16.f16.f32", kFloat16, 8, 4);
  std::vector<uint32_t> m(128);
  for (const Instruction load : {kLoad, kTransposedLoad}) {
    run({load, 0, 0, 0, 0, nullptr, m.data(), 0, 0});
    const char* const name = load == kLoad ? "ldmatrix.m8n8.x4" : "ldmatrix.m8n8.x4.trans";
    for (int i = 0; i < 128; ++i) std::printf("%s %d %d %u %u\n", name, i / 4, i % 4, m[i] & 0xffff, m[i] >> 16);
  }
}
