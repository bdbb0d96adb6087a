// Attention over a sparse graph on a CPU (sparse_attention.py has the formulas).
//
// T is float or double. Memory is the caller's. Every result is the same bits whatever the number of threads.
#pragma once

#include "simd/kernels.h"

namespace ecore {

template <typename T>
void sparse_attention_forward(const SparseAttention<T>& call, T* output, int threads);

// grad_score: [edges, heads], written for the senders' part and as the gradient of the bias.
template <typename T>
void sparse_attention_backward(const SparseAttention<T>& call, PerHead<const T> grad_output, T* grad_score,
                               const SparseGradients<T>& gradients, int threads);

}  // namespace ecore
