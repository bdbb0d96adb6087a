#include "edge_attention_cpu.h"

#include <algorithm>
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

// True for matrices of which nothing would be left in a second-level cache, or in one's share of a third-level cache,
// when the call ends.
template <typename T>
bool larger_than_caches(int64_t matrices, int64_t rows, int64_t columns) {
  return matrices * rows * columns * static_cast<int64_t>(sizeof(T)) >= int64_t{16} << 20;
}

template <typename T>
EdgeHead<T> head_of(const EdgeAttention<T>& call, const int32_t* order, int64_t b, int64_t k) {
  const int64_t pair = b * call.heads + k, of_keys = k / (call.heads / call.key_heads);
  EdgeHead<T> head = {call.receivers,
                      call.senders,
                      call.dim,
                      call.value_dim,
                      order,
                      rows_of(call.query, b, k),
                      rows_of(call.key, b, of_keys),
                      rows_of(call.value, b, of_keys),
                      call.edge.of(b, k),
                      call.edge.row,
                      call.neighbors.of(b, k),
                      call.neighbors.row,
                      call.factor == nullptr ? nullptr : call.factor + pair * call.receivers,
                      call.scale,
                      call.more};
  head.streams_new_edge = larger_than_caches<T>(call.batch * call.heads, call.receivers, call.senders);
  if (call.more.plain) return head;
  head.more.bias = call.bias.of(b, k);
  head.more.bias_row = call.bias.row;
  head.more.sender_gate = call.sender_gate == nullptr ? nullptr : call.sender_gate + pair * call.senders;
  head.more.pair = static_cast<uint32_t>(pair);
  return head;
}

// One gradient's heads share none of it, and it is larger than the caches.
template <typename T>
bool streams(const SharedMatrices<T>& gradient, const EdgeAttention<T>& call) {
  return gradient.batches == call.batch && gradient.heads == call.heads &&
         larger_than_caches<T>(call.batch * call.heads, call.receivers, call.senders);
}

std::vector<int32_t> numbers(int64_t count) {
  std::vector<int32_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  return order;
}

