// Matrix products of one instruction set: a register-blocked micro-kernel, the three sweeps over a tile that attention
// is made of, and the packing of their operands. Included only by simd_*.cpp; see simd_vectors.h.
//
// "Rows" of an operand lie one after another, padded with zeros to whole vectors (padded_width). An operand packed
// "across" is a transposed one, in chunks of kChunk columns that lie one after another: [columns /
// kChunk][depth][kChunk].
#pragma once

#include "simd.h"
#include "simd_vectors.h"

namespace ecore {
namespace {

// A micro-kernel's tile: kPanel rows of kMaxVectors vectors. It fills the registers that the instruction set has.
constexpr int kPanel = 6;
#if ECORE_SIMD_BYTES == 64 || defined(__aarch64__)
constexpr int kMaxVectors = 4;  // 32 registers
#else
constexpr int kMaxVectors = 2;  // 16
#endif
template <typename T>
constexpr int kChunk = kMaxVectors * kLanes<T>;

// The sweeps work on tiles of at most this size, which with their operands fit the second-level cache.
constexpr int64_t kTileRows = 12 * kPanel;
constexpr int64_t kTilePanels = kTileRows / kPanel;
constexpr int64_t kTileColumns = 320;  // a multiple of every kChunk

template <typename T>
constexpr int64_t padded_width(int64_t width) {
  return rounded_up(width, kLanes<T>);
}

// C[m, :] = or += sum_k A[m, k] B[k, :] for kRows rows and kVectors vectors of columns, or with kFour one of four
// elements more. With kTransposed, A[m, k] lies at a[k * a_stride + m].
template <typename T, int kRows, int kVectors, bool kFour, bool kTransposed>
void micro_kernel(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t depth, T* c, int64_t c_stride,
                  bool add) {
  constexpr int kWhole = kVectors > 0 ? kVectors : 1;  // arrays cannot be empty
  Vector<T> total[kRows][kWhole];
  Four<T> rest[kRows];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    T* const row = c + m * c_stride;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) total[m][v] = add ? load<Vector<T>>(row + v * kLanes<T>) : Vector<T>{};
    if (kFour) rest[m] = add ? load<Four<T>>(row + kVectors * kLanes<T>) : Four<T>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> column[kWhole];
    Four<T> last{};
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) column[v] = load<Vector<T>>(b + v * kLanes<T>);
    if (kFour) last = load<Four<T>>(b + kVectors * kLanes<T>);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const T factor = kTransposed ? a[m] : a[m * a_stride];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) total[m][v] += factor * column[v];
      if (kFour) rest[m] += factor * last;
    }
    a += kTransposed ? a_stride : 1;
    b += b_stride;
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    T* const row = c + m * c_stride;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(row + v * kLanes<T>, total[m][v]);
    if (kFour) store(row + kVectors * kLanes<T>, rest[m]);
  }
}

template <typename T>
using MicroKernel = void (*)(const T*, int64_t, const T*, int64_t, int64_t, T*, int64_t, bool);

// The micro-kernel for 1 ... kPanel rows and 1 ... kMaxVectors vectors; with `four` the last of them has four elements.
template <typename T, bool kTransposed, int kRows = kPanel, int kVectors = kMaxVectors>
inline MicroKernel<T> micro_kernel_for(int64_t rows, int64_t vectors, bool four) {
  if constexpr (kRows > 1) {
    if (rows != kRows) return micro_kernel_for<T, kTransposed, kRows - 1, kVectors>(rows, vectors, four);
  }
  if constexpr (kVectors > 1) {
    if (vectors != kVectors) return micro_kernel_for<T, kTransposed, kRows, kVectors - 1>(rows, vectors, four);
  }
  if constexpr (kLanes<T> > 4) {
    if (four) return micro_kernel<T, kRows, kVectors - 1, true, kTransposed>;
  }
  return micro_kernel<T, kRows, kVectors, false, kTransposed>;
}

