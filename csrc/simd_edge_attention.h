// Attention on any dense graph, one (b, k) at a time, with its edges in memory (Eqs. 4 to 7). Included only by
// simd_*.cpp; see simd_vectors.h.
//
// With scores s = scale q_i . k_j and edges E, a row's attention is softmax(s E) over its neighbours, and its updated
// edges are factor (E + s E). A tile is kTileRows receivers by up to kTileColumns senders, in planes [rows, columns].
#pragma once

#include "simd.h"
#include "simd_products.h"

namespace ecore {
namespace {

// What is packed of the senders of a head.
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
  T* grad_edges;   // backward: of a row
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
    grad_edges = backward ? carver.take(stride) : nullptr;
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
void edge_forward(const EdgeHead<T>& head, const T* packed, int64_t begin, int64_t end, T* scratch, Rows<T> output,
                  T* new_edge, T* log_normalizer) {
  using V = Vector<T>;
  const PackedNodes<T> senders(head, false, const_cast<T*>(packed));
  const EdgeScratch<T> at(head, false, scratch);
  const int64_t value_stride = padded_width<T>(head.value_dim);
  const Listed<const T> values = reachable(head.value, head.order, head.value_dim, senders.copy, head.order);
  int64_t limits[kTilePanels];
  T largest[kTileRows], normalizer[kTileRows];
  bool hears[kTileRows];

  for (; begin < end; begin += kTileRows) {
    const int64_t rows = smaller_of(kTileRows, end - begin);
    const Listed<const T> queries = {head.query.data, head.query.stride, head.order + begin};
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
          const V edge = load<V>(at.edges + j), weighted = head.scale * load<V>(row + j) * edge;
          const V listens = load<V>(at.heard + j);
          const auto is_heard = listens > V{};
          const V x = is_heard ? weighted * kLog2E<T> : splat(-kInfinity<T>);
          store(at.new_edges + j, is_heard ? factor * (edge + weighted) : V{});
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
      multiply_rows(at.planes, at.stride, rows, limits, values.from(start), head.value_dim,
                    {at.total, value_stride, head.order}, start > 0);
    }
    for (int64_t r = 0; r < rows; ++r) {
      // A row without neighbours is 0; one whose scores all overflowed is NaN, as a softmax makes it.
      const T factor = hears[r] ? static_cast<T>(1) / normalizer[r] : static_cast<T>(0);
      T* const out = output.data + (begin + r) * output.stride;
      for (int64_t c = 0; c < head.value_dim; ++c) out[c] = at.total[r * value_stride + c] * factor;
      log_normalizer[begin + r] = hears[r] ? largest[r] + log2_of(normalizer[r]) : static_cast<T>(0);
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
  static Listed<T> rows_of(const EdgeHead<T>& head, const Rows<T>* results, int64_t width, T* rows) {
    if (results != nullptr) return reachable(*results, head.order, width, rows, head.order);
    return {rows, padded_width<T>(width), head.order};
  }
};

template <typename T>
int64_t edge_sums_size(const EdgeHead<T>& head) {
  return NodeSums<T>(head, nullptr).size;
}

template <typename T>
void edge_backward(const EdgeHead<T>& head, const T* packed, int64_t begin, int64_t end, T* scratch,
                   Rows<const T> output, Rows<const T> grad_output, Rows<const T> grad_new_edge,
                   const T* log_normalizer, Rows<T> grad_query, T* grad_edge, bool add_edge, T* grad_factor,
                   const Rows<T>* grad_key, const Rows<T>* grad_value, T* sums_of_senders) {
  using V = Vector<T>;
  const PackedNodes<T> senders(head, true, const_cast<T*>(packed));
  const EdgeScratch<T> at(head, true, scratch);
  const NodeSums<T> sums(head, sums_of_senders);
  const bool alone = grad_key != nullptr;
  const Listed<T> key_sums = sums.rows_of(head, grad_key, head.dim, sums.key);
  const Listed<T> value_sums = sums.rows_of(head, grad_value, head.value_dim, sums.value);
  for (int64_t i = 0; !alone && i < sums.size; ++i) sums_of_senders[i] = 0;
  const Listed<const T> keys = reachable(head.key, head.order, head.dim, senders.copy, head.order);
  T* const attention = at.planes + at.plane_size;
  int64_t limits[kTilePanels], firsts[kTileColumns / kPanel + 1];
  T delta[kTileRows], factor_gradient[kTileRows];

  for (int64_t& first : firsts) first = 0;
  for (; begin < end; begin += kTileRows) {
    const int64_t rows = smaller_of(kTileRows, end - begin);
    const int32_t* const nodes = head.order + begin;
    const Listed<const T> queries = reachable(head.query, nodes, head.dim, at.queries, head.order);
    const Listed<const T> gradients = reachable(grad_output, nodes, head.value_dim, at.grad_output, head.order);
    const Listed<T> grad_queries = reachable(grad_query, nodes, head.dim, at.total, head.order);
    load_copy(at.queries, head.query, nodes, rows, head.dim);
    load_copy(at.grad_output, grad_output, nodes, rows, head.value_dim);
    for (int64_t r = 0; r < rows; ++r) {
      delta[r] = dot(gradients.row(r), output.data + (begin + r) * output.stride, head.value_dim);
      factor_gradient[r] = 0;
    }
    for (int64_t start = 0; start < head.nodes; start += kTileColumns) {
      const int64_t columns = smaller_of(kTileColumns, head.nodes - start), padded = rounded_up(columns, kLanes<T>);
      for (int64_t& limit : limits) limit = columns;
      multiply_across(queries, rows, limits, senders.keys + start * head.dim, head.dim, at.planes, at.stride);
      multiply_across(gradients, rows, limits, senders.value_across + start * head.value_dim, head.value_dim, attention,
                      at.stride);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = begin + r;
        T* const row = at.planes + r * at.stride;
        T* const attention_row = attention + r * at.stride;
        load_edges(head, i, start, columns, at);
        const T factor = head.factor == nullptr ? static_cast<T>(0) : head.factor[i];
        if (grad_new_edge.data == nullptr) {
          for (int64_t j = 0; j < padded; ++j) at.new_edges[j] = 0;
        } else {
          copy_row(at.new_edges, grad_new_edge.data + i * grad_new_edge.stride + start, columns);
          for (int64_t j = columns; j < padded; ++j) at.new_edges[j] = 0;
        }
        V factors{};
        for (int64_t j = 0; j < columns; j += kLanes<T>) {
          const V edge = load<V>(at.edges + j), s = head.scale * load<V>(row + j), weighted = s * edge;
          const auto is_heard = load<V>(at.heard + j) > V{};
          const V p = is_heard ? exp2<T>(weighted * kLog2E<T> - log_normalizer[i]) : V{};
          const V grad_new = is_heard ? load<V>(at.new_edges + j) : V{};
          const V through = grad_new * factor;
          const V g = p * (load<V>(attention_row + j) - delta[r]) + through;
          factors += grad_new * (edge + weighted);
          store(attention_row + j, p);
          store(row + j, g * edge * head.scale);
          store(at.grad_edges + j, g * s + through);
        }
        factor_gradient[r] += sum<T>(factors);
        if (grad_edge == nullptr) continue;
        T* const to = grad_edge + i * head.nodes + start;
        if (add_edge) {
          for (int64_t j = 0; j < columns; ++j) to[j] += at.grad_edges[j];
        } else {
          copy_row(to, at.grad_edges, columns);
        }
      }
      multiply_rows(at.planes, at.stride, rows, limits, keys.from(start), head.dim, grad_queries, start > 0);
      multiply_columns(at.planes, at.stride, rows, firsts, columns, queries, head.dim, key_sums.from(start), alone);
      multiply_columns(attention, at.stride, rows, firsts, columns, gradients, head.value_dim, value_sums.from(start),
                       alone);
    }
    for (int64_t& first : firsts) first = -1;
    store_copy(grad_query, at.total, nodes, rows, head.dim);
    for (int64_t r = 0; grad_factor != nullptr && r < rows; ++r) grad_factor[begin + r] = factor_gradient[r];
  }
}

template <typename T>
void edge_finish(const EdgeHead<T>& head, T* sums, int64_t parts, int64_t begin, int64_t end, Rows<T> grad_key,
                 Rows<T> grad_value) {
  const NodeSums<T> total(head, sums);
  add_parts(total.key, total.size, parts, begin, end, head.order, grad_key, head.dim);
  add_parts(total.value, total.size, parts, begin, end, head.order, grad_value, head.value_dim);
}

template <typename T>
constexpr EdgeAttentionKernels<T> edge_attention_kernels() {
  return {kChunk<T>,       edge_packed_size<T>, edge_pack<T>,     edge_scratch<T>,
          edge_forward<T>, edge_sums_size<T>,   edge_backward<T>, edge_finish<T>};
}

}  // namespace
}  // namespace ecore
