#include "graph_attention_cpu.h"

#include <algorithm>
#include <memory>

#include "parts.h"
#include "simd/choice.h"
#include "thread_pool.h"
#include "workspace.h"

namespace ecore {
namespace {

template <typename T>
const GraphAttentionKernels<T>& kernels() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return simd().graph_attention_float;
  } else {
    return simd().graph_attention_double;
  }
}

// One (b, k) of a call, as the kernels take it.
template <typename T>
struct Pair {
  int64_t index, batch, head;
  std::vector<Rows<const T>> touched;  // read or written by its kernels
  Ahead<T> ahead;
  std::vector<Rows<const T>> queries, keys;
  GraphHead<T> of;

  Pair(const GraphAttention<T>& whole, int64_t pair)
      : index(pair),
        batch(pair / whole.graph.resolutions),
        head(pair % whole.graph.resolutions),
        queries(rows_of(whole.queries, batch, head)),
        keys(rows_of(whole.keys, batch, head)) {
    const EmotionGraph<T>& graph = whole.graph;
    const int64_t nodes = graph.nodes();
    of.words = graph.words;
    of.emotions = graph.emotions;
    of.depth = static_cast<int64_t>(queries.size()) - 1;
    of.emotion_count = whole.saved.counts[2 * pair];
    of.count = whole.saved.counts[2 * pair + 1];
    of.order = whole.saved.order + pair * nodes;
    of.weight = whole.saved.weight + pair * nodes;
    of.correlation = graph.correlation + batch * graph.correlation_stride;
    of.row_factor = whole.row_factor == nullptr ? nullptr : whole.row_factor + pair * nodes;
    of.words_only = whole.words_only;
    of.scale = whole.scale;
    of.queries = queries.data();
    of.keys = keys.data();
    of.value = rows_of(whole.value, batch, head);
    of.dim = whole.dim;
    of.value_dim = whole.value_dim;
    of.ahead = nullptr;
    touched = keys;
    touched.push_back(of.value);
    touched.insert(touched.end(), queries.begin(), queries.end());
  }
  Pair(const Pair&) = delete;
  Pair& operator=(const Pair&) = delete;

  template <typename U>
  void touch(const Heads<U>& tensor) {
    const Rows<U> rows = rows_of(tensor, batch, head);
    if (rows.data == nullptr) return;
    touched.push_back({rows.data, rows.stride});
  }
  // Makes this pair's kernels fetch what the next pair touches, evenly over about so many products of a panel of
  // receivers.
  void look_ahead(const Pair& next, int64_t products) {
    const int64_t tensors = static_cast<int64_t>(next.touched.size());
    const int64_t steps = std::max<int64_t>(1, of.count * products / 6);
    const int64_t rows_a_step = std::min<int64_t>(16, 1 + tensors * next.of.count / steps);
    ahead = {
        next.touched.data(), tensors, next.of.order, next.of.count, std::max(of.dim, of.value_dim), rows_a_step, 0, 0};
    of.ahead = &ahead;
  }
  int64_t receivers() const { return of.count - (of.words_only ? of.emotion_count : 0); }
};

// Lists a (b, k)'s nodes that take part, for this direction and the other.
template <typename T>
void list_nodes(const GraphAttention<T>& call, int64_t pair) {
  const SavedOrder<T>& saved = call.saved;
  const int64_t nodes = call.graph.nodes();
  list_nodes(call.graph, pair, saved.order + pair * nodes, saved.weight + pair * nodes, saved.counts + 2 * pair);
  std::fill_n(saved.maximum + pair * nodes, nodes, static_cast<T>(0));
  std::fill_n(saved.inverse + pair * nodes, nodes, static_cast<T>(0));
}

// The beginning of range `part`, of receivers 0 ... count - 1 in `parts` ranges with about the same number of edges.
int64_t part_begin(int64_t count, int64_t parts, int64_t part) {
  if (part >= parts) return count;
  // Later receivers hear more senders: the first x of them have about x^2 edges.
  int64_t begin = 0;
  while (begin < count && begin * begin * parts < count * count * part) ++begin;
  return begin;
}

}  // namespace

