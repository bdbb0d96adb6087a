// Weights of the edges that emotions send after the layers of the history (Eq. 8), one (b, k) at a time. Included only
// by table.h; see vectors.h.
//
// A tile is kTileRows receivers by up to kTileColumns emotions, in planes [rows, columns], one for every u^m = 1 +
// scale q^m_i . k^m_j.
#pragma once

#include "kernels.h"
#include "products.h"

namespace ecore {
namespace {

// The emotions of a head as senders: emotion j is at place j + 1 of the order.
template <typename T>
struct Emotions {
  const GraphHead<T>& head;
  int64_t count;

  explicit Emotions(const GraphHead<T>& of) : head(of), count(of.emotion_count) {}
  const int32_t* nodes() const { return head.order + 1; }
  int64_t index(int64_t j) const { return head.order[j + 1] - head.words; }
  // to[j] = from[index of j] for emotions begin + (0 ... size - 1), with zeros up to whole vectors.
  void gather(const T* from, int64_t begin, int64_t size, T* to) const {
    for (int64_t j = 0; j < size; ++j) to[j] = from[index(begin + j)];
    for (int64_t j = size; j < rounded_up(size, kLanes<T>); ++j) to[j] = 0;
  }
};

template <typename T>
struct ReadoutScratch {
  T* keys;    // [depth], each across
  T* planes;  // [depth]
  T* edges;   // E0 of a row, then the edges that are read out
  T* sums;    // over words, by emotion
  T* before;  // [depth] vectors: products of the u before each
  // For the backward:
  T* queries;        // [depth] copies
  T* key_rows;       // [depth] copies
  T* grad_keys;      // [depth] copies
  T* grad_queries;   // [depth] copies
  int32_t* numbers;  // 0, 1, 2, ...
  T* gradient;       // of a row's edges
  T* to_words;       // likewise, shared by the words
  int64_t across_size, rows_size, plane_stride, plane_size, query_size, size;

  ReadoutScratch(const GraphHead<T>& head, bool backward, T* scratch) {
    across_size = rounded_up(head.emotions, kChunk<T>) * head.dim;
    rows_size = copy_size<T>(head.emotions, head.dim);
    plane_stride = tile_stride<T>(head.emotions);
    plane_size = kTileRows * plane_stride;
    query_size = copy_size<T>(kTileRows, head.dim);
    Carver<T> carver(scratch);
    keys = carver.take(head.depth * across_size);
    planes = carver.take(head.depth * plane_size);
    edges = carver.take(plane_stride);
    sums = carver.take(rounded_up(head.emotions, kLanes<T>));
    before = carver.take(head.depth * kLanes<T>);
    queries = backward ? carver.take(head.depth * query_size) : nullptr;
    key_rows = backward ? carver.take(head.depth * rows_size) : nullptr;
    grad_keys = backward ? carver.take(head.depth * rows_size) : nullptr;
    grad_queries = backward ? carver.take(head.depth * query_size) : nullptr;
    numbers = backward ? reinterpret_cast<int32_t*>(carver.take(larger_of(head.emotions, kTileRows))) : nullptr;
    gradient = backward ? carver.take(plane_stride) : nullptr;
    to_words = backward ? carver.take(plane_stride) : nullptr;
    size = carver.used();
  }
};

// The products of a panel of receivers that multiply_across() computes for so many columns.
template <typename T>
constexpr int64_t chunks_of(int64_t columns) {
  return (columns + kChunk<T> - 1) / kChunk<T>;
}

template <typename T>
int64_t readout_scratch(const GraphHead<T>& head, bool backward) {
  return ReadoutScratch<T>(head, backward, nullptr).size;
}

// Products of queries and emotions' keys for one tile, in the planes.
template <typename T>
void multiply_history(const GraphHead<T>& head, const ReadoutScratch<T>& at, const int32_t* nodes, int64_t rows,
                      int64_t start, int64_t columns, Ahead<T>* ahead) {
  int64_t limits[kTilePanels];
  for (int64_t& limit : limits) limit = columns;
  for (int64_t m = 0; m < head.depth; ++m) {
    const Listed<const T> queries = {head.queries[m].data, head.queries[m].stride, nodes};
    multiply_across(queries, rows, limits, at.keys + m * at.across_size + start * head.dim, head.dim,
                    at.planes + m * at.plane_size, at.plane_stride, ahead);
  }
}

// Rows to fetch while the tile of `rows` receivers from place `begin` on is computed: those of the receivers after it,
// during about so many products of a panel of receivers; in a head's last tile, those that the head names.
template <typename T>
class TilesAhead {
 public:
  TilesAhead(const GraphHead<T>& head, int64_t last, const Rows<const T>* touched, int64_t tensors, int64_t products)
      : head_(head), last_(last), touched_(touched), tensors_(tensors), products_(products) {}

