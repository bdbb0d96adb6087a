#include "edge_attention_cpu.h"

#include <atomic>
#include <memory>
#include <numeric>
#include <thread>

#include "parts.h"
#include "simd/choice.h"
#include "thread_pool.h"
#include "workspace.h"

namespace ecore {
namespace {

template <typename T>
const EdgeAttentionKernels<T>& kernels() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return simd().edge_attention_float;
  } else {
    return simd().edge_attention_double;
  }
}

template <typename T>
EdgeHead<T> head_of(const EdgeAttention<T>& call, const int32_t* order, int64_t b, int64_t k) {
  return {call.nodes,
          call.dim,
          call.value_dim,
          order,
          rows_of(call.query, b, k),
          rows_of(call.key, b, k),
          rows_of(call.value, b, k),
          call.edge.of(b, k),
          call.edge.row,
          call.neighbors.of(b, k),
          call.neighbors.row,
          call.factor == nullptr ? nullptr : call.factor + (b * call.resolutions + k) * call.nodes,
          call.scale};
}

std::vector<int32_t> numbers(int64_t count) {
  std::vector<int32_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  return order;
}

// The (b, k) that share an edge add to its gradient tile by tile, each tile in their order: however many of them are
// under way, the sum is the same, and takes no memory of its own.
class Turns {
 public:
  Turns(int64_t nodes, int64_t tiles_a_row) : tiles_(tiles_a_row), done_(new std::atomic<int64_t>[nodes * tiles_]) {
    for (int64_t i = 0; i < nodes * tiles_; ++i) done_[i].store(0, std::memory_order_relaxed);
  }
  // One (b, k) among those that share the edge.
  struct Turn {
    Turns* of;
    int64_t number;

    static void wait(void* turn, int64_t row, int64_t column) {
      const Turn& mine = *static_cast<Turn*>(turn);
      while (mine.of->at(row, column).load(std::memory_order_acquire) != mine.number) std::this_thread::yield();
    }
    static void done(void* turn, int64_t row, int64_t column) {
      const Turn& mine = *static_cast<Turn*>(turn);
      mine.of->at(row, column).store(mine.number + 1, std::memory_order_release);
    }
  };

 private:
  std::atomic<int64_t>& at(int64_t row, int64_t column) { return done_[row * tiles_ + column]; }

  const int64_t tiles_;
  const std::unique_ptr<std::atomic<int64_t>[]> done_;
};

}  // namespace

template <typename T>
void edge_attention_forward(const EdgeAttention<T>& call, Heads<T> output, T* new_edge, int threads) {
  const EdgeAttentionKernels<T>& kernel = kernels<T>();
  const int64_t pairs = call.batch * call.resolutions, nodes = call.nodes;
  if (pairs == 0 || nodes == 0) return;
  const std::vector<int32_t> order = numbers(nodes);
  const bool shared = share_out(pairs, nodes, threads);
  const int inner = shared ? threads : 1;
  const int64_t parts = shared ? parts_of(nodes) : 1;
  const EdgeHead<T> any = head_of(call, order.data(), 0, 0);
  const int64_t scratch_size = kernel.scratch(any, false);

  const auto run = [&](Tasks& tasks) {
    const Workspace<T> packed(kernel.packed_size(any, false));
    const Workspace<T> scratch(parts * scratch_size);
    for (int64_t index; tasks.next(&index);) {
      const int64_t b = index / call.resolutions, k = index % call.resolutions;
      const EdgeHead<T> head = head_of(call, order.data(), b, k);
      T* const new_edges = new_edge == nullptr ? nullptr : new_edge + index * nodes * nodes;
      for_senders(nodes, kernel.sender_step, inner,
                  [&](int64_t begin, int64_t end) { kernel.pack(head, false, begin, end, packed.get()); });
      parallel_for(parts, 1, inner, [&](int64_t part, int64_t end) {
        for (; part < end; ++part) {
          kernel.forward(head, packed.get(), nodes * part / parts, nodes * (part + 1) / parts,
                         scratch.get() + part * scratch_size, rows_of(output, b, k), new_edges,
                         call.maximum + index * nodes, call.inverse + index * nodes);
        }
      });
    }
  };
  parallel_tasks(pairs, shared ? 1 : threads, run);
}

