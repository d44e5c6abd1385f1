#include "cpu/plan.h"

#include <algorithm>

#include "cpu/few_rows.h"
#include "cpu/one_unit.h"
#include "cpu/strided.h"

namespace consistency_ops::cpu {

namespace {

// Below so many panels a chunk's products take less time than moving G, and a tile less of it is filled.
constexpr int kLeastTilePanels = 4;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int64_t row_count(const PreconditionLayer& layer) {
  int64_t rows = 1;
  for (int64_t size : layer.x_row_size) rows *= size;
  return layer.row_count == nullptr ? rows : std::clamp<int64_t>(*layer.row_count, 0, rows);
}

// Deals the units to chunks and cuts every chunk into runs of consecutive units that stay in one panel.
void divide(const PreconditionLayer& layer, const PreconditionOptions& options, LayerPlan& plan) {
  const Division division =
      make_division(plan.units, options.chunk, layer.group, options.seed, options.step, layer.layer);
  const int64_t chunks = static_cast<int64_t>(plan.chunks.size());
  const int64_t permuted = chunks > 1 ? division.groups * division.group : 0;
  int64_t group_start = 0, in_group = 0;
  auto unit_of = [&](int64_t position) {  // unit_at(), with one walk of the bijection a group
    if (layer.permutation != nullptr) return layer.permutation[position];
    if (chunks == 1) return position;
    int64_t place = position;
    if (position < permuted) {
      if (in_group == 0) group_start = permuted_group(division, position / division.group) * division.group;
      place = group_start + in_group;
      if (++in_group == division.group) in_group = 0;
    }
    return rotate(division, place);
  };

  int32_t panel = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    ChunkPlan& chunk = plan.chunks[c];
    const int64_t begin = chunk_begin(plan.units, chunks, c);
    chunk.size = chunk_begin(plan.units, chunks, c + 1) - begin;
    chunk.panels = static_cast<int32_t>((chunk.size + kPanel - 1) / kPanel);
    chunk.first_panel = panel;
    chunk.storage = 0;
    chunk.tiles = -1;
    chunk.first_run = static_cast<int64_t>(plan.runs.size());
    for (int64_t q = 0; q < chunk.size; ++q) {
      const int64_t unit = unit_of(begin + q);
      const int64_t at = (panel + q / kPanel) * plan.packed_panel() + q % kPanel;
      if (layer.has_bias && unit == layer.units) {
        plan.bias_chunk = static_cast<int32_t>(c);
        plan.bias_column = static_cast<int16_t>(q);
        continue;
      }
      Run* last = static_cast<int64_t>(plan.runs.size()) > chunk.first_run ? &plan.runs.back() : nullptr;
      if (last != nullptr && q % kPanel != 0 && last->packed + last->length == at &&
          last->unit + last->length == unit) {
        ++last->length;
      } else {
        plan.runs.push_back({at, static_cast<int32_t>(unit), static_cast<int16_t>(q), 1});
      }
    }
    chunk.num_runs = static_cast<int64_t>(plan.runs.size()) - chunk.first_run;
    panel += chunk.panels;
  }
}

// Rows of a packed block, whose elements take `bytes` a row and unit: as many as fit kPackedBytes, so that a wide X is
// read only once.  A few rows more than a block go with it: a block of their own would cost more to add than to sum.
int64_t block_rows(int64_t units, int64_t rows, int64_t bytes) {
  int64_t block = kRowBlock;
  while (block > kLeastRowBlock && units * block * bytes > kPackedBytes) block /= 2;
  const int64_t all = round_up(rows, kLeastRowBlock);
  return all > block && 2 * all <= 3 * block && units * all * bytes <= kPackedBytes ? all : block;
}

int64_t matrix_of(const ChunkPlan& chunk) { return int64_t{chunk.panels} * chunk.panels * kPanel * kPanel; }

// Of the inverse in tile order: two terms of half a float, an even number of panels high.
int64_t tiles_of(const ChunkPlan& chunk) {
  return int64_t{chunk.panels} * ((chunk.panels + 1) / 2 * 2) * kPanel * kPanel;
}

int64_t storage_of(const ChunkPlan& chunk) {
  if (chunk.tiles < 0) return matrix_of(chunk);
  return chunk.tiles == chunk.storage ? std::max(matrix_of(chunk), tiles_of(chunk))
                                      : matrix_of(chunk) + tiles_of(chunk);
}

int64_t storage_of(const LayerPlan& layer) {
  int64_t elements = 0;
  for (const ChunkPlan& chunk : layer.chunks) elements += storage_of(chunk);
  return elements;
}

// Which chunks of a head have their inverse in tile order.  The offsets are those in an empty workspace.
void place_tiles(const PreconditionLayer* layers, LayerPlan& head) {
  const PreconditionLayer* end = layers + head.members;
  const int64_t fitting = std::count_if(layers, end, fits_tiles);
  for (size_t c = 0; c < head.chunks.size(); ++c) {
    ChunkPlan& chunk = head.chunks[c];
    const bool has_bias = static_cast<int32_t>(c) == head.bias_chunk;
    if (fitting == 0 || has_bias || chunk.row_panels > 0 || chunk.panels < kLeastTilePanels) continue;
    chunk.tiles = fitting == head.members ? 0 : matrix_of(chunk);
    head.on_tiles = true;
  }
}

int64_t panels_of(const LayerPlan& layer) { return layer.chunks.back().first_panel + layer.chunks.back().panels; }

int64_t covariance_work(const LayerPlan& layer) {
  return std::max<int64_t>(1, layer.sample.count) * panels_of(layer) * layer.chunks.front().panels;
}

}  // namespace

