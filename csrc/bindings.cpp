// The module ecore_kernels._native. Tensors arrive as addresses, so that one build serves every version of torch; the
// checks and the allocations are Python's (kernels/ecore_kernels/native_kernels/).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "dropout_add_layer_norm_cpu.h"
#include "edge_attention_cpu.h"
#include "edge_readout_cpu.h"
#include "graph_attention_cpu.h"
#include "otsu.h"
#include "philox.h"
#include "quantized_linear_bindings.h"
#include "simd/choice.h"
#include "softmax_rows_cpu.h"
#include "sparse_attention_cpu.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
int64_t otsu_cpu(uintptr_t values, int64_t rows, int64_t columns, int64_t row_stride, int64_t max_relevant,
                 uintptr_t mask, uintptr_t count, uintptr_t threshold, int threads) {
  return ecore::otsu_cpu(pointer<const T>(values), rows, columns, row_stride, max_relevant, pointer<uint8_t>(mask),
                         pointer<int64_t>(count), pointer<T>(threshold), threads);
}

#ifdef ECORE_WITH_CUDA
template <typename T>
void otsu_cuda(uintptr_t values, int64_t rows, int64_t columns, int64_t row_stride, int64_t max_relevant,
               uintptr_t mask, uintptr_t count, uintptr_t threshold, int device, uintptr_t stream) {
  ecore::otsu_cuda(pointer<const T>(values), rows, columns, row_stride, max_relevant, pointer<uint8_t>(mask),
                   pointer<int64_t>(count), pointer<T>(threshold), device, pointer<void>(stream));
}
#endif

// A [B, K, N, d] tensor: its address, and its strides over B, K and N in elements. Address 0: not wanted.
using HeadsTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
// B, K, M, P; word_mask, emotion_mask, word_weight, emotion_weight, correlation and the stride over its batch.
using GraphTuple =
    std::tuple<int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t>;
// maximum, inverse, weight, order, counts.
using SavedTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

template <typename T>
ecore::Heads<T> heads(const HeadsTuple& tensor) {
  const auto [address, batch, head, row] = tensor;
  return {pointer<T>(address), batch, head, row};
}

template <typename T>
std::vector<ecore::Heads<T>> heads(const std::vector<HeadsTuple>& tensors) {
  std::vector<ecore::Heads<T>> result;
  for (const HeadsTuple& tensor : tensors) result.push_back(heads<T>(tensor));
  return result;
}

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

// A forward bound to a layout is a function of addresses: sizes and strides, most of the arguments, arrive once.
// Results are in the order of the registered operator's; what the backward alone reads may have address 0.
using Unlocked = py::call_guard<py::gil_scoped_release>;
using Addresses = std::vector<uintptr_t>;

// Planes that a forward leaves for the backward, [planes, size]: at the caller's address, or in memory of its own for
// address 0.
template <typename T>
struct Planes {
  Planes(uintptr_t address, int64_t planes, int64_t plane_size)
      : own(address == 0 ? new T[planes * plane_size] : nullptr),
        first(address == 0 ? own.get() : pointer<T>(address)),
        size(plane_size) {}
  T* operator[](int64_t plane) const { return first + plane * size; }

  std::unique_ptr<T[]> own;  // uninitialised
  T* first;
  int64_t size;
};

// r = prod_m gate^m edge_scale^m, [size], or null. Addresses of gates, then of edge scales: a gate of 0 is left out, an
// edge scale of 0 is one.
template <typename T>
class RowFactor {
 public:
  RowFactor(const Addresses& gates_and_scales, int64_t size) {
    const size_t layers = gates_and_scales.size() / 2;
    for (size_t layer = 0; layer < layers; ++layer) {
      const T* gate = pointer<const T>(gates_and_scales[layer]);
      const T* scale = pointer<const T>(gates_and_scales[layers + layer]);
      if (gate == nullptr) continue;
      if (data == nullptr && scale == nullptr) {
        data = gate;
        continue;
      }
      const T* before = data;
      const T one = scale == nullptr ? T{1} : *scale;
      product_.resize(size);
      // In PyTorch's order: the results are the same bits with a gradient and without.
      for (int64_t i = 0; i < size; ++i) product_[i] = before == nullptr ? gate[i] * one : before[i] * (gate[i] * one);
      data = product_.data();
    }
  }

