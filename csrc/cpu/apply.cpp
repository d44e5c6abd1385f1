// The apply tasks of a launch: outputs of G times the inverses of their chunks.
#include <algorithm>

#include "cpu/few_rows.h"
#include "cpu/launch.h"
#include "cpu/strided.h"
#include "cpu/whitening.h"

namespace consistency_ops::cpu {

namespace {

// Where a unit of a row is in a tile.
int64_t tile_index(bool by_unit, int64_t row, int64_t unit) {
  return by_unit ? unit * kMaxTileRows + row : row * kTilePitch + unit;
}

// A copy of the bias for every row.
template <typename T>
void load_bias(const PreconditionLayer& layer, int64_t taps, int64_t first_output, int64_t rows, const Scratch<T>& s) {
  const GatherKernels<T>& gather = isa_kernels<T>().gather[static_cast<int>(layer.bias_dtype)];
  const Run run{0, 0, 0, 1};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t offset = (first_output + r / taps) * layer.bias_stride;
    gather.load_tile(layer.bias_grad, &offset, 1, 1, &run, 1, 0, false, s.bias + r);
  }
}

// Every tap of an output has corrected a copy of its bias; the bias becomes their mean.
template <typename T>
void average_bias(const PreconditionLayer& layer, int64_t taps, int64_t first_output, int64_t outputs,
                  const Scratch<T>& s) {
  const Run run{0, 0, 0, 1};
  for (int64_t o = first_output; o < first_output + outputs; ++o) {
    const T* copies = s.bias + (o - first_output) * taps;
    T mean = copies[0];
    for (int64_t t = 1; t < taps; ++t) {
      const T difference = copies[t] - mean;  // NaN between infinities: all copies are the infinity that came in
      if (difference == difference) mean += difference / static_cast<T>(t + 1);
    }
    const int64_t offset = o * layer.bias_stride;
    isa_kernels<T>().gather[static_cast<int>(layer.bias_dtype)].store_tile(&mean, 0, layer.bias_grad, &offset, 1, 1,
                                                                           &run, 1);
  }
}

}  // namespace

template <typename T>
void Launch<T>::apply(const Task& task, const Scratch<T>& s) {
  const int64_t outputs = plan_.layers[task.layer].outputs_per_block;
  if (unwhitens_ && !whitened_[task.layer].moves) return;
  const bool on_tiles = plan_.layers[plan_.layers[task.layer].head].on_tiles && fits_tiles(layers_[task.layer]);
  const TileScope tiles(on_tiles ? plan_.tiles : nullptr);
  for (int64_t first = task.begin; first < task.end; first += outputs) {
    const int64_t here = std::min<int64_t>(outputs, task.end - first);
    Squares* squares = unwhitens_ ? &states_[task.layer].squares[first / outputs] : nullptr;
    if (unwhitens_) squares->before = subtract<T>(layers_[task.layer], whitened_[task.layer], first, here);
    apply_block(task.layer, first, here, first + outputs < task.end, s);
    if (unwhitens_) squares->after = sum_of_squares<T>(layers_[task.layer], first, here);
  }
}

template <typename T>
MatrixKind Launch<T>::kind() const {
  if (!options_.triangular) return MatrixKind::kSymmetric;
  return whitened_ == nullptr ? MatrixKind::kGeneral : unwhitens_ ? MatrixKind::kLower : MatrixKind::kUpper;
}

template <typename T>
const char* Launch<T>::next_outputs(int32_t index, int64_t output) const {
  if (output >= layers_[index].outputs) {
    if (after_[index] >= 0) index = after_[index];
    output = 0;
  }
  return static_cast<const char*>(layers_[index].g) +
         output * layers_[index].g_output_stride * element_size(layers_[index].g_dtype);
}

