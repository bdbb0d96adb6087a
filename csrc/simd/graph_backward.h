// The backward of attention on the emotion graph: one sweep that recomputes the scores. Included only by table.h; see
// graph_tiles.h.
#pragma once

#include "graph_tiles.h"

namespace ecore {
namespace {

// The gradients that senders add up over receivers.
template <typename T>
struct SenderSums {
  T* keys;            // [1 + depth] of rows
  T* value;           // rows
  T* emotion_weight;  // by place
  int64_t key_size, size;

  SenderSums(const GraphHead<T>& head, int64_t nodes, T* sums) {
    key_size = nodes * padded_width<T>(head.dim);
    Carver<T> carver(sums);
    keys = carver.take((1 + head.depth) * key_size);
    value = carver.take(nodes * padded_width<T>(head.value_dim));
    emotion_weight = carver.take(rounded_up(head.emotions + 1, kLanes<T>));
    size = carver.used();
  }
  // Rows by place. If no other part writes them, they are the results themselves, provided that the sweeps can write
  // those.
  Listed<T> keys_of(const GraphHead<T>& head, int64_t m, const Rows<T>& results, bool alone,
                    const int32_t* numbers) const {
    if (alone) return reachable(results, head.order, head.dim, keys + m * key_size, numbers);
    return {keys + m * key_size, padded_width<T>(head.dim), numbers};
  }
  Listed<T> value_of(const GraphHead<T>& head, const Rows<T>& results, bool alone, const int32_t* numbers) const {
    if (alone) return reachable(results, head.order, head.value_dim, value, numbers);
    return {value, padded_width<T>(head.value_dim), numbers};
  }
};

template <typename T>
int64_t graph_sums_size(const GraphHead<T>& head, int64_t nodes) {
  return SenderSums<T>(head, nodes, nullptr).size;
}

template <typename T>
struct BackwardScratch {
  T* planes;        // [2 + depth], the last for gradients of attention and then attention itself
  T* queries;       // [1 + depth] copies
  T* grad_queries;  // likewise
  T* grad_output;   // a copy
  T* edges;         // E0 of an emotion's row
  T* grad_edges;    // its gradient
  T* before;        // [depth] vectors: edges before each u
  T* attention;     // of a row
  int64_t query_size, size;

  BackwardScratch(const GraphHead<T>& head, int64_t nodes, T* scratch) {
    query_size = copy_size<T>(kTileRows, head.dim);
    Carver<T> carver(scratch);
    planes = carver.take((2 + head.depth) * kTileRows * tile_stride<T>(nodes));
    queries = carver.take((1 + head.depth) * query_size);
    grad_queries = carver.take((1 + head.depth) * query_size);
    grad_output = carver.take(copy_size<T>(kTileRows, head.value_dim));
    edges = carver.take(rounded_up(head.emotions + 1, kLanes<T>));
    grad_edges = carver.take(rounded_up(head.emotions + 1, kLanes<T>));
    before = carver.take(head.depth * kLanes<T>);
    attention = carver.take(tile_stride<T>(nodes));
    size = carver.used();
  }
};

template <typename T>
int64_t graph_backward_scratch(const GraphHead<T>& head, int64_t nodes) {
  return BackwardScratch<T>(head, nodes, nullptr).size;
}

// What the backward of one row of a tile needs besides its planes.
template <typename T>
struct BackwardRow {
  const T* edges;  // E0, from the tile's first column on
  T factor, scale, maximum, inverse;
  int64_t heard;  // columns
  T* grad_edges;  // added to over the first grad_columns columns
  int64_t grad_columns;

