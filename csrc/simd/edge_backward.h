// The backward of attention on any dense graph. Included only by edge_attention.h.
#pragma once

#include "edge_tiles.h"

namespace ecore {
namespace {

// The gradients that senders add up over receivers.
template <typename T>
struct NodeSums {
  T* key;          // rows
  T* value;        // rows
  T* sender_gate;  // [senders]; empty for heads without gates
  int64_t size;

  NodeSums(const EdgeHead<T>& head, T* sums) {
    Carver<T> carver(sums);
    key = carver.take(head.senders * padded_width<T>(head.dim));
    value = carver.take(head.senders * padded_width<T>(head.value_dim));
    sender_gate = carver.take(head.more.sender_gate == nullptr ? 0 : rounded_up(head.senders, kLanes<T>));
    size = carver.used();
  }
  // If no other part writes them, they are the results themselves, provided that the sweeps can write those.
  static Listed<T> rows_of(const EdgeHead<T>& head, const Rows<T>& results, bool alone, int64_t width, T* rows) {
    if (alone) return reachable(results, head.order, width, rows, head.order);
    return {rows, padded_width<T>(width), head.order};
  }
};

template <typename T>
int64_t edge_sums_size(const EdgeHead<T>& head) {
  return NodeSums<T>(head, nullptr).size;
}

template <typename T>
void edge_backward(const EdgeHead<T>& head, const T* packed, int64_t begin, int64_t end, T* scratch,
                   Rows<const T> output, Rows<const T> grad_output, Rows<const T> grad_new_edge, const T* grad_lse,
                   const T* maxima, const T* inverse, const EdgeGradients<T>& gradients, bool alone,
                   T* sums_of_senders) {
  using V = Vector<T>;
  const PackedNodes<T> senders(head, true, const_cast<T*>(packed));
  const EdgeScratch<T> at(head, true, scratch);
  const NodeSums<T> sums(head, sums_of_senders);
  const bool wants_query = gradients.query.data != nullptr, wants_key = gradients.key.data != nullptr;
  const bool wants_value = gradients.value.data != nullptr, wants_edge = gradients.edge != nullptr;
  const bool wants_bias = gradients.bias != nullptr, wants_gate = gradients.sender_gate != nullptr;
  const bool wants_attention = wants_query || wants_key || wants_edge || wants_bias || wants_gate;  // its gradient
  const Listed<T> key_sums = sums.rows_of(head, gradients.key, alone, head.dim, sums.key);
  const Listed<T> value_sums = sums.rows_of(head, gradients.value, alone, head.value_dim, sums.value);
  const int64_t key_size = head.senders * padded_width<T>(head.dim);
  const int64_t value_size = head.senders * padded_width<T>(head.value_dim);
  // Not every sender of a causal head is heard by the first tile of receivers.
  const bool fresh = alone && !head.causal;
  for (int64_t i = 0; !alone && wants_key && i < key_size; ++i) sums.key[i] = 0;
  for (int64_t i = 0; !alone && wants_value && i < value_size; ++i) sums.value[i] = 0;
  for (int64_t j = 0; alone && !fresh && j < head.senders; ++j) {
    if (wants_key) clear_row(key_sums.row(j), head.dim);
    if (wants_value) clear_row(value_sums.row(j), head.value_dim);
  }
  for (int64_t i = 0; wants_gate && i < rounded_up(head.senders, kLanes<T>); ++i) sums.sender_gate[i] = 0;
  const Listed<const T> keys = reachable(head.key, head.order, head.dim, senders.copy, head.order);
  const T whole_scale = head.scale * kLog2E<T>;
  const bool updated = grad_new_edge.data != nullptr;
  // Then a whole tile is kept until it is this head's turn.
  const bool takes_turns = gradients.turn != nullptr, bias_takes_turns = gradients.bias_turn != nullptr;
  const bool all_pairs = updated && head.more.all_pairs;
  T* const attention = at.planes + at.plane_size;
  int64_t limits[kTilePanels], firsts[kTileColumns / kPanel + 1] = {};
  T delta[kTileRows], factor_gradient[kTileRows];

  for (; begin < end; begin += kTileRows) {
    const int64_t rows = smaller_of(kTileRows, end - begin);
    const int32_t* const nodes = head.order + begin;
    const Listed<const T> queries = reachable(head.query, nodes, head.dim, at.queries, head.order);
    const Listed<const T> grad_outputs = reachable(grad_output, nodes, head.value_dim, at.grad_output, head.order);
    load_copy(at.queries, head.query, nodes, rows, head.dim);
    load_copy(at.grad_output, grad_output, nodes, rows, head.value_dim);
    // True if queries, keys and gradients of this tile are finite, if products over the whole tile read them.
    bool finite = true;
    // As in graph_attention: from the row's own numbers if a tile holds all of them, else from the output.
    const bool one_tile = head.senders <= kTileColumns;
    if (wants_attention && !one_tile) {
      dot_rows(grad_outputs, {output.data, output.stride, nodes}, rows, head.value_dim, delta);
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (!wants_attention) delta[r] = 0;
      if (wants_attention && !one_tile && grad_lse != nullptr) delta[r] -= grad_lse[begin + r];
      const bool seen_in_delta = wants_attention && (!one_tile || inverse[begin + r] != 0);
      finite = finite && (seen_in_delta || !wants_value || all_finite(grad_outputs.row(r), head.value_dim));
    }
    for (int64_t r = 0; r < rows; ++r) factor_gradient[r] = 0;
    const int64_t heard_by_tile = heard_senders(head, begin, rows);
    for (int64_t start = 0; start < heard_by_tile; start += kTileColumns) {
      const int64_t columns = smaller_of(kTileColumns, heard_by_tile - start);
      const int64_t padded = rounded_up(columns, kLanes<T>);
      limit_columns(head, begin, start, columns, limits);
      for (int64_t j = 0; head.causal && j < columns; j += kPanel) firsts[j / kPanel] = start + j - begin;
      EdgesAhead<T> ahead(head, begin, rows, start, columns, grad_new_edge);
      multiply_across(queries, rows, limits, senders.keys + start * head.dim, head.dim, at.planes, at.stride,
                      ahead.get());
      if (wants_attention) {
        multiply_across(grad_outputs, rows, limits, senders.value_across + start * head.value_dim, head.value_dim,
                        attention, at.stride);
      }
      const auto grad_edges_of = [&](int64_t r) { return at.grad_edges + (takes_turns ? r * at.stride : 0); };
      const auto grad_biases_of = [&](int64_t r) { return at.grad_biases + (bias_takes_turns ? r * at.stride : 0); };
      const auto give = [&](T* matrix, bool add, bool streams, int64_t r, const T* from) {
        T* const to = matrix + (begin + r) * head.senders + start;
        if (add) {
          for (int64_t j = 0; j < columns; ++j) to[j] += from[j];
        } else {
          put_row(to, from, columns, streams);
        }
      };
      const auto give_edge = [&](int64_t r, const T* from) {
        give(gradients.edge, gradients.add_edge, gradients.streams_edge, r, from);
      };
      const auto give_bias = [&](int64_t r, const T* from) {
        give(gradients.bias, gradients.add_bias, gradients.streams_bias, r, from);
      };
      V check{};
      load_common(head, start, columns, at);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = begin + r;
        T* const row = at.planes + r * at.stride;
        T* const attention_row = attention + r * at.stride;
        T* const grad_edges = grad_edges_of(r);
        load_edges(head, i, start, columns, at);
        const T factor = head.factor == nullptr ? static_cast<T>(0) : head.factor[i];
        if (updated) {
          copy_row(at.new_edges, grad_new_edge.data + i * grad_new_edge.stride + start, columns);
          for (int64_t j = columns; j < padded; ++j) at.new_edges[j] = 0;
        }
        const int64_t heard_columns = limits[r / kPanel];
        V factors{}, sums_of_row{};
        for (int64_t j = 0; j < heard_columns; j += kLanes<T>) {
          const V product = load<V>(row + j);
          const auto is_heard = load<V>(at.heard + j) > V{};
          const V p = is_heard ? exp2<T>(logit<T>(head, at, j, whole_scale, product) - maxima[i]) * inverse[i] : V{};
          if (wants_attention) {
            V passed = load<V>(attention_row + j);  // to the weights
            if (head.more.drops) store(attention_row + j, passed *= load<V>(at.kept + j));
            sums_of_row += is_heard ? p * passed : V{};
          }
          store(at.attention + j, p);
          check = multiply_add(product, V{}, check);
        }
        if (wants_attention && one_tile) {
          delta[r] = sum<T>(sums_of_row);
          if (grad_lse != nullptr) delta[r] -= grad_lse[i];
        }
        finite = finite && (!wants_attention || is_finite(delta[r]));
        if (head.more.plain) {
          for (int64_t j = 0; j < heard_columns; j += kLanes<T>) {
            const V edge = load<V>(at.edges + j), s = head.scale * load<V>(row + j), p = load<V>(at.attention + j);
            const auto is_heard = load<V>(at.heard + j) > V{};
            V g = p * (load<V>(attention_row + j) - delta[r]), grad_edge{};
            if (updated) {
              const V grad_new = load<V>(at.new_edges + j), through = grad_new * factor;
              g += through;
              grad_edge = through;
              factors += is_heard ? grad_new * multiply_add(s, edge, edge) : V{};
            }
            if (wants_attention) {
              store(row + j, is_heard ? g * edge * head.scale : V{});
              store(grad_edges + j, is_heard ? multiply_add(g, s, grad_edge) : V{});
            }
            store(attention_row + j, p);
          }
        } else {
          T* const grad_biases = wants_bias ? grad_biases_of(r) : nullptr;
          for (int64_t j = 0; j < heard_columns; j += kLanes<T>) {
            const V edge = load<V>(at.edges + j), gate = load<V>(at.gates + j), p = load<V>(at.attention + j);
            const V whole = head.scale * load<V>(row + j), s = clamped<T>(whole, head.more.low, head.more.high);
            const auto is_heard = load<V>(at.heard + j) > V{};
            const auto is_live = all_pairs ? load<V>(at.updated + j) > V{} : is_heard;
            V g = is_heard ? p * (load<V>(attention_row + j) - delta[r]) : V{}, grad_edge{};
            if (wants_bias) store(grad_biases + j, g);
            if (updated) {
              const V grad_new = load<V>(at.new_edges + j), through = grad_new * factor;
              g += through;
              grad_edge = through;
              factors += is_live ? grad_new * multiply_add(s * gate, edge, edge) : V{};
            }
            if (wants_attention) {
              const V to_score = g * edge * gate * head.scale;
              const V passed = whole >= splat(head.more.low) ? to_score : V{};  // the clamp
              store(row + j, is_live ? (whole <= splat(head.more.high) ? passed : V{}) : V{});
              store(grad_edges + j, is_live ? multiply_add(g, s * gate, grad_edge) : V{});
            }
            if (wants_gate) {
              T* const to = sums.sender_gate + start + j;
              store(to, load<V>(to) + (is_live ? g * s * edge : V{}));
            }
            store(attention_row + j, p * load<V>(at.kept + j));
          }
          if (wants_bias && !bias_takes_turns) give_bias(r, grad_biases);
        }
        factor_gradient[r] += sum<T>(factors);
        if (wants_edge && !takes_turns) give_edge(r, grad_edges);
      }
      finite = finite && is_finite(sum<T>(check));
      if (wants_edge && takes_turns) {
        gradients.wait(gradients.turn, begin, start / kTileColumns);
        for (int64_t r = 0; r < rows; ++r) give_edge(r, grad_edges_of(r));
        gradients.done(gradients.turn, begin, start / kTileColumns);
      }
      if (wants_bias && bias_takes_turns) {
        gradients.wait(gradients.bias_turn, begin, start / kTileColumns);
        for (int64_t r = 0; r < rows; ++r) give_bias(r, grad_biases_of(r));
        gradients.done(gradients.bias_turn, begin, start / kTileColumns);
      }
      const auto hears = [&](int64_t r, int64_t j) { return is_neighbor(head, begin + r, start + j); };
      const auto counts = [&](int64_t r, int64_t j) { return all_pairs || hears(r, j); };  // in a score's gradient
      const auto to_senders = [&](const T* plane, const Listed<const T>& operand, int64_t width, const Listed<T>& to,
                                  const auto& where) {
        if (finite) return multiply_columns(plane, at.stride, rows, firsts, columns, operand, width, to, fresh);
        multiply_heard_columns(plane, at.stride, rows, firsts, columns, operand, width, to, fresh, where);
      };
      if (wants_query) {
        const Listed<T> to = reachable(gradients.query, nodes, head.dim, at.total, head.order);
        if (finite) {
          multiply_rows(at.planes, at.stride, rows, limits, keys.from(start), head.dim, to, start > 0);
        } else {
          multiply_heard_rows(at.planes, at.stride, rows, limits, keys.from(start), head.dim, to, start > 0, counts);
        }
      }
      if (wants_key) to_senders(at.planes, queries, head.dim, key_sums.from(start), counts);
      if (wants_value) to_senders(attention, grad_outputs, head.value_dim, value_sums.from(start), hears);
    }
    for (int64_t& first : firsts) first = -1;
    if (wants_query) store_copy(gradients.query, at.total, nodes, rows, head.dim);
    for (int64_t r = 0; gradients.factor != nullptr && r < rows; ++r) {
      gradients.factor[begin + r] = factor_gradient[r];
    }
  }
  streamed();
}

template <typename T>
void edge_finish(const EdgeHead<T>& head, T* sums, int64_t parts, int64_t begin, int64_t end,
                 const EdgeGradients<T>& gradients) {
  const NodeSums<T> total(head, sums);
  if (gradients.key.data != nullptr) {
    add_parts(total.key, total.size, parts, begin, end, head.order, gradients.key, head.dim);
  }
  if (gradients.value.data != nullptr) {
    add_parts(total.value, total.size, parts, begin, end, head.order, gradients.value, head.value_dim);
  }
  for (int64_t j = begin; gradients.sender_gate != nullptr && j < end; ++j) {
    T of_all = total.sender_gate[j];
    for (int64_t p = 1; p < parts; ++p) of_all += total.sender_gate[p * total.size + j];
    gradients.sender_gate[j] = of_all;
  }
}
}  // namespace
}  // namespace ecore
