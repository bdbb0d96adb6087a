// Attention on any dense graph, one (b, k) at a time, with its edges in memory (Eqs. 4 to 7). Included only by
// simd_*.cpp; see vectors.h.
//
// With scores s = scale q_i . k_j and edges E, a row's attention is softmax(s E) over its neighbours, and its updated
// edges are factor (E + s E). EdgeMore lists what a call may add to that. A tile is kTileRows receivers by up to
// kTileColumns senders, in planes [rows, columns]. Pairs that are no neighbours are set to 0 there, as in
// graph_tiles.h.
#pragma once

#include "edge_backward.h"
#include "edge_forward.h"

namespace ecore {
namespace {

template <typename T>
constexpr EdgeAttentionKernels<T> edge_attention_kernels() {
  return {kChunk<T>,       kTileColumns,      edge_packed_size<T>, edge_pack<T>,  edge_scratch<T>,
          edge_forward<T>, edge_sums_size<T>, edge_backward<T>,    edge_finish<T>};
}

}  // namespace
}  // namespace ecore
