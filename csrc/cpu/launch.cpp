// The workspace of a call, and the order in which its threads do the tasks.
#include "cpu/launch.h"

#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace consistency_ops::cpu {

namespace {

// Below this many multiply-adds waking the other threads costs more than they bring.
constexpr int64_t kSerialWork = 2000000;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<char, Free>;

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

Bytes allocate(int64_t bytes) {
  return Bytes(static_cast<char*>(std::aligned_alloc(64, std::max<int64_t>(64, aligned(bytes)))));
}

template <typename Condition>
void wait_until(Condition condition) {
  for (int spins = 0; !condition(); ++spins) {
    if (spins > 100) sched_yield();
  }
}

int64_t work_of(const Plan& plan, const PreconditionLayer* layers) {
  int64_t work = 0;
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    const LayerPlan& layer = plan.layers[l];
    for (const ChunkPlan& chunk : layer.chunks) work += chunk.size * chunk.size * (layer.sample.count / 2 + chunk.size);
    for (const ChunkPlan& chunk : plan.layers[layer.head].chunks) {
      work += chunk.size * chunk.size * layers[l].outputs * layer.taps;
    }
  }
  return work;
}

}  // namespace

template <typename T>
Launch<T>::Launch(const PreconditionLayer* layers, const PreconditionOptions& options, const Plan& plan,
                  char* workspace, int32_t threads, const Whitening& whitening)
    : layers_(layers),
      options_(options),
      plan_(plan),
      states_(plan.layers.size()),
      after_(plan.layers.size(), -1),
      scratch_(threads),
      whitened_(whitening.layers),
      decay_(whitening.decay),
      unwhitens_(whitening.unwhitens) {
  storage_ = reinterpret_cast<T*>(workspace);
  char* at = workspace + aligned(plan.storage_elements * sizeof(T));
  auto take = [&at](int64_t bytes) {
    char* taken = at;
    at += aligned(bytes);
    return taken;
  };
  for (Scratch<T>& s : scratch_) {
    s.row_offset = reinterpret_cast<int64_t*>(take(plan.most_rows * sizeof(int64_t)));
    s.packed = reinterpret_cast<T*>(take(plan.packed_elements * sizeof(T)));
    s.factor = reinterpret_cast<T*>(take(plan.largest_matrix * sizeof(T)));
    s.inverse_factor = reinterpret_cast<T*>(take(plan.largest_matrix * sizeof(T)));
    s.tile = reinterpret_cast<T*>(take(kMaxTileRows * kTilePitch * sizeof(T)));
    s.product = reinterpret_cast<T*>(take(kMaxTileRows * kTilePitch * sizeof(T)));
    s.projected = reinterpret_cast<T*>(take(kMaxTileRows * kTilePitch * sizeof(T)));
    s.inverse_diagonal = reinterpret_cast<T*>(take((kMaxChunk + plan.bias_elements) * sizeof(T)));
    s.bias = s.inverse_diagonal + kMaxChunk;
  }
  int32_t after = -1;
  for (auto task = plan.tasks.rbegin(); threads == 1 && task != plan.tasks.rend(); ++task) {
    if (task->phase != Phase::kApply || task->layer == after) continue;
    after_[task->layer] = after;
    after = task->layer;
  }
  for (size_t l = 0; l < states_.size(); ++l) {
    states_[l].diagonals.resize(plan.layers[l].chunks.size());
    states_[l].info.assign(plan.layers[l].chunks.size(), 0);
    states_[l].few_rows.assign(plan.layers[l].chunks.size(), 0);
    states_[l].tile_scale.resize(plan.layers[l].chunks.size());
    if (whitened_ == nullptr) continue;
    states_[l].averaged.resize(plan.layers[l].chunks.size());
    if (whitening.finite != nullptr) states_[l].finite = whitening.finite[l] != 0;
    if (unwhitens_) states_[l].squares.resize(layers[l].outputs / plan.layers[l].outputs_per_block + 1);
  }
}

template <typename T>
void Launch<T>::work(int64_t thread) {
  const int64_t tickets = static_cast<int64_t>(plan_.tasks.size());
  for (;;) {
    const int64_t ticket = next_.fetch_add(1, std::memory_order_relaxed);
    if (ticket >= tickets) return;
    const Task& task = plan_.tasks[ticket];
    LayerState& state = states_[plan_.layers[task.layer].head];
    const int phase = static_cast<int>(task.phase);
    wait_until([&] {
      return finished_.load(std::memory_order_acquire) >= task.wait_ticket &&
             (phase == 0 || state.done[phase - 1].load(std::memory_order_acquire) >= task.wait_in_phase);
    });
    switch (task.phase) {
      case Phase::kCovariance:
        covariance(task, scratch_[thread]);
        break;
      case Phase::kFactor:
        factor(task, scratch_[thread]);
        break;
      case Phase::kApply:
        apply(task, scratch_[thread]);
        break;
    }
    state.done[phase].fetch_add(1, std::memory_order_release);
    finished_.fetch_add(1, std::memory_order_release);
  }
}

template <typename T>
Squares Launch<T>::squares(int64_t layer) const {
  Squares sum;
  for (const Squares& block : states_[layer].squares) {
    sum.before += block.before;
    sum.after += block.after;
  }
  return sum;
}

int64_t workspace_bytes(const Plan& plan, int64_t element, int32_t threads) {
  return aligned(plan.storage_elements * element) + threads * thread_bytes(plan, element);
}

bool is_serial(const Plan& plan, const PreconditionLayer* layers, const ThreadPool& pool) {
  return pool.run == nullptr || pool.threads <= 1 || work_of(plan, layers) < kSerialWork;
}

template <typename T>
Status run(const PreconditionLayer* layers, const PreconditionOptions& options, const Plan& plan,
           const ThreadPool& pool, const Whitening& whitening, const std::function<void(const Launch<T>&)>& after) {
  const bool serial = is_serial(plan, layers, pool);
  const int32_t threads = serial ? 1 : pool.threads;
  const Bytes workspace = allocate(workspace_bytes(plan, sizeof(T), threads));
  if (workspace == nullptr) return Status::kOutOfMemory;
  Launch<T> launch(layers, options, plan, workspace.get(), threads, whitening);
  if (serial) {
    launch.work(0);
  } else {
    pool.run(
        pool.context, threads, [](void* argument, int64_t thread) { static_cast<Launch<T>*>(argument)->work(thread); },
        &launch);
  }
  if (after) after(launch);
  return Status::kOk;
}

template class Launch<float>;
template Status run<float>(const PreconditionLayer*, const PreconditionOptions&, const Plan&, const ThreadPool&,
                           const Whitening&, const std::function<void(const Launch<float>&)>&);
template class Launch<double>;
template Status run<double>(const PreconditionLayer*, const PreconditionOptions&, const Plan&, const ThreadPool&,
                            const Whitening&, const std::function<void(const Launch<double>&)>&);

}  // namespace consistency_ops::cpu
