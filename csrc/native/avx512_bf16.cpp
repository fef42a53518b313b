// As avx512, with the instruction that multiplies pairs of bfloat16 and adds them to float32.
#include "kernels.h"

#if defined(COMPILES_AVX512_BF16)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#endif

namespace corrsteer {
namespace in_avx512_bf16 {
constexpr int LANES = 16, VECTORS = 3, MR = 8, WIDENING_MR = 8;
#define BF16_DOT(sum, w, x) F32(_mm512_dpbf16_ps(__m512(sum), (__m512bh)(w), (__m512bh)(x)))
#define NONZERO_LANES(v) uint32_t(_mm512_cmp_ps_mask(__m512(v), _mm512_setzero_ps(), _CMP_NEQ_UQ))
#include "kernels.inc"
}  // namespace in_avx512_bf16

const Kernels avx512_bf16 = in_avx512_bf16::kernels("avx512_bf16");
}  // namespace corrsteer

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
