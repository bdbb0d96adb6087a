// Tiles of attention on any dense graph: packed senders, scratch memory, and the loaded values of a row. Included only
// by edge_forward.h and edge_backward.h; see edge_attention.h.
#pragma once

#include "kernels.h"
#include "philox_vectors.h"
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
    const int64_t padded = rounded_up(head.senders, kChunk<T>);
    Carver<T> carver(packed);
    keys = carver.take(padded * head.dim);
    value_across = backward ? carver.take(padded * head.value_dim) : nullptr;
    copy = carver.take(copy_size<T>(head.senders, backward ? head.dim : head.value_dim));
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
  T* biases;       // these five only for heads that are not plain: of a row, 0 without a bias
  T* gates;        // of a row's senders, 1 without
  T* updated;      // of a row: 1 for pairs whose edges are updated, else 0
  T* kept;         // of a row: factors of the weights under dropout
  T* grad_biases;  // backward: of a row, or a plane
  T* new_edges;    // of a row: forward, their values; backward, their gradients
  T* attention;    // backward: of a row
  T* grad_edges;   // backward: of a row, or a plane
  int64_t stride, plane_size, size;

  EdgeScratch(const EdgeHead<T>& head, bool backward, T* scratch) {
    stride = tile_stride<T>(head.senders);
    plane_size = kTileRows * stride;
    Carver<T> carver(scratch);
    planes = carver.take((backward ? 2 : 1) * plane_size);
    queries = backward ? carver.take(copy_size<T>(kTileRows, head.dim)) : nullptr;
    total = carver.take(backward ? copy_size<T>(kTileRows, head.dim) : kTileRows * padded_width<T>(head.value_dim));
    grad_output = backward ? carver.take(copy_size<T>(kTileRows, head.value_dim)) : nullptr;
    edges = carver.take(stride);
    heard = carver.take(stride);
    const int64_t more = head.more.plain ? 0 : stride;
    biases = carver.take(more);
    gates = carver.take(more);
    updated = carver.take(more);
    kept = carver.take(more);
    grad_biases = carver.take(backward && head.more.bias != nullptr ? plane_size : 0);
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

// Loads the values that all rows of a tile share: zeros beyond the last column, gates, and defaults for inputs that the
// call does not have.
template <typename T>
void load_common(const EdgeHead<T>& head, int64_t start, int64_t columns, const EdgeScratch<T>& at) {
  const int64_t padded = rounded_up(columns, kLanes<T>);
  const auto fill = [&](T* to, int64_t begin, int64_t end, T value) {
    for (int64_t j = begin; j < end; ++j) to[j] = value;
  };
  fill(at.edges, columns, padded, 0);
  fill(at.heard, columns, padded, 0);
  if (head.edge == nullptr) fill(at.edges, 0, columns, 1);
  if (head.neighbors == nullptr) fill(at.heard, 0, columns, 1);
  const EdgeMore<T>& more = head.more;
  if (more.plain) return;
  fill(at.biases, more.bias == nullptr ? 0 : columns, padded, 0);
  fill(at.gates, columns, padded, 0);
  fill(at.updated, columns, padded, 0);
  if (more.sender_gate == nullptr) {
    fill(at.gates, 0, columns, 1);
  } else {
    copy_row(at.gates, more.sender_gate + start, columns);
  }
  if (more.all_pairs || head.neighbors == nullptr) fill(at.updated, 0, columns, 1);
  if (!more.drops) fill(at.kept, 0, padded, 1);
}

// kept[j] = more.kept_weight where the weight of the row and of column start + j is kept, else 0; `padded` of them.
template <typename T>
inline void keep_weights(const EdgeMore<T>& more, int64_t row, int64_t start, int64_t padded, T* kept) {
  for (int64_t begin = 0; begin < padded; begin += kDrawn) {
    uint32_t columns[kDrawn], words[kDrawn];
    uint32_t* const out[] = {words};
    for (int64_t i = 0; i < kDrawn; ++i) columns[i] = static_cast<uint32_t>(start + begin + i);
    draw_words<1>(more.seed, columns, static_cast<uint32_t>(row), more.pair, 0, out);
    const int64_t count = smaller_of(kDrawn, padded - begin);
    for (int64_t i = 0; i < count; ++i) {
      kept[begin + i] = words[i] >= more.least_kept ? more.kept_weight : static_cast<T>(0);
    }
  }
}

template <typename T>
bool is_neighbor(const EdgeHead<T>& head, int64_t i, int64_t j) {
  if (head.causal && j > i) return false;
  return head.neighbors == nullptr || head.neighbors[i * head.neighbors_row + j] != 0;
}

// How many of all senders a tile of receivers hears at most.
template <typename T>
int64_t heard_senders(const EdgeHead<T>& head, int64_t begin, int64_t rows) {
  return head.causal ? smaller_of(head.senders, begin + rows) : head.senders;
}

// Of `columns` senders from `start` on: how many each panel of a tile's rows reads. A panel that hears fewer reads some
// more, so that a product over columns finds zeros beside the last that is heard.
template <typename T>
void limit_columns(const EdgeHead<T>& head, int64_t begin, int64_t start, int64_t columns, int64_t* limits) {
  for (int64_t panel = 0; panel < kTilePanels; ++panel) {
    const int64_t heard = begin + (panel + 2) * kPanel - start;
    limits[panel] = head.causal ? smaller_of(columns, heard) : columns;
  }
}

// Loads a row's edges and neighbours in the columns of a tile, and for heads that are not plain its other values. Those
// that all rows share come from load_common().
template <typename T>
void load_edges(const EdgeHead<T>& head, int64_t row, int64_t start, int64_t columns, const EdgeScratch<T>& at) {
  if (head.edge != nullptr) copy_row(at.edges, head.edge + row * head.edge_row + start, columns);
  if (head.causal) {
    for (int64_t j = 0; j < columns; ++j) at.heard[j] = static_cast<T>(is_neighbor(head, row, start + j));
  } else if (head.neighbors != nullptr) {
    const uint8_t* const neighbors = head.neighbors + row * head.neighbors_row + start;
    for (int64_t j = 0; j < columns; ++j) at.heard[j] = static_cast<T>(neighbors[j]);
  }
  const EdgeMore<T>& more = head.more;
  if (more.plain) return;
  if (more.bias != nullptr) copy_row(at.biases, more.bias + row * more.bias_row + start, columns);
  if (!more.all_pairs && head.neighbors != nullptr) copy_row(at.updated, at.heard, columns);
  if (more.drops) keep_weights(more, row, start, rounded_up(columns, kLanes<T>), at.kept);
}

// What the softmax of a tile will read of the caller's matrices, fetched while the products before it are computed,
// where a row of the tile is a piece of a longer row: too short a piece for the hardware to foresee the next.
template <typename T>
class EdgesAhead {
 public:
  EdgesAhead(const EdgeHead<T>& head, int64_t begin, int64_t rows, int64_t start, int64_t columns,
             const Rows<const T>& grad_new_edge = {}) {
    int64_t tensors = 0;
    const auto add = [&](const T* data, int64_t stride) {
      if (data != nullptr && stride != columns) rows_[tensors++] = {data + start, stride};
    };
    add(head.edge, head.edge_row);
    add(head.more.plain ? nullptr : head.more.bias, head.more.bias_row);
    add(grad_new_edge.data, grad_new_edge.stride);
    const int64_t products = (columns + kChunk<T> - 1) / kChunk<T> * ((rows + kPanel - 1) / kPanel);
    const int64_t a_step = (tensors * rows + products - 1) / products;
    ahead_ = {rows_, tensors, head.order + begin, rows, columns, a_step, 0, 0};
  }
  Ahead<T>* get() { return &ahead_; }

 private:
  Rows<const T> rows_[3];
  Ahead<T> ahead_;
};

template <typename T>
inline Vector<T> clamped(Vector<T> x, T low, T high) {  // NaN stays NaN
  x = x < splat(low) ? splat(low) : x;
  return x > splat(high) ? splat(high) : x;
}

// Logarithms to base 2 of a softmax's terms, from the products of queries and keys in the vector at `j` of a row. Both
// directions use this function.
template <typename T>
inline Vector<T> logit(const EdgeHead<T>& head, const EdgeScratch<T>& at, int64_t j, T whole_scale, Vector<T> product) {
  using V = Vector<T>;
  const V edge = load<V>(at.edges + j);
  if (head.more.plain) return score<T>(whole_scale, product, edge);
  const V of_edge = clamped<T>(whole_scale * product, head.more.low * kLog2E<T>, head.more.high * kLog2E<T>) * edge;
  return multiply_add(load<V>(at.biases + j), splat(kLog2E<T>), of_edge * load<V>(at.gates + j));
}
}  // namespace
}  // namespace ecore
