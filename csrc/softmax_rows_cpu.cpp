// Drivers of the passes over rows of logits: csrc/simd/softmax_rows.h, a row at a time.
#include "softmax_rows_cpu.h"

#include <algorithm>
#include <type_traits>

#include "simd/choice.h"
#include "thread_pool.h"

namespace ecore {
namespace {

constexpr int64_t kLogitsPerTask = 16384;  // some microseconds of work

template <typename T>
const SoftmaxRowsKernels<T>& kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return simd().softmax_rows_float;
  } else {
    return simd().softmax_rows_double;
  }
}

template <typename T>
int64_t rows_per_task(const LogitRows<T>& of) {
  return std::max<int64_t>(1, kLogitsPerTask / std::max<int64_t>(1, of.classes));
}

}  // namespace

template <typename T>
void softmax_row_sums(const LogitRows<T>& of, const T* offset, T* maximum, T* inverse, T* mean, int threads) {
  const SoftmaxRowsKernels<T>& kernel = kernels<T>();
  parallel_for(of.rows, rows_per_task(of), threads, [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      kernel.sums(of.logits + row * of.classes, offset, of.classes, of.hole, maximum + row, inverse + row,
                  mean == nullptr ? nullptr : mean + row);
    }
  });
}

template <typename T>
void softmax_row_errors(const LogitRows<T>& of, const T* maximum, const T* inverse, const T* factor,
                        const int64_t* target, double base, double extra, int threads) {
  const SoftmaxRowsKernels<T>& kernel = kernels<T>();
  parallel_for(of.rows, rows_per_task(of), threads, [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      T* const logits = of.logits + row * of.classes;
      kernel.errors(logits, of.classes, maximum[row], inverse[row] * factor[row], static_cast<T>(base), of.hole);
      logits[target[row]] -= static_cast<T>(extra);
    }
  });
}

template void softmax_row_sums(const LogitRows<float>&, const float*, float*, float*, float*, int);
template void softmax_row_sums(const LogitRows<double>&, const double*, double*, double*, double*, int);
template void softmax_row_errors(const LogitRows<float>&, const float*, const float*, const float*, const int64_t*,
                                 double, double, int);
template void softmax_row_errors(const LogitRows<double>&, const double*, const double*, const double*, const int64_t*,
                                 double, double, int);

}  // namespace ecore
