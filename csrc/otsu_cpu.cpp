#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "otsu.h"
#include "thread_pool.h"
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace ecore {
namespace {

// kLanes rows are processed at a time, transposed so that lane k of every vector belongs to row k: sorting and scoring
// are then the same instructions for all rows. Each lane does exactly the arithmetic of the sequential definition, so
// the result does not depend on the vector width.
constexpr int64_t kLanes = 16;
constexpr int64_t kElementsPerRange = 16384;  // about 30 us of work; for less, waking a thread does not pay

// Vectors of GCC and Clang, 16 bytes wide, which every x86-64 and AArch64 has. Wider ones would have to be chosen at
// run time, and these are fast enough. The compilers' own vectorisers do not handle compare-and-swap loops at this
// width.
typedef float Floats __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(16)));
typedef float HalfFloats __attribute__((vector_size(8)));

template <typename T>
using Vector = std::conditional_t<std::is_same_v<T, float>, Floats, Doubles>;

template <typename V, typename T>
inline V load(const T* from) {
  V vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename V, typename T>
inline void store(T* to, V vector) {
  std::memcpy(to, &vector, sizeof vector);
}

inline Doubles load_doubles(const float* from) { return __builtin_convertvector(load<HalfFloats>(from), Doubles); }
inline Doubles load_doubles(const double* from) { return load<Doubles>(from); }

// The larger (smaller) of two; the second if they are equal.
template <typename V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
inline V smaller(V a, V b) {
  return a < b ? a : b;
}
#ifdef __SSE2__  // the same in one instruction, which GCC does not find
inline Floats larger(Floats a, Floats b) { return _mm_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm_min_ps(a, b); }
inline Doubles larger(Doubles a, Doubles b) { return _mm_max_pd(a, b); }
inline Doubles smaller(Doubles a, Doubles b) { return _mm_min_pd(a, b); }
#endif

template <typename T>
inline void exchange(T* high, T* low) {
  using V = Vector<T>;
  constexpr int64_t kWidth = sizeof(V) / sizeof(T);
  for (int64_t k = 0; k < kLanes; k += kWidth) {
    const V a = load<V>(high + k), b = load<V>(low + k);
    store(high + k, larger(a, b));
    store(low + k, smaller(b, a));
  }
}

// Merge exchange (Knuth, The Art of Computer Programming 3, Algorithm 5.2.2M): a sorting network for any n.
template <typename T>
void sort_descending(T* lanes, int64_t n) {
  int64_t top = 1;
  while (2 * top < n) top *= 2;
  for (int64_t p = top; n > 1 && p > 0; p /= 2) {
    for (int64_t q = top, r = 0, d = p;; d = q - p, q /= 2, r = p) {
      for (int64_t i = 0; i + d < n; ++i) {
        if ((i & p) == r) exchange(lanes + i * kLanes, lanes + (i + d) * kLanes);
      }
      if (q == p) break;
    }
  }
}

// For each lane, the factor for its sorted column: a power of two that brings its largest magnitude near 1. Returns
// whether any lane needs it, because a sum or a square might leave the range of doubles; with floats none does.
bool range_factors(const double* sorted, int64_t columns, double* factors) {
  constexpr int64_t kWidth = sizeof(Doubles) / sizeof(double);
  constexpr double kLarge = 0x1p400, kSmall = 0x1p-400;
  const double* const last = sorted + (columns - 1) * kLanes;
  Doubles most{}, least = {kLarge, kLarge};
  for (int64_t k = 0; k < kLanes; k += kWidth) {
    const Doubles largest = larger(load<Doubles>(sorted + k), -load<Doubles>(last + k));  // in magnitude
    most = larger(most, largest);
    least = smaller(least, largest);
  }
  if (std::max(most[0], most[1]) <= kLarge && std::min(least[0], least[1]) >= kSmall) return false;
  for (int64_t k = 0; k < kLanes; ++k) {
    const double largest = std::max(sorted[k], -last[k]);
    // The factors are normal numbers, so flushing to zero does not change them.
    factors[k] = largest > 0 ? std::ldexp(1.0, std::clamp(-std::ilogb(largest), -1022, 1023)) : 1.0;
  }
  return true;
}
bool range_factors(const float*, int64_t, double*) { return false; }

// For each lane, the n of the best split of its sorted column, times the lane's factor if `scaled`.
template <bool scaled, typename T>
void best_split(const T* sorted, int64_t columns, int64_t last_split, const double* factors, double* best_n) {
  constexpr int64_t kWidth = sizeof(Doubles) / sizeof(double);
  constexpr int64_t kVectors = kLanes / kWidth;
  Doubles mean[kVectors] = {}, prefix[kVectors] = {}, best_score[kVectors], best[kVectors];
  const auto value = [&](int64_t j, int64_t v) {
    const Doubles loaded = load_doubles(sorted + j * kLanes + v * kWidth);
    return scaled ? loaded * load<Doubles>(factors + v * kWidth) : loaded;
  };
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t v = 0; v < kVectors; ++v) mean[v] += value(j, v);
  }
  for (int64_t v = 0; v < kVectors; ++v) {
    mean[v] /= static_cast<double>(columns);
    best_score[v] = Doubles{-1, -1};
    best[v] = Doubles{1, 1};
  }
  for (int64_t n = 1; n <= last_split; ++n) {
    const double size = static_cast<double>(n);
    const double weight = size * static_cast<double>(columns - n);
    for (int64_t v = 0; v < kVectors; ++v) {
      prefix[v] += value(n - 1, v);
      const Doubles deviation = prefix[v] - size * mean[v];
      const Doubles score = deviation * deviation / weight;
      const auto better = score > best_score[v];  // strictly, so that the smaller n wins a tie
      best[v] = better ? Doubles{size, size} : best[v];
      best_score[v] = better ? score : best_score[v];
    }
  }
  std::memcpy(best_n, best, sizeof best);
}

