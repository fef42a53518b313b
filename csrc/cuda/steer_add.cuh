// The kernel of steer_add: a thread adds a few neighbouring dimensions of one row's vector at one position.
//
// Nothing here is CUDA's own but the types of numbers and the names of built-in variables, so that a test can run it
// on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "steer_add.h"

namespace corrsteer {

__device__ inline float as_float(float value) { return value; }
__device__ inline float as_float(__half value) { return __half2float(value); }
__device__ inline float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ inline T rounded(float value);
template <>
__device__ inline float rounded<float>(float value) { return value; }
template <>
__device__ inline __half rounded<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
    T value[N];
};

// A block is one row at one position, blockIdx.x = b * S + s, and N * blockDim.x of its dimensions. N > 1 needs
// dimensions that follow each other, a d that is a multiple of N, and rows at addresses that are multiples of a pack.
template <class T, int N>
__global__ void steer_add_kernel(const Steering a) {
    const uint32_t S = uint32_t(a.S);  // 64-bit division would take longer than everything else
    const int64_t b = blockIdx.x / S, s = blockIdx.x % S;
    const int64_t i = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N;
    if (i >= a.d || (a.positions && !a.positions[b * a.positions_row + s * a.positions_position])) return;
    const int32_t which = a.row_vector[b * a.row_vector_row];
    if (which < 0 || which >= a.V) return;  // on a GPU nobody has checked it
    T* h = static_cast<T*>(a.h) + b * a.h_row + s * a.h_position + i * a.h_dimension;
    const float* vector = a.vectors + which * a.vectors_row + i * a.vectors_dimension;
    Pack<T, N> sum = *reinterpret_cast<Pack<T, N>*>(h);
    constexpr int M = N < 4 ? N : 4;  // float32 numbers in 16 bytes
    for (int at = 0; at < N; at += M) {
        const Pack<float, M> added = *reinterpret_cast<const Pack<float, M>*>(vector + at);
        for (int n = 0; n < M; n++) sum.value[at + n] = rounded<T>(as_float(sum.value[at + n]) + added.value[n]);
    }
    *reinterpret_cast<Pack<T, N>*>(h) = sum;
}

// How many dimensions of T a thread takes: as many as 16 bytes hold where all rows allow it, or 1.
template <class T>
int pack_of(const Steering& a) {
    constexpr int N = 16 / sizeof(T);
    const int64_t begins = int64_t(reinterpret_cast<uintptr_t>(a.h)) | ((a.h_row | a.h_position) * int64_t(sizeof(T))) |
                           int64_t(reinterpret_cast<uintptr_t>(a.vectors)) | (a.vectors_row * 4);
    return a.h_dimension == 1 && a.vectors_dimension == 1 && a.d % N == 0 && begins % 16 == 0 ? N : 1;
}

constexpr int THREADS = 128;

// Blocks in each direction, where threads take N dimensions each.
struct Blocks {
    unsigned x, y;
};

inline Blocks blocks_of(const Steering& a, int N) {
    const int64_t threads = (a.d + N - 1) / N;
    return {unsigned(a.B * a.S), unsigned((threads + THREADS - 1) / THREADS)};
}

}  // namespace corrsteer