void sampled_offsets(const PreconditionLayer& layer, const LayerPlan& plan, int64_t row, int64_t rows,
                     int64_t* row_offset) {
  draw_rows(plan.draws, row, rows, 0, row_offset);
  for (int64_t k = 0; k < rows; ++k) {
    row_offset[k] = offset_of(layer.x_row_size, layer.x_row_stride, kMaxRowDims, row_offset[k]);
  }
}

Plan make_plan(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options, int32_t threads,
               bool pairs, bool without_rows, const TileKernels* tiles) {
  Plan plan;
  plan.layers.resize(count);
  const int64_t element = options.float64 ? 8 : 4;
  int64_t largest_layer = 0;
  if (options.stages & kStageApply && !options.float64 && !options.triangular) plan.tiles = tiles;

  for (int64_t l = 0; l < count; ++l) {
    const PreconditionLayer& layer = layers[l];
    LayerPlan& at = plan.layers[l];
    at.units = layer.units + (layer.has_bias ? 1 : 0);
    at.taps = 1;
    for (int64_t size : layer.g_tap_size) at.taps *= size;
    const int64_t row_bytes = std::max<int64_t>(1, layer.units) * element_size(layer.g_dtype);
    const int64_t rows = std::clamp<int64_t>(kApplyBytes / row_bytes / kPanel * kPanel, kPanel, kApplyRows);
    at.outputs_per_block = std::max<int64_t>(1, rows / std::max<int64_t>(1, at.taps));
    at.row_block = block_rows(at.units, 0, element);
    at.bias_chunk = -1;
    at.sample = {1, 0};
    at.head = layer.same_input ? plan.layers[l - 1].head : l;
    LayerPlan& head = plan.layers[at.head];
    ++head.members;
    if (!(options.stages & kStageApply) || (layer.outputs > 0 && at.taps > 0)) head.active = layer.units > 0;
    plan.most_rows = std::max(plan.most_rows, at.outputs_per_block * at.taps);
    if (layer.has_bias) plan.bias_elements = std::max(plan.bias_elements, at.outputs_per_block * at.taps);
  }

  for (int64_t l = 0; l < count; ++l) {
    const PreconditionLayer& layer = layers[l];
    LayerPlan& at = plan.layers[l];
    if (at.active && (options.stages & kStageCovariance)) {
      const int64_t rows = row_count(layer);
      at.sample = sample_rows(rows, options.max_rows);
      at.draws = {options.seed, options.step, layer.layer, 0, at.sample.stride, rows};
      at.active = at.sample.count > 0 || without_rows;
      at.row_block = block_rows(at.units, at.sample.count, element);
      // Where the chunks of a layer have 64 and 65 units, only some may have few rows.
      const int64_t chunks = num_chunks(layer, options);
      const int64_t largest = (at.units + chunks - 1) / std::max<int64_t>(1, chunks);
      const int64_t panels = (largest + kPanel - 1) / kPanel;
      at.in_pairs = pairs && !options.float64 && layer.x_dtype == DType::kBFloat16 &&
                    few_row_panels(layer, options, at, panels) == 0;
      if (at.in_pairs) at.row_block = block_rows(at.units, at.sample.count, element / 2);
      plan.most_rows = std::max(plan.most_rows, at.row_block);
    }
    if (at.active && has_one_unit(layers, count, l, options)) {
      at.active = false;
      at.one_unit = true;
    }
    if (!at.active) continue;
    at.chunks.resize(num_chunks(layer, options));
    divide(layer, options, at);
    for (ChunkPlan& chunk : at.chunks) {
      chunk.row_panels = at.in_pairs ? 0 : few_row_panels(layer, options, at, chunk.panels);
    }
    if (plan.tiles != nullptr) place_tiles(&layer, at);
    at.runs.shrink_to_fit();
    plan.table_bytes += static_cast<int64_t>(at.runs.capacity() * sizeof(Run) + at.chunks.size() * sizeof(ChunkPlan));
    largest_layer = std::max(largest_layer, storage_of(at));
    for (const ChunkPlan& chunk : at.chunks) {
      plan.largest_matrix = std::max(plan.largest_matrix, int64_t{chunk.panels} * chunk.panels * kPanel * kPanel);
    }
  }

  // Layers share a wave and its storage.  A wave has room for the largest layer, for what the largest packed blocks
  // leave free of kPackedBytes a thread, and for enough chunks to keep every thread busy.
  int64_t packed = 0;
  for (const LayerPlan& layer : plan.layers) {
    if (layer.active) packed = std::max(packed, panels_of(layer) * layer.packed_panel());
  }
  const int64_t room = std::max<int64_t>(0, kPackedBytes / element - packed);
  const int64_t capacity = std::max(largest_layer + threads * room, 2 * int64_t{threads} * plan.largest_matrix);

  auto add_covariance = [&](int64_t l, int64_t parts, int64_t wave_ticket) {
    const LayerPlan& layer = plan.layers[l];
    const int64_t chunks = static_cast<int64_t>(layer.chunks.size());
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t begin = chunks * p / parts, end = chunks * (p + 1) / parts;
      const int64_t panels =
          layer.chunks[end - 1].first_panel + layer.chunks[end - 1].panels - layer.chunks[begin].first_panel;
      plan.packed_elements = std::max(plan.packed_elements, panels * layer.packed_panel());
      plan.tasks.emplace_back(Phase::kCovariance, l, begin, end, wave_ticket, 0);
    }
  };
  auto add_factor = [&](int64_t l, int64_t parts, int64_t wave_ticket) {
    for (size_t c = 0; c < plan.layers[l].chunks.size(); ++c) {
      const auto chunk = static_cast<int64_t>(c);
      plan.tasks.emplace_back(Phase::kFactor, l, chunk, chunk + 1, wave_ticket, parts);
    }
  };
  auto add_apply = [&](int64_t l, int64_t wave_ticket) {
    const LayerPlan& layer = plan.layers[l];
    if (layer.taps == 0) return;
    const int64_t blocks = (layers[l].outputs + layer.outputs_per_block - 1) / layer.outputs_per_block;
    const int64_t outputs =
        layer.outputs_per_block * std::clamp<int64_t>(blocks / (4 * int64_t{threads}), 1, kApplyBlocks);
    for (int64_t o = 0; o < layers[l].outputs; o += outputs) {
      plan.tasks.emplace_back(Phase::kApply, l, o, std::min(layers[l].outputs, o + outputs), wave_ticket,
                              plan.layers[layer.head].chunks.size());
    }
  };

  int64_t next = 0;
  while (next < count) {
    std::vector<int64_t> wave, parts;
    int64_t used = 0, work = 0;
    for (; next < count; ++next) {
      LayerPlan& layer = plan.layers[next];
      if (!layer.active) continue;
      const int64_t needed = storage_of(layer);
      if (used > 0 && used + needed > capacity) break;
      for (ChunkPlan& chunk : layer.chunks) {
        const int64_t elements = storage_of(chunk);
        chunk.storage += used;
        if (chunk.tiles >= 0) chunk.tiles += used;
        used += elements;
      }
      wave.push_back(next);
      work += covariance_work(layer);
    }
    plan.storage_elements = std::max(plan.storage_elements, used);

    // A layer is split no finer than its share of the wave's work asks for: every part reads most of X.
    for (int64_t l : wave) {
      const LayerPlan& layer = plan.layers[l];
      const int64_t share = (covariance_work(layer) * threads + work - 1) / std::max<int64_t>(1, work);
      const int64_t panels_per_task = std::max<int64_t>(1, kPackedBytes / (layer.packed_panel() * element));
      const int64_t fitting = (panels_of(layer) + panels_per_task - 1) / panels_per_task;
      parts.push_back(std::clamp<int64_t>(std::max(share, fitting), 1, static_cast<int64_t>(layer.chunks.size())));
    }
    // Threads that wait for the last covariance of one layer can already start on the next.
    const auto ticket = static_cast<int64_t>(plan.tasks.size());
    const size_t length = wave.size();
    for (size_t stage = 0; stage < length + 2; ++stage) {
      if (stage < length) add_covariance(wave[stage], parts[stage], ticket);
      if (stage >= 1 && stage - 1 < length && (options.stages & (kStageFactor | kStageApply))) {
        add_factor(wave[stage - 1], parts[stage - 1], ticket);
      }
      if (stage >= 2 && (options.stages & kStageApply)) {
        const int64_t head = wave[stage - 2];
        for (int64_t l = head; l < head + plan.layers[head].members; ++l) add_apply(l, ticket);
      }
    }
  }
  return plan;
}

int64_t thread_bytes(const Plan& plan, int64_t element) {
  int64_t bytes = round_up(plan.most_rows * static_cast<int64_t>(sizeof(int64_t)), 64);
  bytes += round_up(plan.packed_elements * element, 64);
  bytes += 2 * round_up(plan.largest_matrix * element, 64);        // the factor and its inverse
  bytes += 3 * round_up(kMaxTileRows * kTilePitch * element, 64);  // a tile of G, its product and its projection
  bytes += round_up((kMaxChunk + plan.bias_elements) * element, 64);
  return bytes;
}

}  // namespace consistency_ops::cpu