  const T* data = nullptr;

 private:
  std::vector<T> product_;
};

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

// [B or 1, K or 1, N, N]: address, strides over B, K and N.
template <typename T>
ecore::Matrices<T> matrices(const HeadsTuple& tensor) {
  const auto [address, batch, head, row] = tensor;
  return {pointer<T>(address), batch, head, row};
}

// B, H, Hk, Nq, Nk, d, dv.
using SizesTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
// bias; sender_gate, edge_bias and seed; bounds of scores; whether all pairs are updated; the least word that dropout
// keeps, and the factor of what it keeps.
using MoreTuple = std::tuple<HeadsTuple, std::tuple<uintptr_t, uintptr_t, uintptr_t>, std::tuple<double, double>, bool,
                             std::tuple<uint32_t, double>>;

// Without `more` a call is plain.
template <typename T>
ecore::EdgeAttention<T> edge_attention(const SizesTuple& sizes, const std::vector<HeadsTuple>& query_key_value,
                                       const HeadsTuple& edge, const HeadsTuple& neighbors, uintptr_t factor,
                                       double scale, const std::optional<MoreTuple>& more, uintptr_t maximum,
                                       uintptr_t inverse) {
  ecore::EdgeAttention<T> call{};
  std::tie(call.batch, call.heads, call.key_heads, call.receivers, call.senders, call.dim, call.value_dim) = sizes;
  call.query = heads<const T>(query_key_value.at(0));
  call.key = heads<const T>(query_key_value.at(1));
  call.value = heads<const T>(query_key_value.at(2));
  call.edge = matrices<const T>(edge);
  call.neighbors = matrices<const uint8_t>(neighbors);
  call.factor = pointer<const T>(factor);
  call.scale = static_cast<T>(scale);
  call.maximum = pointer<T>(maximum);
  call.inverse = pointer<T>(inverse);
  call.more.plain = !more.has_value();
  if (call.more.plain) return call;
  const auto& [bias, addresses, bounds, all_pairs, dropout] = *more;
  const auto [sender_gate, edge_bias, seed] = addresses;
  call.bias = matrices<const T>(bias);
  call.sender_gate = pointer<const T>(sender_gate);
  call.more.edge_bias = edge_bias == 0 ? T{0} : *pointer<const T>(edge_bias);
  call.more.low = static_cast<T>(std::get<0>(bounds));
  call.more.high = static_cast<T>(std::get<1>(bounds));
  call.more.all_pairs = all_pairs;
  call.more.drops = seed != 0;
  call.more.seed = seed == 0 ? 0 : *pointer<const uint64_t>(seed);
  call.more.least_kept = std::get<0>(dropout);
  call.more.kept_weight = static_cast<T>(std::get<1>(dropout));
  return call;
}

// Addresses: query, key, value, edge, neighbors; and a gate and an edge scale. `more` is bound with its addresses.
template <typename T>
py::cpp_function bind_edge_attention_forward(const SizesTuple& sizes, const std::vector<HeadsTuple>& query_key_value,
                                             const HeadsTuple& edge, const HeadsTuple& neighbors,
                                             const HeadsTuple& output, const std::optional<MoreTuple>& more) {
  const auto layout = edge_attention<T>(sizes, query_key_value, edge, neighbors, 0, 1, more, 0, 0);
  const auto run = [layout, result = heads<T>(output)](const Addresses& at, const Addresses& gates, double scale,
                                                       const Addresses& to, int threads) {
    auto call = layout;
    auto target = result;
    call.query.data = pointer<const T>(at.at(0));
    call.key.data = pointer<const T>(at.at(1));
    call.value.data = pointer<const T>(at.at(2));
    call.edge.data = pointer<const T>(at.at(3));
    call.neighbors.data = pointer<const uint8_t>(at.at(4));
    const int64_t size = call.batch * call.heads * call.receivers;
    const RowFactor<T> factor(gates, size);
    call.factor = factor.data;
    call.scale = static_cast<T>(scale);
    const Planes<T> planes(to.at(2), 2, size);
    call.maximum = planes[0];
    call.inverse = planes[1];
    target.data = pointer<T>(to.at(0));
    ecore::edge_attention_forward(call, target, pointer<T>(to.at(1)), threads);
  };
  return py::cpp_function(run, Unlocked());
}

