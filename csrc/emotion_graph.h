// The emotion graph as the CPU operators get it, and the nodes of each (b, k) that take part (graph.py).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace ecore {

// A [batch, resolutions, nodes, d] tensor: strides in elements, 1 over the last dimension.
template <typename T>
struct Heads {
  T* data;
  int64_t batch, head, row;
};

template <typename T>
struct EmotionGraph {
  int64_t batch, resolutions, words, emotions;
  const uint8_t* word_mask;     // [batch, resolutions, words], bool
  const uint8_t* emotion_mask;  // [batch, emotions], bool; null: all take part
  const T* word_weight;         // [batch, words]; null where the nodes are not listed, or not for words
  const T* emotion_weight;      // [batch, emotions]; null where the nodes are not listed
  const T* correlation;         // [emotions, emotions] of every batch, correlation_stride apart
  int64_t correlation_stride;

  int64_t nodes() const { return words + emotions; }
  int64_t pairs() const { return batch * resolutions; }
  bool takes_part(int64_t pair, int64_t node) const {
    if (node == 0) return true;
    if (node < words) return word_mask[pair * words + node] != 0;
    return emotion_mask == nullptr || emotion_mask[pair / resolutions * emotions + node - words] != 0;
  }
};

template <typename T>
Rows<T> rows_of(const Heads<T>& tensor, int64_t batch, int64_t head) {
  if (tensor.data == nullptr) return {nullptr, 0};
  return {tensor.data + batch * tensor.batch + head * tensor.head, tensor.row};
}

template <typename T>
std::vector<Rows<T>> rows_of(const std::vector<Heads<T>>& tensors, int64_t batch, int64_t head) {
  std::vector<Rows<T>> rows;
  for (const Heads<T>& tensor : tensors) rows.push_back(rows_of(tensor, batch, head));
  return rows;
}

// Lists the nodes of a (b, k) that take part: [CLS], then the emotions, then the words; with the E0 of the edges that
// they send to words. order and weight are [nodes], and zero where the list has ended; counts are of emotions and of
// all.
template <typename T>
void list_nodes(const EmotionGraph<T>& graph, int64_t pair, int32_t* order, T* weight, int32_t* counts) {
  const int64_t batch = pair / graph.resolutions;
  int32_t count = 0;
  const auto append = [&](int64_t node, T its_weight) {
    order[count] = static_cast<int32_t>(node);
    weight[count++] = its_weight;
  };
  append(0, 1);
  for (int64_t j = 0; j < graph.emotions; ++j) {
    if (graph.takes_part(pair, graph.words + j)) {
      append(graph.words + j, graph.emotion_weight[batch * graph.emotions + j]);
    }
  }
  counts[0] = count - 1;
  for (int64_t j = 1; j < graph.words; ++j) {
    if (!graph.takes_part(pair, j)) continue;
    append(j, graph.word_weight == nullptr ? static_cast<T>(0) : graph.word_weight[batch * graph.words + j]);
  }
  counts[1] = count;
  std::fill(order + count, order + graph.nodes(), 0);
  std::fill(weight + count, weight + graph.nodes(), static_cast<T>(0));
}

// Zeroes the rows, of `width` elements, of those nodes begin ... end - 1 that take no part; nothing where data is null.
template <typename T>
void zero_absent(const EmotionGraph<T>& graph, int64_t pair, int64_t begin, int64_t end, Rows<T> rows, int64_t width) {
  if (rows.data == nullptr) return;
  for (int64_t node = begin; node < end; ++node) {
    if (!graph.takes_part(pair, node)) std::fill_n(rows.data + node * rows.stride, width, static_cast<T>(0));
  }
}

// Zeroes the rows of all nodes begin ... end - 1.
template <typename T>
void zero_all(int64_t begin, int64_t end, Rows<T> rows, int64_t width) {
  for (int64_t node = begin; node < end; ++node) {
    std::fill_n(rows.data + node * rows.stride, width, static_cast<T>(0));
  }
}

}  // namespace ecore
