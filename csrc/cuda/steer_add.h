// steer_add on a GPU: its arguments, and what may be called of the code that nvcc compiles.
#pragma once

#include <cstdint>

namespace corrsteer {

// h: [B, S, d] of numbers; vectors: [V, d] float32; row_vector: [B] int32; positions: [B, S] bool, or null for all.
// Strides are in numbers.
struct Steering {
    void* h;
    const float* vectors;
    const int32_t* row_vector;
    const bool* positions;
    int64_t B, S, d, V;
    int64_t h_row, h_position, h_dimension, vectors_row, vectors_dimension, row_vector_row;
    int64_t positions_row, positions_position;
};

enum class Number { float32, float16, bfloat16 };

// Launch on a stream of the current device; null, or what is wrong in CUDA's words. It neither waits nor allocates, so
// that it can be captured in a graph.
const char* launch(const Steering&, Number, void* stream);

// Why nothing can be launched on this machine, in CUDA's words; null if it can.
const char* problem();

}  // namespace corrsteer
