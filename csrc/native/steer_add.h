// Adding steering vectors to residuals, in place.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace corrsteer {

// A tensor of up to three dimensions; strides are in elements.
struct Strided {
    void* data;
    Dtype dtype;
    int64_t shape[3] = {1, 1, 1}, stride[3] = {};

    template <class T>
    T* at(int64_t i, int64_t j = 0) const {
        return static_cast<T*>(data) + i * stride[0] + j * stride[1];
    }
};

// Add vectors[row_vector[b]] to h[b, s] where positions[b, s] (everywhere where that is null); a row of -1 is left
// alone. h: [B, S, d]; vectors: [V, d] float32; row_vector: [B] int32, -1..V-1; positions: [B, S] bool.
void steer_add(const Strided& h, const Strided& vectors, const Strided& row_vector, const Strided* positions);

}  // namespace corrsteer
