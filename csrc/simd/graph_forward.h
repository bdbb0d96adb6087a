// The forward of attention on the emotion graph. Included only by table.h; see graph_tiles.h.
#pragma once

#include "graph_tiles.h"

namespace ecore {
namespace {

template <typename T>
struct ForwardScratch {
  T* planes;  // [1 + depth]
  T* total;   // output rows
  T* edges;   // E0 of an emotion's row
  int64_t size;

  ForwardScratch(const GraphHead<T>& head, int64_t nodes, T* scratch) {
    Carver<T> carver(scratch);
    planes = carver.take((1 + head.depth) * kTileRows * tile_stride<T>(nodes));
    total = carver.take(kTileRows * padded_width<T>(head.value_dim));
    edges = carver.take(rounded_up(head.emotions + 1, kLanes<T>));
    size = carver.used();
  }
};

template <typename T>
int64_t graph_forward_scratch(const GraphHead<T>& head, int64_t nodes) {
  return ForwardScratch<T>(head, nodes, nullptr).size;
}

// One tile of receivers, over all senders that they hear. Returns whether all of the output is finite. If not, the
// cause may be a value that the receiver does not hear, unless `heard_alone` says that such values are left out.
template <typename T>
bool forward_tile(const GraphHead<T>& head, const PackedSenders<T>& senders, const TileRows<T>& rows,
                  const ForwardScratch<T>& at, bool heard_alone, Rows<T> output, T* maximum, T* inverse) {
  using V = Vector<T>;
  const int64_t stride = tile_stride<T>(head.count), plane_size = kTileRows * stride;
  const int64_t value_stride = padded_width<T>(head.value_dim);
  const Listed<const T> values = reachable(head.value, head.order, head.value_dim, senders.value_copy, senders.numbers);
  const Listed<T> totals = {at.total, value_stride, senders.numbers};
  int64_t limits[kTilePanels];
  T largest[kTileRows], normalizer[kTileRows];

  for (int64_t start = 0; start < rows.longest; start += kTileColumns) {
    rows.limits(start, limits);
    const int64_t columns = smaller_of(rows.longest - start, kTileColumns);
    for (int64_t m = 0; m <= head.depth; ++m) {
      const Listed<const T> queries = {head.queries[m].data, head.queries[m].stride, rows.nodes};
      multiply_across(queries, rows.count, limits, senders.keys + m * senders.across_size + start * head.dim, head.dim,
                      at.planes + m * plane_size, stride, head.ahead);
    }
    for (int64_t r = 0; r < rows.count; ++r) {
      T* const row = at.planes + r * stride;
      const int64_t heard = smaller_of(rows.heard[r] - start, columns);
      if (heard <= 0) {
        fill_zero(row, 0, limits[r / kPanel]);
        continue;
      }
      const T factor = factor_of_row(head, rows.nodes[r]);
      const bool is_emotion = rows.nodes[r] >= head.words;
      if (is_emotion) emotion_edges(head, rows.nodes[r], at.edges);
      weigh_scores(row, plane_size, head.depth, heard, is_emotion ? at.edges + start : senders.weight + start, factor,
                   head.scale);
      const int64_t itself = rows.places[r] - start;
      if (is_emotion && itself >= 0 && itself < heard) row[itself] = -kInfinity<T>;
      V most = splat(-kInfinity<T>), sums = V{};
      for (int64_t j = 0; j < heard; j += kLanes<T>) most = larger<T>(load<V>(row + j), most);
      // The first tile holds [CLS], which every receiver hears: from there on the maximum is a number.
      const T before = largest[r],
              now = start == 0 ? ecore::maximum<T>(most) : ecore::maximum<T>(larger<T>(most, splat(before)));
      for (int64_t j = 0; j < heard; j += kLanes<T>) {
        const V p = exp2<T>(load<V>(row + j) - now);
        sums += p;
        store(row + j, p);
      }
      fill_zero(row, rounded_up(heard, kLanes<T>), limits[r / kPanel]);
      largest[r] = now;
      if (start == 0) {
        normalizer[r] = sum<T>(sums);
      } else {
        const T shrink = exp2<T>(splat(before - now))[0];
        normalizer[r] = normalizer[r] * shrink + sum<T>(sums);
        for (int64_t c = 0; c < value_stride; c += kLanes<T>) {
          T* const to = at.total + r * value_stride + c;
          store(to, load<V>(to) * shrink);
        }
      }
    }
    if (heard_alone) {
      multiply_heard_rows(at.planes, stride, rows.count, limits, values.from(start), head.value_dim, totals, start > 0,
                          [&](int64_t r, int64_t j) { return rows.hears(head, r, start + j); });
    } else {
      multiply_rows(at.planes, stride, rows.count, limits, values.from(start), head.value_dim, totals, start > 0,
                    head.ahead);
    }
  }
  V check{};
  for (int64_t r = 0; r < rows.count; ++r) {
    const T factor = static_cast<T>(1) / normalizer[r];
    scale_row(at.total + r * value_stride, factor, head.value_dim, output.data + rows.nodes[r] * output.stride, &check);
    maximum[rows.places[r]] = largest[r];
    inverse[rows.places[r]] = factor;
  }
  return is_finite(sum<T>(check));
}

template <typename T>
void graph_forward(const GraphHead<T>& head, const T* packed, int64_t begin, int64_t end, T* scratch, Rows<T> output,
                   T* maximum, T* inverse) {
  const PackedSenders<T> senders(head, head.count, false, const_cast<T*>(packed));
  const ForwardScratch<T> at(head, head.count, scratch);
  for (; begin < end; begin += kTileRows) {
    const TileRows<T> rows(head, begin, end);
    if (!forward_tile(head, senders, rows, at, false, output, maximum, inverse)) {
      forward_tile(head, senders, rows, at, true, output, maximum, inverse);
    }
  }
}

}  // namespace
}  // namespace ecore
