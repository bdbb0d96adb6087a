// The kernels, which exist once for each instruction set: the drivers (graph_attention_cpu.cpp and others) call them
// for one (b, k) or a part of one at a time. choice.h chooses among them.
#pragma once

#include <cstdint>

namespace ecore {

// The rows of one (b, k): row i begins at data + i * stride, and its elements lie side by side.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
};

// Rows that the next piece of work will read: fetched into the cache, a few at a time, while this one computes. A
// head's rows lie far apart in memory, so the hardware does not prefetch them.
template <typename T>
struct Ahead {
  const Rows<const T>* rows;  // [tensors]
  int64_t tensors;
  const int32_t* nodes;  // [count]: which rows
  int64_t count, width;  // width: elements of a row
  int64_t rows_a_step;
  int64_t tensor, node;  // the next to be fetched
};

// One (b, k) of the emotion graph. The nodes that take part have an order: [CLS], then the emotions, then the words. A
// node's position in it is its place. A receiver hears (attends to) a prefix of the order; see graph.py.
template <typename T>
struct GraphHead {
  int64_t words, emotions;
  int64_t depth;                 // layers of history
  int64_t emotion_count, count;  // emotions, nodes that take part
  const int32_t* order;          // [count], by place: nodes
  const T* weight;               // [count], by place: E0 of the edges that the node sends to words
  const T* correlation;          // [emotions, emotions]
  const T* row_factor;           // [nodes], by node; null for 1
  bool words_only;               // only words receive
  T scale;
  const Rows<const T>* queries;  // [1 + depth], by node: the layer's own, then the history's (for the readout it alone)
  const Rows<const T>* keys;
  Rows<const T> value;
  int64_t dim, value_dim;
  Ahead<T>* ahead;  // or null; not to be shared by threads
};

// The gradients of a head; data is null for those that are not wanted.
template <typename T>
struct GraphGradients {
  const Rows<T>* queries;  // [1 + depth]
  const Rows<T>* keys;
  Rows<T> value;
  T* row_factor;
  T* emotion_weight;
  T* correlation;
};

// The kernels of one instruction set in one type. Receivers are numbered in the order emotions, words, [CLS], in which
// each hears at least what the one before it hears. Work on disjoint receivers or senders may run in parallel.
//
// `packed` (packed_size elements) holds a head's senders as the products read them; `scratch` belongs to one call.
// Sizes are for heads of up to `nodes` nodes; every piece of memory begins on a cache line.
template <typename T>
struct GraphAttentionKernels {
  int64_t sender_step;  // senders are packed and finished from multiples of this

  int64_t (*packed_size)(const GraphHead<T>& head, int64_t nodes, bool backward);
  void (*pack)(const GraphHead<T>& head, bool backward, int64_t begin, int64_t end, T* packed);

  int64_t (*forward_scratch)(const GraphHead<T>& head, int64_t nodes);
  // Writes output [words or nodes] of those receivers, and by place the maximum [count] of a receiver's scores (to base
  // 2) and one over the sum of their powers.
  void (*forward)(const GraphHead<T>& head, const T* packed, int64_t begin, int64_t end, T* scratch, Rows<T> output,
                  T* maximum, T* inverse);

  int64_t (*sums_size)(const GraphHead<T>& head, int64_t nodes);
  int64_t (*backward_scratch)(const GraphHead<T>& head, int64_t nodes);
  // Writes the gradients of these receivers' queries, row factors and rows of the correlation, and into `sums` their
  // share of the gradients of all senders. If `alone`, they are all receivers, and gradients of keys and values may be
  // written at once.
  void (*backward)(const GraphHead<T>& head, const T* packed, int64_t begin, int64_t end, T* scratch,
                   Rows<const T> output, Rows<const T> grad_output, const T* maximum, const T* inverse,
                   const GraphGradients<T>& gradients, bool alone, T* sums);
  // Adds up `parts` sums that lie sums_size(nodes) apart, and writes these senders' gradients, if backward has not.
  void (*finish)(const GraphHead<T>& head, T* sums, int64_t nodes, int64_t parts, int64_t begin, int64_t end,
                 const GraphGradients<T>& gradients);
};

// A head's readout: only emotions are senders. Here queries and keys are the history's [depth].
template <typename T>
struct EdgeReadoutKernels {
  int64_t (*scratch)(const GraphHead<T>& head, bool backward);
  // Adds what receivers at places first ... last - 1 hear to to_word [emotions], or [words, emotions] with per_word,
  // and to to_emotion [emotions, emotions].
  void (*forward)(const GraphHead<T>& head, int64_t first, int64_t last, T* scratch, bool per_word, T* to_word,
                  T* to_emotion);
  // Writes the gradients of nodes that take part; of keys, the emotions' alone. Those of queries and keys whose data is
  // null, and of the last three if null, are not wanted. `touched` are the tensors of which each receiver's row is read
  // or written, so that later rows can be fetched ahead.
  void (*backward)(const GraphHead<T>& head, T* scratch, const Rows<const T>* touched, int64_t touched_count,
                   bool per_word, const T* grad_to_word, const T* grad_to_emotion, const Rows<T>* grad_queries,
                   const Rows<T>* grad_keys, T* grad_row_factor, T* grad_emotion_weight, T* grad_correlation);
};

