// A pool of std::threads behind the library's ThreadPool: the threads sleep between calls, and all take tasks from one
// counter.
#pragma once

#include <consistency_ops/types.h>

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

class WorkerPool {
 public:
  // `threads` in all: the calling thread works, too.
  explicit WorkerPool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }
  ~WorkerPool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  // Valid as long as the pool lives.  Calls of the library that share it must not overlap.
  consistency_ops::ThreadPool view() { return {&WorkerPool::run, this, static_cast<int32_t>(workers_.size()) + 1}; }

  // How often the library asked for the threads; small problems stay on the calling one.
  int64_t calls() const { return calls_; }

 private:
  using Task = void (*)(void* argument, int64_t index);

  static void run(void* context, int64_t tasks, Task task, void* argument) {
    auto& pool = *static_cast<WorkerPool*>(context);
    std::unique_lock<std::mutex> lock(pool.mutex_);
    ++pool.calls_;
    pool.task_ = task;
    pool.argument_ = argument;
    pool.next_ = 0;
    pool.tasks_ = pool.unfinished_ = tasks;
    pool.wake_.notify_all();
    pool.take_tasks(lock);
    pool.done_.wait(lock, [&pool] { return pool.unfinished_ == 0; });
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return stopping_ || next_ < tasks_; });
      if (stopping_) return;
      take_tasks(lock);
    }
  }

  void take_tasks(std::unique_lock<std::mutex>& lock) {
    while (next_ < tasks_) {
      const int64_t index = next_++;
      const Task task = task_;
      void* const argument = argument_;
      lock.unlock();
      task(argument, index);
      lock.lock();
      if (--unfinished_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  bool stopping_ = false;
  Task task_ = nullptr;
  void* argument_ = nullptr;
  int64_t calls_ = 0, next_ = 0, tasks_ = 0, unfinished_ = 0;
};
