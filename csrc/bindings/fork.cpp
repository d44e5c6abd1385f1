// What becomes of the threads when a process forks. OpenMP's threads are gone in the child, and the first parallel
// region of a thread that had used them would wait for them for ever.
#include "bindings/thread_pool.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <dirent.h>
#endif

namespace consistency_ops::bindings {
namespace {

thread_local bool uses_threads = false;
bool had_threads = false;  // written in the parent while it forks, read in the child
bool threads_are_lost = false;
bool torch_lost_them = false;  // for certain: the thread that forked had used them

// Threads of this process; where nobody can tell, as if there were several.
bool has_several_threads() {
#if defined(__linux__)
  DIR* directory = opendir("/proc/self/task");
  if (directory == nullptr) return true;
  int threads = 0;
  while (const dirent* entry = readdir(directory)) threads += entry->d_name[0] != '.';
  closedir(directory);
  return threads > 1;
#else
  return true;
#endif
}

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int registered = pthread_atfork([] { had_threads = has_several_threads(); }, nullptr,
                                                       [] {
                                                         threads_are_lost = threads_are_lost || had_threads;
                                                         torch_lost_them = torch_lost_them || uses_threads;
                                                       });
#endif

}  // namespace

bool lost_its_threads() { return threads_are_lost; }
void note_use_of_threads() { uses_threads = true; }

}  // namespace consistency_ops::bindings

// For ops/library.py, which then tells torch to use one thread: torch's own operations would hang, too.
extern "C" __attribute__((visibility("default"))) int co_torch_lost_its_threads() {
  return consistency_ops::bindings::torch_lost_them ? 1 : 0;
}