// What a dense graph may have besides edges, neighbours and a factor of updated edges.
template <typename T>
struct EdgeMore {
  bool plain;     // has nothing more: the rest is not read
  const T* bias;  // [receivers, senders], rows bias_row apart, added to the weighted scores; null: 0
  int64_t bias_row;
  const T* sender_gate;  // [senders], a factor on the scores; null: 1
  T edge_bias;           // of updated edges
  T low, high;           // bounds of scores
  bool all_pairs;        // edges off the graph are updated too
  bool drops;            // dropout: a weight is kept where its random word is least_kept or more
  uint32_t least_kept;
  T kept_weight;
  uint64_t seed;
  uint32_t pair;  // the head's number among all: b * heads + k
};

// One (b, k) of a dense graph.
template <typename T>
struct EdgeHead {
  int64_t receivers, senders, dim, value_dim;
  const int32_t* order;  // 0, 1, 2, ..., as many as there are receivers and senders
  Rows<const T> query, key, value;
  const T* edge;  // [receivers, senders], rows edge_row apart; null: 1
  int64_t edge_row;
  const uint8_t* neighbors;  // likewise, bool; null: all
  int64_t neighbors_row;
  const T* factor;  // [receivers], of updated edges; null: they are not wanted
  T scale;
  EdgeMore<T> more;
  bool causal = false;            // receivers hear no sender of a higher number
  bool streams_new_edge = false;  // all heads' new edges are larger than the caches, and are written past them
};

// The gradients of a head; data is null for those that are not wanted.
template <typename T>
struct EdgeGradients {
  Rows<T> query, key, value;
  T *edge, *bias;                   // [receivers, senders]
  bool add_edge, add_bias;          // add to the present content
  bool streams_edge, streams_bias;  // all heads' are larger than the caches, and are written past them
  T* factor;
  T* sender_gate;  // [senders]
  // Several heads may share `edge`, and then add to it in turn: a head's tile of it, identified by its first row and
  // its number along that row, waits for the heads before. Null if there is no head to wait for. The same holds for
  // `bias`.
  void *turn, *bias_turn;
  void (*wait)(void* turn, int64_t row, int64_t column);
  void (*done)(void* turn, int64_t row, int64_t column);
};

// As for graph_attention; senders and receivers are in their own order. For a receiver without neighbours one over its
// sum is 0.
template <typename T>
struct EdgeAttentionKernels {
  int64_t sender_step;
  int64_t tile_columns;  // the width of a row's tiles

  int64_t (*packed_size)(const EdgeHead<T>& head, bool backward);
  void (*pack)(const EdgeHead<T>& head, bool backward, int64_t begin, int64_t end, T* packed);
  int64_t (*scratch)(const EdgeHead<T>& head, bool backward);
  // new_edge: [receivers, senders], or null.
  void (*forward)(const EdgeHead<T>& head, const T* packed, int64_t begin, int64_t end, T* scratch, Rows<T> output,
                  T* new_edge, T* maximum, T* inverse);
  int64_t (*sums_size)(const EdgeHead<T>& head);
  // grad_new_edge's data may be null, and grad_lse [receivers]: zero.
  void (*backward)(const EdgeHead<T>& head, const T* packed, int64_t begin, int64_t end, T* scratch,
                   Rows<const T> output, Rows<const T> grad_output, Rows<const T> grad_new_edge, const T* grad_lse,
                   const T* maximum, const T* inverse, const EdgeGradients<T>& gradients, bool alone, T* sums);
  // Adds up `parts` sums that lie sums_size apart, and writes these senders' gradients, if backward has not.
  void (*finish)(const EdgeHead<T>& head, T* sums, int64_t parts, int64_t begin, int64_t end,
                 const EdgeGradients<T>& gradients);
};

// A tensor of nodes or edges by head: [rows, heads, width] with a width's elements side by side, or [rows, heads].
// Strides in elements; data may be null.
template <typename T>
struct PerHead {
  T* data;
  int64_t row, head;

  T* at(int64_t r, int64_t h) const { return data == nullptr ? nullptr : data + r * row + h * head; }
};

// Attention over a sparse graph.
template <typename T>
struct SparseAttention {
  int64_t receivers, senders, heads, dim, value_dim;
  // By edge: its nodes; by node: where its edges begin in the list of edges sorted by it (edge_list.py).
  const int64_t *sender, *receiver, *receiver_begin, *by_receiver, *sender_begin, *by_sender;
  PerHead<const T> query, key, value;
  PerHead<const T> edge, bias, key_scale, key_offset, value_offset;  // by edge; data may be null
  T scale;
  T* weight;  // [edges, heads], the softmax: by the forward
};

