// Matrix products of one instruction set: a register-blocked micro-kernel, the three sweeps over a tile that attention
// consists of, and the packing of their operands. Included only by table.h; see vectors.h.
//
// "Rows" of an operand lie one after another, padded with zeros to whole vectors (padded_width). An operand packed
// "across" is a transposed one, in chunks of kChunk columns that lie one after another: [columns /
// kChunk][depth][kChunk].
#pragma once

#include "kernels.h"
#include "vectors.h"

namespace ecore {
namespace {

// A micro-kernel's tile: kPanel rows of kMaxVectors vectors. It fills the registers of the instruction set.
constexpr int kPanel = 6;
#if ECORE_SIMD_BYTES == 64 || defined(__aarch64__)
constexpr int kMaxVectors = 4;  // 32 registers
#else
constexpr int kMaxVectors = 2;  // 16
#endif
template <typename T>
constexpr int kChunk = kMaxVectors * kLanes<T>;

// The sweeps work on tiles of at most this size, which fit the second-level cache with their operands.
constexpr int64_t kTileRows = 12 * kPanel;
constexpr int64_t kTilePanels = kTileRows / kPanel;
constexpr int64_t kTileColumns = 320;  // a multiple of every kChunk

template <typename T>
constexpr int64_t padded_width(int64_t width) {
  return rounded_up(width, kLanes<T>);
}

// Elements from one row of a tile's plane to the next: an odd number of cache lines, so that the elements of a column
// do not compete for a few sets of the cache.
template <typename T>
constexpr int64_t tile_stride(int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return (rounded_up(smaller_of(kTileColumns, columns), kLine) / kLine | 1) * kLine;
}

// Rows of a matrix at any places: row i begins at data + numbers[i] * stride.
template <typename T>
struct Listed {
  T* data;
  int64_t stride;
  const int32_t* numbers;

  T* row(int64_t i) const { return data + numbers[i] * stride; }
  Listed from(int64_t i) const { return {data, stride, numbers + i}; }
};

// The operands of a micro-kernel: C = or += A B for up to kPanel rows of A and C.
template <typename T>
struct Product {
  const T* a[kPanel];
  int64_t a_stride;
  Listed<const T> b;
  int64_t depth;
  T* c[kPanel];
  bool add;
};

// The three sweeps over a tile. kAcross: B is packed across. kRows: B's rows are listed. kColumns: they are listed too,
// and A is transposed: A[m, k] lies at a[0][k * a_stride + m].
enum class Sweep { kAcross, kRows, kColumns };

// kRows rows and kVectors vectors of columns; with kFour one more vector, of four elements.
template <typename T, Sweep kSweep, int kRows, int kVectors, bool kFour>
void micro_kernel(const Product<T>& of) {
  constexpr int kWhole = kVectors > 0 ? kVectors : 1;  // arrays cannot be empty
  Vector<T> total[kRows][kWhole];
  Vector<T> rest[kRows];  // Four<T> would need broadcasts of its own
  const T* a[kRows];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    const T* const row = of.c[m];
    a[m] = kSweep == Sweep::kColumns ? of.a[0] + m : of.a[m];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) total[m][v] = of.add ? load<Vector<T>>(row + v * kLanes<T>) : Vector<T>{};
    if constexpr (kFour) {
      rest[m] = of.add ? widened<T>(load<Four<T>>(row + kVectors * kLanes<T>)) : Vector<T>{};
    }
  }
  const T* b = of.b.data;
  for (int64_t k = 0, depth = of.depth, at = 0; k < depth; ++k) {
    if (kSweep != Sweep::kAcross) b = of.b.row(k);
    Vector<T> column[kWhole];
    Vector<T> last{};
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) column[v] = load<Vector<T>>(b + v * kLanes<T>);
    if constexpr (kFour) last = widened<T>(load<Four<T>>(b + kVectors * kLanes<T>));
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const T factor = kSweep == Sweep::kColumns ? a[0][at + m] : a[m][k];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) total[m][v] = multiply_add(splat(factor), column[v], total[m][v]);
      if constexpr (kFour) rest[m] = multiply_add(splat(factor), last, rest[m]);
    }
    if (kSweep == Sweep::kColumns) at += of.a_stride;
    if (kSweep == Sweep::kAcross) b += kChunk<T>;
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    T* const row = of.c[m];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(row + v * kLanes<T>, total[m][v]);
    if constexpr (kFour) store(row + kVectors * kLanes<T>, first_four<T>(rest[m]));
  }
}

