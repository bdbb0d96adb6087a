// The module ecore_kernels._native. Tensors arrive as addresses, so that one build works with every version of torch;
// checks and allocations are in Python (kernels/ecore_kernels/native_kernels/).
#include <array>

#include "../otsu.h"
#include "../philox.h"
#include "../simd/choice.h"
#include "arguments.h"

namespace {

template <typename T>
int64_t otsu_cpu(uintptr_t values, int64_t rows, int64_t columns, int64_t row_stride, int64_t max_relevant,
                 uintptr_t mask, uintptr_t count, uintptr_t threshold, int threads) {
  return ecore::otsu_cpu(pointer<const T>(values), rows, columns, row_stride, max_relevant, pointer<uint8_t>(mask),
                         pointer<int64_t>(count), pointer<T>(threshold), threads);
}

#ifdef ECORE_WITH_CUDA
template <typename T>
void otsu_cuda(uintptr_t values, int64_t rows, int64_t columns, int64_t row_stride, int64_t max_relevant,
               uintptr_t mask, uintptr_t count, uintptr_t threshold, int device, uintptr_t stream) {
  ecore::otsu_cuda(pointer<const T>(values), rows, columns, row_stride, max_relevant, pointer<uint8_t>(mask),
                   pointer<int64_t>(count), pointer<T>(threshold), device, pointer<void>(stream));
}
#endif

std::array<uint32_t, 4> philox_words(uint64_t seed, const std::array<uint32_t, 4>& counter) {
  const auto [c0, c1, c2, c3] = counter;
  const ecore::PhiloxWords words = ecore::philox_words(seed, c0, c1, c2, c3);
  return {words.word[0], words.word[1], words.word[2], words.word[3]};
}

py::dict build_record() {
  py::dict record;
  record["compiler"] = ECORE_RECORD_COMPILER;
  record["build_type"] = ECORE_RECORD_BUILD_TYPE;
  record["commit"] = ECORE_RECORD_COMMIT;                          // "" if it is not known
  record["cuda"] = ECORE_RECORD_CUDA;                              // nvcc's version, or ""
  record["cuda_missing"] = ECORE_RECORD_CUDA_MISSING;              // why there is no CUDA, or ""
  record["cuda_architectures"] = ECORE_RECORD_CUDA_ARCHITECTURES;  // "" without CUDA
  return record;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Compiled operators; called through ecore_kernels.native.";
  module.def("build_record", &build_record, "What this module was compiled with: a dict of strings.");
  module.def("otsu_cpu_float32", &otsu_cpu<float>, Unlocked());
  module.def("otsu_cpu_float64", &otsu_cpu<double>, Unlocked());
  module.def("philox_words", &philox_words, "The four random words of a seed and a counter, for tests.");
  module.def("simd", [] { return ecore::simd().name; }, "The instruction set whose kernels run.");
  module.def("simd_available", &ecore::simd_available, "Those that this machine can run, narrowest first.");
  bind_emotion_graph(module);
  bind_attention(module);
  bind_training(module);
  bind_quantized_linear(module);
#ifdef ECORE_WITH_CUDA
  module.attr("OTSU_CUDA_MAX_COLUMNS") = ecore::kOtsuCudaMaxColumns;
  module.def("otsu_cuda_refusal", &ecore::otsu_cuda_refusal, Unlocked());
  module.def("otsu_cuda_float32", &otsu_cuda<float>, Unlocked());
  module.def("otsu_cuda_float64", &otsu_cuda<double>, Unlocked());
#endif
}
