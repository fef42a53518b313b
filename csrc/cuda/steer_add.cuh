// The kernel of steer_add: a thread adds a few neighbouring dimensions of one row's vector at one position.
//
// Nothing here is CUDA's own but the floating-point types and the names of built-in variables, so that a test can run
// it on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "steer_add.h"

namespace corrsteer {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ inline T round_to(float value);
template <>
__device__ inline float round_to<float>(float value) { return value; }
template <>
__device__ inline __half round_to<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ inline __nv_bfloat16 round_to<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }

// Elements that one instruction loads or stores.
template <class T, int WIDTH>
struct alignas(sizeof(T) * WIDTH) AlignedVector {
    T value[WIDTH];
};

constexpr int ACCESS = 16;  // bytes, the widest access of a thread
template <class T>
constexpr int MAX_WIDTH = ACCESS / sizeof(T);

// A block is one row at one position, blockIdx.x = b * S + s, and WIDTH * blockDim.x of its dimensions. WIDTH > 1 needs
// contiguous dimensions, a d that is a multiple of it, and rows that are aligned to ACCESS.
template <class T, int WIDTH>
__global__ void steer_add_kernel(const SteerAddArgs args) {
    const uint32_t S = uint32_t(args.S);  // 64-bit division would take longer than everything else
    const int64_t b = blockIdx.x / S, s = blockIdx.x % S;
    const int64_t i = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * WIDTH;
    if (i >= args.d) return;
    if (args.positions && !args.positions[b * args.positions_stride_b + s * args.positions_stride_s]) return;
    const int32_t v = args.row_vector[b * args.row_vector_stride_b];
    if (v < 0 || v >= args.V) return;  // the host cannot check it without waiting for the GPU
    T* h = static_cast<T*>(args.h) + b * args.h_stride_b + s * args.h_stride_s + i * args.h_stride_d;
    const float* vector = args.vectors + v * args.vectors_stride_v + i * args.vectors_stride_d;
    auto sum = *reinterpret_cast<AlignedVector<T, WIDTH>*>(h);
    constexpr int F32_WIDTH = WIDTH < MAX_WIDTH<float> ? WIDTH : MAX_WIDTH<float>;
    for (int at = 0; at < WIDTH; at += F32_WIDTH) {
        const auto added = *reinterpret_cast<const AlignedVector<float, F32_WIDTH>*>(vector + at);
        for (int n = 0; n < F32_WIDTH; n++)
            sum.value[at + n] = round_to<T>(to_float(sum.value[at + n]) + added.value[n]);
    }
    *reinterpret_cast<AlignedVector<T, WIDTH>*>(h) = sum;
}

// How many dimensions a thread takes: MAX_WIDTH where layout and alignment allow it, or 1.
template <class T>
int vector_width(const SteerAddArgs& args) {
    const auto address = [](const void* pointer) { return int64_t(reinterpret_cast<uintptr_t>(pointer)); };
    const int64_t offsets = address(args.h) | (args.h_stride_b | args.h_stride_s) * int64_t(sizeof(T)) |
                            address(args.vectors) | args.vectors_stride_v * int64_t(sizeof(float));
    const bool contiguous = args.h_stride_d == 1 && args.vectors_stride_d == 1;
    return contiguous && args.d % MAX_WIDTH<T> == 0 && offsets % ACCESS == 0 ? MAX_WIDTH<T> : 1;
}

constexpr int THREADS = 128;  // a block

struct Grid {
    unsigned x, y;
};

inline Grid grid_of(const SteerAddArgs& args, int width) {
    const int64_t threads = (args.d + width - 1) / width;
    return {unsigned(args.B * args.S), unsigned((threads + THREADS - 1) / THREADS)};
}

}  // namespace corrsteer