template <typename T>
void graph_attention_forward(const GraphAttention<T>& call, Heads<T> output, int threads) {
  const GraphAttentionKernels<T>& kernel = kernels<T>();
  const EmotionGraph<T>& graph = call.graph;
  const int64_t pairs = graph.pairs(), nodes = graph.nodes();
  if (pairs == 0) return;
  const bool shared = share_out(pairs, nodes, threads) && share_out(pairs, most_participants(graph), threads);
  const int inner = shared ? threads : 1;
  const int64_t parts = shared ? parts_of(nodes) : 1;
  const int64_t receiving = call.words_only ? graph.words : nodes;
  advise_huge_pages(graph, output, receiving, call.value_dim);

  const auto run = [&](Tasks& tasks) {
    const auto next_pair = [&]() -> std::unique_ptr<Pair<T>> {
      int64_t index;
      if (!tasks.next(&index)) return nullptr;
      list_nodes(call, index);
      auto pair = std::make_unique<Pair<T>>(call, index);
      pair->touch(output);
      return pair;
    };
    std::unique_ptr<Pair<T>> pair_now, pair_next = next_pair();
    if (pair_next == nullptr) return;
    const Pair<T>& any = *pair_next;  // the sizes are every pair's
    const Workspace<T> packed(kernel.packed_size(any.of, nodes, false));
    const int64_t scratch_size = kernel.forward_scratch(any.of, nodes);
    const Workspace<T> scratch(parts * scratch_size);
    while (pair_next != nullptr) {
      pair_now = std::move(pair_next);
      pair_next = next_pair();
      if (pair_next != nullptr && !shared) pair_now->look_ahead(*pair_next, 6);
      const Pair<T>& pair = *pair_now;
      const int64_t index = pair.index;
      const Rows<T> out = rows_of(output, pair.batch, pair.head);
      parallel_for(parts, 1, inner, [&](int64_t piece, int64_t end) {
        for (; piece < end; ++piece) IdleRows<T>(graph, index, piece, parts, receiving).zero(output, call.value_dim);
      });
      for_senders(pair.of.count, kernel.sender_step, inner,
                  [&](int64_t begin, int64_t end) { kernel.pack(pair.of, false, begin, end, packed.get()); });
      parallel_for(parts, 1, inner, [&](int64_t part, int64_t end) {
        for (; part < end; ++part) {
          kernel.forward(pair.of, packed.get(), part_begin(pair.receivers(), parts, part),
                         part_begin(pair.receivers(), parts, part + 1), scratch.get() + part * scratch_size, out,
                         call.saved.maximum + index * nodes, call.saved.inverse + index * nodes);
        }
      });
    }
  };
  parallel_tasks(pairs, shared ? 1 : threads, run);
}

