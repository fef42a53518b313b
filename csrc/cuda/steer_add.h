// steer_add on a GPU: its arguments, and the functions that nvcc compiles.
#pragma once

#include <cstdint>

namespace corrsteer {

enum class Dtype { float32, float16, bfloat16 };

// h: [B, S, d] of a Dtype; vectors: [V, d] float32; row_vector: [B] int32; positions: [B, S] bool, or null for all.
// Strides are in elements.
struct SteerAddArgs {
    int64_t B, S, d, V;
    void* h;
    int64_t h_stride_b, h_stride_s, h_stride_d;
    const float* vectors;
    int64_t vectors_stride_v, vectors_stride_d;
    const int32_t* row_vector;
    int64_t row_vector_stride_b;
    const bool* positions;
    int64_t positions_stride_b, positions_stride_s;
};

// Launch on a stream of the current device; null, or CUDA's error message. It neither synchronises nor allocates, so
// that a CUDA graph can capture it.
const char* launch(const SteerAddArgs&, Dtype, void* stream);

// CUDA's error message if nothing can be launched on this machine; null if it can.
const char* problem();

}  // namespace corrsteer
