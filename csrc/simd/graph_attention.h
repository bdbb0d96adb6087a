// The table of the kernels of attention on the emotion graph. Included only by table.h.
#pragma once

#include "graph_backward.h"
#include "graph_forward.h"

namespace ecore {
namespace {

template <typename T>
constexpr GraphAttentionKernels<T> graph_attention_kernels() {
  return {kChunk<T>,          graph_packed_size<T>,      graph_pack<T>,     graph_forward_scratch<T>, graph_forward<T>,
          graph_sums_size<T>, graph_backward_scratch<T>, graph_backward<T>, graph_finish<T>};
}

}  // namespace
}  // namespace ecore
