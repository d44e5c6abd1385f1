// The additive recurrence on the CPU: rows are cut among the threads and go through all steps, each block by itself.
// One weight for all steps is packed once; weights of their own are packed by every block, step by step.
#include "consistency_ops/roa_scan.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <type_traits>

#include "cpu/chunk_kernels.h"
#include "cpu/parallel.h"

namespace consistency_ops {
namespace {

// Matrices that serve all steps; nullptr: those of a step are packed where they are used.
struct Packed {
  const void* weight;
  const void* filter;
};

struct ScanKernels {
  void (*pack_transposed)(const void* matrix, int64_t units, void* packed);
  void (*pack)(const void* matrix, int64_t units, void* packed);
  void (*forward[kActivations])(const RoaScanParams& p, const Packed& packed, int64_t first, int64_t rows, void* room);
  void (*backward[kActivations])(const RoaScanBackwardParams& p, const Packed& packed, int64_t first, int64_t rows,
                                 void* room);
  int64_t (*room_of)(int64_t rows, int64_t units);
  int64_t (*packed_bytes)(int64_t units);
};

#define CO_KERNELS "cpu/roa_scan.inl"
#include "cpu/each_isa.inl"

const ScanKernels& kernels(DType dtype) { return CO_BEST(kScanTable[static_cast<int>(dtype)]); }

constexpr size_t kAlignment = 64;
constexpr int64_t kFewestRows = 4;  // a block of fewer rows waits for its sums rather than for arithmetic

// Rows of a block.  Results do not depend on it.
int64_t block_of(int64_t rows, const ThreadPool& pool) {
  const int64_t threads = std::max<int64_t>(1, pool.run == nullptr ? 1 : pool.threads);
  return std::max(std::min(rows, kFewestRows), (rows + threads - 1) / threads);
}

bool valid(int64_t steps, int64_t rows, int64_t units, const RoaScanMaps& maps) {
  const int32_t activation = static_cast<int32_t>(maps.activation);
  if (steps < 0 || rows < 0 || units < 0 || activation < 0 || activation >= kActivations) return false;
  if (maps.index == nullptr) return true;
  const int64_t lists = maps.index_step == 0 ? std::min<int64_t>(steps, 1) : steps;
  for (int64_t t = 0; t < lists; ++t) {
    for (int64_t j = 0; j < units; ++j) {
      const int64_t index = maps.index[t * maps.index_step + j];
      if (index < 0 || index >= units) return false;
    }
  }
  return true;
}

int64_t aligned(int64_t bytes) {
  return (bytes + static_cast<int64_t>(kAlignment) - 1) & -static_cast<int64_t>(kAlignment);
}

// Packs what serves all steps, and calls body(packed, first row, rows, room) for every block.
template <typename Body>
Status run(DType dtype, int64_t steps, int64_t rows, int64_t units, const RoaScanMaps& maps, bool transposed,
           const ThreadPool& pool, const Body& body) {
  if (!valid(steps, rows, units, maps)) return Status::kInvalidArgument;
  if (rows == 0 || units == 0) return Status::kOk;
  const ScanKernels& kernel = kernels(dtype);
  const int64_t block = block_of(rows, pool), tasks = (rows + block - 1) / block;
  const int64_t matrix = aligned(kernel.packed_bytes(units)), room = aligned(kernel.room_of(block, units));
  const std::unique_ptr<char, void (*)(void*)> memory(
      static_cast<char*>(std::aligned_alloc(kAlignment, static_cast<size_t>(2 * matrix + tasks * room))), std::free);
  if (memory == nullptr) return Status::kOutOfMemory;
  Packed packed{};
  const auto pack = transposed ? kernel.pack_transposed : kernel.pack;
  if (maps.weight_step == 0 && steps > 0) {
    pack(maps.weight, units, memory.get());
    packed.weight = memory.get();
  }
  if (maps.filter != nullptr && maps.filter_step == 0 && steps > 0) {
    pack(maps.filter, units, memory.get() + matrix);
    packed.filter = memory.get() + matrix;
  }
  cpu::run_tasks(pool, tasks, [&](int64_t task) {
    const int64_t first = task * block;
    body(packed, first, std::min(block, rows - first), memory.get() + 2 * matrix + task * room);
  });
  return Status::kOk;
}

}  // namespace

Status roa_scan_cpu(const RoaScanParams& p, const ThreadPool& pool) {
  const auto body = [&](const Packed& packed, int64_t first, int64_t rows, void* room) {
    kernels(p.dtype).forward[static_cast<int>(p.maps.activation)](p, packed, first, rows, room);
  };
  return run(p.dtype, p.steps, p.rows, p.units, p.maps, true, pool, body);
}

Status roa_scan_backward_cpu(const RoaScanBackwardParams& p, const ThreadPool& pool) {
  const auto body = [&](const Packed& packed, int64_t first, int64_t rows, void* room) {
    kernels(p.dtype).backward[static_cast<int>(p.maps.activation)](p, packed, first, rows, room);
  };
  return run(p.dtype, p.steps, p.rows, p.units, p.maps, false, pool, body);
}

}  // namespace consistency_ops
