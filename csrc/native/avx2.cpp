// Sixteen registers of eight float32: twelve accumulators, three of weights, one of x.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace corrsteer {
namespace in_avx2 {
constexpr int LANES = 8, VECTORS = 3, MR = 4, WIDENING_MR = 3;
#define NONZERO_LANES(v) uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(__m256(v), _mm256_setzero_ps(), _CMP_NEQ_UQ)))
#include "kernels.inc"
}  // namespace in_avx2

const Kernels avx2 = in_avx2::kernels("avx2");
}  // namespace corrsteer

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
