// Attention on any dense graph on a CPU (edge_attention.py and Eqs. 4 to 7 have the formulas).
//
// T is float or double. Memory is the caller's. Every result is the same bits whatever the number of threads.
#pragma once

#include <cstdint>

#include "emotion_graph.h"

namespace ecore {

// A [batch or 1, heads or 1, receivers, senders] tensor: strides in elements, 0 where it is shared, 1 over the last.
template <typename T>
struct Matrices {
  T* data;
  int64_t batch, head, row;

  T* of(int64_t b, int64_t k) const { return data == nullptr ? nullptr : data + b * batch + k * head; }
};

template <typename T>
struct EdgeAttention {
  int64_t batch, heads, key_heads, receivers, senders, dim, value_dim;
  Heads<const T> query, key, value;   // of key and value heads / key_heads heads share one
  Matrices<const T> edge;             // null: 1
  Matrices<const uint8_t> neighbors;  // bool; null: all are
  const T* factor;                    // [batch, heads, receivers], of updated edges; null: they are not wanted
  T scale;
  EdgeMore<T> more;        // the same for all heads, except for the members below
  Matrices<const T> bias;  // null: 0
  const T* sender_gate;    // [batch, heads, senders]; null: 1
  // From the forward, [batch, heads, receivers]: the maximum of a row's scores (to base 2) and one over the sum of
  // their powers, which is 0 without neighbours.
  T *maximum, *inverse;
};

// new_edge: [batch, heads, receivers, senders], or null.
template <typename T>
void edge_attention_forward(const EdgeAttention<T>& call, Heads<T> output, T* new_edge, int threads);

// A gradient that is shared: [batches, heads, receivers, senders], these 1 or those of the call. Null: not wanted.
template <typename T>
struct SharedMatrices {
  T* data;
  int64_t batches, heads;
};

// Data is null for gradients that are not wanted.
template <typename T>
struct EdgeAttentionGradients {
  Heads<T> query, key, value;  // each head's own
  SharedMatrices<T> edge, bias;
  T* factor;       // [batch, heads, receivers]
  T* sender_gate;  // [batch, heads, senders]
};

// grad_new_edge's data may be null, and grad_lse [batch, heads, receivers]: zero.
template <typename T>
void edge_attention_backward(const EdgeAttention<T>& call, Heads<const T> output, Heads<const T> grad_output,
                             Matrices<const T> grad_new_edge, const T* grad_lse,
                             const EdgeAttentionGradients<T>& gradients, int threads);

}  // namespace ecore