template <typename T>
bool all_finite(const T* row, int64_t columns) {
  int bad = 0;
  for (int64_t j = 0; j < columns; ++j) bad |= !(std::abs(row[j]) <= std::numeric_limits<T>::max());
  return bad == 0;
}

template <typename T>
void mark_relevant(const T* row, int64_t columns, T least, uint8_t* mask) {
  // Through integers as wide as T: compilers vectorise the comparison and the narrowing, but not both at once.
  using Integer = std::conditional_t<std::is_same_v<T, float>, int32_t, int64_t>;
  constexpr int64_t kChunk = 64;
  Integer above[kChunk];
  for (int64_t begin = 0; begin < columns; begin += kChunk) {
    const int64_t size = std::min(kChunk, columns - begin);
    for (int64_t j = 0; j < size; ++j) above[j] = row[begin + j] >= least;
    for (int64_t j = 0; j < size; ++j) mask[begin + j] = static_cast<uint8_t>(above[j]);
  }
}

}  // namespace

template <typename T>
int64_t otsu_cpu(const T* values, int64_t rows, int64_t columns, int64_t row_stride, int64_t max_relevant,
                 uint8_t* mask, int64_t* count, T* threshold, int threads) {
  const int64_t last_split = max_relevant > 0 ? std::min(max_relevant, columns - 1) : columns - 1;
  const int64_t blocks = (rows + kLanes - 1) / kLanes;
  std::atomic<int64_t> first_bad{rows};

  parallel_for(blocks, kElementsPerRange / (columns * kLanes), threads, [&](int64_t begin, int64_t end) {
    std::vector<T> buffer(static_cast<size_t>(columns * kLanes));  // lanes beyond the last row stay finite
    T* const sorted = buffer.data();
    double best_n[kLanes], factors[kLanes];
    for (int64_t first = begin * kLanes; first < std::min(end * kLanes, rows); first += kLanes) {
      const int64_t used = std::min(kLanes, rows - first);
      for (int64_t k = 0; k < used; ++k) {
        const T* row = values + (first + k) * row_stride;
        if (!all_finite(row, columns)) {
          int64_t known = first_bad.load();
          while (first + k < known && !first_bad.compare_exchange_weak(known, first + k)) {
          }
          return;
        }
        for (int64_t j = 0; j < columns; ++j) sorted[j * kLanes + k] = row[j];
      }
      sort_descending(sorted, columns);
      if (range_factors(sorted, columns, factors)) {
        best_split<true>(sorted, columns, last_split, factors, best_n);
      } else {
        best_split<false>(sorted, columns, last_split, factors, best_n);
      }
      for (int64_t k = 0; k < used; ++k) {
        int64_t size = static_cast<int64_t>(best_n[k]);
        const T least = sorted[(size - 1) * kLanes + k];
        while (size < columns && sorted[size * kLanes + k] == least) ++size;
        mark_relevant(values + (first + k) * row_stride, columns, least, mask + (first + k) * columns);
        count[first + k] = size;
        threshold[first + k] = least;
      }
    }
  });
  const int64_t bad = first_bad.load();
  return bad < rows ? bad : -1;
}

template int64_t otsu_cpu(const float*, int64_t, int64_t, int64_t, int64_t, uint8_t*, int64_t*, float*, int);
template int64_t otsu_cpu(const double*, int64_t, int64_t, int64_t, int64_t, uint8_t*, int64_t*, double*, int);

}  // namespace ecore
