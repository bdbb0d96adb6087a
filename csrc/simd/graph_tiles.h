// Attention on the emotion graph, one (b, k) at a time: receivers and packed senders of a tile, and its edges, for both
// directions. Included only by table.h; see vectors.h, and docs/kernels.md for the gradients.
//
// With u^m = 1 + scale q^m_i . k^m_j of the layers before, an edge is E = E0 r u^1 ... u^L, its score s = scale q_i .
// k_j, and a row's attention softmax(s E). A tile is kTileRows receivers by up to kTileColumns senders, in planes
// [rows, tile_stride]: plane 0 for s, planes 1 ... L for u, and in the backward one more.
//
// A tile also holds pairs that are no neighbours. They are set to 0, and products include them. If an operand is not
// finite, so that 0 times it is not 0, multiply_heard_rows and _columns replace the sweeps.
#pragma once

#include "kernels.h"
#include "products.h"

namespace ecore {
namespace {

// The receivers of a head in their order: emotions, words, [CLS]; with words_only no emotions.
template <typename T>
struct Receivers {
  int64_t skipped, count, senders, emotion_count;

  explicit Receivers(const GraphHead<T>& head)
      : skipped(head.words_only ? head.emotion_count : 0),
        count(head.count - skipped),
        senders(head.count),
        emotion_count(head.emotion_count) {}
  int64_t place(int64_t receiver) const { return receiver == count - 1 ? 0 : receiver + 1 + skipped; }
  // The number of places, from the first, that a receiver hears; an emotion's own place is counted, though it does not
  // hear itself.
  int64_t heard(int64_t receiver) const {
    return receiver == count - 1 ? senders : larger_of(emotion_count + 1, place(receiver) + 1);
  }
  bool is_emotion(int64_t receiver) const { return receiver < emotion_count - skipped; }
  // The first receiver that hears a place; all later ones hear it too.
  int64_t first(int64_t place) const { return place <= emotion_count ? 0 : place - 1 - skipped; }
};

// The senders of a head, packed.
template <typename T>
struct PackedSenders {
  T* weight;         // [padded count]
  T* keys;           // [1 + depth], each across
  T* value_across;   // backward: across
  int32_t* numbers;  // [count]: 0, 1, 2, ...
  T* value_copy;     // forward
  T* key_copies;     // backward: [1 + depth]
  int64_t across_size, copy_size, size;

  PackedSenders(const GraphHead<T>& head, int64_t nodes, bool backward, T* packed) {
    const int64_t padded = rounded_up(nodes, kChunk<T>);
    across_size = rounded_up(padded * head.dim, kChunk<T>);
    copy_size = ecore::copy_size<T>(nodes, head.dim);
    Carver<T> carver(packed);
    weight = carver.take(padded);
    keys = carver.take((1 + head.depth) * across_size);
    value_across = backward ? carver.take(padded * head.value_dim) : nullptr;
    numbers = reinterpret_cast<int32_t*>(carver.take(nodes));
    value_copy = backward ? nullptr : carver.take(ecore::copy_size<T>(nodes, head.value_dim));
    key_copies = backward ? carver.take((1 + head.depth) * copy_size) : nullptr;
    size = carver.used();
  }
};

template <typename T>
int64_t graph_packed_size(const GraphHead<T>& head, int64_t nodes, bool backward) {
  return PackedSenders<T>(head, nodes, backward, nullptr).size;
}

template <typename T>
void graph_pack(const GraphHead<T>& head, bool backward, int64_t begin, int64_t end, T* packed) {
  const PackedSenders<T> to(head, head.count, backward, packed);
  const int32_t* const nodes = head.order + begin;
  copy_row(to.weight + begin, head.weight + begin, end - begin);
  for (int64_t j = end; j < rounded_up(end, kLanes<T>); ++j) to.weight[j] = 0;
  for (int64_t j = begin; j < end; ++j) to.numbers[j] = static_cast<int32_t>(j);
  for (int64_t m = 0; m <= head.depth; ++m) {
    const Rows<const T>& key = head.keys[m];
    pack_across(to.keys + m * to.across_size, key.data, key.stride, head.order, begin, end, head.dim);
    if (backward) {
      load_copy(to.key_copies + m * to.copy_size + begin * padded_width<T>(head.dim), key, nodes, end - begin,
                head.dim);
    }
  }
  const Rows<const T>& value = head.value;
  if (backward) {
    pack_across(to.value_across, value.data, value.stride, head.order, begin, end, head.value_dim);
  } else {
    load_copy(to.value_copy + begin * padded_width<T>(head.value_dim), value, nodes, end - begin, head.value_dim);
  }
}

// The receivers of one tile.
template <typename T>
struct TileRows {
  int64_t count;  // at most kTileRows
  int32_t nodes[kTileRows];
  int64_t places[kTileRows];
  int64_t heard[kTileRows];
  int64_t longest;  // of heard: the last

