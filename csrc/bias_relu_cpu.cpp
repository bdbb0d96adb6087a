// Driver of csrc/simd/bias_relu.h.
#include "bias_relu_cpu.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "simd/choice.h"
#include "thread_pool.h"

namespace ecore {
namespace {

// A bias's gradient is a sum over rows. The parts do not depend on the number of threads, so the bits do not.
constexpr int64_t kRowsPerPart = 32;

template <typename T>
const BiasReluKernels<T>& kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return simd().bias_relu_float;
  } else {
    return simd().bias_relu_double;
  }
}

}  // namespace

template <typename T>
void bias_relu(int64_t rows, int64_t size, const T* bias, T* outputs, int threads) {
  const BiasReluKernels<T>& kernel = kernels<T>();
  parallel_for(rows, kRowsPerPart, threads, [&](int64_t row, int64_t end) {
    for (; row < end; ++row) kernel.forward(size, bias, outputs + row * size);
  });
}

template <typename T>
void bias_relu_backward(int64_t rows, int64_t size, const T* gradient, const T* outputs, T* masked, T* of_bias,
                        int threads) {
  const BiasReluKernels<T>& kernel = kernels<T>();
  const int64_t parts = (rows + kRowsPerPart - 1) / kRowsPerPart;
  std::vector<T> sums(static_cast<size_t>(size * parts));
  parallel_for(parts, 1, threads, [&](int64_t part, int64_t last) {
    for (; part < last; ++part) {
      const int64_t end = std::min(rows, (part + 1) * kRowsPerPart);
      for (int64_t row = part * kRowsPerPart; row < end; ++row) {
        const int64_t offset = row * size;
        kernel.backward(size, gradient + offset, outputs + offset, masked + offset, sums.data() + part * size);
      }
    }
  });
  if (of_bias == nullptr) return;
  std::fill(of_bias, of_bias + size, static_cast<T>(0));
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t column = 0; column < size; ++column) of_bias[column] += sums[part * size + column];
  }
}

template void bias_relu(int64_t, int64_t, const float*, float*, int);
template void bias_relu(int64_t, int64_t, const double*, double*, int);
template void bias_relu_backward(int64_t, int64_t, const float*, const float*, float*, float*, int);
template void bias_relu_backward(int64_t, int64_t, const double*, const double*, double*, double*, int);

}  // namespace ecore
