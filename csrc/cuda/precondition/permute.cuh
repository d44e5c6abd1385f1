// The exact division (group = 1) without reading single units of a chunk from memory.
//
// A chunk's units lie anywhere in a row, so a gather moves a sector of 32 bytes for every 2 or 4 it wants, less what
// several units of a chunk have in common.  Bytes through L2 per byte of the matrix, for C units in chunks of 128; X is
// read, G read and written (calculated; nothing has been measured on a GPU):
//
//   C                                            768   1024   2048   4096   11008
//   X of 16 bits, gather                         5.6    7.0   10.3   12.7    14.6
//   X, packed                                      3      3      3      3       3
//   G of float32, gather                         9.2   10.5   12.9   14.4    15.5
//   G, rows in shared memory, inverses stream    4.5    5.3    8.7   15.4      38
//   G, permuted in place                           6      6      6      6       6
//
// The fourth line is a CTA that keeps as many full rows of G as fit (100 KiB with two CTAs an SM) and reads the
// inverses of all chunks, 41 KiB each, past them: the fewer rows, the more often.  It wins below 1200 units only and
// needs a multiplication of its own.  So rows are permuted instead, through shared memory and 16 bytes a thread: X once
// to the workspace, and G where it lies, because the correction works on rows.  Then the units of a chunk are
// neighbours, gram.cuh and apply.cuh read whole sectors, and at last G's units move back.  G needs no scratch, and the
// units of a chunk that failed return bit for bit.  A G, or a packed X, that is larger than L2 makes DRAM see the three
// passes too.
//
// The unit of every position is computed once a task and kept in shared memory, 2 bytes each, beside the rows.  What
// does not fit (rows of more than 15,600 units of float32 or 23,500 of 16 bits) is left to the gather.
#pragma once

#include "cuda/precondition/scheduler.cuh"

namespace consistency_ops {

template <typename Raw, int kWidth>
struct alignas(kWidth * sizeof(Raw)) RowVector {
  Raw v[kWidth];
};

// How the threads of a CTA walk over `columns` vectors of each row.
struct RowWalk {
  int columns, step_rows, step_columns, row, column;