template <typename T>
void graph_attention_backward(const GraphAttention<T>& call, Heads<const T> output, Heads<const T> grad_output,
                              const GraphAttentionGradients<T>& gradients, int threads) {
  const GraphAttentionKernels<T>& kernel = kernels<T>();
  const EmotionGraph<T>& graph = call.graph;
  const int64_t pairs = graph.pairs(), nodes = graph.nodes();
  const int64_t emotions = graph.emotions;
  if (pairs == 0) return;
  const bool shared = share_out(pairs, nodes, threads) && share_out(pairs, most_participants(graph), threads);
  const int inner = shared ? threads : 1;
  const int64_t parts = parts_of(nodes);
  for (const Heads<T>& result : gradients.queries) advise_huge_pages(graph, result, nodes, call.dim);
  for (const Heads<T>& result : gradients.keys) advise_huge_pages(graph, result, nodes, call.dim);
  advise_huge_pages(graph, gradients.value, nodes, call.value_dim);

  const auto run = [&](Tasks& tasks) {
    const auto next_pair = [&]() -> std::unique_ptr<Pair<T>> {
      int64_t index;
      if (!tasks.next(&index)) return nullptr;
      auto pair = std::make_unique<Pair<T>>(call, index);
      pair->touch(output);
      pair->touch(grad_output);
      // Rows that are written are fetched too: a store waits for its cache line as a load does.
      for (const Heads<T>& tensor : gradients.queries) pair->touch(tensor);
      for (const Heads<T>& tensor : gradients.keys) pair->touch(tensor);
      pair->touch(gradients.value);
      return pair;
    };
    std::unique_ptr<Pair<T>> pair_now, pair_next = next_pair();
    if (pair_next == nullptr) return;
    const Pair<T>& any = *pair_next;  // the sizes are every pair's
    const Workspace<T> packed(kernel.packed_size(any.of, nodes, true));
    const int64_t scratch_size = kernel.backward_scratch(any.of, nodes), sums_size = kernel.sums_size(any.of, nodes);
    const Workspace<T> scratch((inner > 1 ? parts : 1) * scratch_size);
    const Workspace<T> sums(parts * sums_size);
    while (pair_next != nullptr) {
      pair_now = std::move(pair_next);
      pair_next = next_pair();
      if (pair_next != nullptr && inner == 1) pair_now->look_ahead(*pair_next, 18);
      const Pair<T>& pair = *pair_now;
      const int64_t index = pair.index;
      const std::vector<Rows<T>> grad_queries = rows_of(gradients.queries, pair.batch, pair.head);
      const std::vector<Rows<T>> grad_keys = rows_of(gradients.keys, pair.batch, pair.head);
      const GraphGradients<T> to = {
          grad_queries.data(),
          grad_keys.data(),
          rows_of(gradients.value, pair.batch, pair.head),
          gradients.row_factor == nullptr ? nullptr : gradients.row_factor + index * nodes,
          gradients.emotion_weight == nullptr ? nullptr : gradients.emotion_weight + index * emotions,
          gradients.correlation == nullptr ? nullptr : gradients.correlation + index * emotions * emotions,
      };
      const int64_t deaf = call.words_only ? graph.words : nodes;  // nodes from here on do not receive
      const int64_t pieces = shared ? parts : 1;
      parallel_for(pieces, 1, inner, [&](int64_t piece, int64_t end) {
        for (; piece < end; ++piece) {
          IdleRows<T> idle(graph, index, piece, pieces, nodes), silent(graph, index, piece, pieces, nodes, deaf, nodes);
          for (const Heads<T>& result : gradients.queries) silent.zero(result, call.dim);
          for (const Heads<T>& result : gradients.keys) idle.zero(result, call.dim);
          idle.zero(gradients.value, call.value_dim);
          silent.zero({gradients.row_factor, graph.resolutions * nodes, nodes, 1}, 1);
        }
      });
      if (to.emotion_weight != nullptr) std::fill_n(to.emotion_weight, emotions, static_cast<T>(0));
      if (to.correlation != nullptr) std::fill_n(to.correlation, emotions * emotions, static_cast<T>(0));

      for_senders(pair.of.count, kernel.sender_step, inner,
                  [&](int64_t begin, int64_t end) { kernel.pack(pair.of, true, begin, end, packed.get()); });
      const int64_t used_parts = parts_of(pair.of.count);
      parallel_for(used_parts, 1, inner, [&](int64_t part, int64_t end) {
        for (; part < end; ++part) {
          kernel.backward(pair.of, packed.get(), part_begin(pair.receivers(), used_parts, part),
                          part_begin(pair.receivers(), used_parts, part + 1),
                          scratch.get() + (inner > 1 ? part * scratch_size : 0), rows_of(output, pair.batch, pair.head),
                          rows_of(grad_output, pair.batch, pair.head), call.saved.maximum + index * nodes,
                          call.saved.inverse + index * nodes, to, used_parts == 1, sums.get() + part * sums_size);
        }
      });
      for_senders(pair.of.count, kernel.sender_step, inner, [&](int64_t begin, int64_t end) {
        kernel.finish(pair.of, sums.get(), nodes, used_parts, begin, end, to);
      });
    }
  };
  parallel_tasks(pairs, inner > 1 ? 1 : threads, run);
}

template void graph_attention_forward(const GraphAttention<float>&, Heads<float>, int);
template void graph_attention_forward(const GraphAttention<double>&, Heads<double>, int);
template void graph_attention_backward(const GraphAttention<float>&, Heads<const float>, Heads<const float>,
                                       const GraphAttentionGradients<float>&, int);
template void graph_attention_backward(const GraphAttention<double>&, Heads<const double>, Heads<const double>,
                                       const GraphAttentionGradients<double>&, int);

}  // namespace ecore
