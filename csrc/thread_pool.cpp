#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace ecore {
namespace {

// More ranges than threads, so that one slow core does not hold up the rest.
constexpr int64_t kRangesPerThread = 4;
constexpr int kMaxThreads = 256;

struct Job {
  const std::function<void(int64_t, int64_t)>& body;
  const int64_t size;
  const int64_t range;
  int helpers_wanted;  // this and the next are guarded by Pool::mutex_
  int helpers_inside = 0;
  std::atomic<int64_t> next{0};
  std::mutex error_mutex{};
  std::exception_ptr error{};

  void drain() {
    for (int64_t begin; (begin = next.fetch_add(range)) < size;) {
      try {
        body(begin, std::min(begin + range, size));
      } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
        next.store(size);
      }
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
    job.drain();
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
      job->drain();
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

std::atomic<bool> forked{false};

Pool& pool() {
  // Never destroyed: its workers outlive every static object.
  static Pool* const instance = [] {
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
#endif
    return new Pool;
  }();
  return *instance;
}

}  // namespace

void parallel_for(int64_t size, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body) {
  if (size <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t useful = std::min<int64_t>({threads, kMaxThreads, (size + grain - 1) / grain});
  if (useful <= 1 || forked.load()) {
    body(0, size);
    return;
  }
  const int64_t range = std::max(grain, (size + useful * kRangesPerThread - 1) / (useful * kRangesPerThread));
  Job job{body, size, range, static_cast<int>(useful) - 1};
  pool().run(job);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace ecore