template <typename T>
void edge_attention_backward(const EdgeAttention<T>& call, Heads<const T> output, Heads<const T> grad_output,
                             Matrices<const T> grad_new_edge, const EdgeAttentionGradients<T>& gradients, int threads) {
  const EdgeAttentionKernels<T>& kernel = kernels<T>();
  const int64_t nodes = call.nodes;
  if (call.batch * call.resolutions == 0 || nodes == 0) return;
  const std::vector<int32_t> order = numbers(nodes);
  // Those (b, k) that share an edge follow one another. Tasks are handed out in order: the one that a task waits for is
  // under way before it, and never waits for a later one.
  const int64_t groups = gradients.batches * gradients.heads, tasks = call.batch * call.resolutions;
  const int64_t members = tasks / groups, heads = call.resolutions / gradients.heads;
  const bool shared = share_out(tasks, nodes, threads);
  const int inner = shared ? threads : 1;
  const int64_t parts = parts_of(nodes);
  const EdgeHead<T> any = head_of(call, order.data(), 0, 0);
  const int64_t scratch_size = kernel.scratch(any, true), sums_size = kernel.sums_size(any);
  std::vector<std::unique_ptr<Turns>> turns;
  if (gradients.edge != nullptr && members > 1 && !shared && threads > 1) {
    const int64_t tiles_a_row = (nodes + kernel.tile_columns - 1) / kernel.tile_columns;
    for (int64_t group = 0; group < groups; ++group) turns.push_back(std::make_unique<Turns>(nodes, tiles_a_row));
  }

  const auto run = [&](Tasks& queue) {
    const Workspace<T> packed(kernel.packed_size(any, true));
    const Workspace<T> scratch((shared ? parts : 1) * scratch_size);
    const Workspace<T> sums(parts * sums_size);
    for (int64_t task; queue.next(&task);) {
      const int64_t group = task / members, member = task % members;
      const int64_t b = group / gradients.heads + member / heads, k = group % gradients.heads + member % heads;
      const int64_t index = b * call.resolutions + k;
      const EdgeHead<T> head = head_of(call, order.data(), b, k);
      const Rows<const T> grad_new = {grad_new_edge.of(b, k), grad_new_edge.row};
      Turns::Turn turn = {turns.empty() ? nullptr : turns[group].get(), member};
      const EdgeGradients<T> to = {
          rows_of(gradients.query, b, k),
          rows_of(gradients.key, b, k),
          rows_of(gradients.value, b, k),
          gradients.edge == nullptr ? nullptr : gradients.edge + group * nodes * nodes,
          member > 0,
          gradients.factor == nullptr ? nullptr : gradients.factor + index * nodes,
          turns.empty() ? nullptr : &turn,
          Turns::Turn::wait,
          Turns::Turn::done,
      };
      for_senders(nodes, kernel.sender_step, inner,
                  [&](int64_t begin, int64_t end) { kernel.pack(head, true, begin, end, packed.get()); });
      parallel_for(parts, 1, inner, [&](int64_t part, int64_t end) {
        for (; part < end; ++part) {
          kernel.backward(head, packed.get(), nodes * part / parts, nodes * (part + 1) / parts,
                          scratch.get() + (shared ? part * scratch_size : 0), rows_of(output, b, k),
                          rows_of(grad_output, b, k), grad_new, call.maximum + index * nodes,
                          call.inverse + index * nodes, to, parts == 1, sums.get() + part * sums_size);
        }
      });
      for_senders(nodes, kernel.sender_step, inner,
                  [&](int64_t begin, int64_t end) { kernel.finish(head, sums.get(), parts, begin, end, to); });
    }
  };
  parallel_tasks(tasks, shared ? 1 : threads, run);
}

template void edge_attention_forward(const EdgeAttention<float>&, Heads<float>, float*, int);
template void edge_attention_forward(const EdgeAttention<double>&, Heads<double>, double*, int);
template void edge_attention_backward(const EdgeAttention<float>&, Heads<const float>, Heads<const float>,
                                      Matrices<const float>, const EdgeAttentionGradients<float>&, int);
template void edge_attention_backward(const EdgeAttention<double>&, Heads<const double>, Heads<const double>,
                                      Matrices<const double>, const EdgeAttentionGradients<double>&, int);

}  // namespace ecore
