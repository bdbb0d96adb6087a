// Attention over a sparse graph, some receivers or senders at a time. Included only by table.h; see vectors.h.
//
// The edges of a node are processed in order, and all heads of an edge in turn, because its rows of keys and values lie
// side by side in memory.
#pragma once

#include "kernels.h"
#include "vectors.h"

namespace ecore {
namespace {

// The pieces of one head's product: sum over c of q_c (k_c scale_c + offset_c); scale or offset may be null.
template <typename T>
inline T product(const T* q, const T* k, const T* scale, const T* offset, int64_t dim) {
  constexpr int64_t kStep = kLanes<T>;
  Vector<T> first{}, second{};
  const auto changed = [&](int64_t c) {
    auto v = load<Vector<T>>(k + c);
    if (scale != nullptr) v = v * load<Vector<T>>(scale + c);
    if (offset != nullptr) v = v + load<Vector<T>>(offset + c);
    return v;
  };
  int64_t c = 0;
  for (; c + 2 * kStep <= dim; c += 2 * kStep) {
    first = multiply_add(load<Vector<T>>(q + c), changed(c), first);
    second = multiply_add(load<Vector<T>>(q + c + kStep), changed(c + kStep), second);
  }
  for (; c + kStep <= dim; c += kStep) first = multiply_add(load<Vector<T>>(q + c), changed(c), first);
  T total = sum<T>(first + second);
  for (; c < dim; ++c) {
    T v = k[c];
    if (scale != nullptr) v = v * scale[c];
    if (offset != nullptr) v = v + offset[c];
    total = multiply_add(q[c], v, total);
  }
  return total;
}

// to += factor (x scale + offset); scale or offset may be null.
template <typename T>
inline void add_scaled(T* to, T factor, const T* x, const T* scale, const T* offset, int64_t dim) {
  constexpr int64_t kStep = kLanes<T>;
  const Vector<T> factors = splat(factor);
  int64_t c = 0;
  for (; c + kStep <= dim; c += kStep) {
    auto v = load<Vector<T>>(x + c);
    if (scale != nullptr) v = v * load<Vector<T>>(scale + c);
    if (offset != nullptr) v = v + load<Vector<T>>(offset + c);
    store(to + c, multiply_add(factors, v, load<Vector<T>>(to + c)));
  }
  for (; c < dim; ++c) {
    T v = x[c];
    if (scale != nullptr) v = v * scale[c];
    if (offset != nullptr) v = v + offset[c];
    to[c] = multiply_add(factor, v, to[c]);
  }
}

// to = factor x y; y may be null.
template <typename T>
inline void set_scaled(T* to, T factor, const T* x, const T* y, int64_t dim) {
  for (int64_t c = 0; c < dim; ++c) to[c] = y == nullptr ? factor * x[c] : factor * x[c] * y[c];
}

template <typename T>
inline void set_zero(T* to, int64_t size) {
  for (int64_t c = 0; c < size; ++c) to[c] = 0;
}

// scale times the edge's factor: the factor on a query times a key.
template <typename T>
inline T whole_scale(const SparseAttention<T>& call, int64_t e, int64_t h) {
  return call.edge.data == nullptr ? call.scale : call.scale * *call.edge.at(e, h);
}

template <typename T>
int64_t sparse_scratch(const SparseAttention<T>& call, int64_t most) {
  return call.heads * rounded_up(most, kLanes<T>);
}

// Softmax of n numbers to base 2, in place; `x` has room for whole vectors.
template <typename T>
inline void softmax(T* x, int64_t n) {
  const int64_t padded = rounded_up(n, kLanes<T>);
  for (int64_t p = n; p < padded; ++p) x[p] = -kInfinity<T>;
  Vector<T> most = load<Vector<T>>(x);
  for (int64_t p = kLanes<T>; p < padded; p += kLanes<T>) most = larger<T>(load<Vector<T>>(x + p), most);
  const Vector<T> highest = splat(maximum<T>(most));
  Vector<T> total{};
  for (int64_t p = 0; p < padded; p += kLanes<T>) {
    const Vector<T> power = exp2<T>(load<Vector<T>>(x + p) - highest);
    store(x + p, power);
    total = total + power;
  }
  const Vector<T> inverse = splat(static_cast<T>(1) / sum<T>(total));
  for (int64_t p = 0; p < padded; p += kLanes<T>) store(x + p, load<Vector<T>>(x + p) * inverse);
}

template <typename T>
void sparse_forward(const SparseAttention<T>& call, int64_t begin, int64_t end, T* scratch, T* output) {
  const int64_t width = call.heads * call.value_dim;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t* const edges = call.by_receiver + call.receiver_begin[i];
    const int64_t n = call.receiver_begin[i + 1] - call.receiver_begin[i];
    const int64_t stride = rounded_up(n, kLanes<T>);
    T* const to = output + i * width;
    set_zero(to, width);
    if (n == 0) continue;
    for (int64_t p = 0; p < n; ++p) {
      const int64_t e = edges[p], j = call.sender[e];
      for (int64_t h = 0; h < call.heads; ++h) {
        const T found = product(call.query.at(i, h), call.key.at(j, h), call.key_scale.at(e, h),
                                call.key_offset.at(e, h), call.dim);
        T x = found * whole_scale(call, e, h);
        if (call.bias.data != nullptr) x = x + *call.bias.at(e, h);
        scratch[h * stride + p] = x * kLog2E<T>;
      }
    }
    for (int64_t h = 0; h < call.heads; ++h) softmax(scratch + h * stride, n);
    for (int64_t p = 0; p < n; ++p) {
      const int64_t e = edges[p], j = call.sender[e];
      for (int64_t h = 0; h < call.heads; ++h) {
        const T weight = scratch[h * stride + p];
        call.weight[e * call.heads + h] = weight;
        add_scaled<T>(to + h * call.value_dim, weight, call.value.at(j, h), nullptr, call.value_offset.at(e, h),
                      call.value_dim);
      }
    }
  }
}

template <typename T>
void sparse_receivers(const SparseAttention<T>& call, int64_t begin, int64_t end, T* scratch,
                      PerHead<const T> grad_output, T* grad_score, const SparseGradients<T>& gradients) {
  const int64_t width = call.heads * call.dim;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t* const edges = call.by_receiver + call.receiver_begin[i];
    const int64_t n = call.receiver_begin[i + 1] - call.receiver_begin[i];
    T* const grad_query = gradients.query == nullptr ? nullptr : gradients.query + i * width;
    if (grad_query != nullptr) set_zero(grad_query, width);
    // The gradient of a weight, and its mean under the weights, which is stored after those of the head.
    for (int64_t p = 0; p < n; ++p) {
      const int64_t e = edges[p], j = call.sender[e];
      for (int64_t h = 0; h < call.heads; ++h) {
        scratch[h * n + p] =
            product<T>(grad_output.at(i, h), call.value.at(j, h), nullptr, call.value_offset.at(e, h), call.value_dim);
      }
    }
    for (int64_t h = 0; h < call.heads; ++h) {
      T* const of_head = scratch + h * n;
      T mean = 0;
      for (int64_t p = 0; p < n; ++p) mean = multiply_add(call.weight[edges[p] * call.heads + h], of_head[p], mean);
      for (int64_t p = 0; p < n; ++p) {
        const int64_t place = edges[p] * call.heads + h;
        grad_score[place] = call.weight[place] * (of_head[p] - mean);
      }
    }
    for (int64_t p = 0; p < n; ++p) {
      const int64_t e = edges[p], j = call.sender[e];
      for (int64_t h = 0; h < call.heads; ++h) {
        const int64_t place = e * call.heads + h;
        const T* const q = call.query.at(i, h);
        const T* const k = call.key.at(j, h);
        const T factor = grad_score[place] * whole_scale(call, e, h);
        if (grad_query != nullptr) {
          add_scaled(grad_query + h * call.dim, factor, k, call.key_scale.at(e, h), call.key_offset.at(e, h), call.dim);
        }
        if (gradients.edge != nullptr) {
          const T found = product(q, k, call.key_scale.at(e, h), call.key_offset.at(e, h), call.dim);
          gradients.edge[place] = grad_score[place] * call.scale * found;
        }
        if (gradients.key_scale != nullptr) set_scaled(gradients.key_scale + place * call.dim, factor, q, k, call.dim);
        if (gradients.key_offset != nullptr) {
          set_scaled<T>(gradients.key_offset + place * call.dim, factor, q, nullptr, call.dim);
        }
        if (gradients.value_offset != nullptr) {
          set_scaled<T>(gradients.value_offset + place * call.value_dim, call.weight[place], grad_output.at(i, h),
                        nullptr, call.value_dim);
        }
      }
    }
  }
}

