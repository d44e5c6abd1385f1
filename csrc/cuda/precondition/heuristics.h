// The constants and rules by which a launch is shaped: the shared memory of a CTA, and how many CTAs work on a chunk.
// Without CUDA, so that tests can ask for them anywhere; plan.cpp applies them.
//
// A CTA keeps the lower 32 x 32 tiles of its chunk in shared memory from the covariance to the inverse, and an arena
// for a stage of X rows.  Tiles have a pitch of 33 floats, so that reading a tile along rows and along columns is free
// of bank conflicts alike.  Up to 128 units A^-1 is turned into 16-bit planes at last, which cover tiles and arena:
//
//   chunk  tiles  KiB of tiles  KiB of planes  sm_90 (227 KiB)    sm_80 (163)        sm_86, sm_120 (99)
//     32     1         4              6         2, by registers    2                  2
//    128    10        41             60         2, by registers    2                  1
//    192    21        87              -         1                  1                  1, stages of 8 rows
//    256    36       149              -         1                  1, stages of 8     does not fit
//
// The arena has 20 KiB: 128 rows of 32 units of float32, 32 of 128, 16 of 256.
#pragma once

#include <algorithm>

#include "consistency_ops/precondition_cuda.h"

namespace consistency_ops {

constexpr int kTile = 32;
constexpr int kTilePitch = kTile + 1;
constexpr int kTileFloats = kTile * kTilePitch;
constexpr int kMaxStageRows = 128;      // of X
constexpr int kRoundRows = 128;         // of G, that a CTA corrects at a time
constexpr int kStageWords = 4096;       // of X, 4 bytes each, in flight in the registers of a CTA
constexpr int kStaticShared = 6 << 10;  // bound on the kernel's fixed shared arrays, with what CUDA reserves
constexpr int kMaxLaunchLayers = 112;   // descriptors that fit the 32,764 bytes of kernel parameters

CO_HOST_DEVICE constexpr int padded_units(int units) { return (units + kTile - 1) / kTile * kTile; }
CO_HOST_DEVICE constexpr int lower_tiles(int side) { return side * (side + 1) / 2; }
// A pitch that keeps the lanes of an mma fragment, who read down columns of X, in 32 different banks.
CO_HOST_DEVICE constexpr int x_pitch(int padded) { return padded + 8; }
// A^-1 of up to 128 units in 16-bit planes (plane_product.cuh), where tiles and arena were.
constexpr int kPlanes = 3;
constexpr int kPlaneTile = kPlanes * kTile * kTile;  // 16-bit numbers
constexpr int kMaxPlaneTiles = 10;
constexpr int kSweepFloats = 6 * 128 * 8;  // behind the tiles, for factor and inverse of up to 128 units (sweep.cuh)

struct CtaShape {
  int32_t threads;       // 256, or 512 for chunks above 128 units; 0: the chunk does not fit the device
  int32_t tile_floats;   // for the tiles of the largest chunk
  int32_t arena_floats;  // for a stage of X
  int32_t shared_bytes;  // dynamic shared memory
};

// Rows of X in a stage: a power of two from 8 to 128, so that stages end at every 512th row.  `arena` counts elements
// of X, float32 or 16-bit.
CO_HOST_DEVICE inline int stage_rows(int padded, int arena, int element_bytes) {
  int rows = kMaxStageRows;
  while (rows > 8 && (rows * padded * element_bytes > kStageWords * 4 || rows * x_pitch(padded) > arena)) rows /= 2;
  return rows;
}

// The CTA for chunks of at most `units` units on a device with `shared_bytes` of shared memory a block.  Tasks that
// permute rows (permute.cuh) need `slab_bytes` of it.
inline CtaShape choose_cta(int units, int shared_bytes, int slab_bytes = 0) {
  CtaShape cta{};
  const int padded = padded_units(units), side = padded / kTile;
  const int threads = side <= 4 ? 256 : 512;
  const int tiles = lower_tiles(side) * kTileFloats;
  const int room = (shared_bytes - kStaticShared) / 4 - tiles;
  int wanted = 0;  // smaller chunks of the same launch may want more rows, never more floats
  for (int p = kTile; p <= padded; p += kTile) {
    const int rows = stage_rows(p, 1 << 30, 4);
    if (rows * x_pitch(p) > wanted) wanted = rows * x_pitch(p);
  }
  const int arena = wanted < room ? wanted : room / 4 * 4;
  if (8 * x_pitch(padded) > arena) return cta;
  cta.threads = threads;
  cta.tile_floats = tiles;
  cta.arena_floats = arena;
  const int planes = threads == 256 ? lower_tiles(side) * kPlaneTile * 2 : 0;
  const int sweep = threads == 256 ? (tiles + kSweepFloats) * 4 : 0;
  cta.shared_bytes = std::max({(tiles + arena) * 4, planes, sweep, slab_bytes});
  return cta;
}

// Shared memory of the tasks that permute rows: a table with the unit of every position, and the slab, which holds full
// rows with one element more.
constexpr int kMaxSlabBytes = 92 << 10;     // of sm_86, beside the fixed arrays
constexpr int kWantedSlabBytes = 32 << 10;  // of rows
CO_HOST_DEVICE constexpr int64_t table_units(int64_t units) { return (units / 8 + 1) * 8; }
CO_HOST_DEVICE constexpr int64_t slab_pitch(int64_t units, int64_t element_bytes) {
  return (units * element_bytes / 16 + 1) * 16 / element_bytes;
}
CO_HOST_DEVICE constexpr int64_t slab_bytes(int64_t units, int64_t element_bytes, int64_t rows) {
  return 2 * table_units(units) + rows * slab_pitch(units, element_bytes) * element_bytes;
}

// How many CTAs work on a chunk.  All bounds are constants and not the size of the device, because the parts of the
// rows decide how a covariance is rounded: 264 CTAs are two on each of the 132 SMs of an H200.  Estimates, none of them
// measured (workloads of the README):
//
//   chunks  rows  rung                      why
//     10     128  clusters of 8             80 CTAs: 128 rows of X take longer than the exchange of sixteen rows' sums
//     12    1024  clusters of 8             96 CTAs; the exchange is 1 to 2 us, 1024 rows in one CTA some 20 us
//     32    4096  clusters of 8             256 CTAs
//    181    4096  task queue, 3 parts       the chunks fill the device, but its last wave would be half empty
//    504    4096  task queue, 2 parts
//     32    4096  task queue, group = 1     128 tasks pack X, as many permute G and restore it (permutes(), below)
constexpr int kTargetCtas = 264;
constexpr int kMaxCluster = 8;      // what every device with clusters can launch
constexpr int kClusterRows = 16;    // of X or G, at least, for a CTA of a cluster
constexpr int kLongRows = 1024;     // of X or G, at most, for a CTA without a task queue
constexpr int kMaxTaskRows = 4096;  // of X or G, for a task of the queue
constexpr int kMinGramRows = 512;   // of X, for a task of the queue
constexpr int kMinApplyRows = 128;  // of G, for a task of the queue
constexpr int kMaxParts = 1024;     // of a chunk

// Whether the rows of X or of G are permuted (permute.cuh): that moves their bytes three times.  A gather moves a
// sector once for every chunk that has a unit in it: at most `chunks` times, and at most once for every run of units.
constexpr int kGatherPasses = 4;                    // cost less than three of a permutation, which other tasks wait for
constexpr int64_t kPermutedBytes = 1 << 20;         // of a matrix, at least
constexpr int64_t kPermutedLaunchBytes = 16 << 20;  // of all matrices: from here on they make a launch a task queue
constexpr int kPermuteRows = 32;                    // of a task, at least: the table of units costs as much as 5 rows

struct RowMatrix {
  int64_t rows, units, chunks;
  int64_t run_bytes;  // of consecutive units that lie in one chunk
  int64_t element_bytes;
  bool unit_rows;  // the units of a row are neighbours in memory, and no row shares them
};

inline bool permutes(const RowMatrix& matrix, const CudaTuning& tuning) {
  constexpr int64_t kSector = 32;
  if (tuning.packing == Packing::kNever || !matrix.unit_rows || matrix.rows == 0 || matrix.chunks < 2) return false;
  if (slab_bytes(matrix.units, matrix.element_bytes, 1) > kMaxSlabBytes) return false;
  if (tuning.packing == Packing::kAlways) return true;
  return matrix.chunks > kGatherPasses &&
         matrix.run_bytes + kSector - matrix.element_bytes > kGatherPasses * matrix.run_bytes &&
         matrix.rows * matrix.units * matrix.element_bytes >= kPermutedBytes;
}

struct LayerWork {
  int64_t chunks, x_rows, g_rows;  // rows that the launch sums and corrects; 0 without that stage
  bool waits_for_trace;
  bool packs_x, permutes_g;  // with a task queue
  bool unwhitens;            // every part of G is an apply task, and restore tasks follow
  int64_t finish_rows;       // of G, that these scale and add
};

struct LaunchShape {
  PreconditionRung rung;
  int32_t cluster;  // CTAs of a task
  int64_t parts;    // into which the task queue should divide the rows of a chunk
};

// Tasks of a layer beside the factor task of every chunk.  0: the factor task does that work itself.
struct LayerTasks {
  int16_t gram_tasks;     // of every chunk: the covariance, each over a part of the rows
  int16_t apply_tasks;    // of every chunk: the correction of a part of the outputs
  int16_t pack_tasks;     // for all chunks: copy a part of the rows of X for the gram tasks
  int16_t permute_tasks;  // for all chunks: permute a part of G for the apply tasks; as many more restore it
  int16_t finish_tasks;   // for all chunks: scale and add a part of the displacements
};

inline LaunchShape choose_rung(int64_t chunks, int64_t longest_rows, int64_t permuted_bytes, bool clusters,
                               const CudaTuning& tuning) {
  int32_t cluster = 1;
  while (clusters && cluster < kMaxCluster && chunks * cluster * 2 <= kTargetCtas &&
         longest_rows >= cluster * 2 * kClusterRows) {
    cluster *= 2;
  }
  PreconditionRung rung = tuning.rung;
  if (rung == PreconditionRung::kAutomatic) {
    const bool tasks = longest_rows > int64_t{cluster} * kLongRows || permuted_bytes >= kPermutedLaunchBytes;
    rung = tasks ? PreconditionRung::kTaskQueue : PreconditionRung::kCluster;
  }
  if (rung == PreconditionRung::kCluster && tuning.ctas > 0) cluster = clusters ? tuning.ctas : 1;
  if (rung != PreconditionRung::kCluster) cluster = 1;
  if (rung == PreconditionRung::kCluster && cluster == 1) rung = PreconditionRung::kOneCta;
  const int64_t parts = tuning.ctas > 0 ? tuning.ctas : (2 * kTargetCtas + chunks - 1) / (chunks > 0 ? chunks : 1);
  return {rung, cluster, parts};
}

// Whitening is a task queue whatever is asked for: what its parts tell each other passes through the workspace anyway.
inline CudaTuning as_queue(CudaTuning tuning) {
  tuning.rung = PreconditionRung::kTaskQueue;
  return tuning;
}

inline LayerTasks tasks_of_layer(const LayerWork& work, const LaunchShape& shape, const CudaTuning& tuning) {
  LayerTasks tasks{static_cast<int16_t>(work.waits_for_trace), 0, 0, 0, 0};
  if (shape.rung != PreconditionRung::kTaskQueue) return tasks;
  const auto parts_of = [&](int64_t rows, int64_t least) {
    const int64_t most = (rows + least - 1) / least, fewest = (rows + kMaxTaskRows - 1) / kMaxTaskRows;
    int64_t parts = shape.parts > fewest ? shape.parts : fewest;
    if (parts > most && tuning.ctas == 0) parts = most;
    return static_cast<int>(parts < kMaxParts ? parts : kMaxParts);
  };
  const int gram_tasks = parts_of(work.x_rows, kMinGramRows), apply_tasks = parts_of(work.g_rows, kMinApplyRows);
  if (work.x_rows > 0 && (gram_tasks > 1 || work.packs_x)) tasks.gram_tasks = static_cast<int16_t>(gram_tasks);
  if (work.g_rows > 0 && (apply_tasks > 1 || work.permutes_g)) tasks.apply_tasks = static_cast<int16_t>(apply_tasks);
  const auto permuting = [&](int64_t rows) {
    const int64_t most = std::min<int64_t>((rows + kPermuteRows - 1) / kPermuteRows, kTargetCtas);
    return static_cast<int16_t>(tuning.ctas > 0 ? tuning.ctas : most);
  };
  if (work.packs_x) tasks.pack_tasks = permuting(work.x_rows);
  if (work.permutes_g) tasks.permute_tasks = permuting(work.g_rows);
  if (work.unwhitens && work.g_rows > 0) {
    tasks.apply_tasks = static_cast<int16_t>(apply_tasks);
    tasks.finish_tasks = std::max<int16_t>(1, permuting(work.finish_rows));
  }
  return tasks;
}

}  // namespace consistency_ops
