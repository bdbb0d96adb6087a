// The choice among instruction sets, at run time.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace ecore {

// The kernels in use: the widest that the machine has, or the one that the environment variable ECORE_KERNELS_SIMD
// named at the first call. Throws std::invalid_argument if that is unknown or impossible here.
const Simd& simd();

// The instruction sets that this machine can run, narrowest first.
std::vector<std::string> simd_available();

}  // namespace ecore
