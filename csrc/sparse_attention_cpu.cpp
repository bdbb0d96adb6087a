#include "sparse_attention_cpu.h"

#include <algorithm>
#include <functional>

#include "simd/choice.h"
#include "thread_pool.h"
#include "workspace.h"

namespace ecore {
namespace {

template <typename T>
const SparseAttentionKernels<T>& kernels() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return simd().sparse_attention_float;
  } else {
    return simd().sparse_attention_double;
  }
}

// Calls body(begin, end, most) on disjoint ranges of nodes that cover all of them and have about the same number of
// edges; most: the most edges of a node. Degrees differ by orders of magnitude, so ranges with the same number of nodes
// would not be equal work.
void for_nodes(const int64_t* first_edge, int64_t nodes, int threads,
               const std::function<void(int64_t, int64_t, int64_t)>& body) {
  constexpr int64_t kEdgesPerRange = 2048;  // nodes count too, since some have no edges
  const int64_t work = first_edge[nodes] + nodes;
  const int64_t ranges = std::clamp<int64_t>(work / kEdgesPerRange, 1, 64 * static_cast<int64_t>(threads));
  const auto bound = [&](int64_t range) {
    if (range == ranges) return nodes;
    const int64_t wanted = work / ranges * range;
    int64_t low = 0, high = nodes;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (first_edge[middle] + middle < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  parallel_tasks(ranges, threads, [&](Tasks& tasks) {
    for (int64_t range; tasks.next(&range);) {
      const int64_t begin = bound(range), end = bound(range + 1);
      int64_t most = 0;
      for (int64_t i = begin; i < end; ++i) most = std::max(most, first_edge[i + 1] - first_edge[i]);
      if (begin < end) body(begin, end, most);
    }
  });
}

}  // namespace

template <typename T>
void sparse_attention_forward(const SparseAttention<T>& call, T* output, int threads) {
  const auto& run = kernels<T>();
  for_nodes(call.receiver_begin, call.receivers, threads, [&](int64_t begin, int64_t end, int64_t most) {
    Workspace<T> scratch(run.scratch(call, most));
    run.forward(call, begin, end, scratch.get(), output);
  });
}

template <typename T>
void sparse_attention_backward(const SparseAttention<T>& call, PerHead<const T> grad_output, T* grad_score,
                               const SparseGradients<T>& gradients, int threads) {
  const auto& run = kernels<T>();
  for_nodes(call.receiver_begin, call.receivers, threads, [&](int64_t begin, int64_t end, int64_t most) {
    Workspace<T> scratch(run.scratch(call, most));
    run.receivers(call, begin, end, scratch.get(), grad_output, grad_score, gradients);
  });
  if (gradients.key == nullptr && gradients.value == nullptr) return;
  for_nodes(call.sender_begin, call.senders, threads, [&](int64_t begin, int64_t end, int64_t) {
    run.senders(call, begin, end, grad_output, grad_score, gradients);
  });
}

template void sparse_attention_forward(const SparseAttention<float>&, float*, int);
template void sparse_attention_forward(const SparseAttention<double>&, double*, int);
template void sparse_attention_backward(const SparseAttention<float>&, PerHead<const float>, float*,
                                        const SparseGradients<float>&, int);
template void sparse_attention_backward(const SparseAttention<double>&, PerHead<const double>, double*,
                                        const SparseGradients<double>&, int);

}  // namespace ecore
