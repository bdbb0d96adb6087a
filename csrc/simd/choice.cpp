#include "choice.h"

#include <cstdlib>
#include <stdexcept>

namespace ecore {
namespace {

// The instruction sets that this machine can run, narrowest first.
std::vector<const Simd*> runnable() {
  std::vector<const Simd*> sets = {&kSimdBaseline};
#ifdef ECORE_WITH_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&kSimdAvx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    sets.push_back(&kSimdAvx512);
  }
#endif
  return sets;
}

const Simd& chosen() {
  const std::vector<const Simd*> sets = runnable();
  const char* const named = std::getenv("ECORE_KERNELS_SIMD");
  if (named == nullptr || *named == '\0') return *sets.back();
  std::string names;
  for (const Simd* set : sets) {
    if (std::string(named) == set->name) return *set;
    names += (names.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::invalid_argument("ECORE_KERNELS_SIMD: expected one of " + names + " (what this machine can run), got '" +
                              named + "'");
}

}  // namespace

const Simd& simd() {
  static const Simd& set = chosen();
  return set;
}

std::vector<std::string> simd_available() {
  std::vector<std::string> names;
  for (const Simd* set : runnable()) names.emplace_back(set->name);
  return names;
}

}  // namespace ecore