template <typename T>
inline void fetch(Ahead<T>* ahead) {
  if (ahead == nullptr) return;
  for (int64_t i = 0; i < ahead->rows_a_step && ahead->tensor < ahead->tensors; ++i) {
    const Rows<const T>& rows = ahead->rows[ahead->tensor];
    const char* const row = reinterpret_cast<const char*>(rows.data + ahead->nodes[ahead->node] * rows.stride);
    const int64_t bytes = ahead->width * static_cast<int64_t>(sizeof(T));
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
    if (++ahead->node == ahead->count) {
      ahead->node = 0;
      ++ahead->tensor;
    }
  }
}

// How rows of a width are cut into a micro-kernel's columns.
template <typename T>
struct Cut {
  bool four;        // the last vector has four elements
  int64_t vectors;  // that one included

  explicit Cut(int64_t width)
      : four(kLanes<T> > 4 && width % kLanes<T> > 0 && width % kLanes<T> <= 4),
        vectors((width + kLanes<T> - 1) / kLanes<T>) {}
};

// C[r, j] = sum_k A[r, k] B[k, j] for j < limits[r / kPanel] (and up to whole vectors), B packed across.
template <typename T>
void multiply_across(const T* a, int64_t a_stride, int64_t rows, const int64_t* limits, const T* b, int64_t depth, T* c,
                     int64_t c_stride, Ahead<T>* ahead = nullptr) {
  const int64_t longest = limits[(rows - 1) / kPanel];
  for (int64_t start = 0; start < longest; start += kChunk<T>) {
    for (int64_t r = 0; r < rows; r += kPanel) {
      const int64_t columns = smaller_of(limits[r / kPanel] - start, kChunk<T>);
      if (columns <= 0) continue;
      const int64_t vectors = (columns + kLanes<T> - 1) / kLanes<T>;
      fetch(ahead);
      micro_kernel_for<T, false>(smaller_of(kPanel, rows - r), vectors, false)(
          a + r * a_stride, a_stride, b + start * depth, kChunk<T>, depth, c + r * c_stride + start, c_stride, false);
    }
  }
}

// C[r, :width] = or += sum_j A[r, j] B[j, :width] for j < limits[r / kPanel]; panels without any are left alone.
template <typename T>
void multiply_rows(const T* a, int64_t a_stride, int64_t rows, const int64_t* limits, const T* b, int64_t b_stride,
                   int64_t width, T* c, int64_t c_stride, bool add, Ahead<T>* ahead = nullptr) {
  const Cut<T> cut(width);
  for (int64_t v = 0; v < cut.vectors; v += kMaxVectors) {
    const int64_t vectors = smaller_of(kMaxVectors, cut.vectors - v);
    const bool four = cut.four && v + vectors == cut.vectors;
    const int64_t column = v * kLanes<T>;
    for (int64_t r = 0; r < rows; r += kPanel) {
      if (limits[r / kPanel] <= 0) continue;
      fetch(ahead);
      micro_kernel_for<T, false>(smaller_of(kPanel, rows - r), vectors, four)(a + r * a_stride, a_stride, b + column,
                                                                              b_stride, limits[r / kPanel],
                                                                              c + r * c_stride + column, c_stride, add);
    }
  }
}

// C[j, :width] += sum_r A[r, j] B[r, :width] for j < columns and firsts[j / kPanel] <= r < rows.
template <typename T>
void multiply_columns(const T* a, int64_t a_stride, int64_t rows, const int64_t* firsts, int64_t columns, const T* b,
                      int64_t b_stride, int64_t width, T* c, int64_t c_stride, Ahead<T>* ahead = nullptr) {
  const Cut<T> cut(width);
  for (int64_t v = 0; v < cut.vectors; v += kMaxVectors) {
    const int64_t vectors = smaller_of(kMaxVectors, cut.vectors - v);
    const bool four = cut.four && v + vectors == cut.vectors;
    const int64_t column = v * kLanes<T>;
    for (int64_t j = 0; j < columns; j += kPanel) {
      const int64_t first = firsts[j / kPanel];
      if (first >= rows) continue;
      fetch(ahead);
      micro_kernel_for<T, true>(smaller_of(kPanel, columns - j), vectors, four)(
          a + first * a_stride + j, a_stride, b + first * b_stride + column, b_stride, rows - first,
          c + j * c_stride + column, c_stride, true);
    }
  }
}

