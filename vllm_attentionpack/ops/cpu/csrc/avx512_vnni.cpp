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
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif

#define AP_AVX512_VNNI
#define AP_LANES 16
#define AP_NAME "avx512_vnni"
#define AP_KERNELS kAvx512VnniKernels
#include "isa.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
