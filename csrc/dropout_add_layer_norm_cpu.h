// sum = residual + dropout(x), normed = LayerNorm(sum) * weight + bias: one pass over memory each way.
//
// Rows are contiguous, [rows, size]. The mask is not stored: element (row, column) is kept where word column % 4 of the
// counter (column / 4, row mod 2^32, row / 2^32, 0) is at least `threshold` (philox.h), in both directions.
#pragma once

#include <cstdint>

namespace ecore {

template <typename T>
struct DropoutAddLayerNorm {
  int64_t rows, size;
  const uint64_t* seed;  // null: nothing is dropped
  uint64_t threshold;    // round(p 2^32)
  T scale;               // of what is kept
  const T* weight;       // [size]
};

// mean and inverse: [rows], the mean of each row's sum and one over its standard deviation.
template <typename T>
void dropout_add_layer_norm_forward(const DropoutAddLayerNorm<T>& call, const T* x, const T* residual, const T* bias,
                                    double eps, T* normed, T* sum, T* mean, T* inverse, int threads);

// Gradients that are read may be null: zero. Those that are written may be null: not wanted.
template <typename T>
struct DropoutAddLayerNormGradients {
  const T* normed;
  const T* sum;
  T* x;
  T* residual;
  T* weight;
  T* bias;
};

template <typename T>
void dropout_add_layer_norm_backward(const DropoutAddLayerNorm<T>& call, const T* sum, const T* mean, const T* inverse,
                                     const DropoutAddLayerNormGradients<T>& gradients, int threads);

}  // namespace ecore