  CO_DEVICE RowWalk(int threads, int columns_)
      : columns(columns_),
        step_rows(threads / columns_),
        step_columns(threads % columns_),
        row(fresh_thread() / columns_),
        column(fresh_thread() % columns_) {}
  CO_DEVICE void next() {
    row += step_rows;
    column += step_columns;
    if (column >= columns) {
      column -= columns;
      ++row;
    }
  }
};

// Rows go from `from` + row_offset[r] to `to` + r to_pitch; 0: back to where they came from.  In between they lie in
// `slab`, and element p of the result is element table[p] there.
template <typename Raw>
struct RowPermutation {
  const Raw* from;
  Raw* to;
  int64_t to_pitch;
  const uint16_t* table;
  Raw* slab;
  int slab_pitch, in_units, out_units;
};

template <int kThreads, int kWidth, typename Raw>
CO_DEVICE void permute_block(const RowPermutation<Raw>& work, const Chunk& chunk, int rows) {
  using Vector = RowVector<Raw, kWidth>;
  constexpr int kBatch = 4;  // 16 KiB in flight from 256 threads
  CO_NO_UNROLL
  for (RowWalk walk(kThreads, work.in_units / kWidth); walk.row < rows;) {
    RowWalk arrived = walk;
    Vector batch[kBatch];
    CO_UNROLL
    for (int i = 0; i < kBatch; ++i, walk.next()) {
      if (walk.row >= rows) continue;
      batch[i] = *reinterpret_cast<const Vector*>(global_memory(work.from) + chunk.scratch.row_offset[walk.row] +
                                                  walk.column * kWidth);
    }
    CO_UNROLL
    for (int i = 0; i < kBatch; ++i, arrived.next()) {
      if (arrived.row >= rows) continue;
      *reinterpret_cast<Vector*>(work.slab + arrived.row * work.slab_pitch + arrived.column * kWidth) = batch[i];
    }
  }
  __syncthreads();
  CO_NO_UNROLL
  for (RowWalk walk(kThreads, (work.out_units + kWidth - 1) / kWidth); walk.row < rows; walk.next()) {
    const auto unit = *reinterpret_cast<const RowVector<uint16_t, kWidth>*>(work.table + walk.column * kWidth);
    Vector out;
    CO_UNROLL
    for (int i = 0; i < kWidth; ++i) out.v[i] = work.slab[walk.row * work.slab_pitch + unit.v[i]];
    const int64_t row = work.to_pitch > 0 ? walk.row * work.to_pitch : chunk.scratch.row_offset[walk.row];
    *reinterpret_cast<Vector*>(global_memory(work.to) + row + walk.column * kWidth) = out;
  }
}

CO_DEVICE int64_t unit_at_position(const PreconditionLayer& layer, const Chunk& chunk, int64_t position) {
  return layer.permutation != nullptr ? layer.permutation[position] : unit_at(chunk.task.division, position);
}

// Rows of G have no place for the bias and one position too many: the unit of the last position lies where the bias
// would.
CO_DEVICE void find_bias(const PreconditionLayer& layer, const Chunk& chunk, int threads) {
  CO_NO_UNROLL
  for (int p = fresh_thread(); p <= layer.units; p += threads) {
    if (unit_at_position(layer, chunk, p) == layer.units) chunk.scratch.bias_position = p;
  }
}

// Where this task's rows go: from unit to position, or back where G is restored.  In packed rows of X the bias is an
// element like others, its input, and so is what fills the last vector.
CO_DEVICE void tabulate(const PreconditionLayer& layer, const Chunk& chunk, uint16_t* table, int threads) {
  const int units = static_cast<int>(layer.units), positions = static_cast<int>(chunk.task.division.units);
  const bool pack = chunk.task.role == kPackTask, restore = chunk.task.role == kRestoreTask;
  const auto enter = [&](int position, int unit) {
    table[restore ? unit : position] = static_cast<uint16_t>(restore ? position : unit);
  };
  CO_NO_UNROLL
  for (int p = fresh_thread(); p < (pack ? static_cast<int>(table_units(units)) : positions); p += threads) {
    const int unit = p < positions ? static_cast<int>(unit_at_position(layer, chunk, p)) : units;
    if (pack || (unit != units && p != units)) {
      enter(p, unit);
    } else if (unit == units) {
      chunk.scratch.bias_position = p;
    } else {
      chunk.scratch.last_unit = unit;
    }
  }
  __syncthreads();
  if (fresh_thread() == 0 && !pack && layer.has_bias && chunk.scratch.bias_position != units) {
    enter(chunk.scratch.bias_position, chunk.scratch.last_unit);
  }
}

// All threads.  This task's part of the rows: of X to the workspace, or of the G of all members in place, there or
// back.
template <int kThreads, typename Raw>
CO_DEVICE void permute_rows(const PreconditionLayer* members, const Chunk& chunk, int shared_bytes) {
  constexpr int kWide = 16 / sizeof(Raw);
  const bool pack = chunk.task.role == kPackTask;
  const PreconditionLayer& first_layer = members[0];
  const int units = static_cast<int>(first_layer.units), table_size = static_cast<int>(table_units(units));
  RowPermutation<Raw> work{};
  work.to_pitch = pack ? chunk.input.packed_pitch : 0;
  uint16_t* const table = reinterpret_cast<uint16_t*>(chunk.tiles);
  work.table = table;
  work.slab = reinterpret_cast<Raw*>(table + table_size);
  work.slab_pitch = static_cast<int>(slab_pitch(units, sizeof(Raw)));
  work.in_units = units;
  work.out_units = pack ? static_cast<int>(chunk.task.division.units) : units;
  tabulate(first_layer, chunk, table, kThreads);
  const int row_bytes = work.slab_pitch * static_cast<int>(sizeof(Raw));
  const int stage = min(kMaxStageRows, (shared_bytes - table_size * 2) / row_bytes);

  CO_NO_UNROLL
  for (int m = 0; m < (pack ? 1 : chunk.task.members); ++m) {
    const PreconditionLayer& layer = members[m];
    const OutputRange outputs = outputs_of(members, m, chunk.task);
    work.from = static_cast<const Raw*>(pack ? layer.x : layer.g);
    work.to = static_cast<Raw*>(pack ? chunk.input.packed : layer.g);
    uintptr_t bits = reinterpret_cast<uintptr_t>(work.from) / sizeof(Raw) | static_cast<uintptr_t>(units);
    if (!pack) bits |= static_cast<uintptr_t>(layer.g_output_stride);
    CO_UNROLL
    for (int i = 0; i < kMaxRowDims; ++i) {
      if (pack && layer.x_row_size[i] > 1) bits |= static_cast<uintptr_t>(layer.x_row_stride[i]);
    }
    const int rows = pack ? chunk.x_rows() : static_cast<int>(outputs.end - outputs.begin);
    CO_NO_UNROLL
    for (int first = 0; first < rows; first += stage) {
      const int count = min(stage, rows - first);
      __syncthreads();  // the table is complete, and the last stage has been written
      if (const int thread = fresh_thread(); thread < count) {
        const int row = first + thread;
        chunk.scratch.row_offset[thread] =
            pack ? strided_offset(static_cast<uint32_t>(chunk.x_row(row)), layer.x_row_size, layer.x_row_stride)
                 : (outputs.begin + row) * layer.g_output_stride;
        work.slab[thread * work.slab_pitch + units] = one_bits<Raw>(first_layer.x_dtype);
      }
      __syncthreads();
      if (bits % kWide == 0) {
        permute_block<kThreads, kWide>(work, chunk, count);
      } else {
        permute_block<kThreads, 1>(work, chunk, count);
      }
      if (pack) work.to += count * work.to_pitch;
    }
  }
}

}  // namespace consistency_ops
