#if defined(__x86_64__)
// Standard headers first: their functions must not be compiled for this instruction set.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define AP_AVX2
#define AP_LANES 8
#define AP_NAME "avx2"
#define AP_KERNELS kAvx2Kernels
#include "isa.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
