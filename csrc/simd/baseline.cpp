#define ECORE_SIMD_BYTES 16
#define ECORE_SIMD_NAME "baseline"
#define ECORE_SIMD_TABLE kSimdBaseline
#include "table.h"