// Gradients of edge and bias: address, batches, heads. Gradients of factor and sender gate: addresses.
using SharedTuple = std::tuple<uintptr_t, int64_t, int64_t>;

template <typename T>
ecore::SharedMatrices<T> shared_matrices(const SharedTuple& tuple) {
  const auto [address, batches, shared_heads] = tuple;
  return {pointer<T>(address), batches, shared_heads};
}

template <typename T>
void edge_attention_backward(const SizesTuple& sizes, const std::vector<HeadsTuple>& query_key_value,
                             const HeadsTuple& edge, const HeadsTuple& neighbors, uintptr_t factor, double scale,
                             const std::optional<MoreTuple>& more, uintptr_t maximum, uintptr_t inverse,
                             const HeadsTuple& output, const HeadsTuple& grad_output, const HeadsTuple& grad_new_edge,
                             uintptr_t grad_lse, const std::vector<HeadsTuple>& gradients, const SharedTuple& grad_edge,
                             const SharedTuple& grad_bias, uintptr_t grad_factor, uintptr_t grad_sender_gate,
                             int threads) {
  ecore::edge_attention_backward(
      edge_attention<T>(sizes, query_key_value, edge, neighbors, factor, scale, more, maximum, inverse),
      heads<const T>(output), heads<const T>(grad_output), matrices<const T>(grad_new_edge), pointer<const T>(grad_lse),
      {heads<T>(gradients.at(0)), heads<T>(gradients.at(1)), heads<T>(gradients.at(2)), shared_matrices<T>(grad_edge),
       shared_matrices<T>(grad_bias), pointer<T>(grad_factor), pointer<T>(grad_sender_gate)},
      threads);
}

// A tensor of nodes or edges by head: address, strides over rows and heads.
using PerHeadTuple = std::tuple<uintptr_t, int64_t, int64_t>;

template <typename T>
ecore::PerHead<T> per_head(const PerHeadTuple& tensor) {
  const auto [address, row, head] = tensor;
  return {pointer<T>(address), row, head};
}

// Receivers, senders, heads, d, dv.
using SparseSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

// Graph: sender, receiver, receiver_begin, by_receiver, sender_begin, by_sender.
template <typename T>
ecore::SparseAttention<T> sparse_attention(const SparseSizes& sizes, const Addresses& graph,
                                           const std::vector<PerHeadTuple>& inputs, double scale, uintptr_t weight) {
  const auto [receivers, senders, head_count, dim, value_dim] = sizes;
  const auto index = [&](size_t i) { return pointer<const int64_t>(graph.at(i)); };
  const auto input = [&](size_t i) { return per_head<const T>(inputs.at(i)); };
  return {receivers,         senders,  head_count, dim,      value_dim,
          index(0),          index(1), index(2),   index(3), index(4),
          index(5),          input(0), input(1),   input(2), input(3),
          input(4),          input(5), input(6),   input(7), static_cast<T>(scale),
          pointer<T>(weight)};
}

template <typename T>
void sparse_attention_forward(const SparseSizes& sizes, const Addresses& graph, const std::vector<PerHeadTuple>& inputs,
                              double scale, uintptr_t weight, uintptr_t output, int threads) {
  ecore::sparse_attention_forward(sparse_attention<T>(sizes, graph, inputs, scale, weight), pointer<T>(output),
                                  threads);
}

