// Sectors and bank conflicts of every source line, without a GPU.
//
// -fsanitize=thread calls __tsan_read4(p) and friends before every access; linked without ThreadSanitizer's own library
// those calls come here.  The accesses of the 32 lanes of a warp at one instruction, between the same two barriers and
// at the same visit, are one request.  A request costs as many 32-byte sectors as it touches in global memory, and as
// many passes in shared memory as the busiest of the 32 banks has different words.  A model of addresses: no caches, no
// loads that the compiler joins; a lane that skips a visit shifts its later ones.  For tests, not for timings.
//
// SIMT_ACCESS_OUT names the report: offset in this library, space, requests, cost of all, least possible cost of all.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "simt/runtime.h"

namespace {

struct Request {
  uint32_t lanes = 0;
  std::vector<std::pair<uintptr_t, int>> accesses;  // address, bytes
};

struct Line {
  uint64_t requests = 0, cost = 0, least = 0;
  bool shared = false;
};

using Visit = std::tuple<const void*, unsigned, void*, unsigned, unsigned>;  // CTA, warp, instruction, meetings, visit
std::map<Visit, Request> open_requests;
std::map<std::tuple<const void*, unsigned, void*>, std::pair<unsigned, unsigned>> visits;  // of a thread
std::map<void*, Line> lines;

void close(void* instruction, const Request& request) {
  Line& line = lines[instruction];
  std::set<uintptr_t> words, sectors, banks[32];
  for (const auto& [address, bytes] : request.accesses) {
    for (uintptr_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
      words.insert(word);
      banks[word % 32].insert(word);
      sectors.insert(word / 8);
    }
  }
  uint64_t passes = 0;
  for (const auto& bank : banks) passes = bank.size() > passes ? bank.size() : passes;
  ++line.requests;
  line.cost += line.shared ? passes : sectors.size();
  line.least += line.shared ? (words.size() + 31) / 32 : (words.size() + 7) / 8;
}

void touch(void* address, int bytes, void* instruction) {
  const simt::Space space = simt::space_of(address);
  if (space != simt::Space::kShared && space != simt::Space::kGlobal) return;
  const unsigned thread = simt::thread_rank(), meetings = simt::meetings();
  auto& visit = visits[{simt::block_key(), thread, instruction}];
  if (visit.first != meetings) visit = {meetings, 0};
  lines[instruction].shared = space == simt::Space::kShared;
  const Visit key{simt::block_key(), thread / 32, instruction, meetings, visit.second++};
  Request& request = open_requests[key];
  request.lanes |= 1u << thread % 32;
  request.accesses.emplace_back(reinterpret_cast<uintptr_t>(address), bytes);
  if (request.lanes != 0xffffffffu) return;
  close(instruction, request);
  open_requests.erase(key);
}

struct Report {
  ~Report() {
    const char* path = std::getenv("SIMT_ACCESS_OUT");
    FILE* file = path != nullptr ? std::fopen(path, "w") : nullptr;
    if (file == nullptr) return;
    for (const auto& [key, request] : open_requests) close(std::get<2>(key), request);
    for (const auto& [instruction, line] : lines) {
      Dl_info info{};
      dladdr(instruction, &info);
      const auto offset = static_cast<char*>(instruction) - static_cast<char*>(info.dli_fbase);
      std::fprintf(file, "%#lx %s %lu %lu %lu\n", static_cast<unsigned long>(offset), line.shared ? "shared" : "global",
                   static_cast<unsigned long>(line.requests), static_cast<unsigned long>(line.cost),
                   static_cast<unsigned long>(line.least));
    }
    std::fclose(file);
  }
} report;

}  // namespace

#define INSTRUCTION static_cast<char*>(__builtin_return_address(0)) - 1
#define API extern "C" __attribute__((visibility("default")))
#define ACCESS(name, bytes)                                                       \
  API void __tsan_read##name(void* p) { touch(p, bytes, INSTRUCTION); }           \
  API void __tsan_write##name(void* p) { touch(p, bytes, INSTRUCTION); }          \
  API void __tsan_unaligned_read##name(void* p) { touch(p, bytes, INSTRUCTION); } \
  API void __tsan_unaligned_write##name(void* p) { touch(p, bytes, INSTRUCTION); }
ACCESS(1, 1)
ACCESS(2, 2)
ACCESS(4, 4)
ACCESS(8, 8)
ACCESS(16, 16)
API void __tsan_read_range(void* p, unsigned long n) { touch(p, static_cast<int>(n), INSTRUCTION); }
API void __tsan_write_range(void* p, unsigned long n) { touch(p, static_cast<int>(n), INSTRUCTION); }
API void __tsan_init() {}
API void __tsan_func_entry(void*) {}
API void __tsan_func_exit() {}
API void __tsan_vptr_update(void**, void*) {}
API void __tsan_vptr_read(void**) {}

#define ATOMICS(bits, T)                                                                                       \
  API T __tsan_atomic##bits##_load(const T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }           \
  API void __tsan_atomic##bits##_store(T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }           \
  API T __tsan_atomic##bits##_fetch_add(T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); } \
  API T __tsan_atomic##bits##_exchange(T* p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); } \
  API int __tsan_atomic##bits##_compare_exchange_strong(T* p, T* c, T v, int, int) {                           \
    return __atomic_compare_exchange_n(p, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                    \
  }                                                                                                            \
  API int __tsan_atomic##bits##_compare_exchange_weak(T* p, T* c, T v, int, int) {                             \
    return __atomic_compare_exchange_n(p, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                    \
  }
ATOMICS(8, uint8_t)
ATOMICS(32, uint32_t)
ATOMICS(64, unsigned long)
