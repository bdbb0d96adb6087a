// Products of few rows with weights of few bits, or as they are, for quantized_linear_cpu.h. Included only by table.h;
// see vectors.h.
//
// A step is as many inputs as one instruction takes. The last step of a row overlaps the one before it, so that nothing
// beyond a row is read: its copy of the activations is 0 for inputs that the step before has taken.
#pragma once

#include "kernels.h"
#include "vectors.h"

#if defined(__SSE2__) && !defined(__FMA__)
#include <emmintrin.h>
#endif

namespace ecore {
namespace {

constexpr int64_t kPackedHead = 64;  // bytes before a packed row, for the factor on its products

// int8 times int16, to which activations are rounded: products and their 32-bit sums are exact, and an instruction has
// twice as many of them as of floats.
#if defined(__AVX2__)
using Words = __m256i;
constexpr int64_t kWords = 16;
inline Words weight_words(const int8_t* from) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Words add_products(Words sums, Words weights, Words x) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(weights, x));
}
#elif defined(__SSE2__)
using Words = __m128i;
constexpr int64_t kWords = 8;
inline Words weight_words(const int8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
}
inline Words add_products(Words sums, Words weights, Words x) {
  return _mm_add_epi32(sums, _mm_madd_epi16(weights, x));
}
#else
typedef int16_t Words __attribute__((vector_size(16)));
constexpr int64_t kWords = 8;
inline Words weight_words(const int8_t* from) {
  typedef int8_t Bytes __attribute__((vector_size(8)));
  return __builtin_convertvector(load<Bytes>(from), Words);
}
#endif

#if defined(__SSE2__)
using WordSums = Words;
#else
typedef int32_t WordSums __attribute__((vector_size(32)));
inline WordSums add_products(WordSums sums, Words weights, Words x) {
  return sums + __builtin_convertvector(weights, WordSums) * __builtin_convertvector(x, WordSums);
}
#endif

// The sum of all, in 64 bits: 32 bits hold only one lane's share.
#if defined(__SSE2__)
inline int64_t sum_of(Words sums) {
#if defined(__AVX2__)
  const __m256i wide = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(sums)),
                                        _mm256_cvtepi32_epi64(_mm256_extracti128_si256(sums, 1)));
  const __m128i pair = _mm_add_epi64(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
#else
  const __m128i sign = _mm_cmpgt_epi32(_mm_setzero_si128(), sums);
  const __m128i pair = _mm_add_epi64(_mm_unpacklo_epi32(sums, sign), _mm_unpackhi_epi32(sums, sign));
#endif
  const __m128i total = _mm_add_epi64(pair, _mm_unpackhi_epi64(pair, pair));
  int64_t value;
  _mm_storel_epi64(reinterpret_cast<__m128i*>(&value), total);
  return value;
}
#else
inline int64_t sum_of(WordSums sums) {
  int64_t total = 0;
  for (int64_t i = 0; i < kWords; ++i) total += sums[i];
  return total;
}
#endif

// How weights of one type are multiplied.
template <typename W>
struct WeightProduct;

template <>
struct WeightProduct<int8_t> {
  using Packed = int16_t;
  using Loaded = Words;
  using Sums = WordSums;
  static constexpr int64_t kStep = kWords;
  static constexpr int64_t kMostInputs = 2048;  // that 32 bits can sum: a pair of products is at most 2 * 128 * 32767

  static Loaded weights(const int8_t* from) { return weight_words(from); }
  static void add(Sums* sums, const Loaded& w, const Packed* x) { *sums = add_products(*sums, w, load<Words>(x)); }
  static float total(Sums sums) { return static_cast<float>(sum_of(sums)); }

  // Rounds a row to steps of 1/32767 of its largest number. If a row is not finite, all its products are NaN.
  static float prepare(const float* x, int64_t inputs, float* inverse) {
    float most = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < inputs; ++i) {
      const float size = __builtin_fabsf(x[i]);
      most = size > most ? size : most;
      finite &= is_finite(x[i]);
    }
    const float step = most / 32767.0f;
    *inverse = step > 1e-35f && finite ? 1.0f / step : 0.0f;  // for smaller numbers the inverse is infinite
    return finite ? step : __builtin_nanf("");
  }
  static Packed packed(float x, float inverse) {
    // Adding it rounds to an integer; subtracting it again leaves the integer.
    return static_cast<Packed>((x * inverse + FloatFormat<float>::kRounder) - FloatFormat<float>::kRounder);
  }
  static void place(Packed* step, int64_t i, Packed value) { step[i] = value; }
};

