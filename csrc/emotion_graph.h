// The emotion graph as the CPU operators take it, and the nodes of each (b, k) that take part (graph.py).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "huge_pages.h"
#include "simd/kernels.h"

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
  if (tensor.data == nullptr) return {nullptr, 0};  // a result that is not wanted
  return {tensor.data + batch * tensor.batch + head * tensor.head, tensor.row};
}

template <typename T>
std::vector<Rows<T>> rows_of(const std::vector<Heads<T>>& tensors, int64_t batch, int64_t head) {
  std::vector<Rows<T>> rows;
  for (const Heads<T>& tensor : tensors) rows.push_back(rows_of(tensor, batch, head));
  return rows;
}

// advise_huge_pages() for a result [batch, resolutions, nodes, width].
template <typename T>
void advise_huge_pages(const EmotionGraph<T>& graph, const Heads<T>& result, int64_t nodes, int64_t width) {
  const int64_t last =
      (graph.batch - 1) * result.batch + (graph.resolutions - 1) * result.head + (nodes - 1) * result.row;
  advise_huge_pages(result.data, (last + width) * static_cast<int64_t>(sizeof(T)));
}

// Lists the nodes of a (b, k) that take part: [CLS], then the emotions, then the words; with the E0 of the edges that
// they send to words. order and weight are [nodes], and zero after the end of the list; counts are of emotions and of
// all listed nodes.
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

// The most nodes that take part in any (b, k).
template <typename T>
int64_t most_participants(const EmotionGraph<T>& graph) {
  int64_t most = 0;
  for (int64_t pair = 0; pair < graph.pairs(); ++pair) {
    int64_t count = 0;
    for (int64_t node = 0; node < graph.nodes(); ++node) count += graph.takes_part(pair, node) ? 1 : 0;
    most = std::max(most, count);
  }
  return most;
}

// The rows of a result that no kernel writes, since their nodes take no part. An object zeroes one (b, k)'s share of
// them, or one of `pieces` of that share.
//
// On real masks they are nearly all rows, so they are zeroed in the longest runs that are contiguous in memory. If
// heads lie side by side, a word that takes part in no resolution is one run over all heads; a (b, k)'s share is then a
// range of nodes in all resolutions, otherwise its own rows.
template <typename T>
class IdleRows {
 public:
  // The rows of nodes 0 ... nodes - 1 that take no part, and of all nodes in idle_begin ... idle_end - 1.
  IdleRows(const EmotionGraph<T>& graph, int64_t pair, int64_t piece, int64_t pieces, int64_t nodes,
           int64_t idle_begin = 0, int64_t idle_end = 0)
      : graph_(graph),
        pair_(pair),
        head_(pair % graph.resolutions),
        piece_(piece),
        pieces_(pieces),
        nodes_(nodes),
        idle_begin_(idle_begin),
        idle_end_(idle_end) {}

  // Zeroes them in a result whose rows have `width` elements; does nothing if its data is null.
  void zero(const Heads<T>& result, int64_t width) {
    if (result.data == nullptr) return;
    const int64_t resolutions = graph_.resolutions;
    const bool side_by_side = resolutions > 1 && result.head == width && result.row == resolutions * width;
    std::vector<Run>& runs = side_by_side ? across_ : own_;
    if (runs.empty()) find_runs(side_by_side, &runs);
    T* const data = result.data + pair_ / resolutions * result.batch + (side_by_side ? 0 : head_ * result.head);
    for (const Run& run : runs) {
      if (side_by_side || result.row == width) {
        std::fill_n(data + run.begin * width, (run.end - run.begin) * width, static_cast<T>(0));
      } else {
        for (int64_t node = run.begin; node < run.end; ++node) {
          std::fill_n(data + node * result.row, width, static_cast<T>(0));
        }
      }
    }
  }

 private:
  struct Run {
    int64_t begin, end;  // rows, counted as they lie in memory
  };

  bool idle(int64_t pair, int64_t node) const {
    return (node >= idle_begin_ && node < idle_end_) || !graph_.takes_part(pair, node);
  }

  void find_runs(bool side_by_side, std::vector<Run>* runs) const {
    const int64_t heads = side_by_side ? graph_.resolutions : 1;
    const int64_t first_pair = side_by_side ? pair_ - head_ : pair_;
    const int64_t shares = heads * pieces_, share = side_by_side ? head_ * pieces_ + piece_ : piece_;
    for (int64_t node = nodes_ * share / shares; node < nodes_ * (share + 1) / shares; ++node) {
      for (int64_t head = 0; head < heads; ++head) {
        if (!idle(first_pair + head, node)) continue;
        const int64_t row = node * heads + head;
        if (!runs->empty() && runs->back().end == row) {
          ++runs->back().end;
        } else {
          runs->push_back({row, row + 1});
        }
      }
    }
  }

  const EmotionGraph<T>& graph_;
  const int64_t pair_, head_, piece_, pieces_, nodes_, idle_begin_, idle_end_;
  std::vector<Run> across_, own_;
};

}  // namespace ecore
