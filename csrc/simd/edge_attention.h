// Attention on any dense graph, one (b, k) at a time, with its edges in memory (Eqs. 4 to 7). Included only by
// simd_*.cpp; see vectors.h.
//
// With scores s = scale q_i . k_j and edges E, a row's attention is softmax(s E) over its neighbours, and its updated
// edges are factor (E + s E). A tile is kTileRows receivers by up to kTileColumns senders, in planes [rows, columns].
// Pairs that are no neighbours are 0 there by selection, as in graph_tiles.h.
#pragma once

#include "kernels.h"
#include "products.h"

namespace ecore {
namespace {

// The senders of a head, packed.
template <typename T>
struct PackedNodes {
  T* keys;          // across
  T* value_across;  // backward: across
  T* copy;          // forward: of values; backward: of keys
  int64_t size;

  PackedNodes(const EdgeHead<T>& head, bool backward, T* packed) {
    const int64_t padded = rounded_up(head.nodes, kChunk<T>);
    Carver<T> carver(packed);
    keys = carver.take(padded * head.dim);
    value_across = backward ? carver.take(padded * head.value_dim) : nullptr;
    copy = carver.take(copy_size<T>(head.nodes, backward ? head.dim : head.value_dim));
    size = carver.used();
  }
};

template <typename T>
int64_t edge_packed_size(const EdgeHead<T>& head, bool backward) {
  return PackedNodes<T>(head, backward, nullptr).size;
}

template <typename T>
void edge_pack(const EdgeHead<T>& head, bool backward, int64_t begin, int64_t end, T* packed) {
  const PackedNodes<T> to(head, backward, packed);
  pack_across(to.keys, head.key.data, head.key.stride, head.order, begin, end, head.dim);
  if (backward)
    pack_across(to.value_across, head.value.data, head.value.stride, head.order, begin, end, head.value_dim);
  const int64_t width = backward ? head.dim : head.value_dim;
  load_copy(to.copy + begin * padded_width<T>(width), backward ? head.key : head.value, head.order + begin, end - begin,
            width);
}

template <typename T>
struct EdgeScratch {
  T* planes;       // scores; backward: then the gradient of attention
  T* queries;      // backward: a copy
  T* total;        // forward: output rows; backward: a copy of the gradients of queries
  T* grad_output;  // backward: a copy
  T* edges;        // of a row, padded
  T* heard;        // of a row: 1 for neighbours, else 0
  T* new_edges;    // of a row: forward, their values; backward, their gradients
  T* attention;    // backward: of a row
  T* grad_edges;   // backward: of a row, or a plane
  int64_t stride, plane_size, size;

