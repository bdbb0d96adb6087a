#include "quantized_linear_cpu.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "simd/choice.h"
#include "thread_pool.h"
#include "workspace.h"

namespace ecore {
namespace {

constexpr int64_t kProductsPerTask = 1 << 17;  // some microseconds of work
constexpr int64_t kBlock = 64;                 // outputs: their weights stay in the first-level cache for all rows
constexpr int64_t kOutputsPerTask = 512;       // when the largest output is searched

template <typename W>
const QuantizedLinearKernels<W>& kernels() {
  if constexpr (std::is_same_v<W, int8_t>) {
    return simd().quantized_linear_int8;
  } else if constexpr (std::is_same_v<W, float>) {
    return simd().quantized_linear_float32;
  } else {
    return simd().quantized_linear_bfloat16;
  }
}

// The rows as the products read them.
template <typename W>
class PackedRows {
 public:
  PackedRows(const QuantizedLayer<W>& layer, const float* x, int64_t rows, int64_t x_stride, int threads)
      : bytes_(kernels<W>().packed_bytes(layer.inputs)), data_(rows * bytes_) {
    parallel_for(rows, std::max<int64_t>(1, kProductsPerTask / 16 / layer.inputs), threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t r = begin; r < end; ++r) {
                     kernels<W>().pack(x + r * x_stride, layer.inputs, data_.get() + r * bytes_);
                   }
                 });
  }
  const char* get() const { return data_.get(); }

 private:
  const int64_t bytes_;
  Workspace<char> data_;
};

}  // namespace

template <typename W>
void quantized_linear(const QuantizedLayer<W>& layer, const float* x, int64_t rows, int64_t x_stride, float* output,
                      int threads) {
  if (rows == 0) return;
  const PackedRows<W> packed(layer, x, rows, x_stride, threads);
  const int64_t blocks = (layer.outputs + kBlock - 1) / kBlock;
  const int64_t products_of_block = kBlock * layer.inputs * rows;
  parallel_for(blocks, std::max<int64_t>(1, kProductsPerTask / products_of_block), threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t block = begin; block < end; ++block) {
                   const int64_t first = block * kBlock;
                   kernels<W>().multiply(layer, first, std::min(first + kBlock, layer.outputs), packed.get(), rows,
                                         output + first, layer.outputs);
                 }
               });
}

template <typename W>
void quantized_linear_argmax(const QuantizedLayer<W>& layer, const float* x, int64_t rows, int64_t x_stride,
                             const int64_t* forbidden, int64_t forbidden_count, int64_t* place, float* largest,
                             int threads) {
  if (rows == 0) return;
  const PackedRows<W> packed(layer, x, rows, x_stride, threads);
  const int64_t tasks = (layer.outputs + kOutputsPerTask - 1) / kOutputsPerTask;
  Workspace<int64_t> places(tasks * rows);
  Workspace<float> maxima(tasks * rows);
  parallel_tasks(tasks, layer.outputs * layer.inputs * rows < kProductsPerTask ? 1 : threads, [&](Tasks& queue) {
    Workspace<float> scores(rows * kOutputsPerTask);
    for (int64_t task; queue.next(&task);) {
      const int64_t begin = task * kOutputsPerTask, end = std::min(begin + kOutputsPerTask, layer.outputs);
      for (int64_t first = begin; first < end; first += kBlock) {
        kernels<W>().multiply(layer, first, std::min(first + kBlock, end), packed.get(), rows,
                              scores.get() + (first - begin), kOutputsPerTask);
      }
      for (int64_t r = 0; r < rows; ++r) {
        float* const row = scores.get() + r * kOutputsPerTask;
        for (int64_t i = 0; i < forbidden_count; ++i) {
          const int64_t at = forbidden[r * forbidden_count + i];
          // NaN stays NaN, so that the search sees it.
          if (at >= begin && at < end && row[at - begin] < std::numeric_limits<float>::infinity()) {
            row[at - begin] = -std::numeric_limits<float>::infinity();
          }
        }
        const int64_t best = kernels<W>().largest(row, end - begin, &maxima.get()[task * rows + r]);
        places.get()[task * rows + r] = begin + best;
      }
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    place[r] = places.get()[r];
    largest[r] = maxima.get()[r];
    for (int64_t task = 1; task < tasks; ++task) {
      const float most = maxima.get()[task * rows + r];
      if (most > largest[r] || most != most) {
        place[r] = places.get()[task * rows + r];
        largest[r] = most;
      }
    }
    if (largest[r] != largest[r]) place[r] = 0;
  }
}

#define ECORE_QUANTIZED_LINEAR(W)                                                                                 \
  template void quantized_linear(const QuantizedLayer<W>&, const float*, int64_t, int64_t, float*, int);          \
  template void quantized_linear_argmax(const QuantizedLayer<W>&, const float*, int64_t, int64_t, const int64_t*, \
                                        int64_t, int64_t*, float*, int);
ECORE_QUANTIZED_LINEAR(int8_t)
ECORE_QUANTIZED_LINEAR(uint16_t)
ECORE_QUANTIZED_LINEAR(float)

}  // namespace ecore