// Corrects some outputs; `more`: as many come next.
template <typename T>
void Launch<T>::apply_block(int32_t index, int64_t first_output, int64_t outputs, bool more, const Scratch<T>& s) {
  const PreconditionLayer& layer = layers_[index];
  const int64_t taps = plan_.layers[index].taps, head = plan_.layers[index].head;
  const LayerPlan& plan = plan_.layers[head];
  const IsaKernels<T>& kernels = isa_kernels<T>();
  const GatherKernels<T>& g_gather = kernels.gather[static_cast<int>(layer.g_dtype)];
  const GatherKernels<T>& bias_gather = kernels.gather[static_cast<int>(layer.bias_dtype)];
  const T largest =
      std::min(largest_of<T>(layer.g_dtype), largest_of<T>(layer.has_bias ? layer.bias_dtype : layer.g_dtype));
  const int64_t rows = outputs * taps;
  // Where the units lie apart, rows (the taps of an output) mostly lie side by side and are moved as pieces.
  const bool by_unit = layer.g_unit_stride != 1;
  const int64_t tile_rows = by_unit || plan.chunks[0].panels > kFewPanels ? kMaxTileRows : kTileRows;
  const int64_t adjacent_rows = taps > 1 ? taps : rows;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t o = taps == 1 ? r : r / taps;
    s.row_offset[r] = (first_output + o) * layer.g_output_stride +
                      offset_of(layer.g_tap_size, layer.g_tap_stride, kMaxTapDims, r - o * taps);
  }
  const int64_t ahead = more ? outputs * layer.g_output_stride : 0;

  const char* next = next_outputs(index, first_output + outputs);
  int64_t first_unit = 0;
  for (size_t c = 0; c < plan.chunks.size(); first_unit += plan.chunks[c++].size) {
    if (states_[head].info[c] != 0) continue;
    const ChunkPlan& chunk = plan.chunks[c];
    const Run* runs = plan.runs.data() + chunk.first_run;
    const bool with_bias = static_cast<int32_t>(c) == plan.bias_chunk;
    const Run bias_run{0, 0, plan.bias_column, 1};
    const bool few = states_[head].few_rows[c];
    const T* matrix = this->matrix(chunk);
    if (chunk.tiles >= 0 && fits_tiles(layer)) {
      plan_.tiles->correct(layer.g, s.row_offset, rows, runs, chunk.num_runs, ahead,
                           reinterpret_cast<const uint16_t*>(storage_ + chunk.tiles), chunk.size,
                           states_[head].tile_scale[c], static_cast<float>(largest));
      continue;
    }
    const DirectRows<T> at{layer.g,
                           s.row_offset,
                           rows,
                           layer.g_unit_stride,
                           runs,
                           chunk.num_runs,
                           taps,
                           chunk.size,
                           next + rows * first_unit * element_size(layer.g_dtype),
                           largest,
                           with_bias ? s.bias : nullptr,
                           plan.bias_column,
                           s.tile,
                           s.product,
                           s.projected};
    if (with_bias) load_bias(layer, taps, first_output, rows, s);
    const DirectKernels<T>& direct = kernels.direct[static_cast<int>(layer.g_dtype)];
    const T inverse_damping = T(1) / static_cast<T>(options_.damping);
    const int64_t corrected =
        few ? direct.correct_few(at, few_rows_transposed(chunk, matrix), matrix, chunk.row_panels, inverse_damping)
            : direct.correct(at, matrix, kind());
    if (corrected == rows) {
      if (with_bias) average_bias(layer, taps, first_output, outputs, s);
      continue;
    }
    for (int r = 0; !by_unit && r < tile_rows; ++r) {
      std::fill(s.tile + r * kTilePitch + chunk.size, s.tile + r * kTilePitch + chunk.panels * kPanel, T(0));
    }
    for (int64_t side = 0; side < rows; side += adjacent_rows) {
      for (int64_t at = std::max(side, corrected); at < side + adjacent_rows; at += tile_rows) {
        const int here = static_cast<int>(std::min(tile_rows, side + adjacent_rows - at));
        const int64_t* row_offset = s.row_offset + at;
        g_gather.load_tile(layer.g, row_offset, here, layer.g_unit_stride, runs, chunk.num_runs, ahead, by_unit,
                           s.tile);
        int64_t bias_offset[kMaxTileRows];
        if (with_bias) {
          for (int r = 0; r < here; ++r) bias_offset[r] = (first_output + (at + r) / taps) * layer.bias_stride;
          bias_gather.load_tile(layer.bias_grad, bias_offset, here, 1, &bias_run, 1, 0, by_unit, s.tile);
        }
        const uint32_t bad =
            few ? kernels.chunk.apply_few(s.tile, by_unit, here, few_rows_transposed(chunk, matrix), matrix,
                                          chunk.row_panels, chunk.size, inverse_damping, largest, s.projected,
                                          s.product)
                : kernels.chunk.apply(s.tile, by_unit, here, matrix, kind(), chunk.size, largest, s.product);
        g_gather.store_tile(s.product, bad, layer.g, row_offset, here, layer.g_unit_stride, runs, chunk.num_runs);
        if (with_bias) {
          for (int r = 0; r < here; ++r) {
            const T* column = s.product + r * kTilePitch + plan.bias_column;
            if (bad >> r & 1) column = s.tile + tile_index(by_unit, r, plan.bias_column);
            s.bias[at + r] = *column;
          }
        }
      }
    }
    if (with_bias) average_bias(layer, taps, first_output, outputs, s);
  }
}

template void Launch<float>::apply(const Task&, const Scratch<float>&);
template void Launch<double>::apply(const Task&, const Scratch<double>&);

}  // namespace consistency_ops::cpu