template <typename T>
inline void copy_row(T* to, const T* from, int64_t width) {
  __builtin_memcpy(to, from, static_cast<size_t>(width) * sizeof(T));
}

// Rows of the given nodes, padded with zeros to `stride` elements.
template <typename T>
void gather_rows(T* to, int64_t stride, const T* from, int64_t from_stride, const int32_t* nodes, int64_t count,
                 int64_t width) {
  for (int64_t i = 0; i < count; ++i, to += stride) {
    copy_row(to, from + nodes[i] * from_stride, width);
    for (int64_t k = width; k < stride; ++k) to[k] = 0;
  }
}

// The given nodes' rows, transposed and packed across; `begin` is a multiple of kChunk. A last chunk that is not full
// repeats the last node, so that it holds nothing but numbers.
template <typename T>
void pack_across(T* to, const T* from, int64_t from_stride, const int32_t* nodes, int64_t begin, int64_t end,
                 int64_t width) {
  const int64_t whole = width / 4 * 4;
  for (int64_t j = begin; j < rounded_up(end, kLanes<T>); j += 4) {
    T* const out = to + j / kChunk<T> * kChunk<T> * width + j % kChunk<T>;
    const T* row[4];
    for (int t = 0; t < 4; ++t) row[t] = from + nodes[smaller_of(j + t, end - 1)] * from_stride;
    for (int64_t k = 0; k < whole; k += 4) {
      const Four<T> a = load<Four<T>>(row[0] + k), b = load<Four<T>>(row[1] + k);
      const Four<T> c = load<Four<T>>(row[2] + k), d = load<Four<T>>(row[3] + k);
      const Four<T> ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
      const Four<T> ef = __builtin_shufflevector(a, b, 2, 6, 3, 7), gh = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      T* const at = out + k * kChunk<T>;
      store(at, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
      store(at + kChunk<T>, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
      store(at + 2 * kChunk<T>, __builtin_shufflevector(ef, gh, 0, 1, 4, 5));
      store(at + 3 * kChunk<T>, __builtin_shufflevector(ef, gh, 2, 3, 6, 7));
    }
    for (int64_t k = whole; k < width; ++k) {
      for (int t = 0; t < 4; ++t) out[k * kChunk<T> + t] = row[t][k];
    }
  }
}

template <typename T>
T dot(const T* a, const T* b, int64_t size) {
  using V = Vector<T>;
  V total{};
  int64_t k = 0;
  for (; k + kLanes<T> <= size; k += kLanes<T>) total += load<V>(a + k) * load<V>(b + k);
  T result = sum<T>(total);
  for (; k < size; ++k) result += a[k] * b[k];
  return result;
}

// Adds up, in order, `parts` matrices of rows that lie `apart` elements from each other, and stores rows begin ... end
// - 1 at those of the given nodes.
template <typename T>
void add_parts(T* rows, int64_t stride, int64_t apart, int64_t parts, int64_t begin, int64_t end, const int32_t* nodes,
               const Rows<T>& to, int64_t width) {
  using V = Vector<T>;
  for (int64_t j = begin; j < end; ++j) {
    T* const row = rows + j * stride;
    for (int64_t p = 1; p < parts; ++p) {
      for (int64_t c = 0; c < stride; c += kLanes<T>) store(row + c, load<V>(row + c) + load<V>(row + p * apart + c));
    }
    copy_row(to.data + nodes[j] * to.stride, row, width);
  }
}

// Hands out pieces of a workspace, each beginning on a cache line if the workspace does. Without a workspace it only
// counts.
template <typename T>
class Carver {
 public:
  explicit Carver(T* workspace) : workspace_(workspace) {}
  T* take(int64_t size) {
    T* const piece = workspace_ == nullptr ? nullptr : workspace_ + used_;
    used_ += rounded_up(size, 64 / static_cast<int64_t>(sizeof(T)));
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  T* const workspace_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace ecore
