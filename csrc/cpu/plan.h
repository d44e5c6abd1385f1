// What precondition_cpu decides before it touches data: divisions, storage and the order of the work.
#pragma once

#include <cstdint>
#include <vector>

#include "consistency_ops/precondition.h"
#include "cpu/chunk_kernels.h"

namespace consistency_ops::cpu {

// Rows of X in one packed block, at most and at least.  What a layer gets follows from its width, its type and the
// instruction set alone, because the sums of a block are rounded on their own: the result must not depend on the number
// of threads.
constexpr int64_t kRowBlock = 128;
constexpr int64_t kLeastRowBlock = 32;
// A task packs at most this much of X at once, so that the block and the covariances it feeds stay in a 1 MiB L2.
constexpr int64_t kPackedBytes = 512 << 10;
// Rows of G are corrected in blocks of at most so many rows and bytes: every cache line of G holds units of several
// chunks, and should be in L2 when the later ones come.  One output with all its taps is the least.
constexpr int64_t kApplyRows = 64;
constexpr int64_t kApplyBytes = 256 << 10;
// Blocks of a task, where there are enough of them: each fetches the next one while it is computed.
constexpr int64_t kApplyBlocks = 8;

struct ChunkPlan {
  int64_t size;         // units
  int32_t panels;       // ceil(size / 16)
  int32_t first_panel;  // in the layer
  int64_t first_run, num_runs;
  int32_t row_panels;  // ceil(rows / 16) if the rows are few and stand for the covariance (few_rows.h), else 0
  int64_t storage;     // offset of the matrix in the workspace of the wave, in elements
  // Where the inverse is in tile order, for layers with fits_tiles: its offset, that of the matrix if no other layer
  // needs that; or -1.
  int64_t tiles;
};

// Layers with the same input follow one another; the first of them is their head.  The head has the division of the
// units and all tasks except those that correct, which every layer has for its own G.
struct LayerPlan {
  int64_t head;     // index of the head
  int64_t members;  // in a head: how many layers have its input, itself included
  // Whether this layer has chunks to process.  False for all but the head, and for a head without rows or whose layers
  // have no gradient at all; info and damping_used then get their defaults, and G is not touched.
  bool active;
  bool one_unit;  // corrected apart (one_unit.h); not active
  bool on_tiles;  // in a head: whether a chunk has its inverse in tile order
  bool in_pairs;  // packed by PairKernels, two rows of bfloat16 a word; else rows are widened to the compute type
  RowSample sample;
  RowDraws draws;     // the row of each of its blocks
  int64_t units;      // with the bias
  int64_t row_block;  // rows that are packed at once: as many as fit kPackedBytes, so that a wide X is read only once
  int64_t taps, outputs_per_block;
  std::vector<ChunkPlan> chunks;
  std::vector<Run> runs;  // the division without the bias unit
  int32_t bias_chunk;     // the chunk with the bias unit, or -1
  int16_t bias_column;    // its column there

  // What `rows` rows of X fill of a packed panel, in rows of 16 elements (words, if in pairs).
  int64_t packed_rows(int64_t rows) const { return in_pairs ? (rows + 1) / 2 : rows; }
  // Rows of 16 elements from a packed panel to the next: one more than is used, so that the same row of all panels does
  // not fall in one set of the L1 cache.
  int64_t pitch() const { return packed_rows(row_block) + 1; }
  int64_t packed_panel() const { return pitch() * kPanel; }
};

// Tasks are handed out in order.  A task waits for all tasks of its layer's previous phase, or of earlier waves, whose
// tickets are smaller: any number of threads, even one, makes progress.
enum class Phase : int8_t { kCovariance, kFactor, kApply };

struct Task {
  Task(Phase of_phase, int64_t of_layer, int64_t first, int64_t last, int64_t ticket, int64_t tasks)
      : phase(of_phase),
        layer(static_cast<int32_t>(of_layer)),
        begin(static_cast<int32_t>(first)),
        end(static_cast<int32_t>(last)),
        wait_ticket(static_cast<int32_t>(ticket)),
        wait_in_phase(static_cast<int32_t>(tasks)) {}

  Phase phase;
  int32_t layer;          // the head of a run, but when applying
  int32_t begin, end;     // chunks, or outputs when applying
  int32_t wait_ticket;    // all tasks before this ticket must have finished, and
  int32_t wait_in_phase;  // so many tasks of the layer's previous phase
};

// Whether G may be multiplied by TileKernels::correct, where there are such kernels.
inline bool fits_tiles(const PreconditionLayer& layer) {
  return layer.g_dtype == DType::kBFloat16 && layer.g_unit_stride == 1;
}

struct Plan {
  const TileKernels* tiles = nullptr;  // null where no layer is corrected with them
  std::vector<LayerPlan> layers;
  std::vector<Task> tasks;
  int64_t storage_elements = 0;   // the largest wave
  int64_t packed_elements = 0;    // per thread
  int64_t largest_matrix = 0;     // elements, per thread and scratch matrix
  int64_t bias_elements = 0;      // per thread
  int64_t most_rows = kRowBlock;  // of X or G that a thread works on at once
  int64_t table_bytes = 0;        // memory of the divisions
};

// `without_rows`: layers of which there are no rows are worked on, too.  `pairs`: whether there are PairKernels.
// `tiles`: the kernels on tiles, if there are any.
Plan make_plan(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options, int32_t threads,
               bool pairs, bool without_rows = false, const TileKernels* tiles = nullptr);
// Offsets in X of the sampled rows row .. row + rows - 1.
void sampled_offsets(const PreconditionLayer& layer, const LayerPlan& plan, int64_t row, int64_t rows,
                     int64_t* row_offset);

// Bytes of the workspace of one thread, each part rounded up to a cache line.
int64_t thread_bytes(const Plan& plan, int64_t element);

}  // namespace consistency_ops::cpu
