// A linear layer for few rows on a CPU, with weights of few bits or as they are: then reading the weights takes the
// time.
//
// W is int8_t (with a scale for each output; activations are rounded to 16 bits, each row relative to its largest
// number) uint16_t (bfloat16; activations are float) or float. Results are the same bits whatever the number of
// threads.
#pragma once

#include <cstdint>

#include "simd/kernels.h"

namespace ecore {

// x, [rows, inputs], rows x_stride apart; output [rows, outputs], contiguous.
template <typename W>
void quantized_linear(const QuantizedLayer<W>& layer, const float* x, int64_t rows, int64_t x_stride, float* output,
                      int threads);

// For each row the place of the largest output that is not among its `forbidden` [rows, forbidden_count] (numbers that
// are no place are ignored), the first of equal ones, and that output: NaN if one of the row's outputs is NaN or
// infinity.
template <typename W>
void quantized_linear_argmax(const QuantizedLayer<W>& layer, const float* x, int64_t rows, int64_t x_stride,
                             const int64_t* forbidden, int64_t forbidden_count, int64_t* place, float* largest,
                             int threads);

}  // namespace ecore
