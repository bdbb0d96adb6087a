#include "edge_readout_cpu.h"

#include <algorithm>

#include "parts.h"
#include "simd_choice.h"
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

// One (b, k) of a call, as the kernels take it.
template <typename T>
struct Pair {
  int64_t batch, head;
  std::vector<int32_t> order;
  std::vector<T> weight;
  std::vector<Rows<const T>> queries, keys;
  GraphHead<T> of{};

  Pair(const EdgeReadout<T>& call, int64_t pair)
      : batch(pair / call.graph.resolutions),
        head(pair % call.graph.resolutions),
        order(static_cast<size_t>(call.graph.nodes())),
        weight(static_cast<size_t>(call.graph.nodes())),
        queries(rows_of(call.queries, batch, head)),
        keys(rows_of(call.keys, batch, head)) {
    const EmotionGraph<T>& graph = call.graph;
    int32_t counts[2];
    list_nodes(graph, pair, order.data(), weight.data(), counts);
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
};

}  // namespace

template <typename T>
void edge_readout_forward(const EdgeReadout<T>& call, T* to_word, T* to_emotion, int threads) {
  const EmotionGraph<T>& graph = call.graph;
  const int64_t emotions = graph.emotions, word_size = (call.per_word ? graph.words : 1) * emotions;
  // A part is some of the words of one batch, in all resolutions; the first has the emotions, too. Parts of one batch
  // add up the words that they share an emotion's sum with.
  const int64_t parts = std::min(parts_of(graph.nodes()), graph.words);
  const bool adds_up = parts > 1 && !call.per_word;
  const Workspace<T> sums(adds_up ? graph.batch * parts * emotions : 0);
  parallel_tasks(graph.batch * parts, threads, [&](Tasks& tasks) {
    int64_t task;
    if (!tasks.next(&task)) return;
    const Workspace<T> scratch(kernels<T>().scratch(Pair<T>(call, 0).of, false));
    do {
      const int64_t batch = task / parts, part = task % parts;
      const int64_t begin = graph.words * part / parts, end = graph.words * (part + 1) / parts;
      T* const words = adds_up ? sums.get() + task * emotions : to_word + batch * word_size;
      T* const its_emotions = to_emotion + batch * emotions * emotions;
      if (call.per_word) {
        std::fill_n(words + begin * emotions, (end - begin) * emotions, static_cast<T>(0));
      } else {
        std::fill_n(words, emotions, static_cast<T>(0));
      }
      if (part == 0) std::fill_n(its_emotions, emotions * emotions, static_cast<T>(0));
      for (int64_t head = 0; head < graph.resolutions; ++head) {
        const Pair<T> pair(call, batch * graph.resolutions + head);
        const auto place = [&](int64_t word) {
          const auto first = pair.order.begin() + pair.of.emotion_count + 1, last = pair.order.begin() + pair.of.count;
          return std::lower_bound(first, last, word) - pair.order.begin();
        };
        kernels<T>().forward(pair.of, part == 0 ? 0 : place(begin), place(end), scratch.get(), call.per_word, words,
                             its_emotions);
      }
    } while (tasks.next(&task));
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
  parallel_tasks(graph.pairs(), threads, [&](Tasks& tasks) {
    int64_t index;
    if (!tasks.next(&index)) return;
    const Workspace<T> scratch(kernels<T>().scratch(Pair<T>(call, index).of, true));
    do {
      const Pair<T> pair(call, index);
      const std::vector<Rows<T>> grad_queries = rows_of(gradients.queries, pair.batch, pair.head);
      const std::vector<Rows<T>> grad_keys = rows_of(gradients.keys, pair.batch, pair.head);
      T* const grad_factor = gradients.row_factor == nullptr ? nullptr : gradients.row_factor + index * nodes;
      T* const grad_weight =
          gradients.emotion_weight == nullptr ? nullptr : gradients.emotion_weight + index * emotions;
      T* const grad_correlation =
          gradients.correlation == nullptr ? nullptr : gradients.correlation + index * emotions * emotions;
      for (const Rows<T>& rows : grad_queries) zero_absent(graph, index, 0, nodes, rows, call.dim);
      for (const Rows<T>& rows : grad_keys) {
        zero_all(0, words, rows, call.dim);  // words' edges are not read out
        zero_absent(graph, index, words, nodes, rows, call.dim);
      }
      if (grad_factor != nullptr) zero_absent(graph, index, 0, nodes, {grad_factor, 1}, 1);
      if (grad_weight != nullptr) std::fill_n(grad_weight, emotions, static_cast<T>(0));
      if (grad_correlation != nullptr) std::fill_n(grad_correlation, emotions * emotions, static_cast<T>(0));
      kernels<T>().backward(pair.of, scratch.get(), call.per_word, grad_to_word + pair.batch * word_size,
                            grad_to_emotion + pair.batch * emotions * emotions, grad_queries.data(), grad_keys.data(),
                            grad_factor, grad_weight, grad_correlation);
    } while (tasks.next(&index));
  });
}

template void edge_readout_forward(const EdgeReadout<float>&, float*, float*, int);
template void edge_readout_forward(const EdgeReadout<double>&, double*, double*, int);
template void edge_readout_backward(const EdgeReadout<float>&, const float*, const float*,
                                    const EdgeReadoutGradients<float>&, int);
template void edge_readout_backward(const EdgeReadout<double>&, const double*, const double*,
                                    const EdgeReadoutGradients<double>&, int);

}  // namespace ecore
