// Bindings of quantized_linear and quantized_linear_argmax.
#include "../quantized_linear_cpu.h"
#include "arguments.h"

namespace {

// Outputs, inputs, stride over outputs; weight, scale, bias.
using LayerTuple = std::tuple<int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t>;

template <typename W>
ecore::QuantizedLayer<W> layer_of(const LayerTuple& tuple) {
  const auto [outputs, inputs, stride, weight, scale, bias] = tuple;
  return {pointer<const W>(weight), outputs, inputs, stride, pointer<const float>(scale), pointer<const float>(bias)};
}

template <typename W>
void quantized_linear(const LayerTuple& layer, uintptr_t x, int64_t rows, int64_t x_stride, uintptr_t output,
                      int threads) {
  ecore::quantized_linear(layer_of<W>(layer), pointer<const float>(x), rows, x_stride, pointer<float>(output), threads);
}

template <typename W>
void quantized_linear_argmax(const LayerTuple& layer, uintptr_t x, int64_t rows, int64_t x_stride, uintptr_t forbidden,
                             int64_t forbidden_count, uintptr_t place, uintptr_t largest, int threads) {
  ecore::quantized_linear_argmax(layer_of<W>(layer), pointer<const float>(x), rows, x_stride,
                                 pointer<const int64_t>(forbidden), forbidden_count, pointer<int64_t>(place),
                                 pointer<float>(largest), threads);
}

}  // namespace

void bind_quantized_linear(py::module_& module) {
  module.def("quantized_linear_int8", &quantized_linear<int8_t>, Unlocked());
  module.def("quantized_linear_bfloat16", &quantized_linear<uint16_t>, Unlocked());
  module.def("quantized_linear_float32", &quantized_linear<float>, Unlocked());
  module.def("quantized_linear_argmax_int8", &quantized_linear_argmax<int8_t>, Unlocked());
  module.def("quantized_linear_argmax_bfloat16", &quantized_linear_argmax<uint16_t>, Unlocked());
  module.def("quantized_linear_argmax_float32", &quantized_linear_argmax<float>, Unlocked());
}
