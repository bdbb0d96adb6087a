#include "edge_readout_cpu.h"

#include <algorithm>
#include <memory>

#include "parts.h"
#include "simd/choice.h"
#include "thread_pool.h"
#include "workspace.h"

namespace ecore {
namespace {

template <typename T>
const EdgeReadoutKernels<T>& kernels() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return simd().edge_readout_float;
  } else {
    return simd().edge_readout_double;
  }
}

// One (b, k) of a call, or some of its receivers, as the kernels take it.
template <typename T>
struct Pair {
  int64_t task, index, batch, head;
  int64_t first = 0, last;  // receivers, by place
  std::vector<int32_t> order;
  std::vector<T> weight;
  std::vector<Rows<const T>> queries, keys;
  std::vector<Rows<const T>> touched;  // a row for every receiver
  Ahead<T> ahead{};
  GraphHead<T> of{};

  Pair(const EdgeReadout<T>& call, int64_t its_task, int64_t pair)
      : task(its_task),
        index(pair),
        batch(pair / call.graph.resolutions),
        head(pair % call.graph.resolutions),
        order(static_cast<size_t>(call.graph.nodes())),
        weight(static_cast<size_t>(call.graph.nodes())),
        queries(rows_of(call.queries, batch, head)),
        keys(rows_of(call.keys, batch, head)),
        touched(queries) {
    const EmotionGraph<T>& graph = call.graph;
    int32_t counts[2];
    list_nodes(graph, pair, order.data(), weight.data(), counts);
    last = counts[1];
    of.words = graph.words;
    of.emotions = graph.emotions;
    of.depth = static_cast<int64_t>(queries.size());
    of.emotion_count = counts[0];
    of.count = counts[1];
    of.order = order.data();
    of.weight = weight.data();
    of.correlation = graph.correlation + batch * graph.correlation_stride;
    of.row_factor = call.row_factor == nullptr ? nullptr : call.row_factor + pair * graph.nodes();
    of.scale = call.scale;
    of.queries = queries.data();
    of.keys = keys.data();
    of.dim = call.dim;
  }
  Pair(const Pair&) = delete;
  Pair& operator=(const Pair&) = delete;

  // Keeps as receivers only the words begin ... end - 1; if begin is 0, `[CLS]` and the emotions too.
  void narrow(int64_t begin, int64_t end) {
    const auto place = [&](int64_t word) {
      const auto words = order.begin() + of.emotion_count + 1;
      return std::lower_bound(words, order.begin() + of.count, word) - order.begin();
    };
    first = begin == 0 ? 0 : place(begin);
    last = place(end);
  }
  // Makes the kernels fetch the next pair's first receivers during this pair's last tile.
  void look_ahead(const Pair& next) {
    const int64_t count = std::min<int64_t>(kFetched, next.last - next.first);
    const int64_t tensors = static_cast<int64_t>(next.touched.size());
    if (count <= 0 || tensors == 0) return;
    ahead = {next.touched.data(), tensors, next.of.order + next.first, count, of.dim, kRowsAStep, 0, 0};
    of.ahead = &ahead;
  }

 private:
  static constexpr int64_t kFetched = 72, kRowsAStep = 4;
};

// Calls body(pair) for every pair that next() makes, until it makes none; each pair knows the one after it.
template <typename T, typename Next, typename Body>
void for_pairs(const Next& next, const Body& body) {
  std::unique_ptr<Pair<T>> pair_now = next(), pair_next;
  for (; pair_now != nullptr; pair_now = std::move(pair_next)) {
    pair_next = next();
    if (pair_next != nullptr) pair_now->look_ahead(*pair_next);
    body(*pair_now);
  }
}

}  // namespace

