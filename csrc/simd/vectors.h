// Vectors of one instruction set and the arithmetic on them. Included only by table.h, each of which is compiled for
// one instruction set and defines ECORE_SIMD_BYTES, the width of its vectors.
//
// Everything here has internal linkage, and nothing from the standard library's headers is called: the linker would
// merge an inline function that two of those files share, and could keep the copy with instructions that the machine
// lacks.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ecore {
namespace {

template <typename T, int kSize>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kSize * sizeof(T))));
};

template <typename T>
struct FloatFormat;
template <>
struct FloatFormat<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr Bits kBias = 127;
  static constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the lowest bits
};
template <>
struct FloatFormat<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr Bits kBias = 1023;
  static constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52
};

template <typename T>
constexpr int kLanes = ECORE_SIMD_BYTES / static_cast<int>(sizeof(T));
template <typename T>
using Vector = typename VectorOf<T, kLanes<T>>::Type;
template <typename T>
using BitVector = typename VectorOf<typename FloatFormat<T>::Bits, kLanes<T>>::Type;
template <typename T>
using Four = typename VectorOf<T, 4>::Type;  // for the rest after whole vectors

constexpr int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t rounded_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

template <typename V, typename T>
inline V load(const T* from) {
  V vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename V, typename T>
inline void store(T* to, V vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

template <typename T>
inline Vector<T> splat(T value) {
  return value - Vector<T>{};
}

// a * b + c, rounded once if the instruction set can. Nothing else is fused: the compiler must not contract, so that
// such a product has the same bits everywhere.
template <typename V>
inline V multiply_add(V a, V b, V c) {
  [[maybe_unused]] constexpr bool kSingle = sizeof(a[0]) == sizeof(float);
#if defined(__FMA__)
  if constexpr (sizeof(V) == 16 && kSingle) {
    return (V)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
  } else if constexpr (sizeof(V) == 16) {
    return (V)_mm_fmadd_pd((__m128d)a, (__m128d)b, (__m128d)c);
  } else if constexpr (sizeof(V) == 32 && kSingle) {
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  } else if constexpr (sizeof(V) == 32) {
    return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && kSingle) {
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  } else if constexpr (sizeof(V) == 64) {
    return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  }
#endif
#elif defined(__aarch64__)
  if constexpr (sizeof(V) == 16 && kSingle) {
    return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  } else if constexpr (sizeof(V) == 16) {
    return (V)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
  } else {
    return a * b + c;
  }
#else
  return a * b + c;
#endif
}

inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline double multiply_add(double a, double b, double c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

template <typename T>
inline Vector<T> larger(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

// The lanes of these numbers, counted through `a` and then `b`.
template <int... kLane, typename V>
inline V shuffled(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kLane...);
#else
  using Numbers = decltype(a < b);  // integers as wide as the elements
  return __builtin_shuffle(a, b, Numbers{kLane...});
#endif
}

// Four elements in the first lanes of a vector of more, 0 in the others; and back. By hand, since GCC 12 takes a detour
// through memory.
template <typename T>
inline Vector<T> widened(Four<T> four) {
#if ECORE_SIMD_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return (Vector<T>)_mm512_zextps128_ps512((__m128)four);
  } else {
    return (Vector<T>)_mm512_maskz_broadcast_f64x4(0x0f, (__m256d)four);  // zextpd warns in GCC 12
  }
#elif ECORE_SIMD_BYTES == 32
  static_assert(sizeof(T) == 4, "no other type has more than four lanes here");
  return (Vector<T>)_mm256_zextps128_ps256((__m128)four);
#else
  static_assert(sizeof(T) == 0, "no type has more than four lanes here");
#endif
}
template <typename T>
inline Four<T> first_four(Vector<T> vector) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(vector, vector, 0, 1, 2, 3);
#else
  Four<T> four;
  __builtin_memcpy(&four, &vector, sizeof(four));
  return four;
#endif
}

template <int kBy, typename V, int... kLane>
inline V rotated(V v) {
  return shuffled<((kLane + kBy) % static_cast<int>(sizeof...(kLane)))...>(v, v);
}

// Calls rotated() with the lane numbers 0 ... kLeft - 1 + sizeof...(kLane).
template <int kBy, int kLeft, typename V, int... kLane>
inline V rotate(V v) {
  if constexpr (kLeft == 0) {
    return rotated<kBy, V, kLane...>(v);
  } else {
    return rotate<kBy, kLeft - 1, V, kLeft - 1, kLane...>(v);
  }
}

template <typename T, int kBy = kLanes<T> / 2>
inline T sum(Vector<T> v) {
  if constexpr (kBy == 0) {
    return v[0];
  } else {
    return sum<T, kBy / 2>(v + rotate<kBy, kLanes<T>>(v));
  }
}

template <typename T, int kBy = kLanes<T> / 2>
inline T maximum(Vector<T> v) {
  if constexpr (kBy == 0) {
    return v[0];
  } else {
    return maximum<T, kBy / 2>(larger<T>(v, rotate<kBy, kLanes<T>>(v)));
  }
}

// 0, 1, 2, ...
template <typename T>
inline Vector<T> lane_numbers() {
  Vector<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = static_cast<T>(i);
  return v;
}

// 2^x for x <= 128, to about one unit in the last place; exactly 0 below the normal numbers. The coefficients are the
// polynomial of least relative error (2e-9 and 3e-18) on [-1/2, 1/2], with the constant set to 1.
template <typename T>
inline Vector<T> exp2(Vector<T> x) {
  using Format = FloatFormat<T>;
  const Vector<T> least = splat(-static_cast<T>(Format::kBias));
  x = x < least ? least : x;
  const Vector<T> shifted = x + Format::kRounder;
  const Vector<T> f = x - (shifted - Format::kRounder);
  Vector<T> p;
  if constexpr (sizeof(T) == sizeof(float)) {
    p = splat(0.00015345812161311629759f);
    p = multiply_add(p, f, splat(0.0013399931177239737967f));
    p = multiply_add(p, f, splat(0.0096184889563311816196f));
    p = multiply_add(p, f, splat(0.05550328777105324799f));
    p = multiply_add(p, f, splat(0.24022646890645520696f));
    p = multiply_add(p, f, splat(0.69314720573719575134f));
    p = multiply_add(p, f, splat(1.0f));
  } else {
    p = splat(4.4352827069572771511e-10);
    p = multiply_add(p, f, splat(7.0741056135081427963e-9));
    p = multiply_add(p, f, splat(1.0178198021671930844e-7));
    p = multiply_add(p, f, splat(1.321543308967639918e-6));
    p = multiply_add(p, f, splat(0.000015252733489988525649));
    p = multiply_add(p, f, splat(0.00015403530462514432062));
    p = multiply_add(p, f, splat(0.0013333558146789911722));
    p = multiply_add(p, f, splat(0.0096181291075883352443));
    p = multiply_add(p, f, splat(0.055504108664819921605));
    p = multiply_add(p, f, splat(0.24022650695910156204));
    p = multiply_add(p, f, splat(0.69314718055994533046));
    p = multiply_add(p, f, splat(1.0));
  }
  const BitVector<T> exponent = load<BitVector<T>>(&shifted);
  const BitVector<T> power = (exponent + Format::kBias) << Format::kMantissa;
  return p * load<Vector<T>>(&power);
}

template <typename T>
constexpr T kLog2E = static_cast<T>(1.4426950408889634074);
// x log2(e), the score whose power of two gives the attention: from a product of a query and a key, the edge, and a
// row's factor (log2(e) included). Both directions and both operators use this function, so that the backward's scores
// are the forward's, bit by bit, and the largest equals the row's maximum.
template <typename T>
inline Vector<T> score(T whole_scale, Vector<T> product, Vector<T> edge) {
  return whole_scale * product * edge;
}

template <typename T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

template <typename T>
inline bool is_finite(T x) {
  return x - x == static_cast<T>(0);
}

}  // namespace
}  // namespace ecore
