#include "cpu/plan.h"

#include <algorithm>

namespace consistency_ops::cpu {

namespace {

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
    int64_t rotated = position;
    if (position < permuted) {
      if (in_group == 0) group_start = permuted_group(division, position / division.group) * division.group;
      rotated = group_start + in_group;
      if (++in_group == division.group) in_group = 0;
    }
    rotated += division.offset;
    return rotated >= plan.units ? rotated - plan.units : rotated;
  };

  int32_t panel = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    ChunkPlan& chunk = plan.chunks[c];
    const int64_t begin = chunk_begin(plan.units, chunks, c);
    chunk.size = chunk_begin(plan.units, chunks, c + 1) - begin;
    chunk.panels = static_cast<int32_t>((chunk.size + kPanel - 1) / kPanel);
    chunk.first_panel = panel;
    chunk.first_run = static_cast<int64_t>(plan.runs.size());
    for (int64_t q = 0; q < chunk.size; ++q) {
      const int64_t unit = unit_of(begin + q);
      const int64_t at = (panel + q / kPanel) * kPackedPitch * kPanel + q % kPanel;
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

int64_t storage_of(const LayerPlan& layer) {
  int64_t elements = 0;
  for (const ChunkPlan& chunk : layer.chunks) elements += int64_t{chunk.panels} * chunk.panels * kPanel * kPanel;
  return elements;
}

}  // namespace

Plan make_plan(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options, int32_t threads) {
  Plan plan;
  plan.layers.resize(count);
  const int64_t element = options.float64 ? 8 : 4;
  int64_t largest_layer = 0;

  for (int64_t l = 0; l < count; ++l) {
    const PreconditionLayer& layer = layers[l];
    LayerPlan& at = plan.layers[l];
    at.units = layer.units + (layer.has_bias ? 1 : 0);
    at.taps = 1;
    for (int64_t size : layer.g_tap_size) at.taps *= size;
    const int64_t row_bytes = std::max<int64_t>(1, layer.units) * element_size(layer.g_dtype);
    const int64_t rows = std::clamp<int64_t>(kApplyBytes / row_bytes / kPanel * kPanel, kPanel, kApplyRows);
    at.outputs_per_task = std::max<int64_t>(1, rows / std::max<int64_t>(1, at.taps));
    at.bias_chunk = -1;
    at.sample = {0, 1, 0};
    at.active = layer.units > 0;
    if (options.stages & kStageCovariance) {
      at.sample = sample_rows(row_count(layer), options.max_rows, options.seed, options.step, layer.layer);
      at.active = at.active && at.sample.count > 0;
    }
    if (options.stages & kStageApply) at.active = at.active && layer.outputs > 0 && at.taps > 0;
    if (!at.active) continue;
    at.chunks.resize(num_chunks(layer, options));
    divide(layer, options, at);
    plan.table_bytes += static_cast<int64_t>(at.runs.capacity() * sizeof(Run) + at.chunks.size() * sizeof(ChunkPlan));
    largest_layer = std::max(largest_layer, storage_of(at));
    for (const ChunkPlan& chunk : at.chunks) {
      plan.largest_matrix = std::max(plan.largest_matrix, int64_t{chunk.panels} * chunk.panels * kPanel * kPanel);
    }
    if (layer.has_bias) plan.bias_elements = std::max(plan.bias_elements, at.outputs_per_task * at.taps);
  }

  // Layers share a wave, and its storage, as long as that is no larger than the largest layer needs alone, or than it
  // takes to keep every thread busy.
  const int64_t capacity = std::max(largest_layer, 2 * int64_t{threads} * plan.largest_matrix);
  const int64_t panels_per_task = std::max<int64_t>(1, kPackedBytes / (kPackedPitch * kPanel * element));
  int64_t first = 0;
  while (first < count) {
    const int64_t wave_ticket = static_cast<int64_t>(plan.tasks.size());
    int64_t used = 0, end = first;
    for (; end < count; ++end) {
      if (!plan.layers[end].active) continue;
      const int64_t needed = storage_of(plan.layers[end]);
      if (used > 0 && used + needed > capacity) break;
      for (ChunkPlan& chunk : plan.layers[end].chunks) {
        chunk.storage = used;
        used += int64_t{chunk.panels} * chunk.panels * kPanel * kPanel;
      }
    }
    plan.storage_elements = std::max(plan.storage_elements, used);

    std::vector<int32_t> previous(end - first, 0);
    for (int64_t l = first; l < end; ++l) {
      const LayerPlan& layer = plan.layers[l];
      if (!layer.active) continue;
      const int64_t chunks = static_cast<int64_t>(layer.chunks.size());
      const int64_t panels = layer.chunks.back().first_panel + layer.chunks.back().panels;
      const int64_t parts =
          std::min(chunks, std::max<int64_t>(threads, (panels + panels_per_task - 1) / panels_per_task));
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t begin = chunks * p / parts, stop = chunks * (p + 1) / parts;
        plan.tasks.push_back({Phase::kCovariance, static_cast<int32_t>(l), begin, stop, wave_ticket, 0});
        const ChunkPlan& last = layer.chunks[stop - 1];
        plan.packed_elements =
            std::max(plan.packed_elements,
                     (last.first_panel + last.panels - layer.chunks[begin].first_panel) * kPanel * kPackedPitch);
      }
      previous[l - first] = static_cast<int32_t>(parts);
    }
    if (options.stages & (kStageFactor | kStageApply)) {
      for (int64_t l = first; l < end; ++l) {
        const LayerPlan& layer = plan.layers[l];
        if (!layer.active) continue;
        const int64_t chunks = static_cast<int64_t>(layer.chunks.size());
        for (int64_t c = 0; c < chunks; ++c) {
          plan.tasks.push_back({Phase::kFactor, static_cast<int32_t>(l), c, c + 1, wave_ticket, previous[l - first]});
        }
        previous[l - first] = static_cast<int32_t>(chunks);
      }
    }
    if (options.stages & kStageApply) {
      for (int64_t l = first; l < end; ++l) {
        const LayerPlan& layer = plan.layers[l];
        if (!layer.active) continue;
        for (int64_t o = 0; o < layers[l].outputs; o += layer.outputs_per_task) {
          plan.tasks.push_back({Phase::kApply, static_cast<int32_t>(l), o,
                                std::min(layers[l].outputs, o + layer.outputs_per_task), wave_ticket,
                                previous[l - first]});
        }
      }
    }
    first = end;
  }
  return plan;
}

int64_t thread_bytes(const Plan& plan, int64_t element) {
  int64_t bytes = round_up(kRowBlock * static_cast<int64_t>(sizeof(int64_t)), 64);
  bytes += round_up(plan.packed_elements * element, 64);
  bytes += 2 * round_up(plan.largest_matrix * element, 64);  // the factor and its inverse
  bytes += 2 * round_up(kPanel * kTilePitch * element, 64);  // a tile of G and its product
  bytes += round_up((kMaxChunk + plan.bias_elements) * element, 64);
  return bytes;
}

}  // namespace consistency_ops::cpu