// Calls the micro-kernel for 1 ... kPanel rows and 1 ... kMaxVectors vectors; with `four` the last vector has four
// elements.
template <typename T, Sweep kSweep, int kRows = kPanel, int kVectors = kMaxVectors>
inline void multiply(const Product<T>& of, int64_t rows, int64_t vectors, bool four) {
  if constexpr (kRows > 1) {
    if (rows != kRows) return multiply<T, kSweep, kRows - 1, kVectors>(of, rows, vectors, four);
  }
  if constexpr (kVectors > 1) {
    if (vectors != kVectors) return multiply<T, kSweep, kRows, kVectors - 1>(of, rows, vectors, four);
  }
  if constexpr (kLanes<T> > 4 && kSweep != Sweep::kAcross) {
    if (four) return micro_kernel<T, kSweep, kRows, kVectors - 1, true>(of);
  }
  micro_kernel<T, kSweep, kRows, kVectors, false>(of);
}

template <typename T>
inline void fetch(Ahead<T>* ahead) {
  if (ahead == nullptr) return;
  for (int64_t i = 0; i < ahead->rows_a_step && ahead->tensor < ahead->tensors; ++i) {
    const Rows<const T>& rows = ahead->rows[ahead->tensor];
    const char* const row = reinterpret_cast<const char*>(rows.data + ahead->nodes[ahead->node] * rows.stride);
    const int64_t bytes = ahead->width * static_cast<int64_t>(sizeof(T));
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
    if (++ahead->node == ahead->count) {
      ahead->node = 0;
      ++ahead->tensor;
    }
  }
}

// How rows of a width are split into a micro-kernel's columns.
template <typename T>
struct Cut {
  bool four;        // the last vector has four elements
  int64_t vectors;  // the last one included

  explicit Cut(int64_t width)
      : four(kLanes<T> > 4 && width % kLanes<T> > 0 && width % kLanes<T> <= 4),
        vectors((width + kLanes<T> - 1) / kLanes<T>) {}
};

// True if the sweeps touch only a row's own elements. Otherwise rows must be copied and padded.
template <typename T>
constexpr bool fits(int64_t width) {
  return width % kLanes<T> == 0 || (kLanes<T> > 4 && width % kLanes<T> == 4);
}

// C[r, j] = sum_k A[r, k] B[k, j] for j < limits[r / kPanel] (and up to whole vectors), B packed across.
template <typename T>
void multiply_across(const Listed<const T>& a, int64_t rows, const int64_t* limits, const T* b, int64_t depth, T* c,
                     int64_t c_stride, Ahead<T>* ahead = nullptr) {
  const int64_t longest = limits[(rows - 1) / kPanel];
  Product<T> of;
  of.depth = depth;
  of.add = false;
  for (int64_t start = 0; start < longest; start += kChunk<T>) {
    of.b.data = b + start * depth;
    for (int64_t r = 0; r < rows; r += kPanel) {
      const int64_t columns = smaller_of(limits[r / kPanel] - start, kChunk<T>), here = smaller_of(kPanel, rows - r);
      if (columns <= 0) continue;
      for (int64_t m = 0; m < here; ++m) {
        of.a[m] = a.row(r + m);
        of.c[m] = c + (r + m) * c_stride + start;
      }
      fetch(ahead);
      multiply<T, Sweep::kAcross>(of, here, (columns + kLanes<T> - 1) / kLanes<T>, false);
    }
  }
}

// C[r, :width] = or += sum_j A[r, j] B[j, :width] for j < limits[r / kPanel]; panels without any are not changed.
template <typename T>
void multiply_rows(const T* a, int64_t a_stride, int64_t rows, const int64_t* limits, const Listed<const T>& b,
                   int64_t width, const Listed<T>& c, bool add, Ahead<T>* ahead = nullptr) {
  const Cut<T> cut(width);
  Product<T> of;
  of.b = b;
  of.add = add;
  for (int64_t v = 0; v < cut.vectors; v += kMaxVectors) {
    const int64_t vectors = smaller_of(kMaxVectors, cut.vectors - v), column = v * kLanes<T>;
    of.b.data = b.data + column;
    for (int64_t r = 0; r < rows; r += kPanel) {
      const int64_t here = smaller_of(kPanel, rows - r);
      of.depth = limits[r / kPanel];
      if (of.depth <= 0) continue;
      for (int64_t m = 0; m < here; ++m) {
        of.a[m] = a + (r + m) * a_stride;
        of.c[m] = c.row(r + m) + column;
      }
      fetch(ahead);
      multiply<T, Sweep::kRows>(of, here, vectors, cut.four && v + vectors == cut.vectors);
    }
  }
}

