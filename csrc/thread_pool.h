// The threads of every CPU kernel of the extension: torch's own OpenMP threads if it has some, else a small pool.
//
// Why torch's threads: after each of torch's operations they spin for some milliseconds, waiting for the next one, and
// threads of our own would have to share the cores with them. An OpenMP of our own would also have its own threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace ecore {

// Hands out the numbers 0 ... size - 1, each once, in order.
class Tasks {
 public:
  explicit Tasks(int64_t size) : size_(size) {}
  // True if there was a task left; `task` is then its number.
  bool next(int64_t* task) { return (*task = next_.fetch_add(1)) < size_; }
  void stop() { next_.store(size_); }

 private:
  const int64_t size_;
  std::atomic<int64_t> next_{0};
};

// Calls work(tasks) once on each of up to `threads` threads, the caller's among them: together they are to do `size`
// tasks. Returns when all have returned.
//
// Safe to call from several threads at once and from inside `work` or a body. In a forked process the call is serial,
// since fork() copies locks but not threads. Exceptions of `work` are rethrown here.
void parallel_tasks(int64_t size, int threads, const std::function<void(Tasks&)>& work);

// Calls body(begin, end) on disjoint ranges that cover [0, size), likewise. A range holds at least `grain` items,
// except for the last, so that little work stays on the caller. The ranges never depend on timing; which thread runs a
// range does.
void parallel_for(int64_t size, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace ecore
