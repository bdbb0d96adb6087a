// Philox of many counters at once (philox.h says which numbers). Included only by the kernels; see vectors.h.
#pragma once

#include <utility>

#include "../philox.h"
#include "vectors.h"

namespace ecore {
namespace {

// A word in the low half of each lane; the high half is ignored.
using RandomWords = BitVector<double>;
constexpr int64_t kRandomWords = kLanes<double>;
constexpr int kVectorsDrawn = 4;  // under way at a time: a product takes several cycles
constexpr int64_t kDrawn = kVectorsDrawn * kRandomWords;

// 64-bit products of words.
inline RandomWords multiply_words(RandomWords a, uint32_t b) {
#if defined(__AVX512F__) && ECORE_SIMD_BYTES == 64
  return (RandomWords)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, _mm512_set1_epi64(b));  // unmasked, GCC 12 warns
#elif defined(__AVX2__) && ECORE_SIMD_BYTES == 32
  return (RandomWords)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__aarch64__) && ECORE_SIMD_BYTES == 16
  return (RandomWords)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(b));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

// The four words of kVectors * kRandomWords counters (c0[i], c1, c2, c3).
template <int kVectors>
struct Drawn {
  RandomWords word[4][kVectors];

  Drawn(uint64_t seed, const uint32_t* c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    using Narrow = typename VectorOf<uint32_t, kRandomWords>::Type;
    for (int v = 0; v < kVectors; ++v) {
      word[0][v] = __builtin_convertvector(load<Narrow>(c0 + v * kRandomWords), RandomWords);
      word[1][v] = RandomWords{} + c1;
      word[2][v] = RandomWords{} + c2;
      word[3][v] = RandomWords{} + c3;
    }
    PhiloxKey key(seed);
    for (int round = 0; round < kPhiloxRounds; ++round, key.next()) {
      for (int v = 0; v < kVectors; ++v) {
        const RandomWords product = multiply_words(word[0][v], kPhiloxFirst),
                          other = multiply_words(word[2][v], kPhiloxSecond);
        word[0][v] = (other >> 32) ^ word[1][v] ^ (RandomWords{} + key.k0);
        word[1][v] = other;
        word[2][v] = (product >> 32) ^ word[3][v] ^ (RandomWords{} + key.k1);
        word[3][v] = product;
      }
    }
  }
};

// The first `kOut` words of kDrawn counters (c0[i], c1, c2, c3): out[w][i].
template <int kOut>
inline void draw_words(uint64_t seed, const uint32_t* c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t* const* out) {
  using Narrow = typename VectorOf<uint32_t, kRandomWords>::Type;
  const Drawn<kVectorsDrawn> drawn(seed, c0, c1, c2, c3);
  for (int w = 0; w < kOut; ++w) {
    for (int v = 0; v < kVectorsDrawn; ++v) {
      store(out[w] + v * kRandomWords, __builtin_convertvector(drawn.word[w][v], Narrow));
    }
  }
}

// a[0], b[0], a[1], b[1], ... from lane kFirst on.
template <int kFirst, int... kLane>
inline RandomWords interleaved(RandomWords a, RandomWords b, std::integer_sequence<int, kLane...>) {
  return shuffled<(kFirst + kLane / 2 + kLane % 2 * static_cast<int>(kRandomWords))...>(a, b);
}

// All words of counters (first + i, c1, c2, c3), one counter's after the other's: out[4 * i + w].
template <int kVectors>
inline void draw_in_order(uint64_t seed, uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t* out) {
  using Lanes = std::make_integer_sequence<int, static_cast<int>(kRandomWords)>;
  constexpr int kHalf = static_cast<int>(kRandomWords / 2);
  uint32_t c0[kVectors * kRandomWords];
  for (int i = 0; i < kVectors * static_cast<int>(kRandomWords); ++i) c0[i] = first + static_cast<uint32_t>(i);
  const Drawn<kVectors> drawn(seed, c0, c1, c2, c3);
  for (int v = 0; v < kVectors; ++v, out += 4 * kRandomWords) {
    // Two words a lane.
    const RandomWords front = (drawn.word[0][v] & 0xFFFFFFFFu) | (drawn.word[1][v] << 32);
    const RandomWords back = (drawn.word[2][v] & 0xFFFFFFFFu) | (drawn.word[3][v] << 32);
    store(out, interleaved<0>(front, back, Lanes()));
    store(out + 2 * kRandomWords, interleaved<kHalf>(front, back, Lanes()));
  }
}

}  // namespace
}  // namespace ecore
