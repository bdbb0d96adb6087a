#include "edge_attention_cpu.h"

#include <numeric>

#include "parts.h"
#include "simd_choice.h"
#include "thread_pool.h"
#include "workspace.h"

namespace ecore {
namespace {

template <typename T>
const EdgeAttentionKernels<T>& kernels() {
  if constexpr (sizeof(T) == sizeof(float)) {
    return simd().edge_attention_float;
  } else {
    return simd().edge_attention_double;
  }
}

template <typename T>
EdgeHead<T> head_of(const EdgeAttention<T>& call, const int32_t* order, int64_t b, int64_t k) {
  return {call.nodes,
          call.dim,
          call.value_dim,
          order,
          rows_of(call.query, b, k),
          rows_of(call.key, b, k),
          rows_of(call.value, b, k),
          call.edge.of(b, k),
          call.edge.row,
          call.neighbors.of(b, k),
          call.neighbors.row,
          call.factor == nullptr ? nullptr : call.factor + (b * call.resolutions + k) * call.nodes,
          call.scale};
}

std::vector<int32_t> numbers(int64_t count) {
  std::vector<int32_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  return order;
}

}  // namespace

template <typename T>
void edge_attention_forward(const EdgeAttention<T>& call, Heads<T> output, T* new_edge, int threads) {
  const EdgeAttentionKernels<T>& kernel = kernels<T>();
  const int64_t pairs = call.batch * call.resolutions, nodes = call.nodes;
  if (pairs == 0 || nodes == 0) return;
  const std::vector<int32_t> order = numbers(nodes);
  const bool shared = share_out(pairs, nodes, threads);
  const int inner = shared ? threads : 1;
  const int64_t parts = shared ? parts_of(nodes) : 1;
  const EdgeHead<T> any = head_of(call, order.data(), 0, 0);
  const int64_t scratch_size = kernel.scratch(any, false);

  const auto run = [&](Tasks& tasks) {
    const Workspace<T> packed(kernel.packed_size(any, false));
    const Workspace<T> scratch(parts * scratch_size);
    for (int64_t index; tasks.next(&index);) {
      const int64_t b = index / call.resolutions, k = index % call.resolutions;
      const EdgeHead<T> head = head_of(call, order.data(), b, k);
      T* const new_edges = new_edge == nullptr ? nullptr : new_edge + index * nodes * nodes;
      for_senders(nodes, kernel.sender_step, inner,
                  [&](int64_t begin, int64_t end) { kernel.pack(head, false, begin, end, packed.get()); });
      parallel_for(parts, 1, inner, [&](int64_t part, int64_t end) {
        for (; part < end; ++part) {
          kernel.forward(head, packed.get(), nodes * part / parts, nodes * (part + 1) / parts,
                         scratch.get() + part * scratch_size, rows_of(output, b, k), new_edges,
                         call.log_normalizer + index * nodes);
        }
      });
    }
  };
  parallel_tasks(pairs, shared ? 1 : threads, run);
}

template <typename T>
void edge_attention_backward(const EdgeAttention<T>& call, Heads<const T> output, Heads<const T> grad_output,
                             Matrices<const T> grad_new_edge, const EdgeAttentionGradients<T>& gradients, int threads) {
  const EdgeAttentionKernels<T>& kernel = kernels<T>();
  const int64_t nodes = call.nodes;
  if (call.batch * call.resolutions == 0 || nodes == 0) return;
  const std::vector<int32_t> order = numbers(nodes);
  // A task is a share of the (b, k) that have an edge in common: it goes through them in order.
  const int64_t count = gradients.batches * gradients.heads * gradients.shares;
  const int64_t batches = call.batch / gradients.batches, heads = call.resolutions / gradients.heads;
  const bool shared = share_out(count, nodes, threads);
  const int inner = shared ? threads : 1;
  const int64_t parts = parts_of(nodes);
  const EdgeHead<T> any = head_of(call, order.data(), 0, 0);
  const int64_t scratch_size = kernel.scratch(any, true), sums_size = kernel.sums_size(any);

  const auto run = [&](Tasks& tasks) {
    const Workspace<T> packed(kernel.packed_size(any, true));
    const Workspace<T> scratch((shared ? parts : 1) * scratch_size);
    const Workspace<T> sums(parts * sums_size);
    for (int64_t task; tasks.next(&task);) {
      const int64_t group = task / gradients.shares, share = task % gradients.shares;
      const int64_t first = batches * heads * share / gradients.shares;
      const int64_t end_of_share = batches * heads * (share + 1) / gradients.shares;
      T* const grad_edge = gradients.edge == nullptr ? nullptr : gradients.edge + task * nodes * nodes;
      for (int64_t member = first; member < end_of_share; ++member) {
        const int64_t b = group / gradients.heads + member / heads, k = group % gradients.heads + member % heads;
        const int64_t index = b * call.resolutions + k;
        const EdgeHead<T> head = head_of(call, order.data(), b, k);
        const Rows<T> grad_key = rows_of(gradients.key, b, k), grad_value = rows_of(gradients.value, b, k);
        const Rows<const T> grad_new = {grad_new_edge.of(b, k), grad_new_edge.row};
        T* const grad_factor = gradients.factor == nullptr ? nullptr : gradients.factor + index * nodes;
        for_senders(nodes, kernel.sender_step, inner,
                    [&](int64_t begin, int64_t end) { kernel.pack(head, true, begin, end, packed.get()); });
        parallel_for(parts, 1, inner, [&](int64_t part, int64_t end) {
          for (; part < end; ++part) {
            kernel.backward(head, packed.get(), nodes * part / parts, nodes * (part + 1) / parts,
                            scratch.get() + (shared ? part * scratch_size : 0), rows_of(output, b, k),
                            rows_of(grad_output, b, k), grad_new, call.log_normalizer + index * nodes,
                            rows_of(gradients.query, b, k), grad_edge, member > first, grad_factor,
                            parts == 1 ? &grad_key : nullptr, parts == 1 ? &grad_value : nullptr,
                            sums.get() + part * sums_size);
          }
        });
        for_senders(nodes, kernel.sender_step, inner, [&](int64_t begin, int64_t end) {
          kernel.finish(head, sums.get(), parts, begin, end, grad_key, grad_value);
        });
      }
    }
  };
  parallel_tasks(count, shared ? 1 : threads, run);
}

template void edge_attention_forward(const EdgeAttention<float>&, Heads<float>, float*, int);
template void edge_attention_forward(const EdgeAttention<double>&, Heads<double>, double*, int);
template void edge_attention_backward(const EdgeAttention<float>&, Heads<const float>, Heads<const float>,
                                      Matrices<const float>, const EdgeAttentionGradients<float>&, int);
template void edge_attention_backward(const EdgeAttention<double>&, Heads<const double>, Heads<const double>,
                                      Matrices<const double>, const EdgeAttentionGradients<double>&, int);

}  // namespace ecore