// Gradients: query, key, value, edge, bias, key_scale, key_offset, value_offset.
template <typename T>
void sparse_attention_backward(const SparseSizes& sizes, const Addresses& graph,
                               const std::vector<PerHeadTuple>& inputs, double scale, uintptr_t weight,
                               const PerHeadTuple& grad_output, uintptr_t grad_score, const Addresses& gradients,
                               int threads) {
  const auto to = [&](size_t i) { return pointer<T>(gradients.at(i)); };
  ecore::sparse_attention_backward(sparse_attention<T>(sizes, graph, inputs, scale, weight),
                                   per_head<const T>(grad_output), pointer<T>(grad_score),
                                   {to(0), to(1), to(2), to(3), to(5), to(6), to(7)}, threads);
}

// Rows, classes, hole.
using RowsTuple = std::tuple<int64_t, int64_t, int64_t>;

template <typename T>
ecore::LogitRows<T> logit_rows(uintptr_t logits, const RowsTuple& tuple) {
  const auto [rows, classes, hole] = tuple;
  return {pointer<T>(logits), rows, classes, hole};
}

template <typename T>
void softmax_row_sums(uintptr_t logits, const RowsTuple& rows, uintptr_t maximum, uintptr_t inverse, uintptr_t mean,
                      int threads) {
  ecore::softmax_row_sums(logit_rows<T>(logits, rows), pointer<T>(maximum), pointer<T>(inverse), pointer<T>(mean),
                          threads);
}

template <typename T>
void softmax_row_errors(uintptr_t logits, const RowsTuple& rows, uintptr_t maximum, uintptr_t inverse, uintptr_t factor,
                        uintptr_t target, double base, double extra, int threads) {
  ecore::softmax_row_errors(logit_rows<T>(logits, rows), pointer<const T>(maximum), pointer<const T>(inverse),
                            pointer<const T>(factor), pointer<const int64_t>(target), base, extra, threads);
}

// Rows, size; address of the seed or 0, threshold, scale; address of the weight.
using NormTuple = std::tuple<int64_t, int64_t, uintptr_t, uint64_t, double, uintptr_t>;

template <typename T>
ecore::DropoutAddLayerNorm<T> dropout_add_layer_norm(const NormTuple& tuple) {
  const auto [rows, size, seed, threshold, scale, weight] = tuple;
  return {rows, size, pointer<const uint64_t>(seed), threshold, static_cast<T>(scale), pointer<const T>(weight)};
}

// Addresses: x, residual, bias; and of normed, sum, mean, inverse.
template <typename T>
void dropout_add_layer_norm_forward(const NormTuple& call, const Addresses& at, double eps, const Addresses& to,
                                    int threads) {
  ecore::dropout_add_layer_norm_forward(dropout_add_layer_norm<T>(call), pointer<const T>(at.at(0)),
                                        pointer<const T>(at.at(1)), pointer<const T>(at.at(2)), eps,
                                        pointer<T>(to.at(0)), pointer<T>(to.at(1)), pointer<T>(to.at(2)),
                                        pointer<T>(to.at(3)), threads);
}

// Addresses: sum, mean, inverse; gradients of normed and sum; and of the gradients of x, residual, weight, bias.
template <typename T>
void dropout_add_layer_norm_backward(const NormTuple& call, const Addresses& at, const Addresses& gradients,
                                     const Addresses& to, int threads) {
  ecore::dropout_add_layer_norm_backward<T>(
      dropout_add_layer_norm<T>(call), pointer<const T>(at.at(0)), pointer<const T>(at.at(1)),
      pointer<const T>(at.at(2)),
      {pointer<const T>(gradients.at(0)), pointer<const T>(gradients.at(1)), pointer<T>(to.at(0)), pointer<T>(to.at(1)),
       pointer<T>(to.at(2)), pointer<T>(to.at(3))},
      threads);
}

std::array<uint32_t, 4> philox_words(uint64_t seed, const std::array<uint32_t, 4>& counter) {
  const auto [c0, c1, c2, c3] = counter;
  const ecore::PhiloxWords words = ecore::philox_words(seed, c0, c1, c2, c3);
  return {words.word[0], words.word[1], words.word[2], words.word[3]};
}

