#include "edge_readout_cpu.h"

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
  const int64_t word_size = (call.per_word ? graph.words : 1) * graph.emotions;
  const int64_t emotion_size = graph.emotions * graph.emotions;
  parallel_for(graph.batch, 1, threads, [&](int64_t batch, int64_t end) {
    const Workspace<T> scratch(kernels<T>().scratch(Pair<T>(call, batch * graph.resolutions).of, false));
    for (; batch < end; ++batch) {
      T* const words = to_word + batch * word_size;
      T* const emotions = to_emotion + batch * emotion_size;
      std::fill_n(words, word_size, static_cast<T>(0));
      std::fill_n(emotions, emotion_size, static_cast<T>(0));
      for (int64_t head = 0; head < graph.resolutions; ++head) {
        const Pair<T> pair(call, batch * graph.resolutions + head);
        kernels<T>().forward(pair.of, scratch.get(), call.per_word, words, emotions);
      }
    }
  });
}

template <typename T>
void edge_readout_backward(const EdgeReadout<T>& call, const T* grad_to_word, const T* grad_to_emotion,
                           const EdgeReadoutGradients<T>& gradients, int threads) {
  const EmotionGraph<T>& graph = call.graph;
  const int64_t nodes = graph.nodes(), emotions = graph.emotions, words = graph.words;
  const int64_t word_size = (call.per_word ? words : 1) * emotions;
  parallel_for(graph.pairs(), 1, threads, [&](int64_t index, int64_t end) {
    const Workspace<T> scratch(kernels<T>().scratch(Pair<T>(call, index).of, true));
    for (; index < end; ++index) {
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
    }
  });
}

template void edge_readout_forward(const EdgeReadout<float>&, float*, float*, int);
template void edge_readout_forward(const EdgeReadout<double>&, double*, double*, int);
template void edge_readout_backward(const EdgeReadout<float>&, const float*, const float*,
                                    const EdgeReadoutGradients<float>&, int);
template void edge_readout_backward(const EdgeReadout<double>&, const double*, const double*,
                                    const EdgeReadoutGradients<double>&, int);

}  // namespace ecore
