// The tile instructions of Intel's AMX in plain C++, bit for bit, so that the kernels on them are tested on machines
// that have none.  As on the hardware a tile may be used only between begin and end, on the thread that began.
//
// TDPBF16PS, by Intel's description and by comparison with an Intel processor (51,200 results each of normal numbers,
// any bits, subnormal inputs, subnormal products, overflow and wide exponents): for an element of C the products of
// even k and those of odd k are two chains of fused multiply-adds from zero, the two sums are added, and the result is
// added to C.  All is rounded to nearest even; inputs, C and results that are subnormal are zero; MXCSR is neither read
// nor written, and nothing is raised.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace consistency_ops::cpu::tile_model {

constexpr int kTiles = 8, kRows = 16, kWords = 16;

struct State {
  bool ready = false;
  uint32_t words[kTiles][kRows][kWords];
};

inline State& state() {
  static thread_local State of_thread;
  return of_thread;
}

// The tiles, or the end that an illegal instruction makes.
inline State& ready() {
  if (!state().ready) std::abort();
  return state();
}

inline void begin() {
  if (state().ready) std::abort();  // no end since the last begin: a thread with tiles slows every switch of context
  state().ready = true;
  std::memset(state().words, 0, sizeof(state().words));
}

inline void end() { ready().ready = false; }

inline void zero(int tile) { std::memset(ready().words[tile], 0, sizeof(ready().words[tile])); }

inline void load(int tile, const void* from, int64_t pitch) {
  for (int r = 0; r < kRows; ++r) {
    std::memcpy(ready().words[tile][r], static_cast<const char*>(from) + r * pitch, sizeof(ready().words[tile][r]));
  }
}

inline void store(int tile, void* to, int64_t pitch) {
  for (int r = 0; r < kRows; ++r) {
    std::memcpy(static_cast<char*>(to) + r * pitch, ready().words[tile][r], sizeof(ready().words[tile][r]));
  }
}

inline float of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Zero, with its sign, for a subnormal number.
inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

inline float lower(uint32_t pair) { return flushed(of_bits(pair << 16)); }
inline float upper(uint32_t pair) { return flushed(of_bits(pair & 0xFFFF0000u)); }

inline void multiply(int c, int a, int b) {
  auto& words = ready().words;
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kWords; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < kRows; ++k) {
        const uint32_t x = words[a][m][k], y = words[b][k][n];
        even = flushed(std::fma(lower(x), lower(y), even));
        odd = flushed(std::fma(upper(x), upper(y), odd));
      }
      const float sum = flushed(even + odd);
      const float total = flushed(flushed(of_bits(words[c][m][n])) + sum);
      std::memcpy(&words[c][m][n], &total, sizeof(total));
    }
  }
}

}  // namespace consistency_ops::cpu::tile_model
