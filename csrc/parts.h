// How a large head's work is cut, so that threads can share it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "thread_pool.h"

namespace ecore {

// Sums over receivers are cut in parts of about this many nodes, whatever the number of threads, so that they are
// always added in one order.
constexpr int64_t kNodesPerPart = 256;
constexpr int64_t kMostParts = 8;

inline int64_t parts_of(int64_t nodes) {
  return std::clamp<int64_t>((nodes + kNodesPerPart - 1) / kNodesPerPart, 1, kMostParts);
}

// Where there are few tasks and large ones, each one's parts are shared out, instead of one thread doing all of it.
inline bool share_out(int64_t tasks, int64_t nodes, int threads) {
  return threads > 1 && tasks < 4 * static_cast<int64_t>(threads) && parts_of(nodes) > 1;
}

// Calls body(begin, end) for ranges of senders, whose bounds are multiples of `step`.
inline void for_senders(int64_t count, int64_t step, int threads, const std::function<void(int64_t, int64_t)>& body) {
  parallel_for((count + step - 1) / step, 1, threads,
               [&](int64_t begin, int64_t end) { body(begin * step, std::min(end * step, count)); });
}

}  // namespace ecore