// C[j, :width] = or += sum_r A[r, j] B[r, :width] for j < columns and firsts[j / kPanel] <= r < rows. A negative first
// says that rows of an earlier tile have been added already; if `fresh`, sums begin where it is not.
template <typename T>
void multiply_columns(const T* a, int64_t a_stride, int64_t rows, const int64_t* firsts, int64_t columns,
                      const Listed<const T>& b, int64_t width, const Listed<T>& c, bool fresh,
                      Ahead<T>* ahead = nullptr) {
  const Cut<T> cut(width);
  Product<T> of;
  of.a_stride = a_stride;
  for (int64_t v = 0; v < cut.vectors; v += kMaxVectors) {
    const int64_t vectors = smaller_of(kMaxVectors, cut.vectors - v), column = v * kLanes<T>;
    for (int64_t j = 0; j < columns; j += kPanel) {
      const int64_t first = larger_of(0, firsts[j / kPanel]), here = smaller_of(kPanel, columns - j);
      if (first >= rows) continue;
      of.a[0] = a + first * a_stride + j;
      of.b = b.from(first);
      of.b.data += column;
      of.depth = rows - first;
      of.add = !fresh || firsts[j / kPanel] < 0;
      for (int64_t m = 0; m < here; ++m) of.c[m] = c.row(j + m) + column;
      fetch(ahead);
      multiply<T, Sweep::kColumns>(of, here, vectors, cut.four && v + vectors == cut.vectors);
    }
  }
}

template <typename T>
inline void copy_row(T* to, const T* from, int64_t width) {
  __builtin_memcpy(to, from, static_cast<size_t>(width) * sizeof(T));
}

// copy_row() into a result; `past_caches` for one that does not fit them: then no line is read before it is written,
// and the thread has to call streamed() before others may read it.
template <typename T>
inline void put_row(T* to, const T* from, int64_t width, bool past_caches) {
  if (!past_caches) return copy_row(to, from, width);
  int64_t k = 0;
#if defined(__FMA__)
  constexpr int64_t kLine = ECORE_SIMD_BYTES / sizeof(T);
  for (; k < width && reinterpret_cast<uintptr_t>(to + k) % ECORE_SIMD_BYTES != 0; ++k) to[k] = from[k];
  for (; k + kLine <= width; k += kLine) {
#if ECORE_SIMD_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + k), _mm512_loadu_si512(from + k));
#else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + k),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k)));
#endif
  }
#endif
  for (; k < width; ++k) to[k] = from[k];
}

inline void streamed() {
#if defined(__FMA__)
  _mm_sfence();
#endif
}

template <typename T>
inline void clear_row(T* row, int64_t width) {
  for (int64_t k = 0; k < width; ++k) row[k] = 0;
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

// The given nodes' rows as the sweeps can load and store them: in place if they fit, else in a padded copy, which
// load_copy() fills and store_copy() writes back. `numbers` are 0, 1, 2, ...
template <typename T, typename U>
Listed<U> reachable(const Rows<U>& rows, const int32_t* nodes, int64_t width, T* copy, const int32_t* numbers) {
  if (fits<T>(width)) return {rows.data, rows.stride, nodes};
  return {copy, padded_width<T>(width), numbers};
}

template <typename T>
void load_copy(T* copy, const Rows<const T>& rows, const int32_t* nodes, int64_t count, int64_t width) {
  if (!fits<T>(width)) gather_rows(copy, padded_width<T>(width), rows.data, rows.stride, nodes, count, width);
}

template <typename T>
void store_copy(const Rows<T>& rows, const T* copy, const int32_t* nodes, int64_t count, int64_t width) {
  if (fits<T>(width)) return;
  for (int64_t i = 0; i < count; ++i) {
    copy_row(rows.data + nodes[i] * rows.stride, copy + i * padded_width<T>(width), width);
  }
}

// The number of elements of such a copy.
template <typename T>
constexpr int64_t copy_size(int64_t count, int64_t width) {
  return fits<T>(width) ? 0 : count * padded_width<T>(width);
}

// The given nodes' rows, transposed and packed across; `begin` is a multiple of kChunk. A last chunk that is not full
// repeats the last node, so that it holds no uninitialised values.
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
      const Four<T> ab = shuffled<0, 4, 1, 5>(a, b), cd = shuffled<0, 4, 1, 5>(c, d);
      const Four<T> ef = shuffled<2, 6, 3, 7>(a, b), gh = shuffled<2, 6, 3, 7>(c, d);
      T* const at = out + k * kChunk<T>;
      store(at, shuffled<0, 1, 4, 5>(ab, cd));
      store(at + kChunk<T>, shuffled<2, 3, 6, 7>(ab, cd));
      store(at + 2 * kChunk<T>, shuffled<0, 1, 4, 5>(ef, gh));
      store(at + 3 * kChunk<T>, shuffled<2, 3, 6, 7>(ef, gh));
    }
    for (int64_t k = whole; k < width; ++k) {
      for (int t = 0; t < 4; ++t) out[k * kChunk<T> + t] = row[t][k];
    }
  }
}

