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
  T* value_rows;    // forward: rows
  T* key_rows;      // backward: rows
  T* value_across;  // backward: across
  int64_t key_stride, value_stride, size;

  PackedNodes(const EdgeHead<T>& head, bool backward, T* packed) {
    const int64_t padded = rounded_up(head.nodes, kChunk<T>);
    key_stride = padded_width<T>(head.dim);
    value_stride = padded_width<T>(head.value_dim);
    Carver<T> carver(packed);
    keys = carver.take(padded * head.dim);
    key_rows = backward ? carver.take(head.nodes * key_stride) : nullptr;
    value_across = backward ? carver.take(padded * head.value_dim) : nullptr;
    value_rows = backward ? nullptr : carver.take(head.nodes * value_stride);
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
  const int32_t* const nodes = head.order + begin;
  pack_across(to.keys, head.key.data, head.key.stride, head.order, begin, end, head.dim);
  if (backward) {
    gather_rows(to.key_rows + begin * to.key_stride, to.key_stride, head.key.data, head.key.stride, nodes, end - begin,
                head.dim);
    pack_across(to.value_across, head.value.data, head.value.stride, head.order, begin, end, head.value_dim);
  } else {
    gather_rows(to.value_rows + begin * to.value_stride, to.value_stride, head.value.data, head.value.stride, nodes,
                end - begin, head.value_dim);
  }
}

template <typename T>
struct EdgeScratch {
  T* planes;       // scores; backward: then the gradient of attention
  T* queries;      // rows
  T* total;        // forward: output rows; backward: the gradients of queries
  T* grad_output;  // backward: rows
  T* edges;        // of a row, padded
  T* heard;        // of a row: 1 for neighbours, else 0
  T* new_edges;    // of a row: forward, their values; backward, their gradients
  T* grad_edges;   // backward: of a row
  int64_t stride, plane_size, key_stride, value_stride, size;

