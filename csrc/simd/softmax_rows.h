// Passes over one row of logits, for softmax_rows_cpu.h. Included only by table.h; see vectors.h.
#pragma once

#include "kernels.h"
#include "vectors.h"

namespace ecore {
namespace {

constexpr int kSweeps = 4;  // vectors at a time: dependent additions would wait for each other

// The rest of a row after whole vectors, padded.
template <typename T>
inline Vector<T> row_end(const T* row, int64_t begin, int64_t end, T padding) {
  T values[kLanes<T>];
  for (int64_t j = 0; j < kLanes<T>; ++j) values[j] = begin + j < end ? row[begin + j] : padding;
  return load<Vector<T>>(values);
}

// Adds `offset`, unless it is null, to the logits of begin ... end - 1, raises `most` to the largest of them, and
// returns their sum.
template <bool kOffset, typename T>
T row_sum_and_maximum(T* row, const T* offset, int64_t begin, int64_t end, T* most) {
  using V = Vector<T>;
  V largest[kSweeps], sums[kSweeps] = {};
  for (V& v : largest) v = splat(*most);
  const auto sweep = [&](int64_t j, int i) {
    V x = load<V>(row + j);
    if constexpr (kOffset) {
      x += load<V>(offset + j);
      store(row + j, x);
    }
    largest[i] = larger<T>(x, largest[i]);
    sums[i] += x;
  };
  int64_t j = begin;
  for (; j + kSweeps * kLanes<T> <= end; j += kSweeps * kLanes<T>) {
    for (int i = 0; i < kSweeps; ++i) sweep(j + i * kLanes<T>, i);
  }
  for (; j + kLanes<T> <= end; j += kLanes<T>) sweep(j, 0);
  if (j < end) {
    if constexpr (kOffset) {
      for (int64_t k = j; k < end; ++k) row[k] += offset[k];
    }
    largest[0] = larger<T>(row_end(row, j, end, -kInfinity<T>), largest[0]);
    sums[0] += row_end(row, j, end, static_cast<T>(0));
  }
  for (int i = 1; i < kSweeps; ++i) {
    largest[0] = larger<T>(largest[i], largest[0]);
    sums[0] += sums[i];
  }
  *most = maximum<T>(largest[0]);
  return sum<T>(sums[0]);
}

template <typename T>
T row_sum_and_maximum(T* row, const T* offset, int64_t begin, int64_t end, T* most) {
  return offset == nullptr ? row_sum_and_maximum<false>(row, offset, begin, end, most)
                           : row_sum_and_maximum<true>(row, offset, begin, end, most);
}

// exp(logit - maximum).
template <typename T>
inline Vector<T> row_power(Vector<T> logits, T maximum) {
  return exp2<T>((logits - maximum) * kLog2E<T>);
}

template <typename T>
void softmax_sums(T* row, const T* offset, int64_t classes, int64_t hole, T* maximum, T* inverse, T* mean) {
  using V = Vector<T>;
  if (hole >= 0 && offset != nullptr) row[hole] += offset[hole];
  T most = hole >= 0 ? row[hole] : -kInfinity<T>;
  T total = row_sum_and_maximum(row, offset, hole + 1, classes, &most);
  if (hole > 0) total += row_sum_and_maximum(row, offset, 0, hole, &most);
  V sums[kSweeps] = {};
  int64_t j = 0;
  for (; j + kSweeps * kLanes<T> <= classes; j += kSweeps * kLanes<T>) {
    for (int i = 0; i < kSweeps; ++i) sums[i] += row_power<T>(load<V>(row + j + i * kLanes<T>), most);
  }
  for (; j + kLanes<T> <= classes; j += kLanes<T>) sums[0] += row_power<T>(load<V>(row + j), most);
  T powers = sum<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  if (j < classes) {
    const V last = row_power<T>(row_end(row, j, classes, most), most);
    for (int64_t i = 0; i < classes - j; ++i) powers += last[i];
  }
  *maximum = most;
  *inverse = static_cast<T>(1) / powers;
  if (mean != nullptr) *mean = total / static_cast<T>(classes - (hole >= 0));
}

template <typename T>
void softmax_errors(T* row, int64_t classes, T maximum, T factor, T base, int64_t hole) {
  using V = Vector<T>;
  const T of_hole = hole >= 0 ? row_power<T>(splat(row[hole]), maximum)[0] * factor : static_cast<T>(0);
  int64_t j = 0;
  for (; j + kLanes<T> <= classes; j += kLanes<T>) {
    store(row + j, row_power<T>(load<V>(row + j), maximum) * factor - base);
  }
  if (j < classes) {
    const V last = row_power<T>(row_end(row, j, classes, maximum), maximum) * factor - base;
    for (int64_t i = 0; i < classes - j; ++i) row[j + i] = last[i];
  }
  if (hole >= 0) row[hole] = of_hole;
}

template <typename T>
constexpr SoftmaxRowsKernels<T> softmax_rows_kernels() {
  return {softmax_sums<T>, softmax_errors<T>};
}

}  // namespace
}  // namespace ecore