template <>
struct WeightProduct<uint16_t> {  // the bits of a bfloat16, the upper half of a float's
  using Packed = float;
  struct Loaded {
    Vector<float> even, odd;
  };
  using Sums = Vector<float>;
  static constexpr int64_t kStep = 2 * kLanes<float>;
  static constexpr int64_t kMostInputs = int64_t{1} << 40;

  static Loaded weights(const uint16_t* from) {
    const BitVector<float> pairs = load<BitVector<float>>(from);
    const BitVector<float> even = pairs << 16, odd = pairs & 0xffff0000u;
    return {load<Vector<float>>(&even), load<Vector<float>>(&odd)};
  }
  static void add(Sums* sums, const Loaded& w, const Packed* x) {
    *sums = multiply_add(w.even, load<Vector<float>>(x), *sums);
    *sums = multiply_add(w.odd, load<Vector<float>>(x + kLanes<float>), *sums);
  }
  static float total(Sums sums) { return sum<float>(sums); }

  static float prepare(const float*, int64_t, float* inverse) { return *inverse = 1.0f; }
  static Packed packed(float x, float) { return x; }
  static void place(Packed* step, int64_t i, Packed value) { step[i / 2 + i % 2 * kLanes<float>] = value; }
};

template <>
struct WeightProduct<float> {  // the weights as they are
  using Packed = float;
  using Loaded = Vector<float>;
  using Sums = Vector<float>;
  static constexpr int64_t kStep = kLanes<float>;
  static constexpr int64_t kMostInputs = int64_t{1} << 40;

  static Loaded weights(const float* from) { return load<Loaded>(from); }
  static void add(Sums* sums, const Loaded& w, const Packed* x) { *sums = multiply_add(w, load<Loaded>(x), *sums); }
  static float total(Sums sums) { return sum<float>(sums); }

  static float prepare(const float*, int64_t, float* inverse) { return *inverse = 1.0f; }
  static Packed packed(float x, float) { return x; }
  static void place(Packed* step, int64_t i, Packed value) { step[i] = value; }
};

template <typename W>
int64_t packed_row_bytes(int64_t inputs) {
  using P = WeightProduct<W>;
  const int64_t steps = (inputs + P::kStep - 1) / P::kStep;
  return kPackedHead + rounded_up(steps * P::kStep * static_cast<int64_t>(sizeof(typename P::Packed)), 64);
}

template <typename W>
void pack_row(const float* x, int64_t inputs, char* packed) {
  using P = WeightProduct<W>;
  float inverse;
  const float step = P::prepare(x, inputs, &inverse);
  __builtin_memcpy(packed, &step, sizeof step);
  auto* const to = reinterpret_cast<typename P::Packed*>(packed + kPackedHead);
  const int64_t whole = inputs / P::kStep * P::kStep;
  for (int64_t at = 0; at < whole; at += P::kStep) {
    for (int64_t i = 0; i < P::kStep; ++i) P::place(to + at, i, P::packed(x[at + i], inverse));
  }
  if (whole == inputs) return;
  for (int64_t i = 0; i < P::kStep; ++i) {
    const int64_t at = inputs - P::kStep + i;
    P::place(to + whole, i, at < whole ? typename P::Packed{} : P::packed(x[at], inverse));
  }
}