// to[r] = A[r] . B[r], each summed as multiply_across does: if B[r] is a sender's row, it is exactly that sweep's
// product.
template <typename T>
void dot_rows(const Listed<const T>& a, const Listed<const T>& b, int64_t rows, int64_t width, T* to) {
  for (int64_t r = 0; r < rows; r += kPanel) {  // several at once, since each is a chain of additions
    const T *left[kPanel], *right[kPanel];
    T total[kPanel] = {};
    for (int m = 0; m < kPanel; ++m) {
      left[m] = a.row(smaller_of(r + m, rows - 1));
      right[m] = b.row(smaller_of(r + m, rows - 1));
    }
    for (int64_t k = 0; k < width; ++k) {
#pragma GCC unroll 8
      for (int m = 0; m < kPanel; ++m) total[m] = multiply_add(left[m][k], right[m][k], total[m]);
    }
    for (int64_t m = 0; m < smaller_of(kPanel, rows - r); ++m) to[r + m] = total[m];
  }
}

// to = from * factor. `check` becomes NaN if a result is not finite, else it stays 0.
template <typename T>
inline void scale_row(const T* from, T factor, int64_t width, T* to, Vector<T>* check) {
  using V = Vector<T>;
  int64_t k = 0;
  for (; k + kLanes<T> <= width; k += kLanes<T>) {
    const V scaled = load<V>(from + k) * factor;
    store(to + k, scaled);
    *check = multiply_add(scaled, V{}, *check);
  }
  T rest = 0;
  for (; k < width; ++k) {
    to[k] = from[k] * factor;
    rest += to[k] * static_cast<T>(0);
  }
  *check += rest;
}

template <typename T>
bool all_finite(const T* row, int64_t width) {
  bool finite = true;
  for (int64_t k = 0; k < width; ++k) finite &= is_finite(row[k]);
  return finite;
}

// What multiply_rows and multiply_columns compute, to the bit, but only from pairs for which hears(receiver, sender) is
// true: for operands that are not finite, which the sweeps would multiply by 0.
template <typename T, typename Hears>
void multiply_heard_rows(const T* a, int64_t a_stride, int64_t rows, const int64_t* limits, const Listed<const T>& b,
                         int64_t width, const Listed<T>& c, bool add, const Hears& hears) {
  for (int64_t r = 0; r < rows; ++r) {
    T* const to = c.row(r);
    const int64_t limit = limits[r / kPanel];
    for (int64_t k = 0; !add && limit > 0 && k < width; ++k) to[k] = 0;
    for (int64_t j = 0; j < limit; ++j) {
      if (!hears(r, j)) continue;
      const T factor = a[r * a_stride + j], *const row = b.row(j);
      for (int64_t k = 0; k < width; ++k) to[k] = multiply_add(factor, row[k], to[k]);
    }
  }
}

template <typename T, typename Hears>
void multiply_heard_columns(const T* a, int64_t a_stride, int64_t rows, const int64_t* firsts, int64_t columns,
                            const Listed<const T>& b, int64_t width, const Listed<T>& c, bool fresh,
                            const Hears& hears) {
  for (int64_t j = 0; j < columns; ++j) {
    T* const to = c.row(j);
    const int64_t first = firsts[j / kPanel];
    if (first >= rows) continue;
    for (int64_t k = 0; fresh && first >= 0 && k < width; ++k) to[k] = 0;
    for (int64_t r = larger_of(0, first); r < rows; ++r) {
      if (!hears(r, j)) continue;
      const T factor = a[r * a_stride + j], *const row = b.row(r);
      for (int64_t k = 0; k < width; ++k) to[k] = multiply_add(factor, row[k], to[k]);
    }
  }
}

// Adds up, in order, `parts` matrices of padded rows that lie `apart` elements from each other, and stores rows begin
// ... end - 1 at those of the given nodes. A single part that fits is already in place.
template <typename T>
void add_parts(T* rows, int64_t apart, int64_t parts, int64_t begin, int64_t end, const int32_t* nodes,
               const Rows<T>& to, int64_t width) {
  using V = Vector<T>;
  if (parts == 1 && fits<T>(width)) return;
  const int64_t stride = padded_width<T>(width);
  for (int64_t j = begin; j < end; ++j) {
    T* const row = rows + j * stride;
    for (int64_t p = 1; p < parts; ++p) {
      for (int64_t c = 0; c < stride; c += kLanes<T>) store(row + c, load<V>(row + c) + load<V>(row + p * apart + c));
    }
    copy_row(to.data + nodes[j] * to.stride, row, width);
  }
}

// Hands out pieces of a workspace; each begins on a cache line if the workspace does. Without a workspace it only
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