  // Attention, from the products of queries and keys, and the edge without its factor.
  Vector<T> attention(Vector<T> product, Vector<T> edge) const {
    const T whole_scale = scale * kLog2E<T> * factor;
    Vector<T> x = score<T>(whole_scale, product, edge) - maximum;
    // The score of a neighbour is not above the maximum; others may be.
    x = x > Vector<T>{} ? Vector<T>{} : x;
    return exp2<T>(x) * inverse;
  }
};

// Computes a row's attention again from its products in planes 0 ... depth: 0 from column `heard` on, up to whole
// vectors. Returns the sum of attention times its gradient, which is in the last plane; 0 if that is not wanted.
template <bool kSum, typename T>
T attend_again(T* row, int64_t plane_size, int64_t depth, const BackwardRow<T>& of, T* attention) {
  using V = Vector<T>;
  const T* const gradient = row + (1 + depth) * plane_size;
  V sums{};
  for (int64_t j = 0; j < of.heard; j += kLanes<T>) {
    const V edge = grown_edge<false, T>(row + j, plane_size, depth, of.scale, load<V>(of.edges + j), nullptr);
    V p = of.attention(load<V>(row + j), edge), part{};
    if (kSum) part = p * load<V>(gradient + j);
    if (j + kLanes<T> > of.heard) {
      const auto heard = lane_numbers<T>() < static_cast<T>(of.heard - j);
      p = heard ? p : V{};
      part = heard ? part : V{};
    }
    store(attention + j, p);
    sums += part;
  }
  return kSum ? sum<T>(sums) : static_cast<T>(0);
}

// One vector of a row of a tile, at column j, in place: plane 0 from the products of queries and keys to the gradient
// of s, planes 1 ... depth likewise for u, the last from the gradient of attention to attention; both gradients times
// scale. If kPartial, all is 0 from column `heard` on. Returns the gradient of the row factor.
template <bool kPartial, typename T>
inline Vector<T> differentiate(T* row, int64_t j, int64_t plane_size, int64_t depth, const T* attention, T delta,
                               T* before, const BackwardRow<T>& of) {
  using V = Vector<T>;
  const auto heard = lane_numbers<T>() < static_cast<T>(of.heard - j);
  const auto select = [&](V v) { return kPartial ? (heard ? v : V{}) : v; };
  row += j;
  T* const last = row + (1 + depth) * plane_size;
  const V edge = grown_edge<true>(row, plane_size, depth, of.scale, load<V>(of.edges + j), before);
  const V p = load<V>(attention + j), g = select(p * (load<V>(last) - delta)), gs = g * (of.scale * load<V>(row));
  store(last, p);
  store(row, select(g * (edge * (of.factor * of.scale))));
  if (j < of.grad_columns) {
    V others = gs * of.factor;
    for (int64_t m = 1; m <= depth; ++m) others *= load<V>(row + m * plane_size);
    T* const at = of.grad_edges + j;
    store(at, load<V>(at) + select(others));
  }
  V others = gs * (of.factor * of.scale);
  for (int64_t m = depth; m > 0; --m) {
    T* const at = row + m * plane_size;
    const V u = load<V>(at);
    store(at, select(others * load<V>(before + (m - 1) * kLanes<T>)));
    others *= u;
  }
  return select(gs * edge);
}

template <typename T>
T differentiate_row(T* row, int64_t plane_size, int64_t depth, const T* attention, T delta, T* before,
                    const BackwardRow<T>& of) {
  Vector<T> grad_factor{};
  int64_t j = 0;
  for (; j + kLanes<T> <= of.heard; j += kLanes<T>) {
    grad_factor += differentiate<false>(row, j, plane_size, depth, attention, delta, before, of);
  }
  if (j < of.heard) grad_factor += differentiate<true>(row, j, plane_size, depth, attention, delta, before, of);
  return sum<T>(grad_factor);
}

template <typename T>
void graph_backward(const GraphHead<T>& head, const T* packed, int64_t begin, int64_t end, T* scratch,
                    Rows<const T> output, Rows<const T> grad_output, const T* maximum, const T* inverse,
                    const GraphGradients<T>& gradients, bool alone, T* sums_of_senders) {
  const int64_t depth = head.depth;
  const PackedSenders<T> senders(head, head.count, true, const_cast<T*>(packed));
  const SenderSums<T> sums(head, head.count, sums_of_senders);
  const BackwardScratch<T> at(head, head.count, scratch);
  const Receivers<T> receivers(head);
  const int64_t stride = tile_stride<T>(head.count), plane_size = kTileRows * stride;
  const bool wants_value = gradients.value.data != nullptr;
  bool wants_scores =
      gradients.row_factor != nullptr || gradients.emotion_weight != nullptr || gradients.correlation != nullptr;
  for (int64_t m = 0; m <= depth; ++m) {
    wants_scores = wants_scores || gradients.queries[m].data != nullptr || gradients.keys[m].data != nullptr;
    if (!alone && gradients.keys[m].data != nullptr) fill_zero(sums.keys + m * sums.key_size, 0, sums.key_size);
  }
  if (!alone && wants_value) fill_zero(sums.value, 0, head.count * padded_width<T>(head.value_dim));
  fill_zero(sums.emotion_weight, 0, rounded_up(head.emotions + 1, kLanes<T>));
  T* const attention = at.planes + (1 + depth) * plane_size;
  int64_t limits[kTilePanels], firsts[kTileColumns / kPanel + 1];
  T delta[kTileRows], factor_gradient[kTileRows];

  for (; begin < end; begin += kTileRows) {
    const TileRows<T> rows(head, begin, end);
    const auto queries = [&](int64_t m) {
      return reachable(head.queries[m], rows.nodes, head.dim, at.queries + m * at.query_size, senders.numbers);
    };
    for (int64_t m = 0; m <= depth; ++m) {
      load_copy(at.queries + m * at.query_size, head.queries[m], rows.nodes, rows.count, head.dim);
    }
    const Listed<const T> grad_outputs =
        reachable(grad_output, rows.nodes, head.value_dim, at.grad_output, senders.numbers);
    load_copy(at.grad_output, grad_output, rows.nodes, rows.count, head.value_dim);
    // True if queries, keys and gradients of this tile are finite, if products over the whole tile read them.
    bool finite = true;
    // Attention times its gradient, summed over all that a row hears. If a tile holds all of it, the sum is of the same
    // numbers that it is subtracted from, as in a softmax's backward. Otherwise it comes from the output, in the order
    // in which those numbers are summed. So a row with a single sender gets exactly 0 in both cases.
    if (wants_scores && rows.longest > kTileColumns) {
      dot_rows(grad_outputs, {output.data, output.stride, rows.nodes}, rows.count, head.value_dim, delta);
    }
    for (int64_t r = 0; r < rows.count; ++r) {
      factor_gradient[r] = 0;
      finite = finite && (wants_scores || all_finite(grad_outputs.row(r), head.value_dim));
    }
    for (int64_t start = 0; start < rows.longest; start += kTileColumns) {
      rows.limits(start, limits);
      // Whole panels: the sums that a later tile adds to must begin in its first panel.
      const int64_t columns =
          smaller_of(rounded_up(rows.longest - start, kPanel), smaller_of(kTileColumns, head.count - start));
      for (int64_t m = 0; m <= depth; ++m) {
        multiply_across(queries(m), rows.count, limits, senders.keys + m * senders.across_size + start * head.dim,
                        head.dim, at.planes + m * plane_size, stride, head.ahead);
      }
      if (wants_scores) {
        multiply_across(grad_outputs, rows.count, limits, senders.value_across + start * head.value_dim, head.value_dim,
                        attention, stride, head.ahead);
      }
      for (int64_t r = 0; r < rows.count; ++r) {
        T* const row = at.planes + r * stride;
        const int64_t heard = larger_of(0, smaller_of(rows.heard[r] - start, columns));
        if (heard > 0) {
          const int32_t node = rows.nodes[r];
          const bool is_emotion = node >= head.words;
          const int64_t itself = is_emotion ? rows.places[r] - start : -1;
          const bool has_itself = itself >= 0 && itself < heard;
          if (is_emotion) {
            emotion_edges(head, node, at.edges);
            fill_zero(at.grad_edges, 0, rounded_up(head.emotion_count + 1, kLanes<T>));
          }
          const BackwardRow<T> of = {
              (is_emotion ? at.edges : senders.weight) + start,
              factor_of_row(head, node),
              head.scale,
              maximum[rows.places[r]],
              inverse[rows.places[r]],
              heard,
              (is_emotion ? at.grad_edges : sums.emotion_weight) + start,
              head.emotion_count + 1 - start,
          };
          // The emotion itself adds nothing to its row: its attention is 0, and its other values are finite.
          for (int64_t m = 0; has_itself && m < 2 + depth; ++m) {
            finite = finite && (m > depth || is_finite(row[m * plane_size + itself]));
            row[m * plane_size + itself] = 0;
          }
          if (wants_scores) {
            const T total = attend_again<true>(row, plane_size, depth, of, at.attention);
            if (has_itself) at.attention[itself] = 0;
            if (rows.heard[r] <= kTileColumns) delta[r] = total;
            factor_gradient[r] += differentiate_row(row, plane_size, depth, at.attention, delta[r], at.before, of);
            finite = finite && is_finite(delta[r]) && is_finite(factor_gradient[r]);
          } else {
            attend_again<false>(row, plane_size, depth, of, attention + r * stride);
          }
          if (has_itself) {
            for (int64_t m = 0; m < 2 + depth; ++m) row[m * plane_size + itself] = 0;
            at.grad_edges[start + itself] = 0;
          }
          if (is_emotion && gradients.correlation != nullptr) {
            T* const to = gradients.correlation + (node - head.words) * head.emotions - head.words;
            for (int64_t j = larger_of(start, 1); j < start + heard; ++j) to[head.order[j]] = at.grad_edges[j];
          }
        }
        for (int64_t m = wants_scores ? 0 : 1 + depth; m < 2 + depth; ++m) {
          fill_zero(row + m * plane_size, rounded_up(heard, kLanes<T>), columns);
        }
      }
      for (int64_t j = 0; j < columns; j += kPanel) {
        firsts[j / kPanel] = receivers.first(start + j) - begin;
      }
      const auto hears = [&](int64_t r, int64_t j) { return rows.hears(head, r, start + j); };
      const auto to_receivers = [&](const T* plane, const Listed<const T>& operand, int64_t width,
                                    const Listed<T>& to) {
        if (finite) return multiply_rows(plane, stride, rows.count, limits, operand, width, to, start > 0, head.ahead);
        multiply_heard_rows(plane, stride, rows.count, limits, operand, width, to, start > 0, hears);
      };
      const auto to_senders = [&](const T* plane, const Listed<const T>& operand, int64_t width, const Listed<T>& to) {
        if (finite) {
          return multiply_columns(plane, stride, rows.count, firsts, columns, operand, width, to, alone, head.ahead);
        }
        multiply_heard_columns(plane, stride, rows.count, firsts, columns, operand, width, to, alone, hears);
      };
      for (int64_t m = 0; m <= depth; ++m) {
        const T* const plane = at.planes + m * plane_size;
        if (gradients.queries[m].data != nullptr) {
          const Listed<const T> keys = reachable(head.keys[m], head.order, head.dim,
                                                 senders.key_copies + m * senders.copy_size, senders.numbers);
          to_receivers(plane, keys.from(start), head.dim,
                       reachable(gradients.queries[m], rows.nodes, head.dim, at.grad_queries + m * at.query_size,
                                 senders.numbers));
        }
        if (gradients.keys[m].data != nullptr) {
          to_senders(plane, queries(m), head.dim,
                     sums.keys_of(head, m, gradients.keys[m], alone, senders.numbers).from(start));
        }
      }
      if (wants_value) {
        to_senders(attention, grad_outputs, head.value_dim,
                   sums.value_of(head, gradients.value, alone, senders.numbers).from(start));
      }
    }
    for (int64_t m = 0; m <= depth; ++m) {
      if (gradients.queries[m].data == nullptr) continue;
      store_copy(gradients.queries[m], at.grad_queries + m * at.query_size, rows.nodes, rows.count, head.dim);
    }
    for (int64_t r = 0; gradients.row_factor != nullptr && r < rows.count; ++r) {
      gradients.row_factor[rows.nodes[r]] = factor_gradient[r];
    }
  }
}

template <typename T>
void graph_finish(const GraphHead<T>& head, T* sums, int64_t nodes, int64_t parts, int64_t begin, int64_t end,
                  const GraphGradients<T>& gradients) {
  const int64_t apart = graph_sums_size(head, nodes);
  const SenderSums<T> total(head, head.count, sums);
  for (int64_t m = 0; m <= head.depth; ++m) {
    if (gradients.keys[m].data == nullptr) continue;
    add_parts(total.keys + m * total.key_size, apart, parts, begin, end, head.order, gradients.keys[m], head.dim);
  }
  if (gradients.value.data != nullptr) {
    add_parts(total.value, apart, parts, begin, end, head.order, gradients.value, head.value_dim);
  }
  if (gradients.emotion_weight == nullptr) return;
  for (int64_t j = larger_of(begin, 1); j < smaller_of(end, head.emotion_count + 1); ++j) {
    T gradient = total.emotion_weight[j];
    for (int64_t p = 1; p < parts; ++p) gradient += total.emotion_weight[p * apart + j];
    gradients.emotion_weight[head.order[j] - head.words] = gradient;
  }
}

}  // namespace
}  // namespace ecore