// kOutputs outputs of kRows rows.
template <typename W, int kOutputs, int kRows>
inline void multiply_block(const QuantizedLayer<W>& layer, int64_t first, const char* packed, int64_t row_bytes,
                           float* out, int64_t out_stride) {
  using P = WeightProduct<W>;
  const int64_t inputs = layer.inputs, whole = inputs / P::kStep * P::kStep;
  const W* weights[kOutputs];
  W padded[kOutputs][P::kStep];
  for (int j = 0; j < kOutputs; ++j) {
    weights[j] = layer.weight + (first + j) * layer.weight_stride;
    if (inputs < P::kStep) {
      for (int64_t i = 0; i < P::kStep - inputs; ++i) padded[j][i] = 0;
      for (int64_t i = 0; i < inputs; ++i) padded[j][P::kStep - inputs + i] = weights[j][i];
      weights[j] = padded[j] + P::kStep - inputs;
    }
  }
  const typename P::Packed* x[kRows];
  for (int r = 0; r < kRows; ++r) {
    x[r] = reinterpret_cast<const typename P::Packed*>(packed + r * row_bytes + kPackedHead);
  }
  float totals[kOutputs][kRows] = {};
  for (int64_t begin = 0; begin < inputs; begin += P::kMostInputs) {
    typename P::Sums sums[kOutputs][kRows] = {};
    const auto step = [&](int64_t of_weights, int64_t of_x) {
      typename P::Loaded loaded[kOutputs];
      for (int j = 0; j < kOutputs; ++j) loaded[j] = P::weights(weights[j] + of_weights);
      for (int r = 0; r < kRows; ++r) {
        for (int j = 0; j < kOutputs; ++j) P::add(&sums[j][r], loaded[j], x[r] + of_x);
      }
    };
    const int64_t end = smaller_of(begin + P::kMostInputs, whole);
    for (int64_t i = begin; i < end; i += P::kStep) step(i, i);
    if (begin + P::kMostInputs >= inputs && whole < inputs) step(inputs - P::kStep, whole);
    for (int j = 0; j < kOutputs; ++j) {
      for (int r = 0; r < kRows; ++r) totals[j][r] += P::total(sums[j][r]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float factor;
    __builtin_memcpy(&factor, packed + r * row_bytes, sizeof factor);
    for (int j = 0; j < kOutputs; ++j) {
      const float scale = layer.scale == nullptr ? factor : layer.scale[first + j] * factor;
      const float bias = layer.bias == nullptr ? 0.0f : layer.bias[first + j];
      out[r * out_stride + j] = totals[j][r] * scale + bias;
    }
  }
}

template <typename W, int kOutputs, int kRows>
void multiply_outputs(const QuantizedLayer<W>& layer, int64_t begin, int64_t end, const char* packed, int64_t row_bytes,
                      float* out, int64_t out_stride) {
  int64_t j = begin;
  for (; j + kOutputs <= end; j += kOutputs) {
    multiply_block<W, kOutputs, kRows>(layer, j, packed, row_bytes, out + (j - begin), out_stride);
  }
  for (; j < end; ++j) multiply_block<W, 1, kRows>(layer, j, packed, row_bytes, out + (j - begin), out_stride);
}

template <typename W>
void multiply_rows(const QuantizedLayer<W>& layer, int64_t begin, int64_t end, const char* packed, int64_t rows,
                   float* out, int64_t out_stride) {
  const int64_t row_bytes = packed_row_bytes<W>(layer.inputs);
  int64_t r = 0;
  const auto next = [&](auto multiply, int64_t count) {
    multiply(layer, begin, end, packed + r * row_bytes, row_bytes, out + r * out_stride, out_stride);
    r += count;
  };
  while (r + 4 <= rows) next(multiply_outputs<W, 2, 4>, 4);
  if (r + 2 <= rows) next(multiply_outputs<W, 4, 2>, 2);
  if (r < rows) next(multiply_outputs<W, 4, 1>, 1);
}

// The place of the first of the largest of `values`, and that value; NaN if one is NaN or infinity.
inline int64_t largest_of(const float* values, int64_t count, float* most) {
  using V = Vector<float>;
  V largest = splat(-kInfinity<float>);
  auto usable = largest < kInfinity<float>;
  int64_t i = 0;
  for (; i + kLanes<float> <= count; i += kLanes<float>) {
    const V v = load<V>(values + i);
    usable &= v < kInfinity<float>;
    largest = larger<float>(v, largest);
  }
  float highest = maximum<float>(largest);
  bool all = true;
  for (int lane = 0; lane < kLanes<float>; ++lane) all &= usable[lane] != 0;
  for (; i < count; ++i) {
    all &= values[i] < kInfinity<float>;
    highest = values[i] > highest ? values[i] : highest;
  }
  *most = all ? highest : __builtin_nanf("");
  if (!all) return 0;
  i = 0;
  while (i < count && values[i] != highest) ++i;
  return i;
}

template <typename W>
constexpr QuantizedLinearKernels<W> quantized_linear_kernels() {
  return {packed_row_bytes<W>, pack_row<W>, multiply_rows<W>, largest_of};
}

}  // namespace
}  // namespace ecore
