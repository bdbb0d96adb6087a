// Weights of the edges that emotions send after the layers of the history, on a CPU (edge_readout.py and Eq. 8 have the
// formulas).
//
// T is float or double. Memory is the caller's. Every result is the same bits whatever the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "emotion_graph.h"

namespace ecore {

template <typename T>
struct EdgeReadout {
  EmotionGraph<T> graph;
  std::vector<Heads<const T>> queries, keys;  // the history's
  int64_t dim;
  const T* row_factor;  // [batch, resolutions, nodes], or null
  T scale;
  bool per_word;
};

// to_word: [batch, emotions], or [batch, words, emotions] with per_word; to_emotion: [batch, emotions, emotions].
template <typename T>
void edge_readout_forward(const EdgeReadout<T>& call, T* to_word, T* to_emotion, int threads);

template <typename T>
struct EdgeReadoutGradients {
  std::vector<Heads<T>> queries, keys;
  T* row_factor;      // [batch, resolutions, nodes], or null
  T* emotion_weight;  // [batch, resolutions, emotions], or null: to be added up over resolutions
  T* correlation;     // [batch, resolutions, emotions, emotions], or null: likewise, and over the batch if it is shared
};

template <typename T>
void edge_readout_backward(const EdgeReadout<T>& call, const T* grad_to_word, const T* grad_to_emotion,
                           const EdgeReadoutGradients<T>& gradients, int threads);

}  // namespace ecore
