// The forward of attention on any dense graph. Included only by edge_attention.h.
#pragma once

#include "edge_tiles.h"

namespace ecore {
namespace {

// One tile of receivers, over all senders. Returns whether all of the output is finite. If not, the cause may be a
// value that the receiver does not hear, unless `heard_alone` says that such values are left out.
template <typename T>
bool edge_forward_tile(const EdgeHead<T>& head, const PackedNodes<T>& senders, int64_t begin, int64_t rows,
                       const EdgeScratch<T>& at, bool heard_alone, Rows<T> output, T* new_edge, T* maxima, T* inverse) {
  using V = Vector<T>;
  const int64_t value_stride = padded_width<T>(head.value_dim);
  const Listed<const T> values = reachable(head.value, head.order, head.value_dim, senders.copy, head.order);
  const Listed<const T> queries = {head.query.data, head.query.stride, head.order + begin};
  const Listed<T> totals = {at.total, value_stride, head.order};
  const T whole_scale = head.scale * kLog2E<T>;
  int64_t limits[kTilePanels];
  T largest[kTileRows], normalizer[kTileRows];
  bool hears[kTileRows] = {};

  const int64_t heard_by_tile = heard_senders(head, begin, rows);
  for (int64_t start = 0; start < heard_by_tile; start += kTileColumns) {
    const int64_t columns = smaller_of(kTileColumns, heard_by_tile - start);
    limit_columns(head, begin, start, columns, limits);
    EdgesAhead<T> ahead(head, begin, rows, start, columns);
    multiply_across(queries, rows, limits, senders.keys + start * head.dim, head.dim, at.planes, at.stride,
                    ahead.get());
    load_common(head, start, columns, at);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = begin + r;
      T* const row = at.planes + r * at.stride;
      load_edges(head, i, start, columns, at);
      const T factor = head.factor == nullptr ? static_cast<T>(0) : head.factor[i];
      const int64_t heard_columns = limits[r / kPanel];
      V most = splat(-kInfinity<T>), heard{};
      for (int64_t j = 0; j < heard_columns; j += kLanes<T>) {
        const V edge = load<V>(at.edges + j), product = load<V>(row + j);
        const V listens = load<V>(at.heard + j);
        const auto is_heard = listens > V{};
        const V x = is_heard ? logit<T>(head, at, j, whole_scale, product) : splat(-kInfinity<T>);
        if (new_edge != nullptr && head.more.plain) {
          store(at.new_edges + j, is_heard ? factor * multiply_add(head.scale * product, edge, edge) : V{});
        } else if (new_edge != nullptr) {
          const V of_pair = clamped<T>(head.scale * product, head.more.low, head.more.high) * load<V>(at.gates + j);
          const V updated = factor * multiply_add(of_pair, edge, edge) + head.more.edge_bias;
          store(at.new_edges + j, load<V>(at.updated + j) > V{} ? updated : V{});
        }
        store(row + j, x);
        most = larger<T>(x, most);
        heard = larger<T>(listens, heard);
      }
      hears[r] = (start > 0 && hears[r]) || maximum<T>(heard) > 0;
      if (new_edge != nullptr) {
        put_row(new_edge + i * head.senders + start, at.new_edges, columns, head.streams_new_edge);
      }
      const T before = start == 0 ? -kInfinity<T> : largest[r];
      const T now = maximum<T>(larger<T>(most, splat(before)));
      const T base = now == -kInfinity<T> ? static_cast<T>(0) : now;  // no neighbour so far, or all overflowed
      V sums{};
      for (int64_t j = 0; j < heard_columns; j += kLanes<T>) {
        const V p = exp2<T>(load<V>(row + j) - base);
        sums += p;
        store(row + j, head.more.drops ? p * load<V>(at.kept + j) : p);
      }
      const T shrink = exp2<T>(splat(before - base))[0];
      normalizer[r] = start == 0 ? sum<T>(sums) : normalizer[r] * shrink + sum<T>(sums);
      largest[r] = now;
      for (int64_t c = 0; start > 0 && c < value_stride; c += kLanes<T>) {
        T* const out = at.total + r * value_stride + c;
        store(out, load<V>(out) * shrink);
      }
    }
    if (heard_alone) {
      multiply_heard_rows(at.planes, at.stride, rows, limits, values.from(start), head.value_dim, totals, start > 0,
                          [&](int64_t r, int64_t j) { return is_neighbor(head, begin + r, start + j); });
    } else {
      multiply_rows(at.planes, at.stride, rows, limits, values.from(start), head.value_dim, totals, start > 0);
    }
  }
  V check{};
  for (int64_t r = 0; r < rows; ++r) {
    // A row without neighbours is 0; a row whose scores all overflowed is NaN, as with a softmax.
    const T factor = hears[r] ? static_cast<T>(1) / normalizer[r] : static_cast<T>(0);
    T* const out = output.data + (begin + r) * output.stride;
    if (hears[r]) {
      scale_row(at.total + r * value_stride, factor, head.value_dim, out, &check);
    } else {
      for (int64_t c = 0; c < head.value_dim; ++c) out[c] = 0;
    }
    maxima[begin + r] = hears[r] ? largest[r] : static_cast<T>(0);
    inverse[begin + r] = factor;
  }
  return is_finite(sum<T>(check));
}

template <typename T>
void edge_forward(const EdgeHead<T>& head, const T* packed, int64_t begin, int64_t end, T* scratch, Rows<T> output,
                  T* new_edge, T* maxima, T* inverse) {
  const PackedNodes<T> senders(head, false, const_cast<T*>(packed));
  const EdgeScratch<T> at(head, false, scratch);
  for (; begin < end; begin += kTileRows) {
    const int64_t rows = smaller_of(kTileRows, end - begin);
    if (!edge_forward_tile(head, senders, begin, rows, at, false, output, new_edge, maxima, inverse)) {
      edge_forward_tile(head, senders, begin, rows, at, true, output, new_edge, maxima, inverse);
    }
  }
  streamed();
}
}  // namespace
}  // namespace ecore