template <typename T>
void sparse_senders(const SparseAttention<T>& call, int64_t begin, int64_t end, PerHead<const T> grad_output,
                    const T* grad_score, const SparseGradients<T>& gradients) {
  const int64_t key_width = call.heads * call.dim, value_width = call.heads * call.value_dim;
  for (int64_t j = begin; j < end; ++j) {
    T* const grad_key = gradients.key == nullptr ? nullptr : gradients.key + j * key_width;
    T* const grad_value = gradients.value == nullptr ? nullptr : gradients.value + j * value_width;
    if (grad_key != nullptr) set_zero(grad_key, key_width);
    if (grad_value != nullptr) set_zero(grad_value, value_width);
    for (int64_t p = call.sender_begin[j]; p < call.sender_begin[j + 1]; ++p) {
      const int64_t e = call.by_sender[p], i = call.receiver[e];
      for (int64_t h = 0; h < call.heads; ++h) {
        const int64_t place = e * call.heads + h;
        if (grad_key != nullptr) {
          const T factor = grad_score[place] * whole_scale(call, e, h);
          add_scaled<T>(grad_key + h * call.dim, factor, call.query.at(i, h), call.key_scale.at(e, h), nullptr,
                        call.dim);
        }
        if (grad_value != nullptr) {
          add_scaled<T>(grad_value + h * call.value_dim, call.weight[place], grad_output.at(i, h), nullptr, nullptr,
                        call.value_dim);
        }
      }
    }
  }
}

template <typename T>
constexpr SparseAttentionKernels<T> sparse_attention_kernels() {
  return {sparse_scratch<T>, sparse_forward<T>, sparse_receivers<T>, sparse_senders<T>};
}

}  // namespace
}  // namespace ecore