// Contiguous; null for those that are not wanted. The bias's is grad_score.
template <typename T>
struct SparseGradients {
  T *query, *key, *value, *edge, *key_scale, *key_offset, *value_offset;
};

// Work on disjoint nodes may run in parallel; each result is written by one node's work.
template <typename T>
struct SparseAttentionKernels {
  int64_t (*scratch)(const SparseAttention<T>& call, int64_t most);  // most: the most edges of a receiver
  void (*forward)(const SparseAttention<T>& call, int64_t begin, int64_t end, T* scratch, T* output);
  // All gradients but the senders', and grad_score [edges, heads], which `senders` reads.
  void (*receivers)(const SparseAttention<T>& call, int64_t begin, int64_t end, T* scratch,
                    PerHead<const T> grad_output, T* grad_score, const SparseGradients<T>& gradients);
  void (*senders)(const SparseAttention<T>& call, int64_t begin, int64_t end, PerHead<const T> grad_output,
                  const T* grad_score, const SparseGradients<T>& gradients);
};

// One row of logits; see softmax_rows_cpu.h.
template <typename T>
struct SoftmaxRowsKernels {
  // `offset`, which is added to the row first, and `mean` may be null.
  void (*sums)(T* row, const T* offset, int64_t classes, int64_t hole, T* maximum, T* inverse, T* mean);
  // row <- exp(row - maximum) * factor - base, without base at the hole.
  void (*errors)(T* row, int64_t classes, T maximum, T factor, T base, int64_t hole);
};

// One row of dropout_add_layer_norm_cpu.h.
template <typename T>
struct DropoutRow {
  int64_t row, size;
  bool drops;
  uint64_t seed, threshold;
  T scale;
};

template <typename T>
struct DropoutAddLayerNormKernels {
  void (*forward)(const DropoutRow<T>& of, const T* x, const T* residual, const T* weight, const T* bias, T eps,
                  T* normed, T* sum, T* mean, T* inverse);
  // Gradients of normed and sum may be null: zero; so may those of x and residual: not wanted. Those of weight and bias
  // are added to.
  void (*backward)(const DropoutRow<T>& of, const T* sum, T mean, T inverse, const T* weight, const T* grad_normed,
                   const T* grad_sum, T* grad_x, T* grad_residual, T* grad_weight, T* grad_bias);
};

// A linear layer whose weights are int8, bfloat16 (uint16_t: its bits) or float.
template <typename W>
struct QuantizedLayer {
  const W* weight;  // [outputs, inputs], rows weight_stride apart
  int64_t outputs, inputs, weight_stride;
  const float* scale;  // [outputs], or null: 1
  const float* bias;   // [outputs], or null: 0
};

template <typename W>
struct QuantizedLinearKernels {
  int64_t (*packed_bytes)(int64_t inputs);  // of a row of activations, as `multiply` reads it
  void (*pack)(const float* x, int64_t inputs, char* packed);
  // Writes outputs begin ... end - 1 of packed rows, which are out_stride apart in `out`.
  void (*multiply)(const QuantizedLayer<W>& layer, int64_t begin, int64_t end, const char* packed, int64_t rows,
                   float* out, int64_t out_stride);
  // The place of the first of the largest values, and that value; it is NaN if a value is NaN or infinity.
  int64_t (*largest)(const float* values, int64_t count, float* most);
};

struct Simd {
  const char* name;  // as ECORE_KERNELS_SIMD calls it
  GraphAttentionKernels<float> graph_attention_float;
  GraphAttentionKernels<double> graph_attention_double;
  EdgeReadoutKernels<float> edge_readout_float;
  EdgeReadoutKernels<double> edge_readout_double;
  EdgeAttentionKernels<float> edge_attention_float;
  EdgeAttentionKernels<double> edge_attention_double;
  SparseAttentionKernels<float> sparse_attention_float;
  SparseAttentionKernels<double> sparse_attention_double;
  SoftmaxRowsKernels<float> softmax_rows_float;
  SoftmaxRowsKernels<double> softmax_rows_double;
  DropoutAddLayerNormKernels<float> dropout_add_layer_norm_float;
  DropoutAddLayerNormKernels<double> dropout_add_layer_norm_double;
  QuantizedLinearKernels<int8_t> quantized_linear_int8;
  QuantizedLinearKernels<uint16_t> quantized_linear_bfloat16;
  QuantizedLinearKernels<float> quantized_linear_float32;
};

extern const Simd kSimdBaseline;
#ifdef ECORE_WITH_X86
extern const Simd kSimdAvx2;
extern const Simd kSimdAvx512;
#endif

}  // namespace ecore
