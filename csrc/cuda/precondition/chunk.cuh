// What a CTA keeps in shared memory, and how it walks over rows and units.
#pragma once

#include "consistency_ops/precondition.h"
#include "cuda/convert.cuh"
#include "cuda/precondition/plan.h"

namespace consistency_ops {

constexpr int kMaxGramBlocks = kMaxChunk / kTile * (kMaxChunk / kTile + 1);
constexpr int32_t kBiasUnit = -1;  // its input is 1, its gradient lies in bias_grad
constexpr int32_t kNoUnit = -2;    // padding of the chunk to whole tiles
constexpr int32_t kSingles = -1;   // of a run: units that are no neighbours on a multiple of four

// What a CTA does.
struct Task {
  int32_t role, stages;           // TaskRole; the PreconditionStages that it runs, 0 if it permutes rows
  int32_t layer, members;         // the first layer of its run, and the layers of the run
  int32_t chunk, size;            // index in the layer, and units
  int32_t part;                   // of the rows; counts the tasks of the same role and chunk
  int32_t ticket;                 // its number in the launch
  int32_t rank, cluster;          // of this CTA among the CTAs of its cluster
  LayerTasks of_layer;            // how many tasks of every kind the layer has
  int64_t first_output, outputs;  // this CTA's outputs, counted through all members
  Division division;              // of the layer's units
  uint32_t awaited;               // the value of awaited_counter that the task waits for; 0: it waits for nobody
  uint32_t* awaited_counter;
  uint32_t* done_counter;  // counts the CTAs whose results others wait for; may be null
  Mode mode;               // of the launch
  bool adds;               // displacements that are mapped back are added at once
  bool tf32;               // CudaTuning
  bool warpgroups;         // PreconditionParams
  bool empty;              // no row was seen, or there is nothing to correct: everything stays as it is
};

// The rows of X that this CTA reads: the caller's, or their packed copy in the workspace (permute.cuh).
struct InputRows {
  const void* data;
  int64_t unit_stride;
  RowDraws draws;     // of the sampled rows of all parts
  int64_t all_rows;   // how many they are
  int64_t first_row;  // this CTA's part of them
  int64_t rows;
  int32_t stage_rows;   // rows in a stage of shared memory, where four units are loaded at once
  int32_t single_rows;  // and where they are not: an element then takes a register on its way
  int32_t arena;        // where the stage lies, floats behind the tiles
  bool rows_are_fast;
  bool aligned;          // four units that are neighbours can be loaded at once
  char* packed;          // where this CTA's part of the packed rows begins
  int64_t packed_pitch;  // elements
};

// The task's part of the workspace.  A record holds the tiles of one chunk.
struct Records {
  float* gram;     // of the layer: [chunks, gram_tasks, record]
  float* inverse;  // of the chunk: a record, then failed_minor
  void* status;    // of the layer: GramStatus of every gram task, or SquareSums of every apply task
  int32_t floats;  // of a record
};

// The G that a CTA corrects: its part of the rows of one layer.
struct GradientPart {
  int32_t member;      // of the run of layers
  int32_t first, end;  // rows
  int32_t taps;        // of an output
  int32_t aligned;     // 1: four units that are neighbours can be loaded at once
  int64_t to_before;   // bytes from an element of a weight to what it was before the step
  const void* bias_before;
};

// What the threads of a CTA tell each other while they work.
struct Scratch {
  // Elements, of every row of the stage that is loaded.  While a diagonal tile is factored its panel lies here.
  alignas(16) int64_t row_offset[kMaxStageRows];
  int32_t unit[kMaxChunk];             // at every position of the chunk
  int32_t run[kMaxChunk / 4];          // of four positions: the first of four neighbouring units, or a constant below
  int32_t gram_block[kMaxGramBlocks];  // first row + 65536 * first column of the blocks of 16 x 32 (gram.cuh)
  float inverse_pivot[kMaxChunk];      // 1 / L[i][i]
  // Copies of the bias gradient, corrected, of every row of G, which come when the pivots have been used.
  CO_DEVICE float* bias_copies() { return inverse_pivot; }
  int32_t not_finite[kRoundRows];  // 1: the result of this row of G must not be written
  int32_t staged_rows;             // of X, in the stage
  float bias_sum;
  GradientPart part;
  int32_t has_bias;    // 1: one of the units is the bias
  int32_t ragged;      // 1: there is a run of kSingles
  int32_t waits;       // 1: the inverse was not there yet; at the end, whether this CTA is the last one
  int32_t gradient;    // GradientFlags that the CTA has found
  float warp_sum[32];  // where displacements are mapped back: the two squares of every warp
  int32_t warp_count[32];
  int32_t bias_position, last_unit;    // permute.cuh
  int32_t failed_minor, failed_tries;  // info of the last try, and the tries before it
};

// On 512 bytes and a multiple of them, so that the dynamic shared memory behind it begins on 512 bytes: the planes of
// A^-1 lie there, which warpgroups read (ptx.cuh).
struct alignas(512) ChunkShared {
  Task task;
  InputRows input;
  Records records;
  Scratch scratch;
};

// One chunk, as every thread of its CTA sees it.  What can be read again from shared memory is, because registers that
// live through the whole kernel would be spilled.
struct Chunk {
  const Task& task;
  const InputRows& input;
  const Records& records;
  Scratch& scratch;
  float* tiles;  // tile (i, j), j <= i, of the symmetric or lower triangular matrix

