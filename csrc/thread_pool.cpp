#include "thread_pool.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#ifndef _WIN32
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace ecore {
namespace {

// More ranges than threads, so that one slow core does not delay the others.
constexpr int64_t kRangesPerThread = 4;
constexpr int kMaxThreads = 256;

struct Job {
  Tasks tasks;
  const std::function<void(Tasks&)>& work;
  int helpers_wanted;  // this and the next member are guarded by Pool::mutex_
  int helpers_inside = 0;
  std::mutex error_mutex{};
  std::exception_ptr error{};

  void help() {
    try {
      work(tasks);
    } catch (...) {
      std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
      tasks.stop();
    }
  }
};

class Pool {
 public:
  void run(Job& job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; workers_ < job.helpers_wanted; ++workers_) {
        // Detached: the pool lives as long as the process, and joining threads at exit can hang.
        std::thread([this] { work(); }).detach();
      }
      jobs_.push_back(&job);
    }
    wake_.notify_all();
    job.help();
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));  // from here no helper can enter
    done_.wait(lock, [&] { return job.helpers_inside == 0; });
  }

 private:
  Job* claim() {
    for (Job* job : jobs_) {
      if (job->helpers_wanted > 0) {
        --job->helpers_wanted;
        ++job->helpers_inside;
        return job;
      }
    }
    return nullptr;
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Job* job = nullptr;
      wake_.wait(lock, [&] { return (job = claim()) != nullptr; });
      lock.unlock();
      job->help();
      lock.lock();
      if (--job->helpers_inside == 0) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::deque<Job*> jobs_;
  int workers_ = 0;
};

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: its workers outlive every static object
  return *instance;
}

// GNU OpenMP's parallel region, which LLVM's and Intel's runtimes offer as well: function(data) on so many threads.
using ParallelRegion = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// That of the runtime that torch has loaded, for all to see; null where there is none.
ParallelRegion torch_region() {
#ifdef _WIN32
  return nullptr;
#else
  static const ParallelRegion region = reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return region;
#endif
}

std::atomic<bool> forked{false};
#ifndef _WIN32
// From the start, since torch may have started the threads before we first use them.
[[maybe_unused]] const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
#endif

}  // namespace

void parallel_tasks(int64_t size, int threads, const std::function<void(Tasks&)>& work) {
  if (size <= 0) return;
  const int64_t useful = std::min<int64_t>({threads, kMaxThreads, size});
  if (useful <= 1 || forked.load()) {
    Tasks tasks(size);
    work(tasks);
    return;
  }
  Job job{Tasks(size), work, static_cast<int>(useful) - 1};
  if (const ParallelRegion region = torch_region()) {
    // All of torch's threads, even if there are fewer tasks: OpenMP ends threads that a region does not use.
    region([](void* data) { static_cast<Job*>(data)->help(); }, &job, static_cast<unsigned>(threads), 0);
  } else {
    pool().run(job);
  }
  if (job.error) std::rethrow_exception(job.error);
}

void parallel_for(int64_t size, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body) {
  if (size <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t useful = std::clamp<int64_t>((size + grain - 1) / grain, 1, std::clamp(threads, 1, kMaxThreads));
  const int64_t range =
      useful == 1 ? size : std::max(grain, (size + useful * kRangesPerThread - 1) / (useful * kRangesPerThread));
  parallel_tasks((size + range - 1) / range, threads, [&](Tasks& tasks) {
    for (int64_t task; tasks.next(&task);) body(task * range, std::min((task + 1) * range, size));
  });
}

}  // namespace ecore
