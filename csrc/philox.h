// Philox 4x32-10: random words from a 64-bit seed and a counter of four words (Salmon et al., SC 2011). The same bits
// as ecore_kernels/philox.py and Triton's tl.philox.
//
// In an unnamed namespace: every instruction set has its own copy. simd/philox_vectors.h draws for many counters at
// once.
#pragma once

#include <cstdint>

namespace ecore {
namespace {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxFirst = 0xD2511F53, kPhiloxSecond = 0xCD9E8D57;  // factors

// The key of a round; the first one is the seed, its low word first.
struct PhiloxKey {
  uint32_t k0, k1;

  explicit PhiloxKey(uint64_t seed) : k0(static_cast<uint32_t>(seed)), k1(static_cast<uint32_t>(seed >> 32)) {}
  void next() {
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
};

[[maybe_unused]] inline void philox_round(const PhiloxKey& key, uint32_t& c0, uint32_t& c1, uint32_t& c2,
                                          uint32_t& c3) {
  const uint64_t product = uint64_t{kPhiloxFirst} * c0, other = uint64_t{kPhiloxSecond} * c2;
  c0 = static_cast<uint32_t>(other >> 32) ^ c1 ^ key.k0;
  c1 = static_cast<uint32_t>(other);
  c2 = static_cast<uint32_t>(product >> 32) ^ c3 ^ key.k1;
  c3 = static_cast<uint32_t>(product);
}

struct PhiloxWords {
  uint32_t word[4];
};

// The four words of a counter.
[[maybe_unused]] inline PhiloxWords philox_words(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  PhiloxKey key(seed);
  for (int round = 0; round < kPhiloxRounds; ++round, key.next()) philox_round(key, c0, c1, c2, c3);
  return {{c0, c1, c2, c3}};
}

// The first word of a counter.
[[maybe_unused]] inline uint32_t philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  return philox_words(seed, c0, c1, c2, c3).word[0];
}

}  // namespace
}  // namespace ecore
