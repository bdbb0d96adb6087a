// Attention on the emotion graph on a CPU (graph.py, graph_attention.py and docs/kernels.md have the formulas): lists
// the nodes that take part, splits the work among threads and calls the kernels of the machine's instruction set.
//
// T is float or double. Memory is the caller's. Every result is the same bits whatever the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "emotion_graph.h"

namespace ecore {

// Results of the forward that only the backward reads: [batch, resolutions, nodes] each, by place, and [batch,
// resolutions, 2].
template <typename T>
struct SavedOrder {
  T* maximum;       // of every receiver's scores, to base 2
  T* inverse;       // one over the sum of their powers
  T* weight;        // E0 of the edges that the nodes that take part send to words
  int32_t* order;   // those nodes: [CLS], emotions, words
  int32_t* counts;  // emotions and nodes that take part
};

template <typename T>
struct GraphAttention {
  EmotionGraph<T> graph;
  std::vector<Heads<const T>> queries, keys;  // the layer's own, then the history's
  Heads<const T> value;
  int64_t dim, value_dim;
  const T* row_factor;  // [batch, resolutions, nodes], or null
  T scale;
  bool words_only;
  SavedOrder<T> saved;
};

template <typename T>
void graph_attention_forward(const GraphAttention<T>& call, Heads<T> output, int threads);

// Data is null for gradients that are not wanted.
template <typename T>
struct GraphAttentionGradients {
  std::vector<Heads<T>> queries, keys;
  Heads<T> value;
  T* row_factor;      // [batch, resolutions, nodes]
  T* emotion_weight;  // [batch, resolutions, emotions]: to be added up over resolutions
  T* correlation;     // [batch, resolutions, emotions, emotions]: likewise, and over the batch if it is shared
};

template <typename T>
void graph_attention_backward(const GraphAttention<T>& call, Heads<const T> output, Heads<const T> grad_output,
                              const GraphAttentionGradients<T>& gradients, int threads);

}  // namespace ecore
