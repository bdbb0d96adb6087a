// The end of a linear layer whose outputs go through a ReLU: bias and ReLU in one pass over the product, and in one
// pass over the gradient its mask and the bias's gradient.
#pragma once

#include <cstdint>

namespace ecore {

// outputs [rows, size] <- max(outputs + bias, 0); NaN stays.
template <typename T>
void bias_relu(int64_t rows, int64_t size, const T* bias, T* outputs, int threads);

// `masked` <- `gradient` where the output is not 0 (NaN counts as such), else 0; `of_bias` [size] <- its sum over rows,
// unless it is null.
template <typename T>
void bias_relu_backward(int64_t rows, int64_t size, const T* gradient, const T* outputs, T* masked, T* of_bias,
                        int threads);

}  // namespace ecore