  EdgeScratch(const EdgeHead<T>& head, bool backward, T* scratch) {
    stride = tile_stride<T>(head.nodes);
    plane_size = kTileRows * stride;
    Carver<T> carver(scratch);
    planes = carver.take((backward ? 2 : 1) * plane_size);
    queries = backward ? carver.take(copy_size<T>(kTileRows, head.dim)) : nullptr;
    total = carver.take(backward ? copy_size<T>(kTileRows, head.dim) : kTileRows * padded_width<T>(head.value_dim));
    grad_output = backward ? carver.take(copy_size<T>(kTileRows, head.value_dim)) : nullptr;
    edges = carver.take(stride);
    heard = carver.take(stride);
    new_edges = carver.take(stride);
    attention = backward ? carver.take(stride) : nullptr;
    grad_edges = backward ? carver.take(plane_size) : nullptr;
    size = carver.used();
  }
};

template <typename T>
int64_t edge_scratch(const EdgeHead<T>& head, bool backward) {
  return EdgeScratch<T>(head, backward, nullptr).size;
}

// A row's edges and neighbours in the columns of a tile, padded to whole vectors with what is not heard.
template <typename T>
void load_edges(const EdgeHead<T>& head, int64_t row, int64_t start, int64_t columns, const EdgeScratch<T>& at) {
  const int64_t padded = rounded_up(columns, kLanes<T>);
  copy_row(at.edges, head.edge + row * head.edge_row + start, columns);
  if (head.neighbors == nullptr) {
    for (int64_t j = 0; j < columns; ++j) at.heard[j] = 1;
  } else {
    const uint8_t* const neighbors = head.neighbors + row * head.neighbors_row + start;
    for (int64_t j = 0; j < columns; ++j) at.heard[j] = static_cast<T>(neighbors[j]);
  }
  for (int64_t j = columns; j < padded; ++j) at.edges[j] = at.heard[j] = 0;
}

template <typename T>
bool is_neighbor(const EdgeHead<T>& head, int64_t i, int64_t j) {
  return head.neighbors == nullptr || head.neighbors[i * head.neighbors_row + j] != 0;
}

// One tile of receivers, over all senders. Returns whether all of the output is finite; if it is not, a value may be to
// blame that the receiver does not hear, unless `heard_alone` says that those are left out.
template <typename T>
bool edge_forward_tile(const EdgeHead<T>& head, const PackedNodes<T>& senders, int64_t begin, int64_t rows,
                       const EdgeScratch<T>& at, bool heard_alone, Rows<T> output, T* new_edge, T* maxima, T* inverse) {
  using V = Vector<T>;
  const int64_t value_stride = padded_width<T>(head.value_dim);
  const Listed<const T> values = reachable(head.value, head.order, head.value_dim, senders.copy, head.order);
  const Listed<const T> queries = {head.query.data, head.query.stride, head.order + begin};
  const Listed<T> totals = {at.total, value_stride, head.order};
  const T whole_scale = head.scale * kLog2E<T>;
  int64_t limits[kTilePanels];
  T largest[kTileRows], normalizer[kTileRows];
  bool hears[kTileRows];

  for (int64_t start = 0; start < head.nodes; start += kTileColumns) {
    const int64_t columns = smaller_of(kTileColumns, head.nodes - start);
    for (int64_t& limit : limits) limit = columns;
    multiply_across(queries, rows, limits, senders.keys + start * head.dim, head.dim, at.planes, at.stride);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = begin + r;
      T* const row = at.planes + r * at.stride;
      load_edges(head, i, start, columns, at);
      const T factor = head.factor == nullptr ? static_cast<T>(0) : head.factor[i];
      V most = splat(-kInfinity<T>), heard{};
      for (int64_t j = 0; j < columns; j += kLanes<T>) {
        const V edge = load<V>(at.edges + j), product = load<V>(row + j);
        const V listens = load<V>(at.heard + j);
        const auto is_heard = listens > V{};
        const V x = is_heard ? score<T>(whole_scale, product, edge) : splat(-kInfinity<T>);
        if (new_edge != nullptr) {
          store(at.new_edges + j, is_heard ? factor * multiply_add(head.scale * product, edge, edge) : V{});
        }
        store(row + j, x);
        most = larger<T>(x, most);
        heard = larger<T>(listens, heard);
      }
      hears[r] = (start > 0 && hears[r]) || maximum<T>(heard) > 0;
      if (new_edge != nullptr) copy_row(new_edge + i * head.nodes + start, at.new_edges, columns);
      const T before = start == 0 ? -kInfinity<T> : largest[r];
      const T now = maximum<T>(larger<T>(most, splat(before)));
      const T base = now == -kInfinity<T> ? static_cast<T>(0) : now;  // nobody heard so far, or all overflowed
      V sums{};
      for (int64_t j = 0; j < columns; j += kLanes<T>) {
        const V p = exp2<T>(load<V>(row + j) - base);
        sums += p;
        store(row + j, p);
      }
      const T shrink = exp2<T>(splat(before - base))[0];
      normalizer[r] = start == 0 ? sum<T>(sums) : normalizer[r] * shrink + sum<T>(sums);
      largest[r] = now;
      for (int64_t c = 0; start > 0 && c < value_stride; c += kLanes<T>) {
        T* const out = at.total + r * value_stride + c;
        store(out, load<V>(out) * shrink);
      }
    }
    if (heard_alone) {
      multiply_heard_rows(at.planes, at.stride, rows, limits, values.from(start), head.value_dim, totals, start > 0,
                          [&](int64_t r, int64_t j) { return is_neighbor(head, begin + r, start + j); });
    } else {
      multiply_rows(at.planes, at.stride, rows, limits, values.from(start), head.value_dim, totals, start > 0);
    }
  }
  V check{};
  for (int64_t r = 0; r < rows; ++r) {
    // A row without neighbours is 0; one whose scores all overflowed is NaN, as a softmax makes it.
    const T factor = hears[r] ? static_cast<T>(1) / normalizer[r] : static_cast<T>(0);
    T* const out = output.data + (begin + r) * output.stride;
    if (hears[r]) {
      scale_row(at.total + r * value_stride, factor, head.value_dim, out, &check);
    } else {
      for (int64_t c = 0; c < head.value_dim; ++c) out[c] = 0;
    }
    maxima[begin + r] = hears[r] ? largest[r] : static_cast<T>(0);
    inverse[begin + r] = factor;
  }
  return is_finite(sum<T>(check));
}

template <typename T>
void edge_forward(const EdgeHead<T>& head, const T* packed, int64_t begin, int64_t end, T* scratch, Rows<T> output,
                  T* new_edge, T* maxima, T* inverse) {
  const PackedNodes<T> senders(head, false, const_cast<T*>(packed));
  const EdgeScratch<T> at(head, false, scratch);
  for (; begin < end; begin += kTileRows) {
    const int64_t rows = smaller_of(kTileRows, end - begin);
    if (!edge_forward_tile(head, senders, begin, rows, at, false, output, new_edge, maxima, inverse)) {
      edge_forward_tile(head, senders, begin, rows, at, true, output, new_edge, maxima, inverse);
    }
  }
}

// The gradients that senders add up over receivers.
template <typename T>
struct NodeSums {
  T* key;    // rows
  T* value;  // rows
  int64_t size;

