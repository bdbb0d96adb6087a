// Bindings of attention on any graph: dense and sparse.
#include <cmath>
#include <limits>
#include <optional>

#include "../edge_attention_cpu.h"
#include "../sparse_attention_cpu.h"
#include "../varlen_attention_cpu.h"
#include "arguments.h"

namespace {

// [B or 1, K or 1, N, N]: address, strides over B, K and N.
template <typename T>
ecore::Matrices<T> matrices(const HeadsTuple& tensor) {
  const auto [address, batch, head, row] = tensor;
  return {pointer<T>(address), batch, head, row};
}

// B, H, Hk, Nq, Nk, d, dv.
using SizesTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
// bias; sender_gate, edge_bias and seed; bounds of scores; whether all pairs are updated; the least random word that
// dropout keeps, and the factor on kept weights.
using MoreTuple = std::tuple<HeadsTuple, std::tuple<uintptr_t, uintptr_t, uintptr_t>, std::tuple<double, double>, bool,
                             std::tuple<uint32_t, double>>;

// Gives a call the inputs at these addresses; 0 for none.
template <typename T>
void give(ecore::EdgeAttention<T>& call, uintptr_t sender_gate, uintptr_t edge_bias, uintptr_t seed) {
  call.sender_gate = pointer<const T>(sender_gate);
  call.more.edge_bias = edge_bias == 0 ? T{0} : *pointer<const T>(edge_bias);
  call.more.drops = seed != 0;
  call.more.seed = seed == 0 ? 0 : *pointer<const uint64_t>(seed);
}

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
  give(call, sender_gate, edge_bias, seed);
  call.more.low = static_cast<T>(std::get<0>(bounds));
  call.more.high = static_cast<T>(std::get<1>(bounds));
  call.more.all_pairs = all_pairs;
  call.more.least_kept = std::get<0>(dropout);
  call.more.kept_weight = static_cast<T>(std::get<1>(dropout));
  return call;
}

// The logarithms of the sums that softmaxes divide by; -inf for a receiver without neighbours.
template <typename T>
void fill_lse(const T* maximum, const T* inverse, int64_t size, T* lse) {
  for (int64_t i = 0; i < size; ++i) {
    lse[i] = inverse[i] == 0 ? -std::numeric_limits<T>::infinity()
                             : (maximum[i] - std::log2(inverse[i])) * static_cast<T>(0.69314718055994530942);
  }
}

// Addresses: query, key, value, edge, neighbors, bias, sender gate, edge bias, seed; a gate and an edge scale; output,
// new edges, lse, and the planes for the backward.
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
    call.bias.data = pointer<const T>(at.at(5));
    give(call, at.at(6), at.at(7), at.at(8));
    const int64_t size = call.batch * call.heads * call.receivers;
    const RowFactor<T> factor(gates, size);
    call.factor = factor.data;
    call.scale = static_cast<T>(scale);
    const Planes<T> planes(to.at(3), 2, size);
    call.maximum = planes[0];
    call.inverse = planes[1];
    target.data = pointer<T>(to.at(0));
    ecore::edge_attention_forward(call, target, pointer<T>(to.at(1)), threads);
    if (to.at(2) != 0) fill_lse(call.maximum, call.inverse, size, pointer<T>(to.at(2)));
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

// Sequences, heads, heads of keys, rows, rows of keys, d, dv; addresses of offsets and of the keys' offsets.
using VarlenSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t>;

// Statistics: the address of [2, heads, rows].
template <typename T>
ecore::VarlenAttention<T> varlen_attention(const VarlenSizes& sizes, const std::vector<PerHeadTuple>& inputs,
                                           double scale, bool causal, uintptr_t statistics) {
  const auto [sequences, head_count, key_heads, rows, key_rows, dim, value_dim, begin, key_begin] = sizes;
  T* const maximum = pointer<T>(statistics);
  const ecore::VarlenAttention<T> call = {sequences,
                                          head_count,
                                          key_heads,
                                          rows,
                                          key_rows,
                                          dim,
                                          value_dim,
                                          pointer<const int64_t>(begin),
                                          pointer<const int64_t>(key_begin),
                                          per_head<const T>(inputs.at(0)),
                                          per_head<const T>(inputs.at(1)),
                                          per_head<const T>(inputs.at(2)),
                                          static_cast<T>(scale),
                                          causal,
                                          maximum,
                                          maximum + head_count * rows};
  ecore::check_sequences(call);
  return call;
}

template <typename T>
void varlen_attention_forward(const VarlenSizes& sizes, const std::vector<PerHeadTuple>& inputs, double scale,
                              bool causal, uintptr_t statistics, const PerHeadTuple& output, int threads) {
  ecore::varlen_attention_forward(varlen_attention<T>(sizes, inputs, scale, causal, statistics), per_head<T>(output),
                                  threads);
}

template <typename T>
void varlen_attention_backward(const VarlenSizes& sizes, const std::vector<PerHeadTuple>& inputs, double scale,
                               bool causal, uintptr_t statistics, const PerHeadTuple& output,
                               const PerHeadTuple& grad_output, const std::vector<PerHeadTuple>& gradients,
                               int threads) {
  ecore::varlen_attention_backward(varlen_attention<T>(sizes, inputs, scale, causal, statistics),
                                   per_head<const T>(output), per_head<const T>(grad_output),
                                   per_head<T>(gradients.at(0)), per_head<T>(gradients.at(1)),
                                   per_head<T>(gradients.at(2)), threads);
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("bind_edge_attention_forward_float32", &bind_edge_attention_forward<float>);
  module.def("bind_edge_attention_forward_float64", &bind_edge_attention_forward<double>);
  module.def("edge_attention_backward_float32", &edge_attention_backward<float>, Unlocked());
  module.def("edge_attention_backward_float64", &edge_attention_backward<double>, Unlocked());
  module.def("sparse_attention_forward_float32", &sparse_attention_forward<float>, Unlocked());
  module.def("sparse_attention_forward_float64", &sparse_attention_forward<double>, Unlocked());
  module.def("sparse_attention_backward_float32", &sparse_attention_backward<float>, Unlocked());
  module.def("sparse_attention_backward_float64", &sparse_attention_backward<double>, Unlocked());
  module.def("varlen_attention_forward_float32", &varlen_attention_forward<float>, Unlocked());
  module.def("varlen_attention_forward_float64", &varlen_attention_forward<double>, Unlocked());
  module.def("varlen_attention_backward_float32", &varlen_attention_backward<float>, Unlocked());
  module.def("varlen_attention_backward_float64", &varlen_attention_backward<double>, Unlocked());
}
