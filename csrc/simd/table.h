// Defines the table of one instruction set's kernels. Included only by baseline.cpp, avx2.cpp and avx512.cpp, which
// name it.
#pragma once

#include "dropout_add_layer_norm.h"
#include "edge_attention.h"
#include "edge_readout.h"
#include "graph_attention.h"
#include "quantized_linear.h"
#include "softmax_rows.h"
#include "sparse_attention.h"

namespace ecore {

const Simd ECORE_SIMD_TABLE = {ECORE_SIMD_NAME,
                               graph_attention_kernels<float>(),
                               graph_attention_kernels<double>(),
                               edge_readout_kernels<float>(),
                               edge_readout_kernels<double>(),
                               edge_attention_kernels<float>(),
                               edge_attention_kernels<double>(),
                               sparse_attention_kernels<float>(),
                               sparse_attention_kernels<double>(),
                               softmax_rows_kernels<float>(),
                               softmax_rows_kernels<double>(),
                               dropout_add_layer_norm_kernels<float>(),
                               dropout_add_layer_norm_kernels<double>(),
                               quantized_linear_kernels<int8_t>(),
                               quantized_linear_kernels<uint16_t>(),
                               quantized_linear_kernels<float>()};

}  // namespace ecore