  CO_DEVICE Chunk(ChunkShared& shared, float* tiles_)
      : task(shared.task), input(shared.input), records(shared.records), scratch(shared.scratch), tiles(tiles_) {}
  CO_DEVICE float* arena() const { return tiles + input.arena; }
  CO_DEVICE int size() const { return task.size; }
  CO_DEVICE int padded() const { return padded_units(task.size); }
  CO_DEVICE int side() const { return padded() / kTile; }
  CO_DEVICE int tile_floats() const { return lower_tiles(side()) * kTileFloats; }
  CO_DEVICE int x_rows() const { return static_cast<int>(input.rows); }
  // In X or in its packed copy, of this CTA's i-th row.
  CO_DEVICE int64_t x_row(int i) const { return input.draws.row(input.first_row + i); }
  CO_DEVICE bool by_runs() const { return input.aligned && scratch.ragged == 0; }
  CO_DEVICE int x_stage() const { return by_runs() ? input.stage_rows : input.single_rows; }
};

// Four neighbouring units of a row of X or G.
template <typename Raw>
struct alignas(4 * sizeof(Raw)) FourUnits {
  uint32_t word[sizeof(Raw)];

  CO_DEVICE float get(DType dtype, int i) const {
    return to_float<Raw>(dtype, sizeof(Raw) == 4 ? word[i % sizeof(Raw)] : word[i / 2] >> 16 * (i % 2) & 0xffffu);
  }
  // Where they were zero.
  CO_DEVICE void set(int i, uint32_t bits) {
    if (sizeof(Raw) == 4) {
      word[i % sizeof(Raw)] = bits;
    } else {
      word[i / 2] |= bits << 16 * (i % 2);
    }
  }
  CO_DEVICE void set(DType dtype, int i, float first, float second) {
    if (sizeof(Raw) == 2 && dtype == DType::kBFloat16) {
      word[i / 2] = pack_bfloat16(first, second);
    } else {
      set(i, from_float<Raw>(dtype, first));
      set(i + 1, from_float<Raw>(dtype, second));
    }
  }
};

CO_DEVICE float* lower_tile(float* tiles, int i, int j) { return tiles + (lower_tiles(i) + j) * kTileFloats; }

CO_DEVICE void add(Float4& sum, const Float4& term) {
  CO_UNROLL
  for (int i = 0; i < 4; ++i) sum.v[i] += term.v[i];
}

// Tensor cores cut what they add up toward zero, so a long sum in them drifts: the products of one step go into sums of
// their own, which are added as floats, to nearest.
CO_DEVICE void add(float (&sum)[4], const float (&term)[4]) {
  CO_UNROLL
  for (int i = 0; i < 4; ++i) add_now(sum[i], term[i]);
}

// Element offset of index `index` of a space of sizes `size`, the last dimension fastest.  Indices have 32 bits (the
// launcher sees to it), because a 64-bit division costs a call and its registers; offsets have 64.
template <int kDims>
CO_DEVICE int64_t strided_offset(uint32_t index, const int64_t (&size)[kDims], const int64_t (&stride)[kDims]) {
  int64_t offset = 0;
  CO_UNROLL
  for (int i = kDims - 1; i > 0; --i) {
    const uint32_t divisor = static_cast<uint32_t>(size[i]);
    if (divisor == 1) continue;
    const uint32_t quotient = index / divisor;
    offset += static_cast<int64_t>(index - quotient * divisor) * stride[i];
    index = quotient;
  }
  return offset + static_cast<int64_t>(index) * stride[0];
}

// How the lanes of a CTA cover a stage of rows x padded units: a warp takes 1 x 32 elements where units are the fast
// dimension in memory, 8 x 4 where rows are (NCHW inputs, convolution weights), so that it touches whole sectors.  Step
// i of a warp is block warp + i * kWarps, counted along the rows; there are at most 1024.  Made anew after a barrier.
template <int kWarps>
struct StageWalk {
  int columns, reciprocal;  // blocks along a row; ceil(2^16 / columns) divides numbers up to 1024 exactly
  int warp, lane;
  bool tall;

  CO_DEVICE StageWalk(int padded, bool rows_are_fast)
      : columns(rows_are_fast ? padded / 4 : padded / 32),
        reciprocal(((1 << 16) + columns - 1) / columns),
        warp(fresh_thread() / 32),
        lane(fresh_thread() % 32),
        tall(rows_are_fast) {}
  CO_DEVICE int row(int step) const {
    const int block = ((warp + step * kWarps) * reciprocal) >> 16;
    return tall ? block * 8 + lane % 8 : block;
  }
  CO_DEVICE int position(int step) const {
    const int index = warp + step * kWarps, column = index - ((index * reciprocal) >> 16) * columns;
    return tall ? column * 4 + lane / 8 : column * 32 + lane;
  }
  CO_DEVICE int steps(int rows) const {  // of warp 0, for this many rows
    return ((tall ? (rows + 7) / 8 : rows) * columns + kWarps - 1) / kWarps;
  }
};

// True where consecutive rows are closer together in memory than consecutive units.
CO_DEVICE bool rows_are_fast(int64_t row_stride, int64_t row_size, int64_t unit_stride) {
  const int64_t row = row_stride < 0 ? -row_stride : row_stride, unit = unit_stride < 0 ? -unit_stride : unit_stride;
  return row_size > 1 && row < unit;
}

// value = high + low to 2^-22 of value, as the tensor cores read them: high is the nearest TF32 number, and of low,
// which has 13 bits, they drop the last two.  Integer instructions, because cvt.rna.tf32 is four on sm_90.  NaN stays
// NaN in low; a value that rounds to infinity gives NaN in the sum of products.
struct SplitFloat {
  float high, low;
  CO_DEVICE explicit SplitFloat(float value) {
    high = __uint_as_float((__float_as_uint(value) + 0x1000u) & 0xffffe000u);
    low = value - high;
  }
};

}  // namespace consistency_ops
