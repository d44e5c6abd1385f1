// Which task a CTA does, what it waits for and what waits for it.  plan.h says which tasks there are and how they are
// numbered.
//
// Where tasks wait, CTAs take their numbers from a ticket counter when they start, so every smaller number is held by a
// CTA that runs or has run; and a task waits only for tasks with smaller numbers.  So there is progress at any number
// of resident CTAs, without a cooperative launch.  The last CTA resets the counters: the next launch and a replayed
// graph find them as the first launch did.  The counters lie in the library's own device memory, which is zero when it
// is loaded, so that no call has to fill anything with zeros first; counter_slots.h says which of the 256 slots a
// launch uses.
#pragma once

#include "cuda/precondition/chunk.cuh"

namespace consistency_ops {

struct Counters {
  uint32_t ticket, finished;
  // How many CTAs of a layer have written their part
  uint32_t packed[kMaxLaunchLayers];     // of packed X
  uint32_t summed[kMaxLaunchLayers];     // of the covariances
  uint32_t inverted[kMaxLaunchLayers];   // of the inverses, and of the permuted G
  uint32_t corrected[kMaxLaunchLayers];  // of the corrected, still permuted G
};
static_assert(sizeof(Counters) <= kCudaCounterBytes, "the workspace begins with the counters");

CO_DEVICE_MEMORY Counters counter_slots[kCudaCounterSlots];

// Null where no task waits.
CO_DEVICE Counters* counters_of(const PreconditionParams& params) {
  if (params.workspace == nullptr) return nullptr;
  return params.counters < 0 ? reinterpret_cast<Counters*>(params.workspace) : counter_slots + params.counters;
}

// The round r with first_task[r] <= task < first_task[r + 1].
CO_DEVICE int find_round(const PreconditionParams& params, int task) {
  int low = 0, high = params.count + kRounds - 1;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (params.first_task[middle] <= task) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// [first, first + count): part `part` of `parts` of n things, which are as equal as they can be made.
CO_DEVICE void part_of(int64_t n, int part, int parts, int64_t& first, int64_t& count) {
  const int64_t size = (n + parts - 1) / parts;
  first = min(n, size * part);
  count = min(n, first + size) - first;
}

// Run by one thread: which CTAs the task waits for, and where it says that it is done.  `ctas`: of the factor tasks,
// and of each part of the gram and apply tasks, of its layer.
CO_DEVICE void link_task(const PreconditionParams& params, Task& task, uint32_t ctas) {
  Counters* const counters = counters_of(params);
  const int l = task.layer;
  task.awaited = 0;
  task.awaited_counter = task.done_counter = nullptr;
  if (counters == nullptr) return;
  if (task.role == kPackTask) {
    int user = l - 1;  // the last layer that used the same buffer for packed X
    while (user >= 0 && (params.tasks[user].pack_tasks == 0 || params.packed[user] != params.packed[l])) --user;
    if (user >= 0) {
      task.awaited = static_cast<uint32_t>(count_chunks(params.layers[user], params.options)) *
                     static_cast<uint32_t>(params.tasks[user].gram_tasks);
      task.awaited_counter = &counters->summed[user];
    }
    task.done_counter = &counters->packed[l];
  } else if (task.role == kGramTask) {
    task.awaited = static_cast<uint32_t>(task.of_layer.pack_tasks);
    task.awaited_counter = &counters->packed[l];
    task.done_counter = &counters->summed[l];
  } else if (task.role == kFactorTask) {
    task.awaited = ctas * static_cast<uint32_t>(task.of_layer.gram_tasks);
    task.awaited_counter = &counters->summed[l];
    if (task.of_layer.apply_tasks > 0) task.done_counter = &counters->inverted[l];
  } else if (task.role == kPermuteTask) {
    if (params.whitening.mode == Mode::kWhitens) {  // whose gram tasks look at G as it lies
      task.awaited = static_cast<uint32_t>(count_chunks(params.layers[l], params.options)) *
                     static_cast<uint32_t>(task.of_layer.gram_tasks);
      task.awaited_counter = &counters->summed[l];
    }
    task.done_counter = &counters->inverted[l];
  } else if (task.role == kApplyTask) {
    task.awaited = static_cast<uint32_t>(task.of_layer.permute_tasks);
    if (params.options.stages != kStageApply) task.awaited += ctas;
    task.awaited_counter = &counters->inverted[l];
    if (task.of_layer.permute_tasks + task.of_layer.finish_tasks > 0) task.done_counter = &counters->corrected[l];
  } else {
    task.awaited = ctas * static_cast<uint32_t>(task.of_layer.apply_tasks);
    task.awaited_counter = &counters->corrected[l];
  }
}

struct OutputRange {
  int64_t begin, end;
};

// The outputs of member `member` of the run that this CTA corrects.
CO_DEVICE OutputRange outputs_of(const PreconditionLayer* members, int member, const Task& task) {
  int64_t before = 0;
  CO_NO_UNROLL
  for (int m = 0; m < member; ++m) before += members[m].outputs;
  const int64_t begin = task.first_output - before;
  return {max(int64_t{0}, begin), min(members[member].outputs, begin + task.outputs)};
}

// Run by one thread: role, layer, chunk and part of the task with this number.
CO_DEVICE void identify_task(const PreconditionParams& params, int number, Task& task) {
  const int round = find_round(params, number);
  int rest = number - params.first_task[round], role = kPackTask, l = round, chunks = 1;
  for (; role < kRoles; ++role) {
    l = round - layers_behind(role);
    if (l < 0 || l >= params.count) continue;
    chunks = static_cast<int>(own_chunks(params.layers[l], params.options));
    const int tasks = static_cast<int>(count_tasks(params.tasks[l], chunks, params.options.stages, role));
    if (rest < tasks) break;
    rest -= tasks;
  }
  const bool all_chunks = role == kPackTask || role == kPermuteTask || role == kRestoreTask;
  task.role = role;
  task.layer = l;
  task.members = run_length(params.layers + l, params.count - l);
  task.chunk = all_chunks ? 0 : rest % chunks;
  task.part = all_chunks ? rest : rest / chunks;
  task.of_layer = params.tasks[l];
  task.stages = params.options.stages;
  if (all_chunks) {
    task.stages = 0;
  } else if (role == kGramTask) {
    task.stages = kStageCovariance;
  } else if (role == kApplyTask) {
    task.stages = kStageApply;
  } else if (task.of_layer.apply_tasks > 0) {
    task.stages &= ~kStageApply;
  }
  task.cluster = params.cluster;
  task.tf32 = params.tf32;
  task.mode = params.whitening.mode;
  task.adds = params.whitening.finish && !params.whitening.keep_norm;
  task.warpgroups = params.warpgroups;
}

// Run by one thread: the rows of X and the outputs of G that are this CTA's part of its task.
CO_DEVICE void divide_rows(const PreconditionParams& params, Task& task, InputRows& input) {
  const PreconditionOptions& options = params.options;
  const PreconditionLayer& layer = params.layers[task.layer];
  int64_t rows = rows_of_x(layer);
  if (layer.row_count != nullptr) rows = max(int64_t{0}, min(*layer.row_count, rows));
  const RowSample sample = sample_rows(rows, options.max_rows);
  input.draws = {options.seed, options.step, layer.layer, 0, sample.stride, rows};
  input.all_rows = sample.count;
  int64_t all_outputs = 0, all_rows_of_g = 0;
  for (int m = 0; m < task.members; ++m) {
    all_outputs += params.layers[task.layer + m].outputs;
    all_rows_of_g += rows_of_g(params.layers[task.layer + m]);
  }
  // Without rows whitening goes on by the average.
  const bool needs_rows = (options.stages & kStageCovariance) && params.whitening.mode != Mode::kWhitens;
  task.empty =
      layer.units == 0 || (needs_rows && input.all_rows == 0) || ((options.stages & kStageApply) && all_rows_of_g == 0);

  const LayerTasks& of_layer = task.of_layer;
  const int role = task.role, part = task.part * task.cluster + task.rank;
  const int x_parts = role == kGramTask ? of_layer.gram_tasks : role == kPackTask ? of_layer.pack_tasks : 1;
  const int g_parts = role == kApplyTask                             ? of_layer.apply_tasks
                      : role == kPermuteTask || role == kRestoreTask ? of_layer.permute_tasks + of_layer.finish_tasks
                                                                     : 1;
  part_of(input.all_rows, part, x_parts * task.cluster, input.first_row, input.rows);
  part_of(all_outputs, part, g_parts * task.cluster, task.first_output, task.outputs);
  input.data = layer.x;
  input.unit_stride = layer.x_unit_stride;
  input.rows_are_fast =
      rows_are_fast(layer.x_row_stride[kMaxRowDims - 1], layer.x_row_size[kMaxRowDims - 1], layer.x_unit_stride);
  uintptr_t bits = reinterpret_cast<uintptr_t>(layer.x) / static_cast<uintptr_t>(element_size(layer.x_dtype));
  CO_UNROLL
  for (int i = 0; i < kMaxRowDims; ++i) {
    if (layer.x_row_size[i] > 1) bits |= static_cast<uintptr_t>(layer.x_row_stride[i]);
  }
  input.aligned = layer.x_unit_stride == 1 && bits % 4 == 0;
  if (of_layer.pack_tasks > 0) {
    input.packed_pitch = packed_pitch(layer);
    input.packed = params.workspace + static_cast<int64_t>(params.packed[task.layer]) * 16;
    if (role == kPackTask) {
      input.packed += input.first_row * input.packed_pitch * element_size(layer.x_dtype);
    } else {
      input.data = input.packed;
      input.unit_stride = 1;
      input.rows_are_fast = false;
      input.aligned = true;
      input.draws.stride = 1;
    }
  }
}

// Behind the records of a layer.
CO_DEVICE void* status_of(const PreconditionParams& params, int l) {
  const PreconditionLayer& layer = params.layers[l];
  const int64_t chunks = own_chunks(layer, params.options),
                record = record_floats(all_units(layer), max(chunks, int64_t{1}));
  const int64_t of_chunk =
      params.tasks[l].gram_tasks * record + inverse_floats(params.tasks[l], record, params.options.stages);
  return params.workspace + static_cast<int64_t>(params.records[l]) * 16 + chunks * of_chunk * int64_t{sizeof(float)};
}

// Run by one thread: how the units of the layer are divided, and which of them are the chunk's.
CO_DEVICE void divide_units(const PreconditionParams& params, ChunkShared& shared) {
  Task& task = shared.task;
  const PreconditionOptions& options = params.options;
  const PreconditionLayer& layer = params.layers[task.layer];
  const Division& division = task.division =
      make_division(layer.units + layer.has_bias, options.chunk, layer.group, options.seed, options.step, layer.layer);
  const uint32_t units = static_cast<uint32_t>(division.units), chunks = static_cast<uint32_t>(division.chunks);
  const uint32_t least = units / chunks;  // as in chunk_begin
  task.size = static_cast<int32_t>(least + (static_cast<uint32_t>(task.chunk) < units - least * chunks ? 1 : 0));
  const int bytes = static_cast<int>(element_size(layer.x_dtype));  // at least 16 rows of 16-bit numbers
  shared.input.arena = params.tile_floats;
  const int padded = padded_units(task.size), elements = params.arena_floats * 4 / bytes;
  shared.input.stage_rows = stage_rows(padded, elements, bytes);
  shared.input.single_rows = stage_rows(padded, elements, 4);
}

// Run by one thread: where the task meets others.
CO_DEVICE void find_records(const PreconditionParams& params, ChunkShared& shared) {
  Task& task = shared.task;
  const PreconditionLayer& layer = params.layers[task.layer];
  const int64_t chunks = own_chunks(layer, params.options);
  link_task(params, task, static_cast<uint32_t>(chunks) * static_cast<uint32_t>(params.cluster));
  Records& records = shared.records;
  records.floats = record_floats(all_units(layer), chunks);
  records.gram = reinterpret_cast<float*>(params.workspace + static_cast<int64_t>(params.records[task.layer]) * 16);
  records.inverse = records.gram + chunks * task.of_layer.gram_tasks * records.floats +
                    static_cast<int64_t>(task.chunk) * (records.floats + kStatusFloats);
  records.status = status_of(params, task.layer);
  shared.scratch.failed_tries = shared.scratch.failed_minor = 0;
  shared.scratch.has_bias = shared.scratch.ragged = shared.scratch.gradient = 0;
}

// All threads of the cluster: takes the next ticket.
CO_DEVICE void take_task(const PreconditionParams& params, ChunkShared& shared) {
  Counters* counters = counters_of(params);
  Task& task = shared.task;
  if (threadIdx.x == 0) {
    task.rank = static_cast<int>(blockIdx.x) % params.cluster;
    task.ticket = static_cast<int>(blockIdx.x) / params.cluster;
    if (counters != nullptr && task.rank == 0) task.ticket = static_cast<int>(atomicAdd(&counters->ticket, 1u));
  }
  if (counters != nullptr && params.cluster > 1) {
    cluster_barrier();  // rank 0 has its ticket
    if (threadIdx.x == 0 && task.rank != 0) task.ticket = load_cluster(&task.ticket, 0);
    cluster_barrier();  // which all have read, so that rank 0 may exit
  }
  if (threadIdx.x == 0) identify_task(params, task.ticket, task);
  __syncthreads();
  // A thread of one warp each, side by side, because most of it is waiting for one division after the other.
  if (threadIdx.x == 0) divide_rows(params, task, shared.input);
  if (threadIdx.x == 32) divide_units(params, shared);
  if (threadIdx.x == 64) find_records(params, shared);
  __syncthreads();
}

// Until the tasks that this one needs are done.  Ends with a barrier.
CO_DEVICE void wait_for_others(const Task& task) {
  if (threadIdx.x == 0 && task.awaited != 0) {
    while (load_acquire(task.awaited_counter) < task.awaited) __nanosleep(64);
  }
  __syncthreads();
}

// Publishes what others wait for.  True in thread 0 of the last CTA of the launch, where CTAs count.
CO_DEVICE bool end_task(const PreconditionParams& params, const Task& task) {
  Counters* counters = counters_of(params);
  if (counters == nullptr) return false;
  __syncthreads();
  if (threadIdx.x != 0) return false;
  if (task.done_counter != nullptr) add_release(task.done_counter, 1);
  if (add_acquire_release(&counters->finished, 1) != gridDim.x - 1) return false;
  for (int l = 0; l < params.count; ++l) {
    counters->packed[l] = counters->summed[l] = counters->inverted[l] = counters->corrected[l] = 0;
  }
  counters->ticket = 0;
  atomicExch(&counters->finished, 0u);
  return true;
}

}  // namespace consistency_ops
