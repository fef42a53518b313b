// Thirty-two registers of sixteen float32: twenty-four accumulators.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

namespace corrsteer {
namespace in_avx512 {
constexpr int LANES = 16, VECTORS = 3, MR = 8, WIDENING_MR = 8;
#define NONZERO_LANES(v) uint32_t(_mm512_cmp_ps_mask(__m512(v), _mm512_setzero_ps(), _CMP_NEQ_UQ))
#include "kernels.inc"
}  // namespace in_avx512

const Kernels avx512 = in_avx512::kernels("avx512");
}  // namespace corrsteer

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