  EdgeScratch(const EdgeHead<T>& head, bool backward, T* scratch) {
    stride = smaller_of(kTileColumns, rounded_up(head.nodes, kLanes<T>));
    plane_size = kTileRows * stride;
    key_stride = padded_width<T>(head.dim);
    value_stride = padded_width<T>(head.value_dim);
    Carver<T> carver(scratch);
    planes = carver.take((backward ? 2 : 1) * plane_size);
    queries = carver.take(kTileRows * key_stride);
    total = carver.take(kTileRows * (backward ? key_stride : value_stride));
    grad_output = backward ? carver.take(kTileRows * value_stride) : nullptr;
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
  int64_t limits[kTilePanels];
  T largest[kTileRows], normalizer[kTileRows];

  for (; begin < end; begin += kTileRows) {
    const int64_t rows = smaller_of(kTileRows, end - begin);
    gather_rows(at.queries, at.key_stride, head.query.data, head.query.stride, head.order + begin, rows, head.dim);
    for (int64_t start = 0; start < head.nodes; start += kTileColumns) {
      const int64_t columns = smaller_of(kTileColumns, head.nodes - start);
      for (int64_t& limit : limits) limit = columns;
      multiply_across(at.queries, at.key_stride, rows, limits, senders.keys + start * head.dim, head.dim, at.planes,
                      at.stride);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = begin + r;
        T* const row = at.planes + r * at.stride;
        load_edges(head, i, start, columns, at);
        const T factor = head.factor == nullptr ? static_cast<T>(0) : head.factor[i];
        V most = splat(-kInfinity<T>);
        for (int64_t j = 0; j < columns; j += kLanes<T>) {
          const V edge = load<V>(at.edges + j), weighted = head.scale * load<V>(row + j) * edge;
          const auto is_heard = load<V>(at.heard + j) > V{};
          const V x = is_heard ? weighted * kLog2E<T> : splat(-kInfinity<T>);
          store(at.new_edges + j, is_heard ? factor * (edge + weighted) : V{});
          store(row + j, x);
          most = larger<T>(x, most);
        }
        if (new_edge != nullptr) copy_row(new_edge + i * head.nodes + start, at.new_edges, columns);
        const T before = start == 0 ? -kInfinity<T> : largest[r];
        const T now = maximum<T>(larger<T>(most, splat(before)));
        const T base = now == -kInfinity<T> ? static_cast<T>(0) : now;  // nobody heard so far
        V sums{};
        for (int64_t j = 0; j < columns; j += kLanes<T>) {
          const V p = exp2<T>(load<V>(row + j) - base);
          sums += p;
          store(row + j, p);
        }
        const T shrink = exp2<T>(splat(before - base))[0];
        normalizer[r] = start == 0 ? sum<T>(sums) : normalizer[r] * shrink + sum<T>(sums);
        largest[r] = now;
        for (int64_t c = 0; start > 0 && c < at.value_stride; c += kLanes<T>) {
          T* const out = at.total + r * at.value_stride + c;
          store(out, load<V>(out) * shrink);
        }
      }
      multiply_rows(at.planes, at.stride, rows, limits, senders.value_rows + start * at.value_stride, at.value_stride,
                    head.value_dim, at.total, at.value_stride, start > 0);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const bool hears = largest[r] != -kInfinity<T>;
      const T factor = hears ? static_cast<T>(1) / normalizer[r] : static_cast<T>(0);
      T* const out = output.data + (begin + r) * output.stride;
      for (int64_t c = 0; c < head.value_dim; ++c) out[c] = at.total[r * at.value_stride + c] * factor;
      log_normalizer[begin + r] = hears ? largest[r] + log2_of(normalizer[r]) : static_cast<T>(0);
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
};

template <typename T>
int64_t edge_sums_size(const EdgeHead<T>& head) {
  return NodeSums<T>(head, nullptr).size;
}

template <typename T>
void edge_backward(const EdgeHead<T>& head, const T* packed, int64_t begin, int64_t end, T* scratch,
                   Rows<const T> output, Rows<const T> grad_output, Rows<const T> grad_new_edge,
                   const T* log_normalizer, Rows<T> grad_query, T* grad_edge, bool add_edge, T* grad_factor,
                   T* sums_of_senders) {
  using V = Vector<T>;
  const PackedNodes<T> senders(head, true, const_cast<T*>(packed));
  const EdgeScratch<T> at(head, true, scratch);
  const NodeSums<T> sums(head, sums_of_senders);
  T* const attention = at.planes + at.plane_size;
  int64_t limits[kTilePanels], firsts[kTileColumns / kPanel + 1] = {};
  T delta[kTileRows], factor_gradient[kTileRows];

  for (; begin < end; begin += kTileRows) {
    const int64_t rows = smaller_of(kTileRows, end - begin);
    gather_rows(at.queries, at.key_stride, head.query.data, head.query.stride, head.order + begin, rows, head.dim);
    gather_rows(at.grad_output, at.value_stride, grad_output.data, grad_output.stride, head.order + begin, rows,
                head.value_dim);
    for (int64_t r = 0; r < rows; ++r) {
      delta[r] = dot(at.grad_output + r * at.value_stride, output.data + (begin + r) * output.stride, head.value_dim);
      factor_gradient[r] = 0;
    }
    for (int64_t start = 0; start < head.nodes; start += kTileColumns) {
      const int64_t columns = smaller_of(kTileColumns, head.nodes - start), padded = rounded_up(columns, kLanes<T>);
      for (int64_t& limit : limits) limit = columns;
      multiply_across(at.queries, at.key_stride, rows, limits, senders.keys + start * head.dim, head.dim, at.planes,
                      at.stride);
      multiply_across(at.grad_output, at.value_stride, rows, limits, senders.value_across + start * head.value_dim,
                      head.value_dim, attention, at.stride);
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
      multiply_rows(at.planes, at.stride, rows, limits, senders.key_rows + start * at.key_stride, at.key_stride,
                    head.dim, at.total, at.key_stride, start > 0);
      multiply_columns(at.planes, at.stride, rows, firsts, columns, at.queries, at.key_stride, head.dim,
                       sums.key + start * at.key_stride, at.key_stride);
      multiply_columns(attention, at.stride, rows, firsts, columns, at.grad_output, at.value_stride, head.value_dim,
                       sums.value + start * at.value_stride, at.value_stride);
    }
    for (int64_t r = 0; r < rows; ++r) {
      copy_row(grad_query.data + (begin + r) * grad_query.stride, at.total + r * at.key_stride, head.dim);
      if (grad_factor != nullptr) grad_factor[begin + r] = factor_gradient[r];
    }
  }
}

template <typename T>
void edge_finish(const EdgeHead<T>& head, T* sums, int64_t parts, int64_t begin, int64_t end, Rows<T> grad_key,
                 Rows<T> grad_value) {
  const NodeSums<T> total(head, sums);
  add_parts(total.key, padded_width<T>(head.dim), total.size, parts, begin, end, head.order, grad_key, head.dim);
  add_parts(total.value, padded_width<T>(head.value_dim), total.size, parts, begin, end, head.order, grad_value,
            head.value_dim);
}

template <typename T>
constexpr EdgeAttentionKernels<T> edge_attention_kernels() {
  return {kChunk<T>,       edge_packed_size<T>, edge_pack<T>,     edge_scratch<T>,
          edge_forward<T>, edge_sums_size<T>,   edge_backward<T>, edge_finish<T>};
}

}  // namespace
}  // namespace ecore
