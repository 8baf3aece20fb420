#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define AP_SCALAR
#define AP_LANES 8
#define AP_NAME "scalar"
#define AP_KERNELS kScalarKernels
#include "isa.inc"
