// Driver of csrc/simd/dropout_add_layer_norm.h.
#include "dropout_add_layer_norm_cpu.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "simd/choice.h"
#include "thread_pool.h"

namespace ecore {
namespace {

// Gradients of weight and bias are sums over rows. The parts do not depend on the number of threads, so the bits do
// not.
constexpr int64_t kRowsPerPart = 32;

template <typename T>
const DropoutAddLayerNormKernels<T>& kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return simd().dropout_add_layer_norm_float;
  } else {
    return simd().dropout_add_layer_norm_double;
  }
}

template <typename T>
DropoutRow<T> row_of(const DropoutAddLayerNorm<T>& call, int64_t row) {
  return {row, call.size, call.seed != nullptr, call.seed == nullptr ? 0 : *call.seed, call.threshold, call.scale};
}

template <typename T>
T* at(T* rows, int64_t offset) {
  return rows == nullptr ? nullptr : rows + offset;
}

}  // namespace

template <typename T>
void dropout_add_layer_norm_forward(const DropoutAddLayerNorm<T>& call, const T* x, const T* residual, const T* bias,
                                    double eps, T* normed, T* sum, T* mean, T* inverse, int threads) {
  const DropoutAddLayerNormKernels<T>& kernel = kernels<T>();
  parallel_for(call.rows, kRowsPerPart, threads, [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      const int64_t offset = row * call.size;
      kernel.forward(row_of(call, row), x + offset, residual + offset, call.weight, bias, static_cast<T>(eps),
                     normed + offset, sum + offset, mean + row, inverse + row);
    }
  });
}

template <typename T>
void dropout_add_layer_norm_backward(const DropoutAddLayerNorm<T>& call, const T* sum, const T* mean, const T* inverse,
                                     const DropoutAddLayerNormGradients<T>& gradients, int threads) {
  const DropoutAddLayerNormKernels<T>& kernel = kernels<T>();
  const int64_t parts = (call.rows + kRowsPerPart - 1) / kRowsPerPart, size = call.size;
  std::vector<T> sums(static_cast<size_t>(2 * size * parts));  // for each part: weight's, then bias's
  parallel_for(parts, 1, threads, [&](int64_t part, int64_t last) {
    for (; part < last; ++part) {
      T* const of_weight = sums.data() + 2 * size * part;
      const int64_t end = std::min(call.rows, (part + 1) * kRowsPerPart);
      for (int64_t row = part * kRowsPerPart; row < end; ++row) {
        const int64_t offset = row * size;
        kernel.backward(row_of(call, row), sum + offset, mean[row], inverse[row], call.weight,
                        at(gradients.normed, offset), at(gradients.sum, offset), at(gradients.x, offset),
                        at(gradients.residual, offset), of_weight, of_weight + size);
      }
    }
  });
  for (T* const to : {gradients.weight, gradients.bias}) {
    if (to == nullptr) continue;
    const T* const from = sums.data() + (to == gradients.weight ? 0 : size);
    std::fill(to, to + size, static_cast<T>(0));
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t column = 0; column < size; ++column) to[column] += from[2 * size * part + column];
    }
  }
}

template void dropout_add_layer_norm_forward(const DropoutAddLayerNorm<float>&, const float*, const float*,
                                             const float*, double, float*, float*, float*, float*, int);
template void dropout_add_layer_norm_forward(const DropoutAddLayerNorm<double>&, const double*, const double*,
                                             const double*, double, double*, double*, double*, double*, int);
template void dropout_add_layer_norm_backward(const DropoutAddLayerNorm<float>&, const float*, const float*,
                                              const float*, const DropoutAddLayerNormGradients<float>&, int);
template void dropout_add_layer_norm_backward(const DropoutAddLayerNorm<double>&, const double*, const double*,
                                              const double*, const DropoutAddLayerNormGradients<double>&, int);

}  // namespace ecore