// The (b, k) that share an edge or a bias add to its gradient tile by tile, in a fixed order for each tile. So the sum
// does not depend on how many of them run at once, and needs no extra memory.
class Turns {
 public:
  Turns(int64_t rows, int64_t tiles_a_row) : tiles_(tiles_a_row), done_(new std::atomic<int64_t>[rows * tiles_]) {
    for (int64_t i = 0; i < rows * tiles_; ++i) done_[i].store(0, std::memory_order_relaxed);
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

// The gradient of a matrix that several (b, k) share and add to.
template <typename T>
class SharedGradient {
 public:
  // Tasks go through the batch and in it through the heads, or the other way round. In both cases those that share a
  // matrix reach it in a fixed order, which `member` gives.
  SharedGradient(const SharedMatrices<T>& to, const EdgeAttention<T>& call, int64_t tile_columns, bool in_turns)
      : to_(to),
        size_(call.receivers * call.senders),
        shares_batch_(to.batches < call.batch),
        shares_heads_(to.heads < call.heads) {
    if (to.data == nullptr || !in_turns || !(shares_batch_ || shares_heads_)) return;
    const int64_t tiles_a_row = (call.senders + tile_columns - 1) / tile_columns;
    for (int64_t i = 0; i < to.batches * to.heads; ++i) {
      turns_.push_back(std::make_unique<Turns>(call.receivers, tiles_a_row));
    }
  }
  int64_t member(int64_t task, int64_t b, int64_t k) const {
    if (shares_batch_ && shares_heads_) return task;
    return shares_batch_ ? b : shares_heads_ ? k : 0;
  }
  T* of(int64_t b, int64_t k) const { return to_.data == nullptr ? nullptr : to_.data + index(b, k) * size_; }
  Turns::Turn turn(int64_t task, int64_t b, int64_t k) const {
    return {turns_.empty() ? nullptr : turns_[index(b, k)].get(), member(task, b, k)};
  }

 private:
  int64_t index(int64_t b, int64_t k) const { return (shares_batch_ ? 0 : b) * to_.heads + (shares_heads_ ? 0 : k); }

  const SharedMatrices<T> to_;
  const int64_t size_;
  const bool shares_batch_, shares_heads_;
  std::vector<std::unique_ptr<Turns>> turns_;
};

}  // namespace

template <typename T>
void edge_attention_forward(const EdgeAttention<T>& call, Heads<T> output, T* new_edge, int threads) {
  const EdgeAttentionKernels<T>& kernel = kernels<T>();
  const int64_t pairs = call.batch * call.heads, receivers = call.receivers;
  if (pairs == 0 || receivers == 0) return;
  const std::vector<int32_t> order = numbers(std::max(receivers, call.senders));
  const bool shared = share_out(pairs, receivers, threads);
  const int inner = shared ? threads : 1;
  const int64_t parts = shared ? parts_of(receivers) : 1;
  const EdgeHead<T> any = head_of(call, order.data(), 0, 0);
  const int64_t scratch_size = kernel.scratch(any, false);

  const auto run = [&](Tasks& tasks) {
    const Workspace<T> packed(kernel.packed_size(any, false));
    const Workspace<T> scratch(parts * scratch_size);
    for (int64_t index; tasks.next(&index);) {
      const int64_t b = index / call.heads, k = index % call.heads;
      const EdgeHead<T> head = head_of(call, order.data(), b, k);
      T* const new_edges = new_edge == nullptr ? nullptr : new_edge + index * receivers * call.senders;
      for_senders(call.senders, kernel.sender_step, inner,
                  [&](int64_t begin, int64_t end) { kernel.pack(head, false, begin, end, packed.get()); });
      parallel_for(parts, 1, inner, [&](int64_t part, int64_t end) {
        for (; part < end; ++part) {
          kernel.forward(head, packed.get(), receivers * part / parts, receivers * (part + 1) / parts,
                         scratch.get() + part * scratch_size, rows_of(output, b, k), new_edges,
                         call.maximum + index * receivers, call.inverse + index * receivers);
        }
      });
    }
  };
  parallel_tasks(pairs, shared ? 1 : threads, run);
}

template <typename T>
void edge_attention_backward(const EdgeAttention<T>& call, Heads<const T> output, Heads<const T> grad_output,
                             Matrices<const T> grad_new_edge, const T* grad_lse,
                             const EdgeAttentionGradients<T>& gradients, int threads) {
  const EdgeAttentionKernels<T>& kernel = kernels<T>();
  const int64_t receivers = call.receivers, senders = call.senders, tasks = call.batch * call.heads;
  if (tasks == 0 || receivers == 0 || senders == 0) return;
  const std::vector<int32_t> order = numbers(std::max(receivers, senders));
  // The (b, k) that share an edge follow one another. Tasks are handed out in order: the one that a task waits for has
  // started earlier, and never waits for a later one.
  const bool by_head =
      gradients.edge.data != nullptr && gradients.edge.batches < call.batch && gradients.edge.heads == call.heads;
  const bool shared = share_out(tasks, receivers, threads);
  const int inner = shared ? threads : 1;
  const int64_t parts = parts_of(receivers);
  const EdgeHead<T> any = head_of(call, order.data(), 0, 0);
  const int64_t scratch_size = kernel.scratch(any, true), sums_size = kernel.sums_size(any);
  const bool in_turns = !shared && threads > 1;
  const SharedGradient<T> edges(gradients.edge, call, kernel.tile_columns, in_turns);
  const SharedGradient<T> biases(gradients.bias, call, kernel.tile_columns, in_turns);

  const auto run = [&](Tasks& queue) {
    const Workspace<T> packed(kernel.packed_size(any, true));
    const Workspace<T> scratch((shared ? parts : 1) * scratch_size);
    const Workspace<T> sums(parts * sums_size);
    for (int64_t task; queue.next(&task);) {
      const int64_t b = by_head ? task % call.batch : task / call.heads;
      const int64_t k = by_head ? task / call.batch : task % call.heads;
      const int64_t index = b * call.heads + k;
      const EdgeHead<T> head = head_of(call, order.data(), b, k);
      const Rows<const T> grad_new = {grad_new_edge.of(b, k), grad_new_edge.row};
      Turns::Turn edge_turn = edges.turn(task, b, k), bias_turn = biases.turn(task, b, k);
      const EdgeGradients<T> to = {
          rows_of(gradients.query, b, k),
          rows_of(gradients.key, b, k),
          rows_of(gradients.value, b, k),
          edges.of(b, k),
          biases.of(b, k),
          edges.member(task, b, k) > 0,
          biases.member(task, b, k) > 0,
          streams(gradients.edge, call),
          streams(gradients.bias, call),
          gradients.factor == nullptr ? nullptr : gradients.factor + index * receivers,
          gradients.sender_gate == nullptr ? nullptr : gradients.sender_gate + index * senders,
          edge_turn.of == nullptr ? nullptr : &edge_turn,
          bias_turn.of == nullptr ? nullptr : &bias_turn,
          Turns::Turn::wait,
          Turns::Turn::done,
      };
      for_senders(senders, kernel.sender_step, inner,
                  [&](int64_t begin, int64_t end) { kernel.pack(head, true, begin, end, packed.get()); });
      parallel_for(parts, 1, inner, [&](int64_t part, int64_t end) {
        for (; part < end; ++part) {
          kernel.backward(
              head, packed.get(), receivers * part / parts, receivers * (part + 1) / parts,
              scratch.get() + (shared ? part * scratch_size : 0), rows_of(output, b, k), rows_of(grad_output, b, k),
              grad_new, grad_lse == nullptr ? nullptr : grad_lse + index * receivers, call.maximum + index * receivers,
              call.inverse + index * receivers, to, parts == 1, sums.get() + part * sums_size);
        }
      });
      for_senders(senders, kernel.sender_step, inner,
                  [&](int64_t begin, int64_t end) { kernel.finish(head, sums.get(), parts, begin, end, to); });
    }
  };
  parallel_tasks(tasks, shared ? 1 : threads, run);
}

template void edge_attention_forward(const EdgeAttention<float>&, Heads<float>, float*, int);
template void edge_attention_forward(const EdgeAttention<double>&, Heads<double>, double*, int);
template void edge_attention_backward(const EdgeAttention<float>&, Heads<const float>, Heads<const float>,
                                      Matrices<const float>, const float*, const EdgeAttentionGradients<float>&, int);
template void edge_attention_backward(const EdgeAttention<double>&, Heads<const double>, Heads<const double>,
                                      Matrices<const double>, const double*, const EdgeAttentionGradients<double>&,
                                      int);

}  // namespace ecore
