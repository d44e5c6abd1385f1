// One-hot probes of the host bodies of csrc/cuda/ptx.cuh.  For a matrix product, one element of A and one of B are 1:
// the element of D that becomes 1 tells that their k agree, and where row and column went.  All pairs, one line each
// that has a product: `name lane_of_a value_of_a lane_of_b value_of_b lane_of_d value_of_d`.  For a load, every element
// of the 32 rows in shared memory has a number of its own: `name lane register low high`.
#include <cstdio>
#include <vector>

#include "cuda/port.cuh"
#include "cuda/ptx.cuh"

using namespace consistency_ops;

namespace {

enum Instruction { kTf32, kBFloat16, kFloat16, kLoad, kTransposedLoad };

struct Params {
  Instruction instruction;
  int a_lane, a_value, b_lane, b_value;
  float* d;     // [32, 4]
  uint32_t* m;  // [32, 4]
};

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
  Params p{instruction, 0, 0, 0, 0, d.data(), nullptr};
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

}  // namespace

int main() {
  probe_pairs("mma.m16n8k8.f32.tf32.tf32.f32", kTf32, 4, 2);
  probe_pairs("mma.m16n8k16.f32.bf16.bf16.f32", kBFloat16, 8, 4);
  probe_pairs("mma.m16n8k16.f32.f16.f16.f32", kFloat16, 8, 4);
  std::vector<uint32_t> m(128);
  for (const Instruction load : {kLoad, kTransposedLoad}) {
    run({load, 0, 0, 0, 0, nullptr, m.data()});
    const char* const name = load == kLoad ? "ldmatrix.m8n8.x4" : "ldmatrix.m8n8.x4.trans";
    for (int i = 0; i < 128; ++i) std::printf("%s %d %d %u %u\n", name, i / 4, i % 4, m[i] & 0xffff, m[i] >> 16);
  }
}
