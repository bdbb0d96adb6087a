#define ECORE_SIMD_BYTES 32
#define ECORE_SIMD_NAME "avx2"
#define ECORE_SIMD_TABLE kSimdAvx2
#include "table.h"
