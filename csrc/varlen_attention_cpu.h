// Attention inside sequences of different lengths on a CPU, their rows one after the other (varlen_attention.py).
//
// T is float or double. Memory is the caller's. Every result is the same bits whatever the number of threads.
#pragma once

#include <cstdint>

#include "simd/kernels.h"

namespace ecore {

template <typename T>
struct VarlenAttention {
  int64_t sequences, heads, key_heads, rows, key_rows, dim, value_dim;  // heads / key_heads heads share keys and values
  const int64_t *begin, *key_begin;  // [sequences + 1]: where a sequence's queries, and its keys and values, begin
  PerHead<const T> query, key, value;
  T scale;
  bool causal;           // a query hears no key that comes later in its sequence
  T *maximum, *inverse;  // from the forward, [heads, rows]: as for edge_attention
};

// Throws std::invalid_argument unless the begins are those of sequences that cover all rows.
template <typename T>
void check_sequences(const VarlenAttention<T>& call);

template <typename T>
void varlen_attention_forward(const VarlenAttention<T>& call, PerHead<T> output, int threads);

// Data of gradients is null for those that are not wanted.
template <typename T>
void varlen_attention_backward(const VarlenAttention<T>& call, PerHead<const T> output, PerHead<const T> grad_output,
                               PerHead<T> grad_query, PerHead<T> grad_key, PerHead<T> grad_value, int threads);

}  // namespace ecore