  TileRows(const GraphHead<T>& head, int64_t begin, int64_t end) : count(smaller_of(kTileRows, end - begin)) {
    const Receivers<T> receivers(head);
    for (int64_t r = 0; r < count; ++r) {
      places[r] = receivers.place(begin + r);
      nodes[r] = head.order[places[r]];
      heard[r] = receivers.heard(begin + r);
    }
    longest = heard[count - 1];
  }
  // True if a receiver hears a place.
  bool hears(const GraphHead<T>& head, int64_t r, int64_t place) const {
    return place < heard[r] && (nodes[r] < head.words || place != places[r]);
  }
  // For each panel, the most columns that its rows hear in the tile that begins at place `start`.
  void limits(int64_t start, int64_t* panels) const {
    for (int64_t r = 0; r < count; r += kPanel) {
      const int64_t last = smaller_of(r + kPanel, count) - 1;
      panels[r / kPanel] = larger_of(0, smaller_of(heard[last] - start, kTileColumns));
    }
  }
};

// E0 of the edges that an emotion hears, by place, up to whole vectors; 0 for the emotion itself.
template <typename T>
void emotion_edges(const GraphHead<T>& head, int64_t receiver_node, T* edges) {
  const T* const row = head.correlation + (receiver_node - head.words) * head.emotions;
  edges[0] = 1;
  for (int64_t j = 1; j <= head.emotion_count; ++j) {
    edges[j] = head.order[j] == receiver_node ? static_cast<T>(0) : row[head.order[j] - head.words];
  }
  for (int64_t j = head.emotion_count + 1; j < rounded_up(head.emotion_count + 1, kLanes<T>); ++j) edges[j] = 0;
}

template <typename T>
T factor_of_row(const GraphHead<T>& head, int64_t node) {
  return head.row_factor == nullptr ? static_cast<T>(1) : head.row_factor[node];
}

// E0 u^1 ... u^depth from the products of queries and keys in planes 1 ... depth; if kKeep, those become the u, and
// `before` gets the edge before each of them.
template <bool kKeep, typename T>
inline Vector<T> grown_edge(T* row, int64_t plane_size, int64_t depth, T scale, Vector<T> edge, T* before) {
  using V = Vector<T>;
  for (int64_t m = 1; m <= depth; ++m) {
    T* const at = row + m * plane_size;
    const V u = multiply_add(splat(scale), load<V>(at), splat(static_cast<T>(1)));
    if (kKeep) {
      store(before + (m - 1) * kLanes<T>, edge);
      store(at, u);
    }
    edge *= u;
  }
  return edge;
}

// Scores s E log2(e) of one row in plane 0, from the products of queries and keys in planes 0 ... depth; -infinity from
// column `heard` on, up to whole vectors.
template <typename T>
void weigh_scores(T* row, int64_t plane_size, int64_t depth, int64_t heard, const T* edges, T factor, T scale) {
  using V = Vector<T>;
  const T whole_scale = scale * kLog2E<T> * factor;
  for (int64_t j = 0; j < heard; j += kLanes<T>) {
    const V edge = grown_edge<false, T>(row + j, plane_size, depth, scale, load<V>(edges + j), nullptr);
    store(row + j, score<T>(whole_scale, load<V>(row + j), edge));
  }
  for (int64_t j = heard; j < rounded_up(heard, kLanes<T>); ++j) row[j] = -kInfinity<T>;
}

template <typename T>
void fill_zero(T* row, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) row[j] = 0;
}

}  // namespace
}  // namespace ecore
