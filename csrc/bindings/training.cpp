// Bindings of the operators of a training step around the attention.
#include "../dropout_add_layer_norm_cpu.h"
#include "../softmax_rows_cpu.h"
#include "arguments.h"

namespace {

// Rows, classes, hole.
using RowsTuple = std::tuple<int64_t, int64_t, int64_t>;

template <typename T>
ecore::LogitRows<T> logit_rows(uintptr_t logits, const RowsTuple& tuple) {
  const auto [rows, classes, hole] = tuple;
  return {pointer<T>(logits), rows, classes, hole};
}

template <typename T>
void softmax_row_sums(uintptr_t logits, uintptr_t offset, const RowsTuple& rows, uintptr_t maximum, uintptr_t inverse,
                      uintptr_t mean, int threads) {
  ecore::softmax_row_sums(logit_rows<T>(logits, rows), pointer<const T>(offset), pointer<T>(maximum),
                          pointer<T>(inverse), pointer<T>(mean), threads);
}

template <typename T>
void softmax_row_errors(uintptr_t logits, const RowsTuple& rows, uintptr_t maximum, uintptr_t inverse, uintptr_t factor,
                        uintptr_t target, double base, double extra, int threads) {
  ecore::softmax_row_errors(logit_rows<T>(logits, rows), pointer<const T>(maximum), pointer<const T>(inverse),
                            pointer<const T>(factor), pointer<const int64_t>(target), base, extra, threads);
}

// Rows, size; address of the seed or 0, threshold, scale; address of the weight.
using NormTuple = std::tuple<int64_t, int64_t, uintptr_t, uint64_t, double, uintptr_t>;

template <typename T>
ecore::DropoutAddLayerNorm<T> dropout_add_layer_norm(const NormTuple& tuple) {
  const auto [rows, size, seed, threshold, scale, weight] = tuple;
  return {rows, size, pointer<const uint64_t>(seed), threshold, static_cast<T>(scale), pointer<const T>(weight)};
}

// Addresses: x, residual, bias; and of normed, sum, mean, inverse.
template <typename T>
void dropout_add_layer_norm_forward(const NormTuple& call, const Addresses& at, double eps, const Addresses& to,
                                    int threads) {
  ecore::dropout_add_layer_norm_forward(dropout_add_layer_norm<T>(call), pointer<const T>(at.at(0)),
                                        pointer<const T>(at.at(1)), pointer<const T>(at.at(2)), eps,
                                        pointer<T>(to.at(0)), pointer<T>(to.at(1)), pointer<T>(to.at(2)),
                                        pointer<T>(to.at(3)), threads);
}

// Addresses: sum, mean, inverse; gradients of normed and sum; and of the gradients of x, residual, weight, bias.
template <typename T>
void dropout_add_layer_norm_backward(const NormTuple& call, const Addresses& at, const Addresses& gradients,
                                     const Addresses& to, int threads) {
  ecore::dropout_add_layer_norm_backward<T>(
      dropout_add_layer_norm<T>(call), pointer<const T>(at.at(0)), pointer<const T>(at.at(1)),
      pointer<const T>(at.at(2)),
      {pointer<const T>(gradients.at(0)), pointer<const T>(gradients.at(1)), pointer<T>(to.at(0)), pointer<T>(to.at(1)),
       pointer<T>(to.at(2)), pointer<T>(to.at(3))},
      threads);
}

}  // namespace

void bind_training(py::module_& module) {
  module.def("softmax_row_sums_float32", &softmax_row_sums<float>, Unlocked());
  module.def("softmax_row_sums_float64", &softmax_row_sums<double>, Unlocked());
  module.def("softmax_row_errors_float32", &softmax_row_errors<float>, Unlocked());
  module.def("softmax_row_errors_float64", &softmax_row_errors<double>, Unlocked());
  module.def("dropout_add_layer_norm_forward_float32", &dropout_add_layer_norm_forward<float>, Unlocked());
  module.def("dropout_add_layer_norm_forward_float64", &dropout_add_layer_norm_forward<double>, Unlocked());
  module.def("dropout_add_layer_norm_backward_float32", &dropout_add_layer_norm_backward<float>, Unlocked());
  module.def("dropout_add_layer_norm_backward_float64", &dropout_add_layer_norm_backward<double>, Unlocked());
}
