// One row of bias and ReLU, for bias_relu_cpu.h. Included only by table.h; see vectors.h.
#pragma once

#include "kernels.h"
#include "vectors.h"

namespace ecore {
namespace {

template <typename T>
void bias_relu_forward(int64_t size, const T* bias, T* row) {
  using V = Vector<T>;
  int64_t j = 0;
  for (; j + kLanes<T> <= size; j += kLanes<T>) {
    const V x = load<V>(row + j) + load<V>(bias + j);
    store(row + j, x < V{} ? V{} : x);
  }
  for (; j < size; ++j) {
    const T x = row[j] + bias[j];
    row[j] = x < 0 ? 0 : x;
  }
}

template <typename T>
void bias_relu_row_backward(int64_t size, const T* gradient, const T* output, T* masked, T* sum) {
  using V = Vector<T>;
  int64_t j = 0;
  for (; j + kLanes<T> <= size; j += kLanes<T>) {
    const V passed = load<V>(output + j) <= V{} ? V{} : load<V>(gradient + j);
    store(masked + j, passed);
    store(sum + j, load<V>(sum + j) + passed);
  }
  for (; j < size; ++j) {
    masked[j] = output[j] <= 0 ? 0 : gradient[j];
    sum[j] += masked[j];
  }
}

template <typename T>
constexpr BiasReluKernels<T> bias_relu_kernels() {
  return {bias_relu_forward<T>, bias_relu_row_backward<T>};
}

}  // namespace
}  // namespace ecore
