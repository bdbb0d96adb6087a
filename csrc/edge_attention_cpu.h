// Attention on any dense graph on a CPU (edge_attention.py and Eqs. 4 to 7 say what is computed).
//
// T is float or double. Memory is the caller's. Every result is the same bits whatever the number of threads.
#pragma once

#include <cstdint>

#include "emotion_graph.h"

namespace ecore {

// A [batch or 1, resolutions or 1, nodes, nodes] tensor: strides in elements, 0 where it is shared, 1 over the last.
template <typename T>
struct Matrices {
  T* data;
  int64_t batch, head, row;

  T* of(int64_t b, int64_t k) const { return data == nullptr ? nullptr : data + b * batch + k * head; }
};

template <typename T>
struct EdgeAttention {
  int64_t batch, resolutions, nodes, dim, value_dim;
  Heads<const T> query, key, value;
  Matrices<const T> edge;
  Matrices<const uint8_t> neighbors;  // bool; null: all are
  const T* factor;                    // [batch, resolutions, nodes], of updated edges; null: none are wanted
  T scale;
  // By the forward, [batch, resolutions, nodes]: the maximum of a row's scores (to base 2) and one over the sum of
  // their powers, which is 0 without neighbours.
  T *maximum, *inverse;
};

// new_edge: [batch, resolutions, nodes, nodes], or null.
template <typename T>
void edge_attention_forward(const EdgeAttention<T>& call, Heads<T> output, T* new_edge, int threads);

// Data is null for those that are not wanted.
template <typename T>
struct EdgeAttentionGradients {
  Heads<T> query, key, value;
  T* edge;          // [batches, heads, nodes, nodes]
  int64_t batches;  // of edges: batch or 1
  int64_t heads;    // resolutions or 1
  T* factor;        // [batch, resolutions, nodes]
};

// grad_new_edge's data may be null: zero.
template <typename T>
void edge_attention_backward(const EdgeAttention<T>& call, Heads<const T> output, Heads<const T> grad_output,
                             Matrices<const T> grad_new_edge, const EdgeAttentionGradients<T>& gradients, int threads);

}  // namespace ecore
