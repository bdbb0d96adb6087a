// Parts of a large head's work, which threads can share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "thread_pool.h"

namespace ecore {

// Sums over receivers are split into parts of about this many nodes, whatever the number of threads, so that the order
// of additions is always the same.
constexpr int64_t kNodesPerPart = 256;
constexpr int64_t kMostParts = 8;

inline int64_t parts_of(int64_t nodes) {
  return std::clamp<int64_t>((nodes + kNodesPerPart - 1) / kNodesPerPart, 1, kMostParts);
}

// True if tasks run one after the other, with the parts of each shared among the threads, instead of one thread for
// each task. That wakes the threads several times for each task, so it is done only if it keeps clearly more of them
// busy. `nodes` is the number of nodes that take part in the largest task: on real masks a large head has few.
inline bool share_out(int64_t tasks, int64_t nodes, int threads) {
  const int64_t parts = parts_of(nodes);
  if (threads < 2 || parts < 2) return false;
  const auto busy = [threads](int64_t pieces) {  // threads, on average
    return static_cast<double>(pieces) / static_cast<double>((pieces + threads - 1) / threads);
  };
  return busy(parts) > 1.25 * busy(tasks);
}

// Calls body(begin, end) for ranges of senders whose bounds are multiples of `step`.
inline void for_senders(int64_t count, int64_t step, int threads, const std::function<void(int64_t, int64_t)>& body) {
  parallel_for((count + step - 1) / step, 1, threads,
               [&](int64_t begin, int64_t end) { body(begin * step, std::min(end * step, count)); });
}

}  // namespace ecore