py::dict build_record() {
  py::dict record;
  record["compiler"] = ECORE_RECORD_COMPILER;
  record["build_type"] = ECORE_RECORD_BUILD_TYPE;
  record["commit"] = ECORE_RECORD_COMMIT;                          // "" where it is not known
  record["cuda"] = ECORE_RECORD_CUDA;                              // nvcc's version, or ""
  record["cuda_missing"] = ECORE_RECORD_CUDA_MISSING;              // why there is no CUDA, or ""
  record["cuda_architectures"] = ECORE_RECORD_CUDA_ARCHITECTURES;  // "" without CUDA
  return record;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Compiled operators; called through ecore_kernels.native.";
  module.def("build_record", &build_record, "What this module was compiled with: a dict of strings.");
  module.def("otsu_cpu_float32", &otsu_cpu<float>, Unlocked());
  module.def("otsu_cpu_float64", &otsu_cpu<double>, Unlocked());
  module.def("philox_words", &philox_words, "The four random words of a seed and a counter, for tests.");
  module.def("simd", [] { return ecore::simd().name; }, "The instruction set whose kernels run.");
  module.def("simd_available", &ecore::simd_available, "Those that this machine can run, narrowest first.");
  module.def("bind_graph_attention_forward_float32", &bind_graph_attention_forward<float>);
  module.def("bind_graph_attention_forward_float64", &bind_graph_attention_forward<double>);
  module.def("graph_attention_backward_float32", &graph_attention_backward<float>, Unlocked());
  module.def("graph_attention_backward_float64", &graph_attention_backward<double>, Unlocked());
  module.def("bind_edge_readout_forward_float32", &bind_edge_readout_forward<float>);
  module.def("bind_edge_readout_forward_float64", &bind_edge_readout_forward<double>);
  module.def("edge_readout_backward_float32", &edge_readout_backward<float>, Unlocked());
  module.def("edge_readout_backward_float64", &edge_readout_backward<double>, Unlocked());
  module.def("bind_edge_attention_forward_float32", &bind_edge_attention_forward<float>);
  module.def("bind_edge_attention_forward_float64", &bind_edge_attention_forward<double>);
  module.def("edge_attention_backward_float32", &edge_attention_backward<float>, Unlocked());
  module.def("edge_attention_backward_float64", &edge_attention_backward<double>, Unlocked());
  module.def("sparse_attention_forward_float32", &sparse_attention_forward<float>, Unlocked());
  module.def("sparse_attention_forward_float64", &sparse_attention_forward<double>, Unlocked());
  module.def("sparse_attention_backward_float32", &sparse_attention_backward<float>, Unlocked());
  module.def("sparse_attention_backward_float64", &sparse_attention_backward<double>, Unlocked());
  module.def("softmax_row_sums_float32", &softmax_row_sums<float>, Unlocked());
  module.def("softmax_row_sums_float64", &softmax_row_sums<double>, Unlocked());
  module.def("softmax_row_errors_float32", &softmax_row_errors<float>, Unlocked());
  module.def("softmax_row_errors_float64", &softmax_row_errors<double>, Unlocked());
  module.def("dropout_add_layer_norm_forward_float32", &dropout_add_layer_norm_forward<float>, Unlocked());
  module.def("dropout_add_layer_norm_forward_float64", &dropout_add_layer_norm_forward<double>, Unlocked());
  module.def("dropout_add_layer_norm_backward_float32", &dropout_add_layer_norm_backward<float>, Unlocked());
  module.def("dropout_add_layer_norm_backward_float64", &dropout_add_layer_norm_backward<double>, Unlocked());
  bind_quantized_linear(module);
#ifdef ECORE_WITH_CUDA
  module.attr("OTSU_CUDA_MAX_COLUMNS") = ecore::kOtsuCudaMaxColumns;
  module.def("otsu_cuda_refusal", &ecore::otsu_cuda_refusal, Unlocked());
  module.def("otsu_cuda_float32", &otsu_cuda<float>, Unlocked());
  module.def("otsu_cuda_float64", &otsu_cuda<double>, Unlocked());
#endif
}