  NodeSums(const EdgeHead<T>& head, T* sums) {
    Carver<T> carver(sums);
    key = carver.take(head.nodes * padded_width<T>(head.dim));
    value = carver.take(head.nodes * padded_width<T>(head.value_dim));
    size = carver.used();
  }
  // Without a rival part they are the results themselves, if those can be reached.
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
                   Rows<const T> output, Rows<const T> grad_output, Rows<const T> grad_new_edge, const T* maxima,
                   const T* inverse, const EdgeGradients<T>& gradients, bool alone, T* sums_of_senders) {
  using V = Vector<T>;
  const PackedNodes<T> senders(head, true, const_cast<T*>(packed));
  const EdgeScratch<T> at(head, true, scratch);
  const NodeSums<T> sums(head, sums_of_senders);
  const bool wants_query = gradients.query.data != nullptr, wants_key = gradients.key.data != nullptr;
  const bool wants_value = gradients.value.data != nullptr, wants_edge = gradients.edge != nullptr;
  const bool wants_attention = wants_query || wants_key || wants_edge;  // its gradient
  const Listed<T> key_sums = sums.rows_of(head, gradients.key, alone, head.dim, sums.key);
  const Listed<T> value_sums = sums.rows_of(head, gradients.value, alone, head.value_dim, sums.value);
  const int64_t key_size = head.nodes * padded_width<T>(head.dim);
  const int64_t value_size = head.nodes * padded_width<T>(head.value_dim);
  for (int64_t i = 0; !alone && wants_key && i < key_size; ++i) sums.key[i] = 0;
  for (int64_t i = 0; !alone && wants_value && i < value_size; ++i) sums.value[i] = 0;
  const Listed<const T> keys = reachable(head.key, head.order, head.dim, senders.copy, head.order);
  const T whole_scale = head.scale * kLog2E<T>;
  const bool updated = grad_new_edge.data != nullptr;
  const bool takes_turns = gradients.turn != nullptr;  // then a whole tile is kept until it is this head's
  T* const attention = at.planes + at.plane_size;
  int64_t limits[kTilePanels], firsts[kTileColumns / kPanel + 1];
  T delta[kTileRows], factor_gradient[kTileRows];

  for (int64_t& first : firsts) first = 0;
  for (; begin < end; begin += kTileRows) {
    const int64_t rows = smaller_of(kTileRows, end - begin);
    const int32_t* const nodes = head.order + begin;
    const Listed<const T> queries = reachable(head.query, nodes, head.dim, at.queries, head.order);
    const Listed<const T> grad_outputs = reachable(grad_output, nodes, head.value_dim, at.grad_output, head.order);
    load_copy(at.queries, head.query, nodes, rows, head.dim);
    load_copy(at.grad_output, grad_output, nodes, rows, head.value_dim);
    // True if queries, keys and gradients of this tile are finite, as far as products over all of it take them.
    bool finite = true;
    // As in graph_attention: of the row's own numbers where a tile holds them, else of the output.
    const bool one_tile = head.nodes <= kTileColumns;
    if (wants_attention && !one_tile) {
      dot_rows(grad_outputs, {output.data, output.stride, nodes}, rows, head.value_dim, delta);
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (!wants_attention) delta[r] = 0;
      const bool seen_in_delta = wants_attention && (!one_tile || inverse[begin + r] != 0);
      finite = finite && (seen_in_delta || !wants_value || all_finite(grad_outputs.row(r), head.value_dim));
    }
    for (int64_t r = 0; r < rows; ++r) factor_gradient[r] = 0;
    for (int64_t start = 0; start < head.nodes; start += kTileColumns) {
      const int64_t columns = smaller_of(kTileColumns, head.nodes - start), padded = rounded_up(columns, kLanes<T>);
      for (int64_t& limit : limits) limit = columns;
      multiply_across(queries, rows, limits, senders.keys + start * head.dim, head.dim, at.planes, at.stride);
      if (wants_attention) {
        multiply_across(grad_outputs, rows, limits, senders.value_across + start * head.value_dim, head.value_dim,
                        attention, at.stride);
      }
      const auto grad_edges_of = [&](int64_t r) { return at.grad_edges + (takes_turns ? r * at.stride : 0); };
      const auto give_edges = [&](int64_t r) {
        T* const to = gradients.edge + (begin + r) * head.nodes + start;
        const T* const grad_edges = grad_edges_of(r);
        if (gradients.add_edge) {
          for (int64_t j = 0; j < columns; ++j) to[j] += grad_edges[j];
        } else {
          copy_row(to, grad_edges, columns);
        }
      };
      V check{};
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
        V factors{}, sums_of_row{};
        for (int64_t j = 0; j < columns; j += kLanes<T>) {
          const V product = load<V>(row + j), edge = load<V>(at.edges + j);
          const auto is_heard = load<V>(at.heard + j) > V{};
          const V p = is_heard ? exp2<T>(score<T>(whole_scale, product, edge) - maxima[i]) * inverse[i] : V{};
          if (wants_attention) sums_of_row += is_heard ? p * load<V>(attention_row + j) : V{};
          store(at.attention + j, p);
          check = multiply_add(product, V{}, check);
        }
        if (wants_attention && one_tile) delta[r] = sum<T>(sums_of_row);
        finite = finite && (!wants_attention || is_finite(delta[r]));
        for (int64_t j = 0; j < columns; j += kLanes<T>) {
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
        factor_gradient[r] += sum<T>(factors);
        if (wants_edge && !takes_turns) give_edges(r);
      }
      finite = finite && is_finite(sum<T>(check));
      if (wants_edge && takes_turns) {
        gradients.wait(gradients.turn, begin, start / kTileColumns);
        for (int64_t r = 0; r < rows; ++r) give_edges(r);
        gradients.done(gradients.turn, begin, start / kTileColumns);
      }
      const auto hears = [&](int64_t r, int64_t j) { return is_neighbor(head, begin + r, start + j); };
      const auto to_senders = [&](const T* plane, const Listed<const T>& operand, int64_t width, const Listed<T>& to) {
        if (finite) return multiply_columns(plane, at.stride, rows, firsts, columns, operand, width, to, alone);
        multiply_heard_columns(plane, at.stride, rows, firsts, columns, operand, width, to, alone, hears);
      };
      if (wants_query) {
        const Listed<T> to = reachable(gradients.query, nodes, head.dim, at.total, head.order);
        if (finite) {
          multiply_rows(at.planes, at.stride, rows, limits, keys.from(start), head.dim, to, start > 0);
        } else {
          multiply_heard_rows(at.planes, at.stride, rows, limits, keys.from(start), head.dim, to, start > 0, hears);
        }
      }
      if (wants_key) to_senders(at.planes, queries, head.dim, key_sums.from(start));
      if (wants_value) to_senders(attention, grad_outputs, head.value_dim, value_sums.from(start));
    }
    for (int64_t& first : firsts) first = -1;
    if (wants_query) store_copy(gradients.query, at.total, nodes, rows, head.dim);
    for (int64_t r = 0; gradients.factor != nullptr && r < rows; ++r) {
      gradients.factor[begin + r] = factor_gradient[r];
    }
  }
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
}

template <typename T>
constexpr EdgeAttentionKernels<T> edge_attention_kernels() {
  return {kChunk<T>,       kTileColumns,      edge_packed_size<T>, edge_pack<T>,  edge_scratch<T>,
          edge_forward<T>, edge_sums_size<T>, edge_backward<T>,    edge_finish<T>};
}

}  // namespace
}  // namespace ecore
