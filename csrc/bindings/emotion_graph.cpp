// Bindings of the operators on the emotion graph.
#include "../edge_readout_cpu.h"
#include "../graph_attention_cpu.h"
#include "arguments.h"

namespace {

// B, K, M, P; word_mask, emotion_mask, word_weight, emotion_weight, correlation and the stride over its batch.
using GraphTuple =
    std::tuple<int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t>;
// maximum, inverse, weight, order, counts.
using SavedTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

template <typename T>
ecore::EmotionGraph<T> emotion_graph(const GraphTuple& tuple) {
  const auto [batch, resolutions, words, emotions, word_mask, emotion_mask, word_weight, emotion_weight, correlation,
              correlation_stride] = tuple;
  return {batch,
          resolutions,
          words,
          emotions,
          pointer<const uint8_t>(word_mask),
          pointer<const uint8_t>(emotion_mask),
          pointer<const T>(word_weight),
          pointer<const T>(emotion_weight),
          pointer<const T>(correlation),
          correlation_stride};
}

// The arguments that the two directions share.
template <typename T>
ecore::GraphAttention<T> graph_attention(const GraphTuple& graph, const std::vector<HeadsTuple>& queries,
                                         const std::vector<HeadsTuple>& keys, const HeadsTuple& value, int64_t dim,
                                         int64_t value_dim, uintptr_t row_factor, double scale, bool words_only,
                                         const SavedTuple& saved) {
  const auto [maximum, inverse, weight, order, counts] = saved;
  return {emotion_graph<T>(graph),
          heads<const T>(queries),
          heads<const T>(keys),
          heads<const T>(value),
          dim,
          value_dim,
          pointer<const T>(row_factor),
          static_cast<T>(scale),
          words_only,
          {pointer<T>(maximum), pointer<T>(inverse), pointer<T>(weight), pointer<int32_t>(order),
           pointer<int32_t>(counts)}};
}

template <typename T>
ecore::SavedOrder<T> saved_order(const Planes<T>& planes) {
  return {planes[0], planes[1], planes[2], reinterpret_cast<int32_t*>(planes[3]),
          reinterpret_cast<int32_t*>(planes[4])};
}

// Addresses: query, key, value, word_weight, word_mask, emotion_weight, correlation, emotion_mask, the history's
// queries and its keys; and its gates and edge scales.
template <typename T>
py::cpp_function bind_graph_attention_forward(const GraphTuple& graph, const std::vector<HeadsTuple>& queries,
                                              const std::vector<HeadsTuple>& keys, const HeadsTuple& value, int64_t dim,
                                              int64_t value_dim, bool words_only, const HeadsTuple& output) {
  const auto layout =
      graph_attention<T>(graph, queries, keys, value, dim, value_dim, 0, 1, words_only, {0, 0, 0, 0, 0});
  const auto run = [layout, result = heads<T>(output)](const Addresses& at, const Addresses& gates, double scale,
                                                       const Addresses& to, int threads) {
    auto call = layout;
    auto target = result;
    const size_t layers = call.queries.size() - 1;
    call.queries[0].data = pointer<const T>(at.at(0));
    call.keys[0].data = pointer<const T>(at.at(1));
    call.value.data = pointer<const T>(at.at(2));
    call.graph.word_weight = pointer<const T>(at.at(3));
    call.graph.word_mask = pointer<const uint8_t>(at.at(4));
    call.graph.emotion_weight = pointer<const T>(at.at(5));
    call.graph.correlation = pointer<const T>(at.at(6));
    call.graph.emotion_mask = pointer<const uint8_t>(at.at(7));
    for (size_t layer = 0; layer < layers; ++layer) {
      call.queries[1 + layer].data = pointer<const T>(at.at(8 + layer));
      call.keys[1 + layer].data = pointer<const T>(at.at(8 + layers + layer));
    }
    const int64_t size = call.graph.pairs() * call.graph.nodes();
    const RowFactor<T> factor(gates, size);
    call.row_factor = factor.data;
    call.scale = static_cast<T>(scale);
    const Planes<T> planes(to.at(1), 5, size);
    call.saved = saved_order(planes);
    target.data = pointer<T>(to.at(0));
    ecore::graph_attention_forward(call, target, threads);
  };
  return py::cpp_function(run, Unlocked());
}

template <typename T>
void graph_attention_backward(const GraphTuple& graph, const std::vector<HeadsTuple>& queries,
                              const std::vector<HeadsTuple>& keys, const HeadsTuple& value, int64_t dim,
                              int64_t value_dim, uintptr_t row_factor, double scale, bool words_only,
                              const SavedTuple& saved, const HeadsTuple& output, const HeadsTuple& grad_output,
                              const std::vector<HeadsTuple>& grad_queries, const std::vector<HeadsTuple>& grad_keys,
                              const HeadsTuple& grad_value, uintptr_t grad_row_factor, uintptr_t grad_emotion_weight,
                              uintptr_t grad_correlation, int threads) {
  ecore::graph_attention_backward(
      graph_attention<T>(graph, queries, keys, value, dim, value_dim, row_factor, scale, words_only, saved),
      heads<const T>(output), heads<const T>(grad_output),
      {heads<T>(grad_queries), heads<T>(grad_keys), heads<T>(grad_value), pointer<T>(grad_row_factor),
       pointer<T>(grad_emotion_weight), pointer<T>(grad_correlation)},
      threads);
}

template <typename T>
ecore::EdgeReadout<T> edge_readout(const GraphTuple& graph, const std::vector<HeadsTuple>& queries,
                                   const std::vector<HeadsTuple>& keys, int64_t dim, uintptr_t row_factor, double scale,
                                   bool per_word) {
  return {emotion_graph<T>(graph),
          heads<const T>(queries),
          heads<const T>(keys),
          dim,
          pointer<const T>(row_factor),
          static_cast<T>(scale),
          per_word};
}

// Addresses: word_mask, emotion_weight, correlation, emotion_mask, the history's queries, its keys; and its gates and
// edge scales.
template <typename T>
py::cpp_function bind_edge_readout_forward(const GraphTuple& graph, const std::vector<HeadsTuple>& queries,
                                           const std::vector<HeadsTuple>& keys, int64_t dim, bool per_word) {
  const auto layout = edge_readout<T>(graph, queries, keys, dim, 0, 1, per_word);
  const auto run = [layout](const Addresses& at, const Addresses& gates, double scale, const Addresses& to,
                            int threads) {
    auto call = layout;
    const size_t layers = call.queries.size();
    call.graph.word_mask = pointer<const uint8_t>(at.at(0));
    call.graph.emotion_weight = pointer<const T>(at.at(1));
    call.graph.correlation = pointer<const T>(at.at(2));
    call.graph.emotion_mask = pointer<const uint8_t>(at.at(3));
    for (size_t layer = 0; layer < layers; ++layer) {
      call.queries[layer].data = pointer<const T>(at.at(4 + layer));
      call.keys[layer].data = pointer<const T>(at.at(4 + layers + layer));
    }
    const RowFactor<T> factor(gates, call.graph.pairs() * call.graph.nodes());
    call.row_factor = factor.data;
    call.scale = static_cast<T>(scale);
    ecore::edge_readout_forward(call, pointer<T>(to.at(0)), pointer<T>(to.at(1)), threads);
  };
  return py::cpp_function(run, Unlocked());
}

template <typename T>
void edge_readout_backward(const GraphTuple& graph, const std::vector<HeadsTuple>& queries,
                           const std::vector<HeadsTuple>& keys, int64_t dim, uintptr_t row_factor, double scale,
                           bool per_word, uintptr_t grad_to_word, uintptr_t grad_to_emotion,
                           const std::vector<HeadsTuple>& grad_queries, const std::vector<HeadsTuple>& grad_keys,
                           uintptr_t grad_row_factor, uintptr_t grad_emotion_weight, uintptr_t grad_correlation,
                           int threads) {
  ecore::edge_readout_backward(edge_readout<T>(graph, queries, keys, dim, row_factor, scale, per_word),
                               pointer<const T>(grad_to_word), pointer<const T>(grad_to_emotion),
                               {heads<T>(grad_queries), heads<T>(grad_keys), pointer<T>(grad_row_factor),
                                pointer<T>(grad_emotion_weight), pointer<T>(grad_correlation)},
                               threads);
}

}  // namespace

void bind_emotion_graph(py::module_& module) {
  module.def("bind_graph_attention_forward_float32", &bind_graph_attention_forward<float>);
  module.def("bind_graph_attention_forward_float64", &bind_graph_attention_forward<double>);
  module.def("graph_attention_backward_float32", &graph_attention_backward<float>, Unlocked());
  module.def("graph_attention_backward_float64", &graph_attention_backward<double>, Unlocked());
  module.def("bind_edge_readout_forward_float32", &bind_edge_readout_forward<float>);
  module.def("bind_edge_readout_forward_float64", &bind_edge_readout_forward<double>);
  module.def("edge_readout_backward_float32", &edge_readout_backward<float>, Unlocked());
  module.def("edge_readout_backward_float64", &edge_readout_backward<double>, Unlocked());
}
