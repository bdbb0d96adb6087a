#define ECORE_SIMD_BYTES 64
#define ECORE_SIMD_NAME "avx512"
#define ECORE_SIMD_TABLE kSimdAvx512
#include "table.h"