template <typename T>
void edge_readout_forward(const EdgeReadout<T>& call, T* to_word, T* to_emotion, int threads) {
  const EmotionGraph<T>& graph = call.graph;
  const int64_t emotions = graph.emotions, word_size = (call.per_word ? graph.words : 1) * emotions;
  // A part is some of the words of one member of the batch, in all resolutions; the first part has the emotions, too.
  // The sums over words of a member's parts are added up.
  const int64_t parts = std::min(parts_of(graph.nodes()), graph.words);
  const bool adds_up = parts > 1 && !call.per_word;
  const Workspace<T> sums(adds_up ? graph.batch * parts * emotions : 0);
  parallel_tasks(graph.batch * parts, threads, [&](Tasks& tasks) {
    int64_t task = 0, head = graph.resolutions;
    const auto next = [&]() -> std::unique_ptr<Pair<T>> {
      if (head == graph.resolutions) {
        if (!tasks.next(&task)) return nullptr;
        head = 0;
      }
      auto pair = std::make_unique<Pair<T>>(call, task, task / parts * graph.resolutions + head++);
      const int64_t part = task % parts;
      pair->narrow(graph.words * part / parts, graph.words * (part + 1) / parts);
      return pair;
    };
    std::unique_ptr<Workspace<T>> scratch;
    for_pairs<T>(next, [&](const Pair<T>& pair) {
      if (scratch == nullptr) scratch = std::make_unique<Workspace<T>>(kernels<T>().scratch(pair.of, false));
      const int64_t part = pair.task % parts;
      T* const words = adds_up ? sums.get() + pair.task * emotions : to_word + pair.batch * word_size;
      T* const its_emotions = to_emotion + pair.batch * emotions * emotions;
      if (pair.head == 0) {
        const int64_t begin = graph.words * part / parts, end = graph.words * (part + 1) / parts;
        if (call.per_word) {
          std::fill_n(words + begin * emotions, (end - begin) * emotions, static_cast<T>(0));
        } else {
          std::fill_n(words, emotions, static_cast<T>(0));
        }
        if (part == 0) std::fill_n(its_emotions, emotions * emotions, static_cast<T>(0));
      }
      kernels<T>().forward(pair.of, pair.first, pair.last, scratch->get(), call.per_word, words, its_emotions);
    });
  });
  for (int64_t i = 0; adds_up && i < graph.batch * emotions; ++i) {
    const T* const its_sums = sums.get() + i / emotions * parts * emotions + i % emotions;
    to_word[i] = its_sums[0];
    for (int64_t part = 1; part < parts; ++part) to_word[i] += its_sums[part * emotions];
  }
}

template <typename T>
void edge_readout_backward(const EdgeReadout<T>& call, const T* grad_to_word, const T* grad_to_emotion,
                           const EdgeReadoutGradients<T>& gradients, int threads) {
  const EmotionGraph<T>& graph = call.graph;
  const int64_t nodes = graph.nodes(), emotions = graph.emotions, words = graph.words;
  const int64_t word_size = (call.per_word ? words : 1) * emotions;
  for (const Heads<T>& result : gradients.queries) advise_huge_pages(graph, result, nodes, call.dim);
  for (const Heads<T>& result : gradients.keys) advise_huge_pages(graph, result, nodes, call.dim);
  parallel_tasks(graph.pairs(), threads, [&](Tasks& tasks) {
    const auto next = [&]() -> std::unique_ptr<Pair<T>> {
      int64_t index;
      if (!tasks.next(&index)) return nullptr;
      auto pair = std::make_unique<Pair<T>>(call, index, index);
      // Rows that are written are fetched too: a store waits for its cache line as a load does.
      for (const Rows<T>& rows : rows_of(gradients.queries, pair->batch, pair->head)) {
        if (rows.data != nullptr) pair->touched.push_back({rows.data, rows.stride});
      }
      return pair;
    };
    std::unique_ptr<Workspace<T>> scratch;
    for_pairs<T>(next, [&](const Pair<T>& pair) {
      if (scratch == nullptr) scratch = std::make_unique<Workspace<T>>(kernels<T>().scratch(pair.of, true));
      const int64_t index = pair.index;
      const std::vector<Rows<T>> grad_queries = rows_of(gradients.queries, pair.batch, pair.head);
      const std::vector<Rows<T>> grad_keys = rows_of(gradients.keys, pair.batch, pair.head);
      T* const grad_factor = gradients.row_factor == nullptr ? nullptr : gradients.row_factor + index * nodes;
      T* const grad_weight =
          gradients.emotion_weight == nullptr ? nullptr : gradients.emotion_weight + index * emotions;
      T* const grad_correlation =
          gradients.correlation == nullptr ? nullptr : gradients.correlation + index * emotions * emotions;
      IdleRows<T> idle(graph, index, 0, 1, nodes);
      IdleRows<T> unread(graph, index, 0, 1, nodes, 0, words);  // words' edges are not read out
      for (const Heads<T>& result : gradients.queries) idle.zero(result, call.dim);
      for (const Heads<T>& result : gradients.keys) unread.zero(result, call.dim);
      idle.zero({gradients.row_factor, graph.resolutions * nodes, nodes, 1}, 1);
      if (grad_weight != nullptr) std::fill_n(grad_weight, emotions, static_cast<T>(0));
      if (grad_correlation != nullptr) std::fill_n(grad_correlation, emotions * emotions, static_cast<T>(0));
      kernels<T>().backward(pair.of, scratch->get(), pair.touched.data(), static_cast<int64_t>(pair.touched.size()),
                            call.per_word, grad_to_word + pair.batch * word_size,
                            grad_to_emotion + pair.batch * emotions * emotions, grad_queries.data(), grad_keys.data(),
                            grad_factor, grad_weight, grad_correlation);
    });
  });
}

template void edge_readout_forward(const EdgeReadout<float>&, float*, float*, int);
template void edge_readout_forward(const EdgeReadout<double>&, double*, double*, int);
template void edge_readout_backward(const EdgeReadout<float>&, const float*, const float*,
                                    const EdgeReadoutGradients<float>&, int);
template void edge_readout_backward(const EdgeReadout<double>&, const double*, const double*,
                                    const EdgeReadoutGradients<double>&, int);

}  // namespace ecore