  Ahead<T>* after(int64_t begin, int64_t rows) {
    const int64_t next = begin + rows, count = smaller_of(kTileRows, last_ - next);
    if (count <= 0) return head_.ahead;
    const int64_t steps = larger_of(1, products_ * rows / kPanel);
    const int64_t rows_a_step = smaller_of(16, 1 + tensors_ * count / steps);
    ahead_ = {touched_, tensors_, head_.order + next, count, head_.dim, rows_a_step, 0, 0};
    return &ahead_;
  }

 private:
  const GraphHead<T>& head_;
  const int64_t last_;
  const Rows<const T>* const touched_;
  const int64_t tensors_, products_;
  Ahead<T> ahead_{};
};

// E0 of the edges that a receiver hears from a tile's emotions.
template <typename T>
void initial_edges(const Emotions<T>& emotions, int64_t node, int64_t start, int64_t columns, T* edges) {
  const GraphHead<T>& head = emotions.head;
  if (node < head.words) {
    copy_row(edges, head.weight + 1 + start, columns);
    for (int64_t j = columns; j < rounded_up(columns, kLanes<T>); ++j) edges[j] = 0;
  } else {
    emotions.gather(head.correlation + (node - head.words) * head.emotions, start, columns, edges);
  }
}

template <typename T>
T factor_of(const GraphHead<T>& head, int64_t node) {
  return head.row_factor == nullptr ? static_cast<T>(1) : head.row_factor[node];
}

template <typename T>
void readout_forward(const GraphHead<T>& head, int64_t first, int64_t last, T* scratch, bool per_word, T* to_word,
                     T* to_emotion) {
  using V = Vector<T>;
  const Emotions<T> emotions(head);
  const ReadoutScratch<T> at(head, false, scratch);
  for (int64_t m = 0; m < head.depth && emotions.count > 0; ++m) {
    pack_across(at.keys + m * at.across_size, head.keys[m].data, head.keys[m].stride, emotions.nodes(), 0,
                emotions.count, head.dim);
  }
  for (int64_t j = 0; j < rounded_up(emotions.count, kLanes<T>); ++j) at.sums[j] = 0;
  TilesAhead<T> tiles(head, last, head.queries, head.depth, head.depth * chunks_of<T>(emotions.count));
  for (int64_t begin = first; begin < last; begin += kTileRows) {
    const int64_t rows = smaller_of(kTileRows, last - begin);
    Ahead<T>* const ahead = tiles.after(begin, rows);
    for (int64_t start = 0; start < emotions.count; start += kTileColumns) {
      const int64_t columns = smaller_of(kTileColumns, emotions.count - start);
      multiply_history(head, at, head.order + begin, rows, start, columns, ahead);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t node = head.order[begin + r];
        const T factor = factor_of(head, node);
        initial_edges(emotions, node, start, columns, at.edges);
        const bool is_word = node < head.words;
        for (int64_t j = 0; j < columns; j += kLanes<T>) {
          V edge = load<V>(at.edges + j) * factor;
          for (int64_t m = 0; m < head.depth; ++m) {
            edge *= static_cast<T>(1) + head.scale * load<V>(at.planes + m * at.plane_size + r * at.plane_stride + j);
          }
          store(at.edges + j, edge);
          if (is_word) store(at.sums + start + j, load<V>(at.sums + start + j) + edge);
        }
        if (is_word && !per_word) continue;
        T* const to = is_word ? to_word + node * head.emotions : to_emotion + (node - head.words) * head.emotions;
        for (int64_t j = 0; j < columns; ++j) {
          if (head.order[start + j + 1] != node) to[emotions.index(start + j)] += at.edges[j];
        }
      }
    }
  }
  if (per_word) return;
  for (int64_t j = 0; j < emotions.count; ++j) to_word[emotions.index(j)] += at.sums[j];
}

template <typename T>
void readout_backward(const GraphHead<T>& head, T* scratch, const Rows<const T>* touched, int64_t touched_count,
                      bool per_word, const T* grad_to_word, const T* grad_to_emotion, const Rows<T>* grad_queries,
                      const Rows<T>* grad_keys, T* grad_row_factor, T* grad_emotion_weight, T* grad_correlation) {
  using V = Vector<T>;
  const Emotions<T> emotions(head);
  const ReadoutScratch<T> at(head, true, scratch);
  const int64_t depth = head.depth;
  for (int64_t m = 0; m < depth; ++m) {
    const Rows<const T> key = head.keys[m];
    if (emotions.count > 0) {
      pack_across(at.keys + m * at.across_size, key.data, key.stride, emotions.nodes(), 0, emotions.count, head.dim);
    }
    load_copy(at.key_rows + m * at.rows_size, key, emotions.nodes(), emotions.count, head.dim);
  }
  for (int64_t i = 0; i < larger_of(emotions.count, kTileRows); ++i) at.numbers[i] = static_cast<int32_t>(i);
  for (int64_t j = 0; j < rounded_up(emotions.count, kLanes<T>); ++j) at.sums[j] = 0;
  int64_t limits[kTilePanels], firsts[kTileColumns / kPanel + 1];
  T factor_gradient[kTileRows];
  const int64_t products = depth * (chunks_of<T>(emotions.count) + 2 * chunks_of<T>(head.dim));
  TilesAhead<T> tiles(head, head.count, touched, touched_count, products);
  for (int64_t begin = 0; begin < head.count; begin += kTileRows) {
    const int64_t rows = smaller_of(kTileRows, head.count - begin);
    const int32_t* const nodes = head.order + begin;
    Ahead<T>* const ahead = tiles.after(begin, rows);
    for (int64_t m = 0; m < depth; ++m) {
      load_copy(at.queries + m * at.query_size, head.queries[m], nodes, rows, head.dim);
      for (int64_t r = 0; grad_queries[m].data != nullptr && emotions.count == 0 && r < rows; ++r) {
        for (int64_t c = 0; c < head.dim; ++c) grad_queries[m].data[nodes[r] * grad_queries[m].stride + c] = 0;
      }
    }
    for (int64_t& first : firsts) first = begin == 0 ? 0 : -1;
    for (int64_t r = 0; r < rows; ++r) factor_gradient[r] = 0;
    for (int64_t start = 0; start < emotions.count; start += kTileColumns) {
      const int64_t columns = smaller_of(kTileColumns, emotions.count - start);
      multiply_history(head, at, nodes, rows, start, columns, ahead);
      if (!per_word) emotions.gather(grad_to_word, start, columns, at.to_words);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t node = nodes[r];
        const T factor = factor_of(head, node);
        const bool is_word = node < head.words;
        initial_edges(emotions, node, start, columns, at.edges);
        const T* gradient = at.to_words;
        if (!is_word) {
          emotions.gather(grad_to_emotion + (node - head.words) * head.emotions, start, columns, at.gradient);
          const int64_t itself = begin + r - 1 - start;  // its place is begin + r
          if (itself >= 0 && itself < columns) {
            // An emotion does not hear itself: the edge to itself counts as 0, even if it is infinite or NaN.
            at.gradient[itself] = at.edges[itself] = 0;
            for (int64_t m = 0; m < depth; ++m) at.planes[m * at.plane_size + r * at.plane_stride + itself] = 0;
          }
        } else if (per_word) {
          emotions.gather(grad_to_word + node * head.emotions, start, columns, at.gradient);
        }
        if (!is_word || per_word) gradient = at.gradient;
        T* const plane = at.planes + r * at.plane_stride;
        V sums{};
        for (int64_t j = 0; j < columns; j += kLanes<T>) {
          V product = splat(static_cast<T>(1));
          for (int64_t m = 0; m < depth; ++m) {
            T* const u_at = plane + m * at.plane_size + j;
            const V u = static_cast<T>(1) + head.scale * load<V>(u_at);
            store(at.before + m * kLanes<T>, product);
            store(u_at, u);
            product *= u;
          }
          const V g = load<V>(gradient + j), edge = load<V>(at.edges + j);
          sums += g * edge * product;
          V others = g * edge * factor * head.scale;
          for (int64_t m = depth - 1; m >= 0; --m) {
            T* const u_at = plane + m * at.plane_size + j;
            const V u = load<V>(u_at);
            store(u_at, others * load<V>(at.before + m * kLanes<T>));
            others *= u;
          }
          const V grad_edge = g * factor * product;
          if (is_word) {
            store(at.sums + start + j, load<V>(at.sums + start + j) + grad_edge);
          } else {
            store(at.edges + j, grad_edge);
          }
        }
        factor_gradient[r] += sum<T>(sums);
        if (is_word || grad_correlation == nullptr) continue;
        T* const to = grad_correlation + (node - head.words) * head.emotions;
        for (int64_t j = 0; j < columns; ++j) to[emotions.index(start + j)] = at.edges[j];
      }
      for (int64_t& limit : limits) limit = columns;
      for (int64_t m = 0; m < depth; ++m) {
        const T* const plane = at.planes + m * at.plane_size;
        const auto listed = [&](const auto& of, const int32_t* its_nodes, T* copy) {
          return reachable(of, its_nodes, head.dim, copy, at.numbers);
        };
        const Listed<const T> queries = listed(head.queries[m], nodes, at.queries + m * at.query_size);
        const Listed<const T> keys = listed(head.keys[m], emotions.nodes(), at.key_rows + m * at.rows_size);
        const Listed<T> to_queries = listed(grad_queries[m], nodes, at.grad_queries + m * at.query_size);
        const Listed<T> to_keys = listed(grad_keys[m], emotions.nodes(), at.grad_keys + m * at.rows_size);
        if (grad_queries[m].data != nullptr) {
          multiply_rows(plane, at.plane_stride, rows, limits, keys.from(start), head.dim, to_queries, start > 0, ahead);
        }
        if (grad_keys[m].data == nullptr) continue;
        multiply_columns(plane, at.plane_stride, rows, firsts, columns, queries, head.dim, to_keys.from(start), true,
                         ahead);
      }
    }
    for (int64_t m = 0; m < depth && emotions.count > 0; ++m) {
      if (grad_queries[m].data == nullptr) continue;
      store_copy(grad_queries[m], at.grad_queries + m * at.query_size, nodes, rows, head.dim);
    }
    for (int64_t r = 0; grad_row_factor != nullptr && r < rows; ++r) grad_row_factor[nodes[r]] = factor_gradient[r];
  }
  for (int64_t m = 0; m < depth; ++m) {
    if (grad_keys[m].data == nullptr) continue;
    store_copy(grad_keys[m], at.grad_keys + m * at.rows_size, emotions.nodes(), emotions.count, head.dim);
  }
  for (int64_t j = 0; grad_emotion_weight != nullptr && j < emotions.count; ++j) {
    grad_emotion_weight[emotions.index(j)] = at.sums[j];
  }
}

template <typename T>
constexpr EdgeReadoutKernels<T> edge_readout_kernels() {
  return {readout_scratch<T>, readout_forward<T>, readout_backward<T>};
}

}  // namespace
}  // namespace ecore
