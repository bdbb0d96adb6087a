// One row of residual + dropout(x) and its LayerNorm, for dropout_add_layer_norm_cpu.h. Included only by table.h; see
// vectors.h.
#pragma once

#include "kernels.h"
#include "philox_vectors.h"
#include "vectors.h"

namespace ecore {
namespace {

constexpr int64_t kBlock = 4 * kDrawn;  // columns that the words of kDrawn counters serve

// The random words of `count` columns of a row, at most kBlock, and of some more; `begin` is a multiple of 4.
template <typename T>
inline void draw_columns(const DropoutRow<T>& of, int64_t begin, int64_t count, uint32_t* words) {
  const uint32_t row = static_cast<uint32_t>(of.row), far = static_cast<uint32_t>(static_cast<uint64_t>(of.row) >> 32);
  const uint32_t first = static_cast<uint32_t>(begin / 4);
  static_assert(kVectorsDrawn == 4);
  switch ((count + 4 * kRandomWords - 1) / (4 * kRandomWords)) {
    case 1:
      return draw_in_order<1>(of.seed, first, row, far, 0, words);
    case 2:
      return draw_in_order<2>(of.seed, first, row, far, 0, words);
    case 3:
      return draw_in_order<3>(of.seed, first, row, far, 0, words);
    default:
      return draw_in_order<4>(of.seed, first, row, far, 0, words);
  }
}

// `value` in the lanes whose words are at least `least`, else 0.
inline Vector<float> kept(const uint32_t* words, uint32_t least, Vector<float> value) {
  const auto word = load<BitVector<float>>(words);
  return word >= (BitVector<float>{} + least) ? value : Vector<float>{};
}
inline Vector<double> kept(const uint32_t* words, uint32_t least, Vector<double> value) {
  using Narrow = typename VectorOf<uint32_t, kLanes<double>>::Type;
  const auto word = __builtin_convertvector(load<Narrow>(words), BitVector<double>);
  return word >= (BitVector<double>{} + least) ? value : Vector<double>{};
}

// Calls each(j, lanes) for whole vectors of a row of `size` columns and rest(j) for the columns that are left.
template <typename T, typename Each, typename Rest>
inline void for_columns(int64_t begin, int64_t end, Each each, Rest rest) {
  int64_t j = begin;
  for (; j + kLanes<T> <= end; j += kLanes<T>) each(j);
  for (; j < end; ++j) rest(j);
}

// to[j] = scale * from[j] where column j is kept, else 0. Dropped values do not enter the result, even if they are NaN.
template <typename T>
inline void drop(const DropoutRow<T>& of, const T* from, T* to) {
  using V = Vector<T>;
  if (of.threshold > 0xFFFFFFFFu) {  // more than any word
    for (int64_t j = 0; j < of.size; ++j) to[j] = 0;
    return;
  }
  const uint32_t least = static_cast<uint32_t>(of.threshold);
  for (int64_t begin = 0; begin < of.size; begin += kBlock) {
    const int64_t end = smaller_of(of.size, begin + kBlock);
    uint32_t words[kBlock];
    draw_columns(of, begin, end - begin, words);
    for_columns<T>(
        begin, end, [&](int64_t j) { store(to + j, kept(words + j - begin, least, V(load<V>(from + j) * of.scale))); },
        [&](int64_t j) { to[j] = words[j - begin] >= least ? from[j] * of.scale : static_cast<T>(0); });
  }
}

template <typename T>
void norm_forward(const DropoutRow<T>& of, const T* x, const T* residual, const T* weight, const T* bias, T eps,
                  T* normed, T* sums, T* mean, T* inverse) {
  using V = Vector<T>;
  const T* dropped = x;
  if (of.drops) {
    drop(of, x, normed);  // which is overwritten below
    dropped = normed;
  }
  V total_lanes{};
  T total = 0;
  for_columns<T>(
      0, of.size,
      [&](int64_t j) {
        const V value = load<V>(residual + j) + load<V>(dropped + j);
        store(sums + j, value);
        total_lanes += value;
      },
      [&](int64_t j) {
        sums[j] = residual[j] + dropped[j];
        total += sums[j];
      });
  const T middle = (total + sum<T>(total_lanes)) / static_cast<T>(of.size);
  V squares_lanes{};
  T squares = 0;
  for_columns<T>(
      0, of.size,
      [&](int64_t j) {
        const V off = load<V>(sums + j) - middle;
        squares_lanes = multiply_add(off, off, squares_lanes);
      },
      [&](int64_t j) { squares += (sums[j] - middle) * (sums[j] - middle); });
  const T variance = (squares + sum<T>(squares_lanes)) / static_cast<T>(of.size);
  const T factor = static_cast<T>(1) / square_root(variance + eps);
  for_columns<T>(
      0, of.size,
      [&](int64_t j) {
        const V value = (load<V>(sums + j) - middle) * factor;
        store(normed + j, multiply_add(value, load<V>(weight + j), load<V>(bias + j)));
      },
      [&](int64_t j) { normed[j] = multiply_add((sums[j] - middle) * factor, weight[j], bias[j]); });
  *mean = middle;
  *inverse = factor;
}

template <typename T>
void norm_backward(const DropoutRow<T>& of, const T* sums, T mean, T inverse, const T* weight, const T* grad_normed,
                   const T* grad_sum, T* grad_x, T* grad_residual, T* grad_weight, T* grad_bias) {
  using V = Vector<T>;
  T* const gradient = grad_residual != nullptr ? grad_residual : grad_x;  // of the sum
  V one_lanes{}, two_lanes{};
  T one = 0, two = 0;
  if (grad_normed != nullptr) {
    for_columns<T>(
        0, of.size,
        [&](int64_t j) {
          const V g = load<V>(grad_normed + j), hat = (load<V>(sums + j) - mean) * inverse;
          const V scaled = g * load<V>(weight + j);
          one_lanes += scaled;
          two_lanes = multiply_add(scaled, hat, two_lanes);
          store(grad_weight + j, multiply_add(g, hat, load<V>(grad_weight + j)));
          store(grad_bias + j, load<V>(grad_bias + j) + g);
        },
        [&](int64_t j) {
          const T g = grad_normed[j], hat = (sums[j] - mean) * inverse;
          one += g * weight[j];
          two += g * weight[j] * hat;
          grad_weight[j] += g * hat;
          grad_bias[j] += g;
        });
  }
  if (gradient == nullptr) return;
  one = (one + sum<T>(one_lanes)) / static_cast<T>(of.size);
  two = (two + sum<T>(two_lanes)) / static_cast<T>(of.size);
  for_columns<T>(
      0, of.size,
      [&](int64_t j) {
        V value{};
        if (grad_normed != nullptr) {
          const V hat = (load<V>(sums + j) - mean) * inverse;
          value = (load<V>(grad_normed + j) * load<V>(weight + j) - one - hat * two) * inverse;
        }
        if (grad_sum != nullptr) value += load<V>(grad_sum + j);
        store(gradient + j, value);
      },
      [&](int64_t j) {
        T value = 0;
        if (grad_normed != nullptr) {
          const T hat = (sums[j] - mean) * inverse;
          value = (grad_normed[j] * weight[j] - one - hat * two) * inverse;
        }
        if (grad_sum != nullptr) value += grad_sum[j];
        gradient[j] = value;
      });
  if (grad_x == nullptr) return;
  if (of.drops) {
    drop(of, gradient, grad_x);
  } else if (grad_x != gradient) {
    __builtin_memcpy(grad_x, gradient, static_cast<size_t>(of.size) * sizeof(T));
  }
}

template <typename T>
constexpr DropoutAddLayerNormKernels<T> dropout_add_layer_norm_kernels() {
  return {norm_forward<T>, norm_backward<T>};
}

}  // namespace
}  // namespace ecore
